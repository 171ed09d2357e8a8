"""Micro-batches: the rows of a step, as many at a time as memory holds.

A gradient is a sum over rows, so their split changes its rounding and nothing else. Where memory runs out, a
step begins again with half as many rows a pass; the batch of the step stays what it is.
"""

import gc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from nanopost import distributed, metrics

T = TypeVar("T")
R = TypeVar("R")
_fits: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # rows a pass, where memory has run out


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
        model: whose size it is; it keeps the smaller micro-batch from here on, for whatever it does.
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
            `--offload` too). It says what to start again with.
    """
    size = max(1, min(micro_batch, len(rows), _fits.get(model, micro_batch)))
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
            if sharded or distributed.world_size() > 1:
                fix = f"start again with --micro-batch {size // 2}"
                raise MemoryError(f"{told}: {fix}, and --resume where a state is saved") from error
        size //= 2  # the error is gone here, and with it what its frames held
        _fits[model] = size
        if trained is not None:
            trained.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        distributed.main_print(f"{told}: {size} from here on; the batch and its gradient stay the same")


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


def _out_of_memory(error: Exception) -> bool:
    """On CUDA an error of its own; else, in a RuntimeError, the words of who found no memory."""
    words = "DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC"
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or any(said in str(error) for said in words)
