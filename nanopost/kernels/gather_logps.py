"""Log-probability, entropy and logsumexp of rows of logits, all three in one read, in Triton.

One program walks along one row. Block by block it keeps three numbers about what it has seen,

    m = max z,   S = Σ exp(d),   U = Σ d·exp(d)   with   d = (z − m)/τ,

and `fold` takes a block into them: where the maximum moves, S and U are expressed by the new one. This is the
online softmax of Milakov and Gimelshein 2018 with one sum more. At the end of the row

    ℓ = (z_y − m)/τ − log S,   H = log S − U/S,   logsumexp = m/τ + log S.

`fold` and `logit_gradient` are also what the kernels of `linear_logps` are made of.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanopost.losses.checks import check_dims, check_logits, check_positive

from .inputs import Pointer, check_dense, check_targets

FORWARD = {"BLOCK": 8192, "num_warps": 8}  # 32 logits a thread: a row of 128k is 16 trips
BACKWARD = {"BLOCK": 4096, "num_warps": 8}


@triton.jit
def fold(
    maximum: "Tensor", total: "Tensor", weighted: "Tensor", block: "Tensor", inverse_temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a block (BLOCK,) or (ROWS, BLOCK) of logits into m, S and U, each () or (ROWS,)."""
    peak = tl.maximum(maximum, tl.max(block, axis=-1))
    origin = tl.where(peak == -float("inf"), 0.0, peak)  # all −∞ so far: exp(−∞ − 0) is 0, −∞ − (−∞) is NaN
    moved = tl.where(total > 0.0, (maximum - origin) * inverse_temperature, 0.0)  # ≤ 0
    rescale = tl.exp(moved)
    distance = (block - tl.expand_dims(origin, -1)) * inverse_temperature
    weight = tl.exp(distance)
    product = tl.where(weight > 0.0, weight * distance, 0.0)  # 0 · (−∞) is 0 here
    weighted = (weighted + moved * total) * rescale + tl.sum(product, axis=-1)
    total = total * rescale + tl.sum(weight, axis=-1)
    return peak, total, weighted


@triton.jit
def logit_gradient(
    logits: "Tensor",
    is_target: "Tensor",
    logsumexp: "Tensor",
    entropy: "Tensor",
    grad_logp: "Tensor",
    grad_entropy: "Tensor",
    grad_logsumexp: "Tensor",
    inverse_temperature: float,
) -> Tensor:
    """∂L/∂z = [a·(1[v = y] − p) − b·p·(log p + H) + c·p]/τ for a block of one row; 0 if the row is broken.

    All of it in float32, the target's 1 − p as well: rounded to half precision first, p of a likely target is
    1 and its gradient 0.
    """
    log_probs = logits * inverse_temperature - logsumexp
    probs = tl.exp(log_probs)
    surprise = tl.where(probs > 0.0, log_probs + entropy, 0.0)
    slope = probs * (grad_logsumexp - grad_logp - grad_entropy * surprise)
    slope += tl.where(is_target, grad_logp, 0.0)
    return tl.where(logsumexp - logsumexp == 0.0, slope * inverse_temperature, 0.0)


@triton.jit
def _forward_kernel(
    logits_ptr: "Pointer",
    target_ids_ptr: "Pointer",
    logps_ptr: "Pointer",
    entropy_ptr: "Pointer",
    logsumexp_ptr: "Pointer",
    vocabulary: int,
    inverse_temperature: float,
    BLOCK: tl.constexpr,
) -> None:
    """One row of logits, walked along once."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * vocabulary  # 16 k rows of 152 k logits are past 2³¹
    maximum, total, weighted = -float("inf"), 0.0, 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        block = tl.load(logits_ptr + columns, mask=columns < vocabulary, other=-float("inf")).to(tl.float32)
        maximum, total, weighted = fold(maximum, total, weighted, block, inverse_temperature)
    target = tl.load(target_ids_ptr + row)
    inside = (target >= 0) & (target < vocabulary)
    picked = tl.load(logits_ptr + target, mask=inside, other=float("nan")).to(tl.float32)
    spread = tl.log(total)
    tl.store(logps_ptr + row, (picked - maximum) * inverse_temperature - spread)
    tl.store(entropy_ptr + row, spread - weighted / total)
    tl.store(logsumexp_ptr + row, maximum * inverse_temperature + spread)


@triton.jit
def _backward_kernel(
    logits_ptr: "Pointer",
    target_ids_ptr: "Pointer",
    logsumexp_ptr: "Pointer",
    entropy_ptr: "Pointer",
    grad_logps_ptr: "Pointer",
    grad_entropy_ptr: "Pointer",
    grad_logsumexp_ptr: "Pointer",
    grad_logits_ptr: "Pointer",
    vocabulary: int,
    inverse_temperature: float,
    BLOCK: tl.constexpr,
) -> None:
    """One block of one row of the gradient."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = row.to(tl.int64) * vocabulary + columns
    gradient = logit_gradient(
        tl.load(logits_ptr + offsets, mask=columns < vocabulary, other=-float("inf")).to(tl.float32),
        columns == tl.load(target_ids_ptr + row),
        tl.load(logsumexp_ptr + row),
        tl.load(entropy_ptr + row),
        tl.load(grad_logps_ptr + row),
        tl.load(grad_entropy_ptr + row),
        tl.load(grad_logsumexp_ptr + row),
        inverse_temperature,
    )
    tl.store(grad_logits_ptr + offsets, gradient, mask=columns < vocabulary)


class _GatherLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_ids: Tensor, temperature: float) -> tuple[Tensor, ...]:
        rows, vocabulary = logits.shape
        outputs = [torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3)]
        ctx.inverse_temperature = 1.0 / temperature
        _forward_kernel[(rows,)](logits, target_ids, *outputs, vocabulary, ctx.inverse_temperature, **FORWARD)
        logps, entropy, logsumexp = outputs
        ctx.save_for_backward(logits, target_ids, logsumexp, entropy)
        return logps, entropy, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, target_ids, logsumexp, entropy = ctx.saved_tensors
        upstream = [grad.contiguous() for grad in grad_outputs]  # that of a plain sum is one number, expanded
        grad_logits = torch.empty_like(logits)
        rows, vocabulary = logits.shape
        _backward_kernel[rows, triton.cdiv(vocabulary, BACKWARD["BLOCK"])](
            logits,
            target_ids,
            logsumexp,
            entropy,
            *upstream,
            grad_logits,
            vocabulary,
            ctx.inverse_temperature,
            **BACKWARD,
        )
        return grad_logits, None, None


def gather_logps(
    logits: Tensor, target_ids: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy and logsumexp of every row, from one read of the logits.

        ℓ = z_y/τ − log Σ_v exp(z_v/τ),   H = −Σ_v p_v log p_v,   logsumexp = log Σ_v exp(z_v/τ)

    z are the logits, y the target, τ the temperature and p = softmax(z/τ). The backward pass reads the logits
    once more and writes their gradient into a new tensor. With a, b, c the gradients of the three outputs,

        ∂L/∂z_v = [a·(1[v = y] − p_v) − b·p_v·(log p_v + H) + c·p_v]/τ

    Args:
        logits: (N, V), float32, bfloat16 or float16, contiguous; carries the gradient, in its own dtype.
        target_ids: (N,), int32 or int64; no gradient. An id outside [0, V) makes its log-probability NaN.
        temperature: τ > 0.

    Returns:
        Log-probabilities ≤ 0, entropies in [0, log V] and logsumexps, each (N,), float32, nats; −log V, log V
        and log V for logits of 0. A row with a NaN, with +∞ or with nothing finite has no log-probability and
        no entropy (NaN), and its gradient is 0.

    Raises:
        ValueError: logits not (N, V), of another dtype or not contiguous, targets that do not fit, τ ≤ 0.

    Reference:
        Milakov and Gimelshein 2018, algorithm 3 (the online softmax). Equals `losses.token_logps` and
        `losses.entropy`.
    """
    check_logits(logits)
    check_dims("logits", logits, 2)
    check_dense(logits=logits)
    check_targets(target_ids, len(logits))
    check_positive("temperature", temperature)
    return _GatherLogps.apply(logits, target_ids, temperature)
