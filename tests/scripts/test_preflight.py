"""The preflight in whole scripts: it ends a run that would go wrong, and leaves no trace in the others."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopost import metrics
from nanopost.evals import preflight
from tests.ranks import ROOT, run_script
from tests.tiny import hub_folder, write_chats

SMALL = "--threads 1 --batch-size 8 --lr 1e-2 --warmup 2"


@pytest.fixture
def start(tmp_path) -> list[str]:
    """The flags of a model and 24 chats."""
    hub, chats = hub_folder(tmp_path / "hub"), write_chats(tmp_path / "chats.jsonl", 24)
    return ["--model", str(hub), "--data", str(chats)]


def outcomes(run: Path) -> dict[str, str]:
    page = json.loads((run / "preflight.json").read_text())
    assert list(preflight.CHECKS) == [check["name"] for check in page["checks"]]
    return {check["name"]: check["outcome"] for check in page["checks"]}


@pytest.mark.parametrize("ranks", [1, 2])
def test_sft_alone(start, tmp_path, ranks):
    run = tmp_path / "run"
    command = ["train_sft.py", *start, *SMALL.split(), "--out", str(run), "--steps", "0", "--show", "2"]
    printed = run_script(command, ranks=ranks)
    found = outcomes(run)
    assert not {"fail", "warn"} & {*found.values()} and list(found.values()).count("pass") >= 8
    assert {path.name for path in run.iterdir()} == {".lock", "args.json", "env.json", "preflight.json"}
    assert printed.count("chats.jsonl:1: <|im_start|>user") == 1 and printed.count("[<|im_end|>]") == 2
    assert printed.count("samples are not packed") == 1


def test_a_fault_ends_the_run_before_its_first_step(start, tmp_path):
    weights = tmp_path / "hub/model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][-1] = 0  # the row of <|im_end|>, in a head that LoRA freezes
    save_file(tensors, weights, metadata={"format": "pt"})
    command = ["train_sft.py", *start, *SMALL.split(), "--out", str(tmp_path / "run"), "--lora-rank", "2"]
    with pytest.raises(AssertionError, match=r"preflight: stop row failed, nothing was trained"):
        run_script([*command, "--steps", "3"], ranks=1)
    assert outcomes(tmp_path / "run")["stop row"] == "fail"
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/model").exists()


def test_a_run_is_bit_for_bit_the_one_without(start, tmp_path, monkeypatch):
    def weights(name: str) -> dict[str, torch.Tensor]:
        command = ["train_sft.py", *start, *SMALL.split(), "--out", str(tmp_path / name), "--steps", "3"]
        monkeypatch.setattr(sys, "argv", command)
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(ROOT / "train_sft.py"), run_name="__main__")
        return load_file(tmp_path / name / "model/model.safetensors")

    state = torch.get_rng_state()
    checked = weights("with")
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr(preflight, "check_run", lambda *given, **options: None)
    bare = weights("without")
    assert all(torch.equal(tensor, bare[name]) for name, tensor in checked.items())
    losses = [[r["loss"] for r in metrics.read_records(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1] and not (tmp_path / "without/preflight.json").exists()


def test_grpo_alone(start, tmp_path):
    run = tmp_path / "run"
    flags = "--threads 1 --verifier math --max-new-tokens 4 --prompts-per-step 4 --group-size 3 --steps 0"
    flags += " --temperature 1.5 --top-k 9 --show 1"
    printed = run_script(["train_grpo.py", *start, *flags.split(), "--out", str(run)], ranks=1)
    found = outcomes(run)
    asked = {"verifier", "rewards", "log-probs", "micro-batch", "step-0 card", "stop ids", "rows"}
    assert {found[name] for name in asked} == {"pass"} and found["groups"] == "warn"  # it never stops
    assert printed.count("loss is near 0, its gradient is not") == 1 and "sampled: <|im_start|>" in printed
    assert not (run / "metrics.jsonl").exists() and not (run / "model").exists()
