"""When a step goes wrong: it is not taken, it is counted, and what it was made of is kept.

A loss or a gradient that is NaN or infinite says that the step cannot be trusted, and nothing of it shall
reach the weights: one NaN in Adam's moments stays for good. Three such steps in a row are no accident.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nanopost import atomic, checkpoint, distributed, optim
from nanopost.data.schema import Sample

IN_A_ROW = 3  # steps that may go wrong one after the other, less one
_wrong: WeakKeyDictionary[torch.optim.Optimizer, list[int]] = WeakKeyDictionary()  # in a row, and in all


def take_step(
    run: Path,
    step: int,
    optimizer: torch.optim.Optimizer,
    *models: nn.Module,
    max_norm: float,
    loss: float,
    samples: Sequence[Sample],
) -> float:
    """Clip, step and drop the gradients; where loss or gradient is not finite, drop them and nothing else.

    Args:
        run: the run folder; what a step that is not taken was made of goes to skipped/<step>-rank<r>.jsonl.
        step: counted from 0.
        optimizer: over the models' parameters. A step not taken leaves weights, moments and Adam's own count
            as they are, bit for bit; the learning rate is a function of `step` and goes on.
        models: after backward; the gradient of each is clipped apart. All ranks call.
        max_norm: of each gradient over all ranks, see `optim.clip_grad_norm`.
        loss: this rank's part of the step's.
        samples: this rank's, kept when something goes wrong.
    Returns:
        The first model's gradient norm before clipping, the same on every rank; NaN when the step was not
        taken, on any rank's account.
    Raises:
        FloatingPointError: the third step in a row that cannot be taken; it names the files.
    """
    try:
        norm, *_ = [optim.clip_grad_norm(model, max_norm) for model in models]
    except FloatingPointError:
        norm = math.nan
    counts = _wrong.setdefault(optimizer, [0, 0])
    wrong = distributed.all_sum(float(not math.isfinite(loss))) > 0 or not math.isfinite(norm)
    if not wrong:
        optimizer.step()
        counts[0] = 0
    optimizer.zero_grad(set_to_none=True)
    if not wrong:
        return norm
    counts[:] = [counts[0] + 1, counts[1] + 1]
    path = _keep(run, step, loss, norm, samples)
    total = distributed.all_sum(loss)
    told = f"step {step + 1} was not taken: loss {total:.4g}, gradient norm {norm:.4g}; its samples: {path}"
    distributed.main_print(f"{told} ({counts[0]} in a row, {counts[1]} in all)")
    if counts[0] >= IN_A_ROW:
        raise FloatingPointError(f"{told}; the third in a row: no weight has changed since the first of them")
    return math.nan


def save_if_due(
    run: Path, done: int, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int
) -> None:
    """After a step: save a state where one is due, and leave where a signal asked for it.

    A state that cannot be written, because the disk is full or broken, is told; training goes on to the next,
    and a resumed run from the one before. The last one must be written.

    Args:
        run: the run folder.
        done: steps taken so far.
        steps: of the run; the last of them is always saved.
        model, optimizer: see `checkpoint.save_state`. All ranks call.
        every: steps between states; 0: only at the end.
    Raises:
        OSError: the last state cannot be written.
        SystemExit: a signal asked to leave; 143 for SIGTERM, 130 for SIGINT.
    """
    if not (last := done == steps) and not distributed.due(done, every=every):
        return
    told = "the state is saved, --resume goes on from it"
    try:
        checkpoint.save_state(run, done, model, optimizer)
    except OSError as error:
        if last:
            raise
        told = f"the state after step {done} is not saved: {error}; those from before are as they were"
        distributed.main_print(told)
    distributed.leave_if_asked(told, done=last)


def _keep(run: Path, step: int, loss: float, norm: float, samples: Sequence[Sample]) -> Path:
    """Write what a step was made of, a line each; several updates of a step go one after another."""
    path = Path(run) / "skipped" / f"{step:06d}-rank{distributed.rank()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {"step": step, "rank": distributed.rank(), "loss": repr(loss), "grad_norm": repr(norm)}
    with atomic.named(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in [head, *map(asdict, samples)])
    return path


def read_skipped(path: Path | str) -> list[Sample]:
    """The samples of a step that was not taken, to be collated and looked at again."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [Sample(tuple(row["ids"]), tuple(row["mask"])) for row in rows if "ids" in row]
