"""The rows of the CUDA table about what a token does by itself: RMSNorm, SwiGLU, RoPE.

They are called as the model calls them. Both passes are checked against the formula in float64, on a small
case and on all of the tensors that are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.cuda_measure import (
    Ceilings,
    Left,
    Mark,
    Wrong,
    close,
    gate_bytes,
    norm_bytes,
    random,
    rope_bytes,
    sampled,
    share,
)
from nanopost.kernels import dispatch, pointwise

TOKENS, WIDTH, INSIDE, HEADS, HEAD_DIM = 16_384, 4096, 14_336, 32, 128
EPS, BAR = 1e-5, 0.88
ROUNDED = 2 * torch.finfo(torch.bfloat16).eps  # of an entry: more than two roundings make


@dataclass(frozen=True)
class Function:
    """What is timed, what it must equal, and the bytes of both passes at `TOKENS` tokens."""

    ours: Callable[..., Tensor]
    slow: Callable[..., Tensor]
    inputs: Callable[[int], list[Tensor]]  # of so many tokens
    trained: int  # how many of the inputs, the first ones, get a gradient
    work: tuple[int, int]


def slow_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def slow_gate(gate: Tensor, up: Tensor) -> Tensor:
    return gate * gate.sigmoid() * up


def slow_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (left, right), cos, sin = x.chunk(2, -1), cos[:, None], sin[:, None]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def heads(tokens: int) -> list[Tensor]:
    """Heads, and cosines and sines of random angles."""
    angles = random(tokens, HEAD_DIM // 2, dtype=torch.float32, scale=100.0)
    return [random(tokens, HEADS, HEAD_DIM), angles.cos().bfloat16(), angles.sin().bfloat16()]


FUNCTIONS = {
    "rms_norm": Function(
        partial(pointwise.rms_norm, eps=EPS),
        slow_norm,
        lambda tokens: [random(tokens, WIDTH), random(WIDTH)],
        2,
        norm_bytes(TOKENS, WIDTH),
    ),
    "swiglu": Function(
        pointwise.swiglu,
        slow_gate,
        lambda tokens: [random(tokens, INSIDE), random(tokens, INSIDE)],
        2,
        gate_bytes(TOKENS * INSIDE),
    ),
    "rope": Function(pointwise.rope, slow_rope, heads, 1, rope_bytes(TOKENS, HEADS, HEAD_DIM)),
}


def both_passes(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], trained: int, pull: Tensor
) -> list[Tensor]:
    """The result and the gradients of the first inputs under an upstream gradient."""
    inputs = [x.detach().requires_grad_(i < trained) for i, x in enumerate(inputs)]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs[:trained], pull)]


def check(name: str, function: Function, inputs: list[Tensor]) -> None:
    """Entries within two roundings of bfloat16 and 2 % of the mean entry: a sum over all tokens cancels."""
    if not dispatch.fused(*inputs):
        raise Wrong(f"{name} does not take the Triton path on this machine")
    pull = torch.randn_like(inputs[0])
    found = both_passes(function.ours, inputs, function.trained, pull)
    exact = both_passes(function.slow, [x.double() for x in inputs], function.trained, pull.double())
    for part, x, wanted in zip(("result", "first gradient", "second gradient"), found, exact, strict=False):
        atol = 0.02 * float(wanted.abs().mean())
        close(f"{name} of {len(inputs[0]):,} tokens, {part}", x, wanted, rtol=ROUNDED, atol=atol)


def row(name: str, ceilings: Ceilings, left: Left) -> list[Mark]:
    """One of the functions, forward and backward."""
    function = FUNCTIONS[name]
    for tokens in (61, TOKENS):
        check(name, function, function.inputs(tokens))
    torch.cuda.empty_cache()  # float64 takes four times as much
    calls, pulls = [], []
    for _ in range(2):
        inputs = function.inputs(TOKENS)
        calls.append(partial(function.ours, *inputs))
        leaves = [x.detach().requires_grad_(i < function.trained) for i, x in enumerate(inputs)]
        out = function.ours(*leaves)
        pull, trained = torch.randn_like(out), leaves[: function.trained]
        pulls.append(partial(torch.autograd.grad, out, trained, pull, retain_graph=True))
    with torch.no_grad():
        forward = sampled(calls, left)
    backward = sampled(pulls, left)
    return [
        share("forward", function.work[0], forward, ceilings["copy"], "of copy", bar=BAR),
        share("backward", function.work[1], backward, ceilings["copy"], "of copy", bar=BAR),
    ]
