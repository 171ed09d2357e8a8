"""Save in one move, resume exactly.

A state holds what the next step depends on and the configuration does not say: weights, the optimiser's
moments, and one integer. Data order, learning rate and sampling noise are functions of (seed, step), so on a
CPU a resumed run is the straight run bit for bit. Tensors go to safetensors and the rest to JSON; nothing is
pickled. Each rank writes what it holds, and any number of ranks reads what it needs of it.

    run/state/step_<n>/model.safetensors  optimizer.safetensors
                       state.json  args.json  env.json  MANIFEST.json

Two ranks write model-00001-of-00002.safetensors and so on. args.json and env.json say what the run was
started with. The manifest has size and SHA-256 of the other files, and comes last. A state is gone on from
when all of it is as it was written; one that is not is named, put aside, and passed over for the one before.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nanopost import atomic, distributed, shards

Tensors = dict[str, torch.Tensor]
MANIFEST = "MANIFEST.json"


def full_state(model: nn.Module) -> Tensors:
    """All weights of a model, whole and on the CPU, tied ones once.

    Args:
        model: as built or sharded; all ranks call, because each has a part to give.
    Returns:
        Tensors by name, to be written at once: they may share the model's memory. Ranks but 0 get none.
    """
    gathered = ((name, _full(tensor)) for name, tensor in _state(model).items())
    return {name: tensor for name, tensor in gathered if distributed.is_main()}


def save_state(
    run: Path | str, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, keep: int = 2
) -> None:
    """Write run/state/step_<step>/ with its manifest, in one move.

    Args:
        run: the run folder, on a disk that all ranks see.
        step: steps taken so far, which is the number of the next one.
        model: as built or sharded; tied weights are written once, frozen ones not at all. All ranks call, and
            each writes its own part.
        optimizer: built over the model's parameters.
        keep: how many states stay, the newest ones, ≥ 1.
    Raises:
        ValueError: keep below 1, or the optimiser trains something that is no parameter of the model.
        OSError: on every rank, when one could not write; the states from before are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1 state to stay, got {keep}")
    names = {parameter: name for name, parameter in model.named_parameters()}  # one name for tied weights
    strangers = sum(p not in names for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise ValueError(f"optimizer: {strangers} parameters are not the model's (build it after shard)")
    weights, moments, numbers = _moving(model), Tensors(), dict[str, Any]()
    for parameter, name in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            (moments if isinstance(value, torch.Tensor) else numbers)[f"{name}/{key}"] = value
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    record = {"step": step, "groups": groups, "numbers": numbers, "torch": torch.__version__}
    path = Path(run) / "state" / f"step_{step:06d}"
    ranks, here = distributed.world_size(), distributed.rank()
    part = f"-{here + 1:05d}-of-{ranks:05d}" if ranks > 1 else ""

    def write_part() -> dict[str, Any]:
        for what, tensors in (("model", weights), ("optimizer", moments)):
            shards.write_part(atomic.hidden(path) / f"{what}{part}.safetensors", tensors)
        return _entries(atomic.hidden(path).glob(f"*{part}.safetensors"))

    def finish() -> None:
        new, entries = atomic.hidden(path), {name: entry for part in parts for name, entry in part.items()}
        (new / "state.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for file in (Path(run) / "args.json", Path(run) / "env.json"):
            if file.exists():
                shutil.copyfile(file, new / file.name)
        entries |= _entries(new.glob("*.json"))
        (new / MANIFEST).write_text(_manifest(step, entries), encoding="utf-8")
        atomic.finish(new, path)
        for older in _states(path.parent)[:-keep]:
            os.rename(older, older.with_name(f".{older.name}.gone"))  # a state is whole, or no state
        for left in [*path.parent.glob(".*.gone"), *path.parent.glob(".*.tmp")]:
            shutil.rmtree(left, ignore_errors=True)  # the state is in its place: the next save tidies again

    try:
        distributed.together(lambda: atomic.begin(path), main=True)
        parts = distributed.together(write_part)
        with atomic.named(path):
            distributed.together(finish, main=True)
    except BaseException:
        if distributed.is_main():
            shutil.rmtree(atomic.hidden(path), ignore_errors=True)
        raise


def load_state(run: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put the newest whole state of a run back into a model and its optimiser; name those passed over.

    Args:
        run: the run folder. All ranks call; rank 0 chooses, each reads its own part.
        model: of the same shapes, sharded or not, whatever it was when saved.
        optimizer: built as it was for the saved run.
    Returns:
        The step to go on with; 0, and nothing touched, where the run had no time to save a state.
    Raises:
        ValueError: there are states and none is whole (nothing is touched then), or names or shapes of the
            weights, or the optimiser's groups, are not the saved ones.
    """
    folder = distributed.together(lambda: _choose(Path(run)), main=True)[0]
    if folder is None:
        return 0
    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    weights, moments = (shards.read_index(folder.glob(f"{x}*.safetensors")) for x in ("model", "optimizer"))
    own = _moving(model)
    saved = {name: shards.whole_shape(weights, name) for name in weights}
    _same(folder, "shape of", {name: list(tensor.shape) for name, tensor in own.items()}, saved)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    _same(folder, "group", dict(enumerate(groups)), dict(enumerate(record["groups"])))
    with torch.no_grad():
        for name, tensor in own.items():
            shards.local(tensor).copy_(shards.read_part(weights, name, shards.place_of(tensor)[0]))
    optimizer.state.clear()
    parameters = {name: parameter for parameter, name in names.items()}
    for entry in [*moments, *record["numbers"]]:
        name, key = entry.rsplit("/", 1)
        value = _moment(moments, entry, parameters[name]) if entry in moments else record["numbers"][entry]
        optimizer.state[parameters[name]][key] = value
    distributed.barrier()
    return int(record["step"])


def _moment(moments: shards.Index, entry: str, parameter: torch.Tensor) -> torch.Tensor:
    """What the optimiser keeps of a parameter: of its shape and lying as it does, or a number."""
    if shards.whole_shape(moments, entry) != list(parameter.shape):
        return shards.read_part(moments, entry, ()).to(parameter.device)
    moment = torch.empty_like(parameter, requires_grad=False)
    shards.local(moment).copy_(shards.read_part(moments, entry, shards.place_of(parameter)[0]))
    return moment


def _choose(run: Path) -> Path | None:
    """The newest state that is whole; newer ones are put aside under another name, and told."""
    states, told = _states(run / "state"), list[str]()
    while states and (found := flaw(states[-1])):
        told.append(f"{states.pop().name} passed over: {found}")
    if told and not states:
        raise ValueError("\n".join([f"resume: {run} holds no whole state to go on from", *told]))
    for path in _states(run / "state")[len(states) :]:
        shutil.rmtree(aside := path.with_name(f".{path.name}.flawed"), ignore_errors=True)
        os.rename(path, aside)
    told += [] if states else [f"resume: {run} holds no state, it begins at the first step"]
    if told:
        print("\n".join(told), flush=True)
    return states[-1] if states else None


def flaw(folder: Path) -> str | None:
    """What is not as it was written in a state's folder, by its manifest; None when all of it is."""
    path = folder / MANIFEST
    try:
        text, step = path.read_text(encoding="utf-8"), int(folder.name.removeprefix("step_"))
        files = [file for file in folder.iterdir() if file.name != MANIFEST and file.name[0] != "."]
        kept, found = json.loads(text)["files"], _entries(files)
        for name in sorted({*kept, *found}):
            if kept.get(name) != found.get(name):
                return f"{name} is {found.get(name, 'missing')}, written was {kept.get(name, 'none')}"
        return None if text == _manifest(step, found) else f"{MANIFEST} is not the one of step {step}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} does not read ({type(error).__name__}: {error})"


def _entries(files: Iterable[Path]) -> dict[str, Any]:
    return {path.name: {"size": path.stat().st_size, "sha256": atomic.sha256(path)} for path in files}


def _manifest(step: int, entries: dict[str, Any]) -> str:
    return json.dumps({"step": step, "files": dict(sorted(entries.items()))}, indent=2) + "\n"


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


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on the CPU, gathered from all ranks where it is sharded."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def _same(folder: Path, what: str, own: dict[Any, Any], saved: dict[Any, Any]) -> None:
    for key in [*own, *(key for key in saved if key not in own)]:
        if own.get(key) != saved.get(key):
            raise ValueError(f"{folder}: {what} {key!r}: saved {saved.get(key)}, this run has {own.get(key)}")


def _states(folder: Path) -> list[Path]:
    """Complete states, oldest first; a folder that was never renamed into place has another name."""
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))
