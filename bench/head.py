"""How a head is run, ours and everybody's: the same tensors, the same loop, whatever the function.

A problem of 64 tokens comes first. It belongs to the build: what a process loads with its first product is
not the memory of an iteration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.inputs import linear_problem
from bench.worker import Turn, loop

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, D), weight (V, D), target ids (N,)
Results = dict[str, Tensor]


def run(head: Head, hidden: Tensor, weight: Tensor, target_ids: Tensor, upstream: Tensor | None) -> Results:
    """Its value, and both gradients where the leaves ask for them; `upstream` is the value's own gradient."""
    hidden.grad = weight.grad = None
    value = head(hidden, weight, target_ids)
    if not value.requires_grad:
        return {"value": value}
    value.backward(upstream)
    return {"value": value.detach(), "hidden": hidden.grad, "weight": weight.grad}


def time_loss(turn: Turn, head: Head, *, count: int, width: int, vocabulary: int, **_: Any) -> None:
    """A head that gives the mean cross-entropy, forward and backward."""
    serve(turn, head, (count, width, vocabulary), backward=True, uniform=True)


def time_logps(
    turn: Turn, head: Head, *, count: int, width: int, vocabulary: int, backward: bool, **_: Any
) -> None:
    """A head that gives a log-probability each; backward with a gradient of its own for each."""
    serve(turn, head, (count, width, vocabulary), backward=backward, uniform=False)


def serve(turn: Turn, head: Head, shape: tuple[int, int, int], *, backward: bool, uniform: bool) -> None:
    def problem(count: int, width: int, vocabulary: int) -> list[Any]:
        hidden, weight, target_ids, upstream = linear_problem(count, width, vocabulary)
        leaves = [leaf.requires_grad_(backward) for leaf in (hidden, weight)]
        return [*leaves, target_ids, None if uniform else upstream]

    run(head, *problem(64, shape[1], 1024))
    given = problem(*shape)
    loop(turn, lambda: run(head, *given), lambda results: results)
