"""What PPO needs beyond GRPO: values before the token, their metrics, rewards of a model, weights parted."""

import dataclasses
from pathlib import Path

import pytest
import torch

from nanopost.data.chat import Chat, copy_chat
from nanopost.data.schema import Record, Sample
from nanopost.evals.ppo import (
    completion_values,
    contexts,
    critic_metrics,
    load_critic,
    load_pair,
    load_scorer,
    parted,
    rescored,
    together,
)
from nanopost.models.heads import ScoreModel, load_score_model, save_score_model
from nanopost.models.lora_model import Adapter, add_adapter
from nanopost.models.peft import save_adapter
from nanopost.models.trainable import LoRA
from nanopost.models.weights import load_model
from nanopost.rewards.verdict import Unverified, Verdict
from nanopost.rollout.types import Rollout
from tests.chat_fixtures import make_chat
from tests.tiny import TINY, hub_folder


@pytest.fixture
def critic() -> ScoreModel:
    torch.manual_seed(0)
    model = ScoreModel(TINY).double()
    torch.nn.init.normal_(model.score.weight)
    return model


def sample_of(prompt: int, completion: int) -> Sample:
    ids = torch.randint(23, (prompt + completion,), generator=torch.Generator().manual_seed(prompt))
    return Sample(tuple(ids.tolist()), (False,) * prompt + (True,) * completion)


def test_a_value_is_read_before_its_token_and_padding_changes_nothing(critic):
    samples = [sample_of(3, 2), sample_of(1, 9), sample_of(5, 1), sample_of(2, 4)]
    for micro_batch in (1, 2, 4):
        values = completion_values(critic, samples, micro_batch=micro_batch)
        for sample, value in zip(samples, values, strict=True):
            first = sample.mask.index(True)
            alone = critic(torch.tensor([sample.ids]))[0, :, 0]
            torch.testing.assert_close(value, alone[first - 1 : -1], rtol=0, atol=1e-12)
    changed = dataclasses.replace(samples[0], ids=(*samples[0].ids[:-1], 22 - samples[0].ids[-1]))
    before, after = (completion_values(critic, [sample])[0] for sample in (samples[0], changed))
    assert torch.equal(before, after)  # the last token is chosen after the last value is read


def test_critic_metrics_by_hand():
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    returns = [torch.tensor([1.0, 4.0]), torch.tensor([4.0])]
    told = critic_metrics(values, returns)
    assert told["value_loss"] == pytest.approx(0.5 * (0 + 4 + 1) / 3)
    assert told["explained_variance"] == pytest.approx(1 - (2 / 3) / 2)  # errors 0, 2, 1; returns 1, 4, 4
    assert critic_metrics(returns, returns) == {"value_loss": 0.0, "explained_variance": 1.0}
    assert critic_metrics([torch.zeros(3)], [torch.ones(3)]) == {"value_loss": 0.5, "explained_variance": 0.0}


def test_what_a_critic_starts_from(tmp_path):
    folder = hub_folder(tmp_path / "hub")
    chat = make_chat(tmp_path / "chat")
    policy, critic = load_pair(folder, None, chat, LoRA(), seed=0)
    ids = torch.tensor([[3, 1, 4]])
    assert torch.equal(policy.model.rows(ids)[0], critic.model.rows(ids)[0])
    assert policy.model is not critic.model and not critic.values(ids).any()
    policy, critic = load_pair(folder, "shared", chat, LoRA(), seed=0)
    assert policy is critic and not critic.values(ids).any()
    with pytest.raises(
        ValueError, match=r"header: its tokenizer is not that of .*chat, so it would read other"
    ):
        load_critic(make_chat(tmp_path / "header", "header").folder, chat)


def test_a_critics_folder_keeps_its_values_beside_a_policys_adapter(tmp_path):
    """The policy goes on with its adapter; the critic starts as its folder, with a new one of its own."""
    folder, chat, ids = hub_folder(tmp_path / "hub"), make_chat(tmp_path / "chat"), torch.tensor([[3, 1, 4]])
    trained = add_adapter(load_model(folder), Adapter(2, 4.0), seed=0)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    save_adapter(trained, trained.state_dict(), tmp_path / "adapter", base=folder)
    scorer = load_score_model(folder)
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(2))
    copy_chat(folder, tmp_path / "critic")
    save_score_model(scorer.config, scorer.state_dict(), tmp_path / "critic", stop_ids=(1,), labels=["value"])
    flags = LoRA(lora_from=tmp_path / "adapter")
    policy, critic = load_pair(folder, tmp_path / "critic", chat, flags, seed=0)
    assert torch.equal(critic.values(ids), scorer.values(ids)) and torch.equal(policy(ids), trained(ids))
    assert [p for p in critic.parameters() if p.requires_grad and p.ndim == 2]


def scorer_folder(folder: Path, chat: Chat) -> Path:
    """A reward model of the tiny shape."""
    model = ScoreModel(TINY)
    torch.nn.init.ones_(model.score.weight)
    copy_chat(chat.folder, folder)
    save_score_model(TINY, model.state_dict(), folder, stop_ids=chat.stop_ids, labels=["good"])
    return folder


def test_a_reward_model_has_a_score(tmp_path):
    chat, folder = make_chat(tmp_path / "chat"), hub_folder(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"hub: no tensor score\.weight: a language model has no score"):
        load_scorer(folder, chat)
    assert not load_critic(folder, chat).score.weight.any()  # a critic may start from one
    assert load_scorer(scorer_folder(tmp_path / "judge", chat), chat).score.weight.all()
    with pytest.raises(ValueError, match=r"header: its tokenizer is not that of"):
        load_scorer(make_chat(tmp_path / "header", "header").folder, chat)


def test_another_template_of_a_reward_model_is_told(tmp_path, capsys):
    chat = make_chat(tmp_path / "chat")
    folder = scorer_folder(tmp_path / "judge", chat)
    load_scorer(folder, chat)
    assert not capsys.readouterr().out
    load_scorer(folder, make_chat(tmp_path / "think", "think"))
    told = "the reward model reads the policy's chat template, which is not its own\n"
    assert capsys.readouterr().out == told


def test_contexts_are_those_of_the_folders(tmp_path):
    folders = [hub_folder(tmp_path / str(size), max_position_embeddings=size) for size in (64, 32)]
    assert contexts(folders[0], None, "shared", folders[1]) == [64, 32] and contexts(None, "shared") == []


@pytest.mark.parametrize("start", [None, "shared"])
def test_weights_part_into_a_policy_and_a_critic(tmp_path, start):
    folder = hub_folder(tmp_path / "hub")
    chat = make_chat(tmp_path / "chat")
    both = together(*load_pair(folder, start, chat, LoRA(), seed=0), beta=0.5)
    state = {name: tensor for name, tensor in both.state_dict().items()}
    if start == "shared":  # as `checkpoint.full_state` tells a tensor once, under its first name
        state = {name: tensor for name, tensor in state.items() if not name.startswith("critic.")}
    policy, critic = parted(state)
    assert policy.keys() == load_pair(folder, None, chat, LoRA(), seed=0)[0].state_dict().keys()
    assert critic.keys() == load_score_model(folder).state_dict().keys()
    assert both.state_dict()["beta"].dtype == torch.float64


def test_only_the_score_changes_when_rows_are_rescored(critic):
    record = Record(file="f", line=1, messages=(), answer="a", text=None, meta={})
    nothing = torch.zeros(1)
    rollouts = [
        Rollout((3, 1), (4,), nothing, nothing, "stop"),
        Rollout((5,), (9, 2, 6), nothing, nothing, "stop"),
    ]
    rows = [(record, r, "a", Verdict(1.0, {"right": 1.0}, "compared")) for r in rollouts]
    told = rescored(rows, critic, micro_batch=2)
    for (_, r, text, verdict), row in zip(told, rows, strict=True):
        expected = critic(torch.tensor([r.sample.ids]))[0, -1, 0].item()
        assert verdict.score == pytest.approx(expected, abs=1e-5) and verdict.score != 1.0
        assert (r, text, verdict.parts, verdict.reason) == (*row[1:3], row[3].parts, row[3].reason)
    assert rescored([], critic) == []
    missing = (record, rollouts[0], "a", Unverified("the verifier failed"))
    assert rescored([missing], critic) == [missing]
