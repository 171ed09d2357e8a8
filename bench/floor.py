"""The hardware's floor: the products of an iteration's linear layers, the fastest way there is.

No attention, no norms, no softmax, no sampling; a prompt that several completions share counts once, padding
not at all. So the share of the floor that we reach is never flattered. `passes` lists what an iteration must
run, as (tokens, tokens that reach the head, trained); a decode step is a pass of as many tokens as there are
live rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.worker import Turn, loop

Product = Callable[[Tensor, bool], object]
COPY = 1 << 28  # bytes read, and as many written
ROWS, COLUMNS = 512, 1024  # of a tile: 2 MB in float32


def layer_shapes(width: int) -> list[tuple[int, int]]:
    """(in, out) of q, k, v, o, gate, up, down in the models of `bench.ours.model_folder`."""
    square, half = (width, width), (width, width // 2)
    return [square, half, half, square, (width, 3 * width), (width, 3 * width), (3 * width, width)]


def flops(passes: list, *, width: int, layers: int = 0, vocabulary: int, **_: Any) -> float:
    """Multiplications and additions of these passes: 2 a weight and token, 6 where it is trained."""
    layer = layers * sum(a * b for a, b in layer_shapes(width))
    work = [((6 if t else 2), tokens * layer + scored * width * vocabulary) for tokens, scored, t in passes]
    return float(sum(factor * products for factor, products in work))


def product(weight: Tensor, way: str, tokens: int) -> Product:
    """x to x Wᵀ and, where W is trained, the two products of its backward.

    "packed": W is laid out once as MKL or oneDNN likes it; a weight in training cannot be. "tiled": tiles
    that stay in the cache, for a head whose logits would not.
    """
    if way == "tiled":
        return tiled(weight)
    if way == "packed MKL":
        ready = torch.ops.mkl._mkl_reorder_linear_weight(weight, tokens)
        return lambda x, trained: torch.ops.mkl._mkl_linear(x, ready, weight, None, len(x))
    if way == "packed oneDNN":
        ready = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
        return lambda x, trained: torch.ops.mkldnn._linear_pointwise(x, ready, None, "none", [], "")

    def plain(x: Tensor, trained: bool) -> None:
        y = F.linear(x, weight)
        if trained:
            torch.mm(y, weight), torch.mm(y.T, x)

    return plain


def tiled(weight: Tensor) -> Product:
    """The same, a tile of ROWS × COLUMNS at a time."""
    buffer, weight_grad = torch.empty(ROWS * COLUMNS), torch.zeros_like(weight)

    def run(x: Tensor, trained: bool) -> None:
        grad = torch.zeros_like(x)
        for rows, grad_rows in zip(x.split(ROWS), grad.split(ROWS), strict=True):
            for part, grad_part in zip(weight.split(COLUMNS), weight_grad.split(COLUMNS), strict=True):
                tile = buffer[: len(rows) * len(part)].view(len(rows), len(part))
                torch.mm(rows, part.T, out=tile)
                if trained:
                    grad_rows.addmm_(tile, part)
                    grad_part.addmm_(tile.T, rows)

    return run


@torch.no_grad()
def products(
    work: Path, turn: Turn, *, passes: list, width: int, layers: int = 0, vocabulary: int, way: str, **_: Any
) -> None:
    """Run the passes. Every layer has weights of its own, so they come from memory as in a model."""
    torch.set_float32_matmul_precision("medium" if way == "oneDNN" else "highest")
    random, usual = torch.Generator().manual_seed(0), statistics.mode(tokens for tokens, *_ in passes)
    weights = [torch.randn(b, a, generator=random) for a, b in layer_shapes(width) * layers]
    weights.append(torch.randn(vocabulary, width, generator=random))
    run = [product(weight, way, usual) for weight in weights]
    inputs = {
        (count, size): torch.randn(count, size, generator=random)
        for tokens, scored, _ in passes
        for count, size in ((tokens, width), (tokens, 3 * width), (scored, width))
    }

    def iterate() -> None:
        for tokens, scored, trained in passes:
            for weight, multiply in zip(weights, run, strict=True):
                multiply(inputs[scored if weight is weights[-1] else tokens, weight.shape[1]], trained)

    loop(turn, iterate, lambda _: {"copy": torch.tensor(copy_bandwidth())})


def copy_bandwidth() -> float:
    """Bytes read and written a second by one thread's copy, the best of five."""
    source = torch.ones(COPY, dtype=torch.uint8)
    target, times = torch.empty_like(source), []
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * COPY / min(times)
