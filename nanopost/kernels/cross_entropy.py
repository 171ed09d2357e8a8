"""Cross-entropy of given logits with one read forward and the gradient written over the logits, in Triton.

For a vocabulary of 128 k the logits are the largest tensor of a training step; their gradient is as large.
Here it takes their place, so the step needs the memory once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanopost.losses.checks import check_dims, check_logits

from .inputs import Pointer, check_dense, check_targets

FORWARD = {"BLOCK": 8192, "num_warps": 8}  # 32 logits a thread: a row of 128k is 16 trips
BACKWARD = {"BLOCK": 4096, "num_warps": 8}


@triton.jit
def _forward_kernel(
    logits_ptr: "Pointer",
    target_ids_ptr: "Pointer",
    losses_ptr: "Pointer",
    logsumexp_ptr: "Pointer",
    vocabulary: int,
    BLOCK: tl.constexpr,
) -> None:
    """One row of logits, walked along once: the maximum so far, and Σ exp(z − maximum) so far."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * vocabulary  # 16 k rows of 152 k logits are past 2³¹
    maximum, total = -float("inf"), 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        block = tl.load(logits_ptr + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
        peak = tl.maximum(maximum, tl.max(block, axis=0))
        origin = tl.where(peak == -float("inf"), 0.0, peak)  # all −∞ so far: −∞ − (−∞) would be NaN
        total = total * tl.exp(maximum - origin) + tl.sum(tl.exp(block - origin), axis=0)
        maximum = peak
    target = tl.load(target_ids_ptr + row)
    inside = (target >= 0) & (target < vocabulary)
    picked = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    tl.store(losses_ptr + row, maximum - picked + tl.log(total))
    tl.store(logsumexp_ptr + row, maximum + tl.log(total))


@triton.jit
def _backward_kernel(
    logits_ptr: "Pointer",
    target_ids_ptr: "Pointer",
    logsumexp_ptr: "Pointer",
    grad_losses_ptr: "Pointer",
    vocabulary: int,
    BLOCK: tl.constexpr,
) -> None:
    """One block of one row: logits are read, their gradient is written to the same place."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits_ptr + row.to(tl.int64) * vocabulary + columns
    logits = tl.load(place, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
    logsumexp = tl.load(logsumexp_ptr + row)
    is_target = columns == tl.load(target_ids_ptr + row)
    slope = tl.exp(logits - logsumexp) - tl.where(is_target, 1.0, 0.0)  # float32: rounded p − 1 would be 0
    gradient = tl.load(grad_losses_ptr + row) * slope
    gradient = tl.where(logsumexp - logsumexp == 0.0, gradient, 0.0)  # a broken row sends nothing back
    tl.store(place, gradient, mask=columns < vocabulary)


def forward(logits: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps of rows of logits, (N,) each, float32."""
    rows, vocabulary = logits.shape
    losses, logsumexp = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    _forward_kernel[(rows,)](logits, target_ids, losses, logsumexp, vocabulary, **FORWARD)
    return losses, logsumexp


def gradient_(logits: Tensor, target_ids: Tensor, logsumexp: Tensor, grad_losses: Tensor) -> Tensor:
    """Write the gradient of the losses over the logits."""
    rows, vocabulary = logits.shape
    grid = (rows, triton.cdiv(vocabulary, BACKWARD["BLOCK"]))
    _backward_kernel[grid](logits, target_ids, logsumexp, grad_losses, vocabulary, **BACKWARD)
    return logits


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_ids: Tensor) -> Tensor:
        losses, logsumexp = forward(logits, target_ids)
        ctx.save_for_backward(logits, target_ids, logsumexp)
        ctx.spent = False
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None]:
        if ctx.spent:
            raise RuntimeError("cross_entropy has written its gradient over the logits: no second backward")
        logits, target_ids, logsumexp = ctx.saved_tensors
        gradient_(logits, target_ids, logsumexp, grad_losses.contiguous())  # a plain sum's is expanded
        ctx.spent = True
        torch.autograd.graph.increment_version(logits)  # whoever else saved these logits is told
        return logits.detach(), None


def cross_entropy(logits: Tensor, target_ids: Tensor) -> Tensor:
    """Cross-entropy of every row of logits; the backward pass writes the gradient over the logits.

        L = log Σ_v exp(z_v) − z_y,   ∂L/∂z_v = p_v − 1[v = y]

    z are the logits, y the target and p = softmax(z). After `backward` the memory of the logits holds their
    gradient: nothing may read them any more. So they must be the result of a computation, not a leaf, and an
    operation that has saved them for a backward pass of its own is refused by autograd if it comes later.

    Args:
        logits: (N, V), float32, bfloat16 or float16, contiguous; carries the gradient, which takes its place.
        target_ids: (N,), int32 or int64; no gradient. An id outside [0, V) makes its loss NaN.

    Returns:
        Losses, shape (N,), float32, nats, ≥ 0; log V for equal logits. A row with a NaN, with +∞ or with
        nothing finite is NaN, and its gradient is 0.

    Raises:
        ValueError: logits not (N, V), of another dtype, not contiguous, or a leaf that requires a gradient;
            targets that do not fit them.
        RuntimeError: a second backward pass.

    Reference:
        Milakov and Gimelshein 2018, algorithm 3 (the online softmax); the gradient in the logits' place: Hsu
        et al. 2024 (Liger Kernel), §3.2. Equals −`losses.token_logps`.
    """
    check_logits(logits)
    check_dims("logits", logits, 2)
    check_dense(logits=logits)
    check_targets(target_ids, len(logits))
    if logits.requires_grad and logits.is_leaf:
        raise ValueError("logits must not be a leaf: the backward pass writes its gradient over them")
    return _CrossEntropy.apply(logits, target_ids)
