"""A verifier that fails on some answers: they are left out and counted, and too many end the run."""

import json
from pathlib import Path

import pytest

from nanopost import metrics
from tests import small_runs
from tests.digits import write_lines
from tests.ranks import run_script

STEPS = 3
FAILING = """
import json, os, runpy, sys
from nanopost import optim
from nanopost.evals import verifier
from nanopost.rewards import math
verifier.SECONDS = 0.05
calls, right, set_lr = [-1, 10**9], math.math_reward, optim.set_lr
failing = {int(step): kinds for step, kinds in json.loads(sys.argv[1]).items()}
last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
def begin(optimizer, lr):
    calls[:] = [calls[0] + 1, 0]
    set_lr(optimizer, lr)
def verify(completion, answer):
    calls[1] += 1
    kind = last and failing.get(calls[0], {}).get(str(calls[1]), failing.get(calls[0], {}).get("all"))
    if kind == "raises":
        raise RecursionError("too deep")
    while kind == "hangs":
        pass
    return right(completion, answer)
math.math_reward, optim.set_lr = verify, begin
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> small_runs.Start:
    return small_runs.begin(tmp_path_factory.mktemp("start"))


def run(start: small_runs.Start, name: str, out: Path, failing: dict, *more: str, ranks: int = 1) -> str:
    """A run whose verifier fails by the number of the step and of the call in it, on the last rank."""
    flags = ["--group-size", "4", "--steps", str(STEPS), "--rollouts-every", "1", *more]
    command = small_runs.command(start, name, out, "--eval-data", str(start["prompts"]), *flags)
    return run_script(["-c", FAILING, json.dumps(failing), *command], ranks=ranks, limit=60)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("grpo", ["--minibatches", "4"]),
        ("grpo", ["--loss", "reinforce"]),
        ("ppo", ["--minibatches", "4", "--epochs", "2"]),
    ],
    ids=["grpo", "reinforce", "ppo"],
)
def test_answers_without_a_verdict_are_left_out_and_counted(start, tmp_path, name, more):
    """In the second step: one of the first group, and all of the second, perhaps an update of its own."""
    kinds = {"2": "hangs", "5": "raises", "6": "raises", "7": "raises", "8": "raises"}
    printed = run(start, name, tmp_path / "run", {1: kinds}, *more)
    assert "5 of 16 answers have no verdict, and so no reward (first: no verdict after 0.05 s)" in printed
    records = metrics.read_records(tmp_path / "run")
    assert [record["unverified"] for record in records] == [0, 5, 0] and records[-1]["eval_unverified"] == 0
    assert all(record["grad_norm"] is not None for record in records)
    rows = metrics.read_rollouts(tmp_path / "run", 1)
    missing, kept = ([row for row in rows if (row["score"] is None) is none] for none in (True, False))
    assert [i for i, row in enumerate(rows) if row["score"] is None] == [1, 4, 5, 6, 7]
    assert [row["reason"] for row in missing] == [
        "no verdict after 0.05 s",
        *["RecursionError: too deep"] * 4,
    ]
    assert all(row["advantage"] is None and not row["parts"] for row in missing)
    assert records[1]["reward"] == pytest.approx(sum(row["score"] for row in kept) / 11)
    assert records[1]["length"] == pytest.approx(sum(len(row["tokens"]) for row in kept) / 11)
    if "reinforce" in more:  # L = −Σ r Σ log π / n, over those that have a verdict
        expected = -sum(row["score"] * sum(row["old_logps"]) for row in kept) / 11
        assert records[1]["loss"] == pytest.approx(expected, abs=1e-4) and expected > 0.1
    elif name == "grpo":
        for group in (rows[i : i + 4] for i in range(0, 16, 4)):
            known = [row for row in group if row["score"] is not None]
            mean = sum(row["score"] for row in known) / max(1, len(known))
            for row in known:
                assert row["advantage"] == pytest.approx(row["score"] - mean, abs=1e-12)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_an_evaluation_is_of_what_was_verified(start, tmp_path, name):
    """Each greedy answer has two tokens; so has their mean, over those that have a verdict."""
    run(start, name, tmp_path / "run", {2: {"17": "raises", "20": "hangs"}})
    record = metrics.read_records(tmp_path / "run")[-1]
    assert (record["unverified"], record["eval_unverified"], record["eval_length"]) == (0, 2, 2.0)


def test_an_evaluation_without_any_verdict_is_a_mean_of_nothing(start, tmp_path):
    first = write_lines(tmp_path / "one.jsonl", [json.loads(start["prompts"].read_text().splitlines()[0])])
    run(start, "grpo", tmp_path / "run", {2: {"17": "raises"}}, "--eval-data", str(first))
    record = metrics.read_records(tmp_path / "run")[-1]
    assert record["eval_unverified"] == 1 and record["eval_reward"] is None is record["eval_length"]


def test_traces_are_compared_and_not_counted(start, tmp_path):
    """LUFFY: of two a group the last is the record's; without a verdict on the first it has none either."""
    rows = [json.loads(line) for line in start["prompts"].read_text().splitlines()]
    for row in rows:
        row["messages"].append({"role": "assistant", "content": "7"})
    flags = [
        "--data",
        str(write_lines(tmp_path / "traces.jsonl", rows)),
        "--loss",
        "luffy",
        "--group-size",
        "2",
    ]
    printed = run(start, "grpo", tmp_path / "run", {1: {"1": "raises"}}, *flags)
    assert "2 of 8 answers have no verdict, and so no reward (first: RecursionError: too deep)" in printed
    assert [record["unverified"] for record in metrics.read_records(tmp_path / "run")] == [0, 2, 0]
    scores = [row["score"] for row in metrics.read_rollouts(tmp_path / "run", 1)]
    assert scores[:2] == [None, None] and None not in scores[2:]
    with pytest.raises(AssertionError, match="8 of 8 answers have no verdict"):
        run(start, "grpo", tmp_path / "broken", {1: {"all": "raises"}}, *flags)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_rank_without_any_verdict_goes_along(start, tmp_path, name):
    one = ["--prompts-per-step", "2"]
    printed = run(start, name, tmp_path / "run", {1: {"all": "raises"}}, *one, ranks=2)
    assert "4 of 8 answers have no verdict, and so no reward (first: RecursionError: too deep)" in printed
    records = metrics.read_records(tmp_path / "run")
    assert [record["unverified"] for record in records] == [0, 4, 0]
    assert all(record["grad_norm"] > 0 for record in records)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_verifier_that_broke_ends_the_run(start, tmp_path, name):
    with pytest.raises(AssertionError) as failed:
        run(start, name, tmp_path / "run", {1: {"all": "raises"}})
    assert "RuntimeError: 16 of 16 answers have no verdict" in str(failed.value)
    assert "mend the verifier and go on with --resume" in str(failed.value)
    assert len(metrics.read_records(tmp_path / "run")) == 1
