"""train_sft.py, run as a user runs it: its own process, a real folder, a real file."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from nanopost import metrics
from nanopost.data.chat import load_chat, prompt_ids, record_samples
from nanopost.data.schema import read_jsonl
from nanopost.models.weights import load_model
from tests.ranks import run_script
from tests.tiny import hub_folder, write_chats
from tests.tolerances import within


@pytest.fixture
def start(tmp_path: Path) -> tuple[Path, Path]:
    """A hub folder with random weights, and a file of 24 chats of ragged lengths."""
    return hub_folder(tmp_path / "hub"), write_chats(tmp_path / "chats.jsonl", 24)


def train(start: tuple[Path, Path], out: Path, *flags: str, ranks: int = 1) -> str:
    model, data = start
    fixed = [
        "--model",
        model,
        "--data",
        data,
        "--out",
        out,
        "--steps",
        "6",
        "--batch-size",
        "8",
        "--threads",
        "1",
    ]
    return run_script(
        ["train_sft.py", *map(str, fixed), "--lr", "1e-2", "--warmup", "2", *flags], ranks=ranks
    )


def records(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in metrics.read_records(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


def test_a_run_leaves_a_folder_that_loads_back(start, tmp_path):
    run = tmp_path / "run"
    printed = train(start, run, "--eval-data", str(start[1]), "--eval-every", "3")
    names = {path.name for path in run.iterdir()}
    assert names >= {"args.json", "env.json", "metrics.jsonl", "model", "state", "report.html"}
    assert json.loads((run / "args.json").read_text())["batch_size"] == 8
    assert json.loads((run / "env.json").read_text())["template"] == load_chat(start[0]).version
    told = records(run)
    assert [record["step"] for record in told] == list(range(6))
    assert [line[:3] for line in printed.splitlines() if "/6  " in line] == [
        f"{step}/6" for step in range(1, 7)
    ]
    assert told[-1]["eval_loss"] < told[2]["eval_loss"] < math.log(300)  # it learns
    state = load_file(run / "state/step_000006/model.safetensors")
    model, ids = load_model(run / "model"), torch.tensor([[3, 1, 4, 1, 5]])
    trained = model(ids)
    model.load_state_dict(state, strict=False)
    assert torch.equal(trained, model(ids))  # the exported folder is the trained state
    ours, theirs = load_chat(run / "model"), load_chat(start[0])
    assert (ours.version, ours.stop_ids) == (theirs.version, theirs.stop_ids)


def test_resume_continues_bit_for_bit(start, tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train(start, straight, "--save-every", "3")
    train(start, cut, "--save-every", "3")
    shutil.rmtree(cut / "state/step_000006")  # as if it had died after step 3
    shutil.rmtree(cut / "model")
    with pytest.raises(AssertionError, match="pass --resume to go on"):
        train(start, cut, "--save-every", "3")
    train(start, cut, "--save-every", "3", "--resume")
    assert records(cut) == records(straight)
    assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in weights(cut).items())


def test_micro_batches_and_ranks_change_nothing(start, tmp_path):
    first = tmp_path / "first.jsonl"  # with two ranks, one has no share of the evaluation
    first.write_text(start[1].read_text().splitlines()[0] + "\n")
    train(start, tmp_path / "one", "--eval-data", str(first))
    train(start, tmp_path / "micro", "--micro-batch", "3", "--eval-data", str(first))
    train(start, tmp_path / "ranks", "--micro-batch", "2", "--eval-data", str(first), ranks=2)
    reference, before = weights(tmp_path / "one"), load_file(start[0] / "model.safetensors")
    assert all(
        (reference[name] - before[name]).abs().max() > 1e-3 for name in before
    )  # everything was trained
    found = {name: [weights(tmp_path / name), records(tmp_path / name)] for name in ("one", "micro", "ranks")}
    within("micro-batches, float32", found["micro"], found["one"])
    within("world sizes, float32", found["ranks"], found["one"])


def test_the_gradient_is_that_of_the_mean_over_all_supervised_tokens(start, tmp_path):
    train(start, tmp_path / "run", "--steps", "1", "--batch-size", "24", "--micro-batch", "5")
    model, chat = load_model(start[0]), load_chat(start[0])
    samples = [sample for record in read_jsonl(start[1]) for sample in record_samples(chat, record)]
    total = tokens = 0.0
    for sample in samples:  # by torch's own cross-entropy, one sample after the other
        ids, mask = torch.tensor(sample.ids), torch.tensor(sample.mask[1:]).bool()
        total += cross_entropy(model(ids[None, :-1])[0][mask], ids[1:][mask], reduction="sum")
        tokens += int(mask.sum())
    loss = total / tokens
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    (told,) = records(tmp_path / "run")
    assert told["tokens"] == tokens and told["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert told["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_too_long_samples_are_counted_not_lost_in_silence(start, tmp_path):
    printed = train(start, tmp_path / "run", "--max-length", "40")
    assert "left out" in printed and "chats.jsonl:" in printed
    with pytest.raises(AssertionError, match="no sample of at most 3 tokens"):
        train(start, tmp_path / "none", "--max-length", "3")


def test_products_in_bfloat16_are_asked_for_by_the_environment(start, tmp_path, monkeypatch):
    """They move the loss by their rounding and no more; what is trained and written stays float32."""
    train(start, tmp_path / "wide", "--steps", "20")
    monkeypatch.setenv("NANOPOST_BF16", "1")
    train(start, tmp_path / "half", "--steps", "20")
    told = [[record["loss"] for record in records(tmp_path / name)] for name in ("wide", "half")]
    assert told[1] == pytest.approx(told[0], rel=2e-2) and told[1] != told[0]  # with no cast of old weights
    assert told[0][-1] < 0.6 * told[0][0]
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "half").values())
    said = [json.loads((tmp_path / name / "env.json").read_text())["bf16"] for name in ("wide", "half")]
    assert said == [False, True]
    monkeypatch.setenv("NANOPOST_BF16", "yes")
    with pytest.raises(AssertionError, match="NANOPOST_BF16 must be 0 or 1, got 'yes'"):
        train(start, tmp_path / "neither")


def test_a_batch_that_ranks_cannot_share_is_refused(start, tmp_path):
    with pytest.raises(AssertionError, match="batch_size=7 must be a multiple of the number of ranks"):
        train(start, tmp_path / "run", "--batch-size", "7", ranks=2)


@pytest.mark.slow
def test_gsm8k_as_it_is_published(shared, tmp_path):
    folder = hub_folder(tmp_path / "hub", max_position_embeddings=2048)
    data = shared / "data/gsm8k/train.jsonl"
    printed = train((folder, data), tmp_path / "run", "--steps", "2")
    assert "7473 samples" in printed
    record, chat = read_jsonl(data)[0], load_chat(tmp_path / "run/model")
    assert torch.isfinite(
        load_model(tmp_path / "run/model")(torch.tensor([prompt_ids(chat, record.messages[:1])]))
    ).all()
