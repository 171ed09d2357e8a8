"""The processes of a run: how they begin and leave together, and numbers over all of them.

A script calls these without asking how many ranks there are: each is the identity on one process. Under
torchrun the ranks talk over Gloo on CPU, over NCCL on CUDA (with gloo beside it for Python numbers). What
FSDP2 does to a model is in `fsdp.py`, under the same names here.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar, overload

import torch
import torch.distributed as dist

from nanopost import fsdp
from nanopost.fsdp import bf16, device, gathered, shard

__all__ = [
    "all_sum", "barrier", "bf16", "device", "due", "gathered", "is_main", "join_rows", "leave_if_asked",
    "main_print", "rank", "setup", "shard", "shard_rows", "teardown", "together", "world_size",
]  # fmt: skip

T = TypeVar("T")
EXITS, _asked = {signal.SIGTERM: 143, signal.SIGINT: 130}, set[int]()  # signals to leave, and those noted
# What gloo and NCCL say when a peer's connection is gone, or when it has not come within the time.
LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out", "timeout")


def setup(machine: Any = None) -> None:
    """Join the process group that torchrun announces (nothing to do on one process), and set the precision.

    With `bf16` this process multiplies in bfloat16 from here on (autocast). Weights, optimiser, norms and
    losses stay in float32; sampler and trainer then agree to the rounding of bfloat16, no further.

    A rank that dies makes the others fail in their next exchange: at once where its connection closes, and
    after NANOPOST_TIMEOUT seconds (120 if unset) where it hangs; they say so and end with 1.

    Args:
        machine: a configuration with the flags recompute, offload and replicas (`fsdp.choose`), or none.
    Raises:
        ValueError: as `fsdp.choose`; NANOPOST_TIMEOUT is no number above 0; torchrun is to start ranks again
            with the store of those that died, where they find addresses of the dead (pytorch#135712).
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    again = several and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if again and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        fix = "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and pass --standalone or --rdzv-backend c10d"
        told = f"torchrun --max-restarts {again}: restarted ranks would call those that died"
        raise ValueError(f"{told}; {fix} (docs/scale.md)")
    torch.set_autocast_dtype(device().type, torch.bfloat16)
    torch.set_autocast_enabled(device().type, bf16())
    torch.set_autocast_cache_enabled(False)  # it would keep the weights of the first step
    for number in EXITS if threading.current_thread() is threading.main_thread() else ():
        signal.signal(number, _note)
    places = {name: getattr(machine, name) for name in ("recompute", "offload", "replicas") if machine}
    if several or places.get("offload"):
        if torch.cuda.is_available():
            torch.cuda.set_device(device())
        alone: dict[str, Any] = {} if several else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=_patience()), **alone)
        sys.excepthook = _last_words
    fsdp.choose(**places)


def _patience() -> float:
    """Seconds that a rank waits for the others."""
    value = os.environ.get("NANOPOST_TIMEOUT", "120")
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(f"NANOPOST_TIMEOUT must be a number of seconds above 0, got {value!r}")
    return seconds


def _last_words(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Behind the traceback of a rank that was left alone, what it means and what to do."""
    sys.__excepthook__(kind, error, trace)
    if isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in LOST):
        why = f"rank {rank()} has lost another rank: that one died, or did not come within {_patience():g} s"
        print(f"{why}; start all ranks again with --resume", file=sys.stderr, flush=True)


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


def together(act: Callable[[], Any], *, main: bool = False) -> list[Any]:
    """What each rank's call returns; what one raises, all raise, so that none waits for another.

    Args:
        act: the call.
        main: only rank 0 makes it; the others return None.
    Raises:
        OSError, ValueError: the first rank's that raised one.
    """
    mine: tuple[Any, Exception | None]
    try:
        mine = act() if is_main() or not main else None, None
    except (OSError, ValueError) as error:
        mine = None, error
    parts = join_rows([mine])
    for _, raised in parts:
        if raised:
            raise raised
    return [result for result, _ in parts]


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
        sys.excepthook = sys.__excepthook__
        fsdp.choose()
        # Gloo's threads let go of their last tensors with Python's lock; an interpreter that is already
        # leaving would abort them. The model keeps them alive, so no call joins them: give them a moment.
        time.sleep(0.1)
