"""FSDP2 in a dozen functions, each the identity on one process.

A script calls them without asking how many ranks there are. Under torchrun every rank holds a shard of each
parameter (`fully_shard`, one group a decoder block and one for the rest); gradients are *summed* over ranks,
never averaged, because losses are divided by the denominator of the whole optimiser step before backward. So
the number of ranks cannot change the gradient. Gloo on CPU, NCCL on CUDA (with gloo beside it for Python
numbers).

Sampling needs care: ranks decode different numbers of tokens, so a collective inside a forward pass would
hang. `gathered` puts all weights in place first and keeps them there until its block ends.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

T = TypeVar("T")
EXITS, _asked = {signal.SIGTERM: 143, signal.SIGINT: 130}, set[int]()  # signals to leave, and those noted
M = TypeVar("M", bound=nn.Module)
METHODS = ("logps", "next_logits", "values", "scores")  # what a model can be asked beside its forward pass


def bf16() -> bool:
    """Whether products are in bfloat16: on a GPU unless NANOPOST_BF16=0, on a CPU if NANOPOST_BF16=1.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get("NANOPOST_BF16", "1" if torch.cuda.is_available() else "0")
    if value not in ("0", "1"):
        raise ValueError(f"NANOPOST_BF16 must be 0 or 1, got {value!r}")
    return value == "1"


def setup() -> None:
    """Join the process group that torchrun announces (nothing to do on one process), and set the precision.

    With `bf16` this process multiplies in bfloat16 from here on (autocast). Weights, optimiser, norms and
    losses stay in float32; sampler and trainer then agree to the rounding of bfloat16, no further.
    """
    torch.set_autocast_dtype(device().type, torch.bfloat16)
    torch.set_autocast_enabled(device().type, bf16())
    torch.set_autocast_cache_enabled(False)  # it would keep the weights of the first step
    for number in EXITS if threading.current_thread() is threading.main_thread() else ():
        signal.signal(number, _note)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def _note(number: int, _: Any) -> None:
    """SIGTERM and SIGINT are noted once, to leave after the step; the second of a kind ends at once."""
    if number in _asked:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _asked.add(number)
    os.write(2, b"asked to leave: after this step, once its state is saved\n")


def due(step: int, *, every: int) -> bool:
    """Whether a state is to be saved after so many steps: every so often, and when any rank is to leave."""
    return bool(every and step % every == 0) or bool(_exit_code())


def leave_if_asked(told: str, *, done: bool) -> None:
    """After a state is saved, or `told` why not: leave where a signal asked for it, unless all is done."""
    if not done and (code := _exit_code()):
        main_print(f"asked to leave: {told}")
        teardown()
        raise SystemExit(code)


def _exit_code() -> int:
    """143 when any rank was sent SIGTERM, 130 for SIGINT, else 0."""
    counts = all_sum({str(code): float(number in _asked) for number, code in EXITS.items()})
    return int(next((code for code, count in counts.items() if count), 0))


def rank() -> int:
    """This process's number among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes (rank 0)."""
    return rank() == 0


def device() -> torch.device:
    """Where this process computes: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def shard(model: M) -> M:
    """Move a model to `device()` and shard its parameters over all ranks, block by block, in place.

    Args:
        model: the same weights on every rank, decoder blocks in `model.model.layers`; those of METHODS that
            it has become ways to run it beside the forward pass.
    Returns:
        The same model; sharded already, it stays as it is. Gradients after backward are sums over ranks.
        Outside a forward or backward pass and outside `gathered`, its parameters are DTensors: build the
        optimiser after this call.
    Every rank must run the same number of forward and backward passes, with or without supervised tokens.
    """
    model = model if isinstance(model, FSDPModule) else model.to(device())
    if world_size() == 1 or isinstance(model, FSDPModule):
        return model
    mesh = init_device_mesh(device().type, (world_size(),))
    blocks: list[Any] = list(model.model.layers)  # type: ignore[union-attr, arg-type]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The root frees its weights too: for one gather more, nothing stale can outlive an optimiser step.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in _units(model):  # the setters are not recursive; gloo cannot scale inside a reduction
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in METHODS:
        if hasattr(model, name):
            setattr(model, name, _copied(getattr(model, name)))
            register_fsdp_forward_method(model, name)
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """Hold all weights on every rank while the block runs, so that forward passes need no other rank.

    Args:
        model: sharded by `shard`, or any model on one process. All ranks enter and leave together; inside,
            each may run as many forward passes as it likes, none included. No backward inside.
    Yields:
        The same model.
    """
    for module in _units(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield model
    finally:
        for module in _units(model):
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def _copied(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """FSDP hangs its backward hook on the output, and a view could lose it: hand out a copy."""
    return lambda *args, **kwargs: method(*args, **kwargs).clone()


def _units(model: nn.Module) -> list[FSDPModule]:
    """Every module that FSDP shards on its own, the root first; empty on one process."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@overload
def all_sum(x: float | torch.Tensor) -> float: ...
@overload
def all_sum(x: Mapping[str, Any]) -> dict[str, float]: ...
@overload
def all_sum(x: Sequence[Any]) -> list[float]: ...
def all_sum(x: Any) -> Any:
    """Sum numbers over all ranks, in float64.

    Args:
        x: a number (or tensor of one element), a sequence of them, or a dict of them with the same keys, in
            the same order, on every rank.
    Returns:
        The sums as Python floats in the same shape; `float(x)` on one process.
    """
    if isinstance(x, Mapping):
        return dict(zip(x, all_sum(list(x.values())), strict=True))
    if isinstance(x, Sequence):
        numbers = [value.item() if isinstance(value, torch.Tensor) else value for value in x]
        total = torch.tensor(numbers, dtype=torch.float64)
        if world_size() > 1 and len(total):
            dist.all_reduce(total)
        return total.tolist()
    return all_sum([x])[0]


def shard_rows(items: Sequence[T]) -> list[T]:
    """This rank's contiguous part of a list that all ranks share.

    Args:
        items: rows in the global order. For rows that go through backward, make their number divide by the
            ranks (and group rows adjacent), so that every rank runs as many passes as the others.
    Returns:
        Rows ⌊n·rank/world⌋ to ⌊n·(rank+1)/world⌋; joined over ranks they are `items` again.
    """
    count, here, ranks = len(items), rank(), world_size()
    return list(items[count * here // ranks : count * (here + 1) // ranks])


def join_rows(rows: Sequence[T]) -> list[T]:
    """Every rank's rows as one list that all ranks share, in the order of the ranks: `shard_rows` undone.

    Args:
        rows: this rank's part, of any length; numbers, strings or tensors on the CPU. A tensor that is a view
            travels with all that it is a view of: clone it first.
    Returns:
        The whole list.
    """
    if world_size() == 1:
        return list(rows)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, list(rows))
    return [row for part in parts for row in part]


def main_print(*values: object) -> None:
    """Print on rank 0 only, at once."""
    if is_main():
        print(*values, flush=True)


def barrier() -> None:
    """Wait until every rank is here."""
    all_sum(0.0)


def teardown() -> None:
    """Leave the process group, and let go of the signals; call it last."""
    _asked.clear()
    for number in EXITS if signal.getsignal(signal.SIGTERM) is _note else ():
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()
        # Gloo's threads let go of their last tensors with Python's lock; an interpreter that is already
        # leaving would abort them. The model keeps them alive, so no call joins them: give them a moment.
        time.sleep(0.1)
