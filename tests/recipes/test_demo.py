"""The demo end to end with tiny settings, as a user starts it; the real bars in `make test-deep`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "stage", "strict_json", "exact_greedy", "exact_sampled", "refusal_precision", "refusal_recall",
    "worked", "mean_length", "win_rate", "length_controlled_win_rate", "kl", "parameters",
    "tokens_per_second", "seconds",
}  # fmt: skip
AGAINST = ("win_rate", "length_controlled_win_rate", "kl")  # the stage before: the first has none
RATES = ("strict_json", "exact_greedy", "exact_sampled", "refusal_recall")


def run_demo(out: Path, *flags: str) -> tuple[str, dict]:
    command = [sys.executable, "recipes/demo/recipe.py", "--out", str(out), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout, json.loads((out / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        pytest.param([], ["base", "sft", "preference", "grpo", "student"], id="demo"),
        pytest.param(["--zero"], ["base", "grpo"], id="zero", marks=pytest.mark.slow),
    ],
)
def test_tiny_demo_leaves_table_summary_and_report(tmp_path, flags, stages):
    printed, summary = run_demo(tmp_path / "run", "--settings", "recipes/demo/tiny.json", *flags)
    assert [row["stage"] for row in summary["stages"]] == stages
    for row in summary["stages"]:
        assert set(row) >= KEYS and all(0 <= row[name] <= 1 for name in RATES)
        assert min(row[name] for name in ("mean_length", "seconds", "parameters", "tokens_per_second")) > 0
        assert {row[name] is None for name in AGAINST} == {row["stage"] == "base"}
    for row in summary["stages"]:  # the table tells the same numbers
        assert f"{row['strict_json']:.1%}" in printed and f"{row['mean_length']:.1f}" in printed
    assert printed.rstrip().endswith(f"{tmp_path / 'run' / 'report.html'}")
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert all(name in page for name in stages)
    assert "$ python train_grpo.py" in printed  # the commands a user would type
    assert len({row["parameters"] for row in summary["stages"]}) == 1 + ("student" in stages)


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(AssertionError, match="is there already"):
        run_demo(tmp_path / "run")


@pytest.mark.slow
def test_the_demo_meets_its_bars(tmp_path):
    _, summary = run_demo(tmp_path / "run")
    base, sft, preference, grpo, student = summary["stages"]
    assert summary["seconds"] <= 480
    assert base["strict_json"] < 0.30
    assert sft["strict_json"] >= 0.95 and 0.20 <= sft["exact_sampled"] <= 0.65
    assert preference["win_rate"] >= 0.70 and preference["mean_length"] < sft["mean_length"]
    for name in ("exact_greedy", "exact_sampled", "refusal_precision", "refusal_recall"):
        assert preference[name] >= sft[name] - 0.01, name
    assert grpo["exact_sampled"] >= max(0.75, sft["exact_sampled"] + 0.25) and grpo["strict_json"] >= 0.98
    assert grpo["refusal_precision"] >= 0.95 and grpo["refusal_recall"] >= 0.95
    assert student["exact_greedy"] >= 0.90 * grpo["exact_greedy"]
    assert student["parameters"] <= 0.30 * grpo["parameters"]
    assert student["tokens_per_second"] >= 2 * grpo["tokens_per_second"]


@pytest.mark.slow
def test_zero_learns_to_work_it_out(tmp_path):
    _, summary = run_demo(tmp_path / "run", "--zero")
    base, grpo = summary["stages"]
    assert grpo["exact_sampled"] > base["exact_sampled"] + 0.2
    assert grpo["worked"] > base["worked"] + 0.3 and grpo["mean_length"] > base["mean_length"]
