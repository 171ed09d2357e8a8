"""Micro-batches: the rows of a step, as many at a time as memory holds.

A gradient is a sum over rows, so their split changes its rounding and nothing else. Where memory runs out, a
step begins again with half as many rows a pass; the batch of the step stays what it is. That is written down

    run/micro_batch-rank1.json    {"rows": 32}

by the rank that ran out, and a resumed run begins with the least. So a sharded run, which cannot begin its
step again, is halved by starting it again: `torchrun --max-restarts 3 … --resume` does so by itself.
"""

import gc
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nanopost import distributed, metrics
from nanopost.atomic import replace_file

T = TypeVar("T")
R = TypeVar("R")
FILES = "micro_batch-rank*.json"
# Of the run that this process is in: its folder, and the rows a pass that memory has come down to.
_run: dict[str, Any] = {"folder": None, "rows": None}


def begin(run: Path | None = None, rows: int | None = None) -> None:
    """Begin a run: what was known of the one before is forgotten.

    Args:
        run: its folder, where sizes are written down; None: nowhere.
        rows: no pass has more of them; None: memory has not run out.
    """
    _run.update(folder=run, rows=rows)
    if run and rows:
        told = f"memory ran out before: at most {rows} rows a pass (--micro-batch)"
        distributed.main_print(f"{told}, as long as {run / FILES} says so")


def read_limit(run: Path) -> int | None:
    """The least rows a pass that memory has come down to in a run; None where it never ran out.

    Raises:
        ValueError: a file is not as it was written; it is named.
    """
    sizes = list[int]()
    for path in sorted(run.glob(FILES)):
        text = path.read_text(encoding="utf-8")
        if not (said := re.fullmatch(r'\{"rows": ([1-9]\d*)\}\n', text)):
            raise ValueError(f'{path}: expected {{"rows": N}} with N above 0, got {text!r}; or remove it')
        sizes.append(int(said[1]))
    return min(sizes, default=None)


def in_parts(
    model: nn.Module,
    rows: Sequence[T],
    act: Callable[[Sequence[T]], R],
    micro_batch: int,
    trained: torch.optim.Optimizer | nn.Module | None = None,
    *,
    desc: str = "train",
) -> list[R]:
    """What `act` makes of the rows, a micro-batch a call; out of memory: all again with half as many.

    The pass that was broken off may have left a part of its gradient behind. So all gradients are dropped,
    and the first row comes first again.

    Args:
        model: what computes. The smaller micro-batch stays, for whatever is computed in this run.
        rows: this rank's.
        act: called in their order; may go backward, and must leave nothing else behind.
        micro_batch: rows a call; the last may have fewer.
        trained: whose gradients are dropped then, an optimiser's or a model's; None: `act` makes none.
        desc: of the progress bar.
    Returns:
        What the calls return, in their order.
    Raises:
        MemoryError: there is no half of one row; or the model is sharded: other ranks already wait in the
            pass that this one cannot end, and what FSDP keeps of it cannot be undone (on one process with
            `--offload` too). A start with `--resume` takes the smaller micro-batch.
    """
    size = max(1, min(micro_batch, len(rows), _run["rows"] or micro_batch))
    while True:
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        try:
            return [act(part) for part in metrics.progress(parts, desc=desc)]
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            told = f"rank {distributed.rank()} is out of memory with {size} rows a pass (--micro-batch)"
            if size == 1:
                raise MemoryError(f"{told}: --recompute, --lora-rank and shorter rows take less") from error
            sharded = any(isinstance(module, FSDPModule) for module in model.modules())
            kept = _write_down(size // 2)
            if sharded or distributed.world_size() > 1:
                raise MemoryError(f"{told}: start again with --micro-batch {size // 2}{kept}") from error
        size //= 2  # the error is gone here, and with it what its frames held
        if trained is not None:
            trained.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        distributed.main_print(f"{told}: {size} from here on, the batch and its gradient stay the same{kept}")


def sum_parts(
    model: nn.Module,
    rows: Sequence[T],
    act: Callable[[Sequence[T]], Mapping[str, float]],
    micro_batch: int,
    trained: torch.optim.Optimizer | None = None,
    *,
    desc: str = "train",
) -> Counter[str]:
    """The numbers that `act` tells of micro-batches, added up by name; all else as `in_parts`."""
    sums: Counter[str] = Counter()
    for part in in_parts(model, rows, act, micro_batch, trained, desc=desc):
        sums.update(part)
    return sums


def _write_down(rows: int) -> str:
    """Keep the size for this process, and in the run folder for the next. Returns where it is, in words."""
    _run["rows"] = rows
    if _run["folder"] is None:
        return ""
    path = _run["folder"] / FILES.replace("*", str(distributed.rank()))
    try:
        replace_file(path, (json.dumps({"rows": rows}) + "\n").encode())
    except OSError as error:
        return f"; {path} does not say so: {error}"
    return f"; {path} says so to a start with --resume"


def _out_of_memory(error: Exception) -> bool:
    """On CUDA an error of its own; else, in a RuntimeError, the words of who found no memory."""
    words = "DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC"
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(said in str(error) for said in words)
