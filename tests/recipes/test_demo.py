"""The demo end to end with tiny settings, as a user starts it; the real bars in `make test-deep`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import hub_folder

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "stage", "strict_json", "exact_greedy", "exact_sampled", "refusal_precision", "refusal_recall",
    "mean_length", "kl", "seconds",
}  # fmt: skip
RATES = ("strict_json", "exact_greedy", "exact_sampled", "refusal_recall")


def run_demo(out: Path, *flags: str) -> tuple[str, dict]:
    command = [sys.executable, "recipes/demo/recipe.py", "--out", str(out), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout, json.loads((out / "summary.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("flags", "stages"), [([], ["base", "sft", "grpo"]), (["--zero"], ["base", "grpo"])], ids=["demo", "zero"]
)
def test_tiny_demo_leaves_table_summary_and_report(tmp_path, flags, stages):
    printed, summary = run_demo(tmp_path / "run", "--settings", "recipes/demo/tiny.json", *flags)
    assert [row["stage"] for row in summary["stages"]] == stages
    for row in summary["stages"]:
        assert set(row) >= KEYS and all(0 <= row[name] <= 1 for name in RATES)
        assert (
            row["mean_length"] > 0 and row["seconds"] > 0 and (row["kl"] is None) == (row["stage"] == "base")
        )
    for row in summary["stages"]:  # the table tells the same numbers
        assert f"{row['strict_json']:.1%}" in printed and f"{row['mean_length']:.1f}" in printed
    assert printed.rstrip().endswith(f"{tmp_path / 'run' / 'report.html'}")
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert all(name in page for name in stages)
    assert "$ python train_grpo.py" in printed  # the commands a user would type


def test_an_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(AssertionError, match="is there already"):
        run_demo(tmp_path / "run")


@pytest.mark.slow
def test_the_demo_meets_its_bars(tmp_path):
    _, summary = run_demo(tmp_path / "run")
    base, sft, grpo = summary["stages"]
    assert base["strict_json"] < 0.30
    assert sft["strict_json"] >= 0.95 and 0.20 <= sft["exact_sampled"] <= 0.65
    assert grpo["exact_sampled"] >= max(0.75, sft["exact_sampled"] + 0.25) and grpo["strict_json"] >= 0.98
    assert grpo["refusal_precision"] >= 0.95 and grpo["refusal_recall"] >= 0.95


@pytest.mark.slow
def test_zero_learns_to_work_it_out(tmp_path):
    _, summary = run_demo(tmp_path / "run", "--zero")
    base, grpo = summary["stages"]
    assert grpo["exact_sampled"] > base["exact_sampled"] + 0.2
    assert grpo["worked"] > base["worked"] + 0.3 and grpo["mean_length"] > base["mean_length"]


def test_stage_rows_are_measured_on_the_model_in_the_folder(tmp_path):
    """Against itself a model has KL 0; against another it has not."""
    from nanopost.data.schema import read_jsonl
    from nanopost.evals.stages import stage_row
    from nanopost.worlds import ledger
    from nanopost.worlds.ledger_corpora import write_corpora

    write_corpora(tmp_path / "data", 0, base=5, sft=5, rl=5, test=30)
    records = read_jsonl(tmp_path / "data/test.jsonl")
    a, b = hub_folder(tmp_path / "a"), hub_folder(tmp_path / "b", seed=1)
    options = {"max_new_tokens": 8, "seed": 0}
    row = stage_row(a, records, ledger.verify, previous=a, **options)
    assert row["kl"] == pytest.approx(0.0, abs=1e-4) and row["refusal_precision"] is None
    assert (
        row["strict_json"] == row["exact_sampled"] == row["refusal_recall"] == 0.0
        and 7 < row["mean_length"] <= 8
    )
    assert stage_row(a, records, ledger.verify, previous=b, **options)["kl"] > 0.1
