"""Save in one move, resume exactly.

A state holds what the next step depends on and the configuration does not say: weights, the optimiser's
moments, and one integer. Data order, learning rate and sampling noise are functions of (seed, step), so on a
CPU a resumed run is the straight run bit for bit. Tensors go to safetensors and the rest to JSON; nothing is
pickled. States are full, not sharded: a run on two ranks may go on with one.

    run/state/step_<n>/model.safetensors  optimizer.safetensors  state.json  MANIFEST.json

The manifest has size and SHA-256 of the other files. A state is gone on from when all of it is as it was
written; one that is not is named and passed over for the one before.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

Tensors = dict[str, torch.Tensor]
MANIFEST = "MANIFEST.json"


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Fill a folder out of sight, then put it in place with a rename.

    Args:
        path: where the folder shall stand; an older one there is replaced once the new one is on disk.
    Yields:
        A temporary sibling to write to. If the block raises, it is removed and the older folder stays as it
        was; after a power cut the leftovers are hidden siblings that the next call for this path cleans up.
    """
    path = Path(path)
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not path.exists():  # cut between the two renames below
        os.rename(old, path)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for item in [*temporary.rglob("*"), temporary]:
            _fsync(item)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def full_state(model: nn.Module) -> Tensors:
    """All weights of a model, whole and on the CPU, tied ones once.

    Args:
        model: as built or sharded; all ranks call, because each has a part to give.
    Returns:
        Tensors by name, to be written at once: on one process they share the model's memory.
    """
    return {name: _full(tensor) for name, tensor in _state(model).items()}


def save_state(
    run: Path | str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int = 2
) -> None:
    """Write run/state/step_<step>/ with its manifest, in one move.

    Args:
        run: the run folder.
        step: steps taken so far, which is the number of the next one.
        model: as built or sharded; tied weights are written once, frozen ones not at all. All ranks call,
            rank 0 writes.
        optimizer: built over the model's parameters.
        keep: how many states stay, the newest ones, ≥ 1.
    Raises:
        ValueError: keep below 1, or the optimiser trains something that is no parameter of the model.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1 state to stay, got {keep}")
    names = {parameter: name for name, parameter in model.named_parameters()}  # one name for tied weights
    strangers = sum(p not in names for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise ValueError(f"optimizer: {strangers} parameters are not the model's (build it after shard)")
    weights = {name: _full(tensor) for name, tensor in _moving(model).items()}
    moments: Tensors = {}
    numbers: dict[str, Any] = {}
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            entry = f"{name}/{key}"
            if isinstance(value, torch.Tensor):
                moments[entry] = _full(value)
            else:
                numbers[entry] = value
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if _is_main():
        folder = Path(run) / "state"
        with atomic_folder(folder / f"step_{step:06d}") as new:
            save_file(weights, new / "model.safetensors")
            save_file(moments, new / "optimizer.safetensors")
            record = {"step": step, "groups": groups, "numbers": numbers, "torch": torch.__version__}
            (new / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            (new / MANIFEST).write_text(_manifest(new, step), encoding="utf-8")
        for older in _states(folder)[:-keep]:
            os.rename(older, older.with_name(f".{older.name}.gone"))  # a state is whole, or no state
        for gone in folder.glob(".*.gone"):
            shutil.rmtree(gone)
    _wait()


def load_state(run: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put the newest whole state of a run back into a model and its optimiser; name those passed over.

    Args:
        run: the run folder. All ranks call and all read.
        model: of the same shapes, sharded or not, whatever it was when saved.
        optimizer: built as it was for the saved run.
    Returns:
        The step to go on with; 0, and nothing touched, where the run had no time to save a state.
    Raises:
        ValueError: there are states and none is whole (nothing is touched then), or names or shapes of the
            weights, or the optimiser's groups, are not the saved ones.
    """
    states, told = _states(Path(run) / "state"), list[str]()
    while states and (found := flaw(states[-1])):
        told.append(f"{states.pop().name} passed over: {found}")
    if told and not states:
        raise ValueError("\n".join([f"resume: {run} holds no whole state to go on from", *told]))
    told += [] if states else [f"resume: {run} holds no state, it begins at the first step"]
    if told and _is_main():
        print("\n".join(told), flush=True)
    if not states:
        return 0
    record = json.loads(((folder := states[-1]) / "state.json").read_text(encoding="utf-8"))
    weights, moments = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    own = _moving(model)
    _same(folder, "shape of", _shapes(own), _shapes(weights))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    _same(folder, "group", dict(enumerate(groups)), dict(enumerate(record["groups"])))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_like(weights[name], tensor))
    optimizer.state.clear()
    parameters = {name: parameter for parameter, name in names.items()}
    for entry, value in {**moments, **record["numbers"]}.items():
        name, key = entry.rsplit("/", 1)
        is_moment = isinstance(value, torch.Tensor) and value.shape == parameters[name].shape
        optimizer.state[parameters[name]][key] = _like(value, parameters[name]) if is_moment else value
    _wait()
    return int(record["step"])


def flaw(folder: Path) -> str | None:
    """What is not as it was written in a state's folder, by its manifest; None when all of it is."""
    path = folder / MANIFEST
    try:
        text, step = path.read_text(encoding="utf-8"), int(folder.name.removeprefix("step_"))
        kept, found = json.loads(text)["files"], json.loads(now := _manifest(folder, step))["files"]
        for name in sorted({*kept, *found}):
            if kept.get(name) != found.get(name):
                return f"{name} is {found.get(name, 'missing')}, written was {kept.get(name, 'none')}"
        return None if text == now else f"{MANIFEST} is not the one of step {step}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} does not read ({type(error).__name__}: {error})"


def _manifest(folder: Path, step: int) -> str:
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    entries = {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    return json.dumps({"step": step, "files": entries}, indent=2) + "\n"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(model: nn.Module) -> Tensors:
    """Parameters and buffers that a state holds, tied ones under their first name only."""
    first, tensors = dict[Any, str](), model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        first.setdefault(tensor, name)
    return {name: tensors[name] for name in first.values()}


def _moving(model: nn.Module) -> Tensors:
    """Those that training moves: frozen parameters are where the configuration says."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in _state(model).items() if name not in frozen}


def _shapes(tensors: Tensors) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on the CPU, gathered from all ranks where it is sharded."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def _like(value: torch.Tensor, model_tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor as the model holds its own: on its device, sharded where that one is."""
    value = value.to(model_tensor.device)
    if isinstance(model_tensor, DTensor):
        return distribute_tensor(value, model_tensor.device_mesh, model_tensor.placements)
    return value


def _same(folder: Path, what: str, own: dict[Any, Any], saved: dict[Any, Any]) -> None:
    for key in [*own, *(key for key in saved if key not in own)]:
        if own.get(key) != saved.get(key):
            raise ValueError(f"{folder}: {what} {key!r}: saved {saved.get(key)}, this run has {own.get(key)}")


def _states(folder: Path) -> list[Path]:
    """Complete states, oldest first; a folder that was never renamed into place has another name."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
