"""Exact resume, atomic folders, states that survive what happens to processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nanopost import atomic, checkpoint, optim


class Model(nn.Module):
    """Tied weights, a buffer, a frozen parameter and one that never gets a gradient."""

    def __init__(self, seed: int, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2, 2))
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))) * self.scale)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return optim.adamw(model, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, end: int) -> None:
    """Steps whose data are a function of the step alone."""
    for step in range(start, end):
        optim.set_lr(optimizer, 0.1 * optim.schedule(step, steps=9, warmup=2, kind="cosine", final=0.1))
        ids = torch.randint(7, (5, 6), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """What moves, and its moments; a frozen parameter is where it was built."""
    moving = {name: tensor for name, tensor in model.state_dict().items() if name != "frozen"}
    found = {name: tensor.numpy().tobytes() for name, tensor in moving.items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{key}"] = value.numpy().tobytes()
    return found


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_resume_is_the_straight_run_bit_for_bit(tmp_path: Path, stop: int) -> None:
    straight = Model(0)
    straight_optimizer = optimizer_of(straight)
    train(straight, straight_optimizer, 0, 9)

    first = Model(0)
    first_optimizer = optimizer_of(first)
    train(first, first_optimizer, 0, stop)
    checkpoint.save_state(tmp_path, stop, first, first_optimizer)

    second = Model(99)  # other weights, to be overwritten
    second_optimizer = optimizer_of(second)
    train(second, second_optimizer, 0, 2)  # and a state of its own
    step = checkpoint.load_state(tmp_path, second, second_optimizer)
    assert step == stop
    train(second, second_optimizer, step, 9)
    assert bits(second, second_optimizer) == bits(straight, straight_optimizer)
    assert second.head.weight is second.embed.weight


def test_a_state_before_the_first_step(tmp_path: Path) -> None:
    model, other = Model(0), Model(1)
    checkpoint.save_state(tmp_path, 0, model, optimizer_of(model))
    optimizer = optimizer_of(other)
    assert checkpoint.load_state(tmp_path, other, optimizer) == 0
    assert bits(other, optimizer) == bits(model, optimizer_of(model))


def test_without_a_state_a_run_begins_and_nothing_is_touched(tmp_path: Path, capsys) -> None:
    model = Model(0)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    before = bits(model, optimizer)
    assert checkpoint.load_state(tmp_path, model, optimizer) == 0
    assert f"resume: {tmp_path} holds no state, it begins at the first step" in capsys.readouterr().out
    checkpoint.save_state(tmp_path, 2, model, optimizer)
    (tmp_path / "state/step_000002/state.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds no whole state to go on from\nstep_000002 passed over: state.json"
    ):
        checkpoint.load_state(tmp_path, model, optimizer)
    assert bits(model, optimizer) == before


def test_the_newest_states_stay_and_hold_no_pickle(tmp_path: Path) -> None:
    model = Model(0)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 1)
    for step in (999_999, 2, 1_000_000, 40):
        checkpoint.save_state(tmp_path, step, model, optimizer, keep=3)
    states = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert states == ["step_000040", "step_1000000", "step_999999"]
    assert checkpoint.load_state(tmp_path, model, optimizer) == 1_000_000
    files = sorted(path.name for path in (tmp_path / "state/step_000040").iterdir())
    assert files == ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    weights = load_file(tmp_path / "state/step_000040/model.safetensors")
    assert "head.weight" not in weights and "embed.weight" in weights  # tied: one copy
    assert checkpoint.full_state(model).keys() == {*weights, "frozen"}


def test_keep_and_strangers_are_checked(tmp_path: Path) -> None:
    model = Model(0)
    with pytest.raises(ValueError, match=r"keep: .* got 0"):
        checkpoint.save_state(tmp_path, 1, model, optimizer_of(model), keep=0)
    with pytest.raises(ValueError, match="optimizer: 4 parameters are not the model's"):
        checkpoint.save_state(tmp_path, 1, model, optimizer_of(Model(0)))


def test_another_model_or_optimiser_is_refused(tmp_path: Path) -> None:
    model = Model(0)
    checkpoint.save_state(tmp_path, 3, model, optimizer_of(model))
    wide = Model(0, width=5)
    with pytest.raises(ValueError, match=r"shape of 'embed.weight': saved \[7, 4\], this run has \[7, 5\]"):
        checkpoint.load_state(tmp_path, wide, optimizer_of(wide))
    less = Model(0)
    less.unused.requires_grad_(False)
    with pytest.raises(ValueError, match=r"shape of 'unused': saved \[2, 2\], this run has None"):
        checkpoint.load_state(tmp_path, less, optimizer_of(less))
    with pytest.raises(ValueError, match=r"group 0: saved .*'unused'"):
        checkpoint.load_state(tmp_path, model, torch.optim.AdamW([model.embed.weight]))


# ---- atomic folders


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_appears_whole_and_replaces_the_older(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    for text in ("one", "two"):
        with atomic.atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / f"{text}.txt").write_text(text)
            assert not (target / "sub" / f"{text}.txt").exists()
        assert contents(target) == {f"sub/{text}.txt": text}
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_an_error_leaves_the_older_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic.atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic.atomic_folder(target) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("disk full")
    assert contents(target) == {"a": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


KILLED = """
import os, sys
from nanopost import atomic
where, renames = sys.argv[1], int(sys.argv[2])
real = os.rename
def rename(source, target):
    global renames
    if renames == 0:
        os._exit(9)  # the machine goes out: no handler runs
    renames -= 1
    real(source, target)
os.rename = rename
with atomic.atomic_folder(where) as folder:
    (folder / "a").write_text("new")
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_power_cut_at_any_moment_loses_nothing(tmp_path: Path, renames: int) -> None:
    target = tmp_path / "model"
    with atomic.atomic_folder(target) as folder:
        (folder / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(renames)], timeout=60)
    assert done.returncode == 9
    kept = target if renames == 0 else tmp_path / ".model.old"
    assert contents(kept) == {"a": "old"}
    with pytest.raises(RuntimeError), atomic.atomic_folder(target):
        raise RuntimeError("and the next writer fails too")
    assert contents(target) == {"a": "old"}  # put back
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_cut_while_saving_leaves_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(0)
    optimizer = optimizer_of(model)
    train(model, optimizer, 0, 2)
    checkpoint.save_state(tmp_path, 2, model, optimizer)
    before = bits(model, optimizer)
    train(model, optimizer, 2, 4)

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.json, "dumps", cut)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_state(tmp_path, 4, model, optimizer)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000002"]
    assert checkpoint.load_state(tmp_path, model, optimizer) == 2
    assert bits(model, optimizer) == before
