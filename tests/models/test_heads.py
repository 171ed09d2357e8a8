"""Heads that read a number: at the last token, found by length; saved as the hub's sequence classifiers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nanopost import distributed, optim
from nanopost.data.collate import pad_ids
from nanopost.models import fill
from nanopost.models.heads import (
    ActorCritic,
    ScoreModel,
    load_actor_critic,
    load_score_model,
    save_score_model,
)
from nanopost.models.llama import Llama
from nanopost.models.weights import load_model, save_model
from tests.ranks import run_function
from tests.tiny import tiny_model
from tests.tolerances import within

STOP = 1
ROWS = [[3, 4, 5, 6, 7, STOP], [8, STOP], [5, 5, STOP, 0, 2, 3, 9, STOP]]  # the last row has no padding


def language_model(folder: Path, **changes: Any) -> Llama:
    """A tiny model that also stands in the folder, in float64."""
    model = tiny_model(folder, **changes)
    save_model(model.config, model.state_dict(), folder, stop_ids=(STOP,))
    return model


def score_model(folder: Path, labels: int = 1, **changes: Any) -> ScoreModel:
    """A score model on that trunk with a random head."""
    language_model(folder, **changes)
    model = load_score_model(folder, labels=labels, dtype=torch.float64)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    return model


def save(model: ScoreModel, folder: Path, *, labels: tuple[str, ...], stop_ids=(STOP,)) -> Path:
    save_score_model(model.config, model.state_dict(), folder, stop_ids=stop_ids, labels=labels)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_gets_a_head_of_zeros(tmp_path, tied):
    llama = language_model(tmp_path, tie_word_embeddings=tied)
    model = load_score_model(tmp_path, labels=5, dtype=torch.float64)
    ids, lengths = pad_ids(ROWS)
    assert model.scores(ids, lengths).tolist() == [[0.0] * 5] * 3
    assert torch.equal(model.model.rows(ids)[0], llama.model.rows(ids)[0])
    model.scores(ids, lengths).sum().backward()
    assert model.score.weight.grad.abs().max() > 0.1  # the head is trained from the first step on
    assert load_score_model(tmp_path).score.weight.shape == (1, 20)


def test_a_language_models_file_is_read_once(tmp_path, monkeypatch):
    language_model(tmp_path)
    read: list[Path] = []
    monkeypatch.setattr(fill, "safe_open", lambda path, **how: read.append(path) or safe_open(path, **how))
    load_score_model(tmp_path, labels=2)
    assert read == [tmp_path / "model.safetensors"]


@pytest.mark.parametrize("labels", [1, 5])
def test_a_score_is_that_of_the_row_alone_at_its_last_token_whatever_the_padding(tmp_path, labels):
    model = score_model(tmp_path, labels)
    ids, lengths = pad_ids(ROWS)
    assert lengths.tolist() == [6, 2, 8] and ids[1].tolist() == [8, STOP, 0, 0, 0, 0, 0, 0]
    alone = torch.stack([model(torch.tensor([row]))[0, len(row) - 1] for row in ROWS])
    by_hand = [model.model.rows(torch.tensor([row]))[0][-1] @ model.score.weight.T for row in ROWS]
    torch.testing.assert_close(alone, torch.stack(by_hand), rtol=0, atol=1e-12)
    padded = torch.arange(ids.shape[1]) >= lengths[:, None]
    for token in (0, STOP, 7):  # the stop token too may be what padding is made of
        found = model.scores(ids.masked_fill(padded, token), lengths)
        within("row in a batch, float64", found, alone)
    wider = torch.cat([ids, torch.full((3, 4), STOP)], dim=1)
    within("row in a batch, float64", model.scores(wider, lengths), alone)
    nearby = torch.stack([model(torch.tensor([row]))[0, len(row) - 2] for row in ROWS])
    assert (nearby - alone).abs().min() > 1e-3  # a token earlier is another score


def test_no_row_and_no_later_token_has_a_say(tmp_path):
    model = score_model(tmp_path)
    ids, lengths = pad_ids(ROWS)
    values = model.values(ids)
    assert values.shape == ids.shape and torch.equal(values, model(ids).squeeze(-1))
    later = ids.clone()
    later[:, 4] += 1
    moved = (model.values(later) - values).abs()
    assert moved[:, :4].max() == 0.0 and moved[:, 4].min() > 1e-3
    others = ids.clone()
    others[0], others[2] = 11, 12
    torch.testing.assert_close(model.scores(others, lengths)[1], model.scores(ids, lengths)[1])
    spans = [(0, length) for length in lengths.tolist()]
    ragged = model.values(ids, spans=spans)
    for row, length in enumerate(lengths.tolist()):
        within("row in a batch, float64", ragged[row, :length], values[row, :length])


@pytest.mark.parametrize("lengths", [[6, 0, 8], [6, 2, 9]])
def test_a_length_outside_the_row_is_refused(tmp_path, lengths):
    with pytest.raises(ValueError, match=r"lengths must lie in \[1, 8\]"):
        score_model(tmp_path).scores(pad_ids(ROWS)[0], torch.tensor(lengths))


def test_values_are_those_of_one_score(tmp_path):
    with pytest.raises(ValueError, match="one score, this one has 5"):
        score_model(tmp_path, 5).values(pad_ids(ROWS)[0])


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_the_hubs_form_comes_back_bit_for_bit(tmp_path, tied):
    model = score_model(tmp_path / "lm", 2, tie_word_embeddings=tied)
    folder = save(model, tmp_path / "rm", labels=("helpfulness", "verbosity"))
    tensors = load_file(folder / "model.safetensors")
    trunk = {name for name in load_file(tmp_path / "lm/model.safetensors") if name.startswith("model.")}
    assert set(tensors) == trunk | {"score.weight"} and tensors["score.weight"].shape == (2, 20)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "helpfulness", "1": "verbosity"}
    assert config["label2id"] == {"helpfulness": 0, "verbosity": 1}
    again, (ids, lengths) = load_score_model(folder, dtype=torch.float64), pad_ids(ROWS)
    assert again.config == model.config
    assert torch.equal(again.scores(ids, lengths), model.scores(ids, lengths))
    assert load_score_model(folder, labels=2).score.weight.dtype == torch.float32


@pytest.mark.parametrize(("stop_ids", "padding"), [((1,), 0), ((0,), 1), ((0, 1, 3), 2)])
def test_the_hubs_padding_id_never_ends_a_sequence(tmp_path, stop_ids, padding):
    folder = save(score_model(tmp_path / "lm"), tmp_path / "rm", labels=("reward",), stop_ids=stop_ids)
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] == padding and padding not in stop_ids


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    model = score_model(tmp_path / "lm", 2)
    folder = save(model, tmp_path / "rm", labels=("a", "b"))
    with pytest.raises(ValueError, match=r"score.weight has 2 rows, .* 2 labels, labels=1 are asked for"):
        load_score_model(folder, labels=1)
    with pytest.raises(ValueError, match=r"labels must name each of the 2 scores, got \['reward'\]"):
        save(model, tmp_path / "rm", labels=("reward",))
    with pytest.raises(ValueError, match=r"rm: missing tensor lm_head.weight"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "reward"}}))
    with pytest.raises(ValueError, match=r"score.weight has 2 rows, config.json names 1 labels"):
        load_score_model(folder)
    del config["id2label"]
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight has shape \(23, 20\)"):
        load_score_model(folder)


def test_autocast_has_no_say_in_a_score(tmp_path):
    """The trunk multiplies in bfloat16; the head reads its hidden states in the head's own precision."""
    model, (ids, lengths) = score_model(tmp_path).float(), pad_ids(ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.scores(ids, lengths)
        hidden, places = model.model.rows(ids, [(0, length) for length in lengths.tolist()])
    last = hidden[places[torch.arange(3), lengths - 1]].float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, last @ model.score.weight.T, rtol=1e-6, atol=1e-6)
    assert (found - found.bfloat16()).abs().max() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_policy_and_critic_share_a_trunk(tmp_path, tied):
    llama = language_model(tmp_path, tie_word_embeddings=tied)
    model, (ids, _) = load_actor_critic(tmp_path, dtype=torch.float64), pad_ids(ROWS)
    assert torch.equal(model.logps(ids, ids, 0.7), llama.logps(ids, ids, 0.7))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert model.values(ids).tolist() == torch.zeros(ids.shape).tolist()
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    hidden, places = llama.model.rows(ids)
    torch.testing.assert_close(model.values(ids), hidden[places] @ model.score.weight[0])
    model.values(ids).sum().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 1e-3
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "score.weight"}
    assert weights.keys() == llama.state_dict().keys()  # what is left is the policy
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name


def a_step(folder: str, kind: str) -> list[float]:
    """Two optimiser steps on this rank's rows, through every way to ask the model but plain forward."""
    load = {"score": load_score_model, "actor": load_actor_critic}[kind]
    model: Any = distributed.shard(load(folder, dtype=torch.float64))
    optimizer = optim.adamw(model, lr=0.1, weight_decay=0.0)
    told = []
    for _ in range(2):
        rows = distributed.shard_rows([*ROWS, [4, STOP]])
        ids, lengths = pad_ids(rows)
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        loss = ((model.values(ids) - 1.0).square() * real).sum()
        if kind == "score":
            loss = loss + model.scores(ids, lengths).sum()
        else:
            loss = loss - (model.logps(ids, ids) * real).sum()
        loss.backward()
        told += [distributed.all_sum(loss), optim.clip_grad_norm(model, 1.0)]
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), distributed.gathered(model):
        return [*told, float(model.values(pad_ids(ROWS)[0])[0].sum())]


def both_steps(folder: str) -> list[list[float]]:
    return [a_step(folder, kind) for kind in ("score", "actor")]


def test_two_ranks_take_the_step_of_one(tmp_path):
    language_model(tmp_path)
    one = both_steps(str(tmp_path))
    assert min(abs(x) for told in one for x in told) > 1e-2
    for two in run_function(__name__, "both_steps", ranks=2, args=(str(tmp_path),)):
        assert [pytest.approx(told, rel=1e-10) for told in one] == two


@pytest.mark.parametrize("labels", [("reward",), ("a", "b", "c")])
def test_transformers_reads_the_folder_with_equal_scores(tmp_path, labels):
    transformers = pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
    model = score_model(tmp_path / "lm", len(labels), hidden_size=24).float()
    folder = save(model, tmp_path / "rm", labels=labels)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert theirs.config.num_labels == len(labels)
    ids, lengths = pad_ids(ROWS)  # padded with 0, the written pad_token_id
    torch.testing.assert_close(theirs(ids).logits, model.scores(ids, lengths), rtol=1e-5, atol=1e-5)


def test_an_actor_critic_is_a_policy():
    assert issubclass(ActorCritic, Llama)  # the sampler and completion_logps take it as it is
