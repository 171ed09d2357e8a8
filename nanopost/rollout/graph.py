"""What makes a decode step cheap to repeat on a GPU: one launch for all of it, weights cast once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def replayed(step: Callable[[], None]) -> Callable[[], None]:
    """A function that does on a GPU what `step` does, each time it is called.

    The first call runs the step (and compiles what it needs), the second records its kernels as a CUDA graph,
    and from then on all of them are launched at once: a decode step of a small model is mostly launches.

    Args:
        step: reads and writes the same tensors every time, of the same shapes, and asks the host for nothing.
    """
    calls, graph = iter(("run", "record")), torch.cuda.CUDAGraph()

    def run() -> None:
        call = next(calls, "replay")
        if call == "run":
            step()
            return
        if call == "record":
            with torch.cuda.graph(graph):
                step()
        graph.replay()

    return run


@contextmanager
def kept_casts() -> Iterator[None]:
    """Under autocast, weights that train are cast once while the block runs; they must not change in it."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(before)
