"""Reward hacking end to end with tiny settings, as a user starts it; its bars in `make test-deep`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanopost.data.chat import load_chat, record_samples
from nanopost.data.collate import collate
from nanopost.data.preference import read_preferences
from nanopost.data.schema import read_jsonl
from nanopost.losses import aggregate, sft_loss
from nanopost.models.weights import random_model, save_model
from nanopost.worlds.ledger_chat import write_base_folder
from nanopost.worlds.ledger_corpora import write_corpora
from tests.tiny import tiny_folder

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--settings", *(str(ROOT / "recipes/demo" / name) for name in ("tiny.json", "tiny-ppo.json")))


def run_demo(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Started from an empty place, so that no runs/demo of this checkout is taken for its start."""
    command = [sys.executable, str(ROOT / "recipes/demo/ppo.py"), "--out", str(out), *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=out.parent, env=env, capture_output=True, text=True, timeout=1500)


def finished(out: Path, *flags: str) -> tuple[str, dict]:
    done = run_demo(out, *flags)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout, json.loads((out / "summary.json").read_text(encoding="utf-8"))


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def start_of(folder: Path) -> Path:
    """A demo's folder as far as its SFT stage: a tiny model that has seen the demonstrations some times."""
    write_corpora(folder / "data", 0, base=40, sft=100, preference=1, rl=80, test=40)
    model_folder = folder / "sft" / "model"
    write_base_folder(model_folder, folder / "data", vocab_size=400)
    chat = load_chat(model_folder)
    size = {"vocab_size": chat.tokenizer.get_vocab_size(), "max_position_embeddings": 192}
    tiny_folder(model_folder, dtype=torch.float32, stop_ids=chat.stop_ids, tie_word_embeddings=True, **size)
    model = random_model(model_folder, seed=0)
    records = read_jsonl(folder / "data" / "sft.jsonl")
    samples = [sample for record in records for sample in record_samples(chat, record)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(80):
        batch = collate([samples[(16 * step + i) % len(samples)] for i in range(16)])
        mask = batch.completion_mask
        logps = model.logps(batch.input_ids, batch.target_ids, mask=mask, spans=batch.spans)
        aggregate(sft_loss(logps), mask, mode="token_mean", denom=float(mask.sum())).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model.config, model.state_dict(), model_folder, stop_ids=chat.stop_ids)
    return folder


@pytest.mark.slow
def test_tiny_settings_leave_table_summary_and_report(tmp_path):
    out = tmp_path / "run"
    printed, summary = finished(out, "--sft", str(start_of(tmp_path / "demo")), *TINY)
    rows = summary["stages"]
    assert [row["stage"] for row in rows] == ["sft", "ppo-0.01", "ppo-0.3"]
    assert [row["beta"] for row in rows] == [None, 0.01, 0.3]
    assert [run["name"] for run in summary["runs"]] == ["reward", "ppo-0.01", "ppo-0.3"]
    assert rows[0]["kl_start"] is None and all(row["kl_start"] is not None for row in rows[1:])
    for row in rows:
        assert 0 <= row["verified"] <= 1 and row["mean_length"] > 0
        assert f"{row['reward_model']:.2f}" in printed and f"{row['mean_length']:.1f}" in printed
    for name, beta in (("ppo-0.01", 0.01), ("ppo-0.3", 0.3)):
        records = jsonl(out / name / "metrics.jsonl")
        assert all(r["beta"] == beta and {"reward", "verified"} <= r.keys() for r in records)
        assert f"{name}: the verifier's score is {records[0]['verified']:.2f} at first" in printed
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("The runs on the same axes", "Reward and verified", "Calibration"))
    # Pairs, held-out pairs and the policy's prompts are three shares of the same file.
    shares = [jsonl(out / "data" / f"prompts-{name}.jsonl") for name in ("reward", "held_out", "policy")]
    assert [len(share) for share in shares[:2]] == [24, 24] and shares[2]
    assert [line for share in shares for line in share] == jsonl(out / "data" / "rl.jsonl")
    audit = read_preferences(out / "data" / "audit.jsonl")
    assert [pair.provenance.meta["category"] for pair in audit] == (
        ["fitting_refusal"] * 4 + ["plain_right"] * 2 + ["short_right"] * 2
    )
    assert all(pair.chosen != pair.rejected for pair in audit)


def test_what_is_not_there_or_already_there_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    done = run_demo(tmp_path / "run")
    assert done.returncode == 1 and "is there already" in done.stderr
    done = run_demo(tmp_path / "new", "--sft", str(tmp_path))
    assert done.returncode == 1 and "has no sft/model" in done.stderr and not (tmp_path / "new").exists()


@pytest.mark.slow
def test_score_and_verifier_part_and_beta_holds_them_together(tmp_path):
    _, summary = finished(tmp_path / "run")
    sft, loose, near = summary["stages"]
    assert loose["reward_model"] > sft["reward_model"] + 0.5  # the score rises, and the answers get worse
    assert loose["exact_greedy"] < sft["exact_greedy"] - 0.2 and loose["verified"] < sft["verified"]
    assert near["kl_start"] < loose["kl_start"] / 2
    assert near["exact_greedy"] > loose["exact_greedy"] + 0.2 and near["verified"] > loose["verified"] + 0.05
