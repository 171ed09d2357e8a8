"""A step that is run many times: as it is on a CPU, as one recorded CUDA graph on a GPU."""

from collections.abc import Callable

import torch


def replayed(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A function that does what `step` does, each time it is called.

    On a GPU the first call runs the step (and compiles what it needs), the second records its kernels, and
    from then on all of them are launched at once: a decode step of a small model is otherwise mostly
    launches.

    Args:
        step: reads and writes the same tensors every time, of the same shapes, and asks the host for nothing.
        device: where these tensors are.
    """
    if device.type != "cuda":
        return step
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
