"""train_grpo.py, run as a user runs it, on a policy that can be improved: it answers one of two digits."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanopost import metrics
from nanopost.losses.variants import VARIANTS
from tests.chat_fixtures import make_chat
from tests.digits import digit_policy, write_lines
from tests.ranks import run_script
from tests.tiny import hub_folder
from tests.tolerances import within

TIMES = ("rollout_s", "verify_s", "train_s")


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> tuple[Path, Path]:
    """A model that says 3 or 7, at random, and prompts whose answer is 7."""
    return digit_policy(tmp_path_factory.mktemp("grpo"))


def train(start: tuple[Path, Path], out: Path, *flags: str, ranks: int = 1) -> str:
    model, data = start
    fixed = ["--model", model, "--data", data, "--out", out, "--verifier", "math", "--max-new-tokens", "6"]
    fixed += [
        "--prompts-per-step",
        "8",
        "--group-size",
        "4",
        "--lr",
        "3e-3",
        "--threads",
        "1",
        "--steps",
        "4",
    ]
    return run_script(["train_grpo.py", *map(str, fixed), *flags], ranks=ranks)


def records(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in metrics.read_records(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


def test_the_reward_rises_and_the_line_tells_why(start, tmp_path):
    run = tmp_path / "run"
    printed = train(start, run, "--steps", "40", "--eval-data", str(start[1]), "--eval-every", "40")
    told = records(run)
    assert 0.25 < told[0]["reward"] < 0.75 < 0.95 < told[-1]["reward"]
    assert told[-1]["eval_reward"] == 1.0
    assert abs(told[0]["loss"]) < 0.02 and told[0]["grad_norm"] > 0.01  # loss 0, gradient not
    assert told[0]["kl_old"] == pytest.approx(0.0, abs=1e-9) and told[0]["kl_ref"] == pytest.approx(
        0.0, abs=1e-9
    )
    assert told[-1]["kl_ref"] > 0.01 and told[-1]["no_signal"] > told[0]["no_signal"]
    assert printed.count("loss is near 0, its gradient is not") == 1
    shown = ("reward", "no_signal", "length", "clipped", "entropy", "kl_old", "kl_ref", *TIMES)
    (line,) = [line for line in printed.splitlines() if line.startswith(" 1/40")]
    assert all(name in line for name in shown)
    assert {path.name for path in run.iterdir()} >= {
        "args.json",
        "env.json",
        "model",
        "rollouts",
        "report.html",
    }


def test_written_rollouts_are_whole_groups_whose_advantages_sum_to_zero(start, tmp_path):
    train(start, tmp_path / "run", "--steps", "1")
    rows = metrics.read_rollouts(tmp_path / "run", 0)
    assert len(rows) == 32
    for group in (rows[i : i + 4] for i in range(0, 32, 4)):
        assert len({row["prompt"] for row in group}) == 1
        assert sum(row["advantage"] for row in group) == pytest.approx(0.0, abs=1e-12)
        for row in group:
            assert len(row["tokens"]) == len(row["old_logps"]) > 0
            assert row["score"] == pytest.approx(1.0 if row["completion"].strip() == "7" else 0.0)
            assert (row["advantage"] > 0) <= (row["score"] > 0)


@pytest.mark.parametrize("flags", [[], ["--minibatches", "2", "--loss", "reinforce++", "--resample", "2"]])
def test_resume_continues_bit_for_bit(start, tmp_path, flags):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    for run in (straight, cut):
        train(start, run, "--save-every", "2", "--rollouts-every", "1", *flags)
    shutil.rmtree(cut / "state/step_000004")  # as if it had died after step 2
    shutil.rmtree(cut / "model")
    (cut / "rollouts/000003.jsonl.gz").write_bytes(b"torn")
    train(start, cut, "--save-every", "2", "--rollouts-every", "1", "--resume", *flags)
    assert records(cut) == records(straight)
    assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in weights(cut).items())
    assert metrics.read_rollouts(cut, 3) == metrics.read_rollouts(straight, 3)


@pytest.mark.parametrize(
    "variant",
    [
        ["--loss", "grpo", "--beta", "0.05"],
        ["--loss", "reinforce++", "--beta", "0.05", "--resample", "1", "--minibatches", "2"],
    ],
    ids=lambda flags: flags[1],
)
def test_micro_batches_and_ranks_change_nothing(start, tmp_path, variant):
    """Whole steps, sampling included: lengths differ between ranks, the step does not; nor does an evaluation
    in which one rank has no share."""
    one = write_lines(tmp_path / "one.jsonl", [json.loads(start[1].read_text().splitlines()[0])])
    flags = [*variant, "--temperature", "1.3", "--top-k", "20", "--eval-data", str(one)]
    train(start, tmp_path / "one", *flags)
    train(start, tmp_path / "micro", *flags, "--micro-batch", "5")
    train(start, tmp_path / "slots", *flags, "--slots", "3")
    train(start, tmp_path / "ranks", *flags, ranks=2)
    one, micro, slots, ranks = (
        [weights(tmp_path / name), records(tmp_path / name)] for name in ("one", "micro", "slots", "ranks")
    )
    within("micro-batches, float32", micro, one)
    within("micro-batches, float32", slots, one)
    within("world sizes, float32", ranks, one)


def test_a_record_drawn_twice_in_a_step_is_sampled_twice(start, tmp_path):
    model, data = start
    few = write_lines(
        tmp_path / "few.jsonl", [json.loads(line) for line in data.read_text().splitlines()[:2]]
    )
    train((model, few), tmp_path / "run", "--steps", "1", "--temperature", "3")
    rows = metrics.read_rollouts(tmp_path / "run", 0)
    groups = {tuple(row["completion"] for row in rows[i : i + 4]) for i in range(0, 32, 4)}
    assert len({row["prompt"] for row in rows}) == 2 and len(groups) == 8


def test_a_variant_is_a_row_of_the_table(start, tmp_path):
    """The first step has the same rollouts under every row, and its own gradient."""
    names = ("nanopost", "rloo", "dr_grpo", "gspo", "cispo", "reinforce")
    for name in names:  # warm enough for completions of unequal lengths
        train(start, tmp_path / name, "--steps", "1", "--loss", name, "--temperature", "2.5")
    told = [records(tmp_path / name)[0] for name in names]
    assert len({(record["reward"], record["kl_ref"]) for record in told}) == 1
    norms = sorted(record["grad_norm"] for record in told)
    assert norms[0] > 1e-3 and all(b > 1.01 * a for a, b in pairwise(norms)), norms


def test_dapo_draws_groups_without_signal_again(start, tmp_path):
    """A cool policy often answers alike."""
    flags = ["--loss", "dapo", "--temperature", "0.1", "--steps", "1"]
    train(start, tmp_path / "once", *flags)
    train(start, tmp_path / "again", *flags, "--resample", "3")
    once, again = (metrics.read_rollouts(tmp_path / name, 0) for name in ("once", "again"))
    flat = [record["no_signal"] for name in ("once", "again") for record in records(tmp_path / name)]
    assert flat[1] < flat[0]
    for i in range(0, 32, 4):
        group = once[i : i + 4]
        if len({row["score"] for row in group}) > 1:  # a group with a signal is kept
            assert again[i : i + 4] == group


def test_the_overlong_penalty_is_part_of_the_reward(start, tmp_path):
    """F33 with L_max 3 and L_cache 2: nothing for one token, −½ for two, −1 for three."""
    flags = ["--steps", "1", "--temperature", "3", "--max-new-tokens", "3", "--overlong-cache", "2"]
    train(start, tmp_path / "run", *flags)
    rows = metrics.read_rollouts(tmp_path / "run", 0)
    assert {len(row["tokens"]) for row in rows} >= {2, 3}
    for i in range(0, 32, 4):
        rewards = [row["score"] - (len(row["tokens"]) - 1) / 2 for row in rows[i : i + 4]]
        for row, reward in zip(rows[i : i + 4], rewards, strict=True):
            assert row["advantage"] == pytest.approx(reward - sum(rewards) / 4, abs=1e-12)


def test_luffy_learns_from_the_records_own_answers(start, tmp_path):
    model, _ = start
    prompts = [
        [{"role": "user", "content": a}, {"role": "assistant", "content": "7"}] for a in ("add", "one", "two")
    ]
    data = write_lines(tmp_path / "rl.jsonl", [{"messages": chat, "answer": "7"} for chat in prompts])
    train((model, data), tmp_path / "run", "--loss", "luffy", "--rollouts-every", "1")
    for step in range(4):
        rows = metrics.read_rollouts(tmp_path / "run", step)
        for i in range(0, 32, 4):
            *own, trace = rows[i : i + 4]
            assert (
                trace["score"] == 1.0 and not any(trace["old_logps"]) and trace["completion"].startswith("7")
            )
            assert all(any(row["old_logps"]) for row in own)
        own = [row["score"] for i, row in enumerate(rows) if i % 4 < 3]
        assert records(tmp_path / "run")[step]["reward"] == pytest.approx(sum(own) / len(own))
    with pytest.raises(AssertionError, match=r"group_size must be at least 2 with loss=luffy, got 1"):
        train((model, data), tmp_path / "small", "--loss", "luffy", "--group-size", "1")
    with pytest.raises(AssertionError, match=r"rl\.jsonl:1: the record has no assistant turn"):
        train(start, tmp_path / "none", "--loss", "luffy")


@pytest.mark.slow
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "ppo"])
def test_every_variant_learns(start, tmp_path, variant):
    """From a coin's toss to the right answer."""
    model, data = start
    chats = [json.loads(line) for line in data.read_text().splitlines()]
    chats = [{**c, "messages": [*c["messages"], {"role": "assistant", "content": "7"}]} for c in chats]
    data = write_lines(tmp_path / "rl.jsonl", chats)
    lr = {"reinforce": "1e-3", "luffy": "1e-2", "dr_grpo": "1e-2"}.get(variant, "3e-3")
    train((model, data), tmp_path / "run", "--loss", variant, "--steps", "60", "--lr", lr)
    told = records(tmp_path / "run")
    assert told[0]["reward"] < 0.7 and sum(record["reward"] for record in told[-5:]) / 5 > 0.9


def test_off_policy_minibatches_move_away_from_the_sampler(start, tmp_path):
    train(start, tmp_path / "run", "--minibatches", "4", "--lr", "3e-2")
    assert max(record["clipped"] for record in records(tmp_path / "run")) > 0
    assert max(record["kl_old"] for record in records(tmp_path / "run")) > 1e-4


def test_bad_input_is_named(start, tmp_path):
    model, data = start
    lines = data.read_text().splitlines()
    lines[2] = json.dumps({"messages": [{"role": "user", "content": "add"}]})
    data = tmp_path / "rl.jsonl"
    data.write_text("\n".join(lines) + "\n")
    with pytest.raises(AssertionError, match=r"rl\.jsonl:3: no answer to verify against"):
        train((model, data), tmp_path / "run")
    lines[2] = json.dumps({"messages": [{"role": "user", "content": "add " * 300}], "answer": "7"})
    data.write_text("\n".join(lines) + "\n")
    with pytest.raises(AssertionError, match=r"rl\.jsonl:3: the prompt has \d+ tokens, 250 leave room"):
        train((model, data), tmp_path / "run")
    with pytest.raises(AssertionError, match=r"loss must be one of 'reinforce', .*, got 'trpo'"):
        train(start, tmp_path / "other", "--loss", "trpo")
    with pytest.raises(AssertionError, match=r"beta must not be given: dapo has no such term, got 0.1"):
        train(start, tmp_path / "other", "--loss", "dapo", "--beta", "0.1")
    with pytest.raises(AssertionError, match="loss=ppo needs a critic, which this script has not"):
        train(start, tmp_path / "other", "--loss", "ppo")
    with pytest.raises(AssertionError, match=r"beta must lie in \[0, inf\), got -0.5"):
        train(start, tmp_path / "other", "--loss", "grpo", "--beta", "-0.5")
    with pytest.raises(AssertionError, match="resample must be at least 0 with loss=nanopost, got -1"):
        train(start, tmp_path / "other", "--resample", "-1")
    with pytest.raises(AssertionError, match="overlong_cache=7 exceeds max_new_tokens=6"):
        train(start, tmp_path / "other", "--overlong-cache", "7")
    with pytest.raises(AssertionError, match=r"prompts_per_step=8 must be a multiple of ranks × minibatches"):
        train(start, tmp_path / "other", "--minibatches", "3")
    with pytest.raises(AssertionError, match="warmup: expected 0 <= warmup <= steps, got warmup -1"):
        train(start, tmp_path / "other", "--warmup", "-1")
    assert not (tmp_path / "other").exists()  # before a run folder is made, and no rollout


def test_the_reference_reads_what_the_policy_writes(start, tmp_path):
    hub = hub_folder(tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(AssertionError, match=r"rl\.jsonl:1: the prompt has \d+ tokens, 10 leave room"):
        train(start, tmp_path / "run", "--ref-model", str(hub))
    make_chat(tmp_path / "stranger", "header")
    with pytest.raises(AssertionError, match=r"ref_model: .*stranger has another tokenizer than"):
        train(start, tmp_path / "run", "--ref-model", str(tmp_path / "stranger"))


@pytest.mark.slow
def test_gsm8k_as_it_is_published(shared, tmp_path):
    folder = hub_folder(tmp_path / "hub", max_position_embeddings=2048)
    flags = ["--verifier", "gsm8k", "--steps", "1", "--max-new-tokens", "8", "--prompts-per-step", "2"]
    printed = train((folder, shared / "data/gsm8k/train.jsonl"), tmp_path / "run", *flags)
    assert "7473 prompts" in printed and records(tmp_path / "run")[0]["reward"] == 0.0
