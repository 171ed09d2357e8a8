"""Completions that are there already: scored under a model, taken from a record, written down."""

import random
from pathlib import Path

import pytest
import torch

from nanopost.data.chat import decode, prompt_ids, prompt_messages
from nanopost.data.collate import collate
from nanopost.data.schema import Sample, parse_record
from nanopost.evals.rollouts import (
    completion_logps,
    completion_scores,
    rollout_record,
    trace,
    trained_on,
    with_traces,
)
from nanopost.evals.stages import sequence_kl
from nanopost.models.heads import ScoreModel
from nanopost.models.llama import Llama
from nanopost.rewards.math import gsm8k
from nanopost.rewards.verdict import Unverified, Verdict
from nanopost.rollout.types import Rollout
from tests.chat_fixtures import make_chat
from tests.tiny import TINY, tiny_model

SCOPE = {"temperature": 0.7, "top_k": 9, "top_p": 0.9}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return tiny_model(tmp_path_factory.mktemp("model"))


def ragged_samples(count: int, seed: int = 0) -> list[Sample]:
    """Prompts and completions of unequal lengths, a gap of untrained tokens in some."""
    rng, samples = random.Random(seed), []
    for _ in range(count):
        ids = tuple(rng.randrange(TINY.vocab_size) for _ in range(rng.randint(4, 15)))
        mask = tuple(place > 1 and rng.random() < 0.7 for place in range(len(ids) - 1))
        samples.append(Sample(ids, (*mask, True)))
    return samples


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
@pytest.mark.parametrize("scope", [{}, SCOPE], ids=["plain", "truncated"])
def test_each_sample_gets_its_own_logps_in_its_own_place(model: Llama, scope: dict, micro_batch: int) -> None:
    samples = ragged_samples(7)
    found = completion_logps(model, samples, micro_batch=micro_batch, **scope)
    assert len({len(sample.ids) for sample in samples}) > 3
    for sample, logps in zip(samples, found, strict=True):
        batch = collate([sample])
        alone = model.logps(batch.input_ids, batch.target_ids, **scope)[batch.completion_mask]
        assert not logps.requires_grad and len(logps) == sum(sample.mask)
        assert logps.untyped_storage().nbytes() == logps.nbytes  # no view: it is sent between ranks, and kept
        torch.testing.assert_close(logps, alone.detach(), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("micro_batch", [1, 3, 64])
def test_scores_come_in_the_order_of_the_sequences(model: Llama, micro_batch: int) -> None:
    scorer = ScoreModel(model.config, 2).double()
    scorer.model = model.model
    torch.nn.init.normal_(scorer.score.weight, generator=torch.Generator().manual_seed(2))
    sequences = [sample.ids for sample in ragged_samples(7)]
    found = completion_scores(scorer, sequences, micro_batch=micro_batch)
    alone = torch.cat([scorer(torch.tensor([ids]))[:, len(ids) - 1] for ids in sequences])
    assert found.dtype == torch.float32 and not found.requires_grad and alone.std() > 0.1
    torch.testing.assert_close(found, alone.detach().float(), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="sequences is empty"):
        completion_scores(scorer, [])


def test_nothing_to_score_is_nothing(model: Llama) -> None:
    assert completion_logps(model, []) == []


def test_sequence_kl_is_the_mean_difference_of_whole_completions(model: Llama) -> None:
    rollouts = []
    for number, length in enumerate((2, 5)):
        ids = tuple(range(3 + number, 3 + number + length))
        rollouts.append(Rollout((1, 2), ids, torch.full((length,), -0.5), torch.zeros(length), "stop"))
    logps = completion_logps(model, [rollout.sample for rollout in rollouts])
    expected = sum(-0.5 * len(scored) - float(scored.sum()) for scored in logps) / 2
    assert sequence_kl(model, rollouts) == pytest.approx(expected, abs=1e-12)


def test_a_trace_is_the_records_answer_up_to_its_stop(tmp_path: Path) -> None:
    chat = make_chat(tmp_path)
    messages = [{"role": "user", "content": "add one"}, {"role": "assistant", "content": "it is 2"}]
    record = parse_record({"messages": messages}, file="x.jsonl", line=3)
    prompt = prompt_ids(chat, prompt_messages(record))
    rollout = trace(chat, record, prompt, longest=200)
    assert list(rollout.prompt_ids) == prompt
    assert decode(chat, rollout.completion_ids).startswith("it is 2")
    assert rollout.completion_ids[-1] in chat.stop_ids and "add one" in decode(chat, rollout.prompt_ids)
    assert len(rollout.old_logps) == len(rollout.completion_ids) and not rollout.old_logps.any()
    length = len(rollout.sample.ids)
    assert trace(chat, record, prompt, longest=length).sample == rollout.sample
    with pytest.raises(
        ValueError, match=rf"x\.jsonl:3: prompt and answer have {length} tokens, {length - 1} fit"
    ):
        trace(chat, record, prompt, longest=length - 1)
    with pytest.raises(
        ValueError, match=r"x\.jsonl:3: the last answer is not one to the prompt sampled from"
    ):
        trace(chat, record, prompt[:3], longest=200)
    with pytest.raises(ValueError, match=r"x\.jsonl:4: the record has no assistant turn"):
        trace(chat, parse_record({"messages": messages[:1]}, file="x.jsonl", line=4), prompt, longest=200)


def test_a_trace_stands_behind_its_group_and_goes_with_it(tmp_path: Path) -> None:
    chat = make_chat(tmp_path)
    messages = [{"role": "user", "content": "add one"}, {"role": "assistant", "content": "it is 2"}]
    record = parse_record({"messages": messages, "answer": "2"}, file="x.jsonl", line=3)
    prompt = tuple(prompt_ids(chat, prompt_messages(record)))
    answer = Rollout(prompt, (3, 4), torch.zeros(2), torch.zeros(2), "stop")
    good, gone = (record, answer, "2", Verdict(1.0, {}, "")), (record, answer, "2", Unverified("gone"))
    rows = with_traces([good, gone, gone, gone], 2, chat, gsm8k, longest=200)
    assert rows[:2] == [good, gone] and rows[3:5] == [gone, gone] and len(rows) == 6
    assert rows[2][1].sample == trace(chat, record, prompt, longest=200).sample and "it is 2" in rows[2][2]
    assert rows[2][3].score == 1.0 and rows[5][3].score is None


def test_without_a_verdict_no_token_is_trained_on(model: Llama) -> None:
    rollout = Rollout((1, 2), (3, 4, 5), torch.tensor([-0.5, -0.25, -1.0]), torch.zeros(3), "stop")
    old, sample = trained_on(rollout, Verdict(0.0, {}, "wrong"))
    assert old is rollout.old_logps and sample == rollout.sample
    old, sample = trained_on(rollout, Unverified("gone"))
    assert len(old) == 0 and sample.ids == rollout.sample.ids and not any(sample.mask)
    scored = completion_logps(model, [rollout.sample, sample, rollout.sample])
    assert [len(row) for row in scored] == [3, 0, 3]


def test_a_written_record_holds_what_happened(tmp_path: Path) -> None:
    chat = make_chat(tmp_path)
    messages = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "two"}]
    record = parse_record({"messages": messages}, file="x.jsonl", line=3)
    answer = trace(chat, record, prompt_ids(chat, prompt_messages(record)), longest=200)
    told = chat, record, answer, "two"
    written = rollout_record(*told, Verdict(0.5, {"right": 1.0}, "ok"), torch.tensor([-0.5, 0.0]))
    assert rollout_record(*told, Unverified("gone"), torch.zeros(0))["advantage"] is None
    assert "".join(written["tokens"]).startswith("two") and len(written["tokens"]) == len(
        written["old_logps"]
    )
    found = {key: written[key] for key in ("line", "completion", "finish", "score", "parts", "reason")}
    assert found == {
        "line": 3,
        "completion": "two",
        "finish": "stop",
        "score": 0.5,
        "parts": {"right": 1.0},
        "reason": "ok",
    }
    assert written["advantage"] == -0.25 and "add" in written["prompt"]
