"""A stage's row: measured on the model in the folder, and against the stage before on the same prompts."""

import json
from pathlib import Path

import pytest

from nanopost.data.chat import decode, load_chat
from nanopost.data.schema import Record, read_jsonl
from nanopost.evals.stages import complete, stage_row
from nanopost.models.weights import load_model
from nanopost.rewards.verdict import Verdict
from nanopost.worlds import ledger
from nanopost.worlds.ledger_corpora import write_corpora
from tests.tiny import TINY, hub_folder

OPTIONS = {"max_new_tokens": 8, "seed": 0}
AGAINST = ("kl", "win_rate", "length_controlled_win_rate")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("data")
    write_corpora(folder, 0, base=5, sft=5, preference=5, rl=5, test=30)
    return read_jsonl(folder / "test.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return hub_folder(folder / "a"), hub_folder(folder / "b", seed=1)


def even(completion: str, answer: object) -> Verdict:
    """A verdict that random models do get: right when the text has an even number of characters."""
    right = float(len(completion) % 2 == 0)
    return Verdict(right, {"json": 1.0, "exact": right, "worked": 0.0, "refused": 1.0, "due": 1.0}, "counted")


def test_against_itself_a_model_changes_nothing(models, records) -> None:
    row = stage_row(models[0], records, even, previous=models[0], **OPTIONS)
    assert row["kl"] == pytest.approx(
        0.0, abs=1e-4
    )  # float32 log-probs, of one pass and of the cached sampler
    assert row["win_rate"] == row["length_controlled_win_rate"] == 0.5
    assert 0 < row["exact_sampled"] < 1


def test_against_another_it_is_judged_prompt_by_prompt(models, records) -> None:
    row = stage_row(models[0], records, even, previous=models[1], **OPTIONS)
    sides = []
    for folder in models:
        model, chat = load_model(folder), load_chat(folder)
        done = complete(model, chat, records, temperature=1.0, **OPTIONS)
        sides.append(
            [(even(decode(chat, r.completion_ids), None).score, -len(r.completion_ids)) for r in done]
        )
    points = 0.0
    for (own, shorter), (other, than) in zip(*sides, strict=True):
        mine, theirs = (own, shorter * own), (other, than * other)  # of two wrong ones length tells nothing
        points += 1.0 if mine > theirs else 0.5 if mine == theirs else 0.0
    assert row["win_rate"] == pytest.approx(points / len(records)) and row["win_rate"] != 0.5
    assert row["kl"] > 0.1
    assert row["mean_length"] == pytest.approx(-sum(length for _, length in sides[0]) / len(records))


def test_the_first_stage_has_nothing_before_it(models, records) -> None:
    row = stage_row(models[0], records, ledger.verify, previous=None, **OPTIONS)
    assert [row[name] for name in AGAINST] == [None] * 3
    assert row["refusal_precision"] is None  # a random model refuses nothing
    assert row["strict_json"] == row["exact_sampled"] == row["exact_greedy"] == row["refusal_recall"] == 0.0
    assert 7 < row["mean_length"] <= 8 and row["tokens_per_second"] > 0
    assert [sample["prompt"] for sample in row["samples"]] == [r.messages[-1].content for r in records[:8]]


def test_a_tied_head_is_counted_once(models, records) -> None:
    width, heads = TINY.hidden_size, (TINY.num_attention_heads + TINY.num_key_value_heads) * TINY.head_dim
    layer = 2 * heads * width + 3 * width * TINY.intermediate_size + 2 * width
    vocabulary = json.loads((models[0] / "config.json").read_text())["vocab_size"]
    row = stage_row(models[0], records[:1], even, previous=None, **OPTIONS)
    assert row["parameters"] == vocabulary * width + TINY.num_hidden_layers * layer + width
