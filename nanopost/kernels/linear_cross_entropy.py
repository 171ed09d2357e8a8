"""Cross-entropy of a linear head whose gradient is made in the forward pass, without storing the logits.

Supervised fine-tuning weighs every token of a step alike. Then the gradient is known, up to one number, as
soon as a chunk's logits are there: two products follow the first while the chunk is in the cache, and
backward has only to scale. `linear_logps`, whose upstream gradients come late and differ, must make every
logit twice.
"""

from typing import Any

import torch
from torch import Tensor

from nanopost.kernels import dispatch
from nanopost.kernels.linear_logps import check_head, linear_logps
from nanopost.kernels.linear_logps_tiled import add_at_targets, product
from nanopost.losses.checks import wide


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """−log softmax(h Wᵀ)_y of every token, for losses that weigh all tokens alike.

        L_n = log Σ_v exp s_v − s_y,   s = h_n Wᵀ

    h are hidden states, W the head, y the targets. Equal to `sft_loss(token_logps(hidden @ weight.T, y))` but
    for rounding; logits, sums and gradients are float32 (or wider), whatever the weights are stored in.

    Args:
        hidden: (N, D); carries the gradient Σ_v (p_v − 1[v = y]) W_v.
        weight: (V, D); carries the gradient Σ_n (p_v − 1[v = y]) h_n.
        target_ids: (N,), integers in [0, V); no gradient.

    Returns:
        Shape (N,), nats, ≥ 0, in promote_types(dtype, float32); log V where every logit is 0. Its upstream
        gradient must be one number N times: a sum, or a mean over any denominator.

    Raises:
        ValueError: as `linear_logps`; in backward, upstream gradients that differ between tokens.

    Reference:
        Liger-Kernel (Hsu et al. 2024), §3.2: gradients chunk by chunk in the forward pass.

    >>> linear_cross_entropy(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3])).exp()
    tensor([4.])
    """
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return -linear_logps(hidden, weight, target_ids)[0]
    check_head(hidden, weight, target_ids)
    return _LinearCrossEntropy.apply(hidden, weight, target_ids)


def _plain(s: Tensor, target_ids: Tensor) -> Tensor:
    """Losses of a chunk's logits, which become their gradient."""
    target = s.gather(1, target_ids.unsqueeze(1))
    most = s.amax(1, keepdim=True)
    total = s.sub_(most).exp_().sum(1, keepdim=True)
    add_at_targets(s.div_(total), target_ids, -torch.ones_like(total))
    return (most + total.log() - target).squeeze(1)


def _fused(s: Tensor, target_ids: Tensor) -> Tensor:
    """The same by Triton's kernels: one read, then one read and write."""
    from nanopost.kernels import cross_entropy

    losses, logsumexp = cross_entropy.forward(s, target_ids)
    cross_entropy.gradient_(s, target_ids, logsumexp, torch.ones_like(losses))
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Losses, and both gradients of their sum, a chunk of tokens over the whole vocabulary at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        triton = dispatch.fused(hidden, weight)
        x = hidden if triton else wide(hidden)
        w, size = weight.to(x.dtype), dispatch.chunk(hidden, words=len(weight))
        buffer, losses = x.new_empty(size * len(w)), wide(x.new_empty(len(x)))
        grad_hidden = torch.empty_like(x)
        grad_weight = wide(torch.zeros_like(w)) if ctx.needs_input_grad[1] else None  # None: a frozen head
        with dispatch.fast_products(hidden):
            for part in (slice(i, i + size) for i in range(0, len(x), size)):
                s = product(x[part], w, buffer)
                losses[part] = (_fused if triton else _plain)(s, target_ids[part])
                torch.mm(s, w, out=grad_hidden[part])
                if grad_weight is None:
                    continue
                if s.dtype == grad_weight.dtype:
                    grad_weight.addmm_(s.T, x[part])
                else:  # each product is rounded, their sum is not
                    grad_weight += s.T @ x[part]
        ctx.save_for_backward(grad_hidden, grad_weight)  # of a sum over tokens: too large for a narrow dtype
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if len(grad) and grad.min() < grad.max():  # neither with a NaN in it: that one goes through
            low, high = float(grad.min()), float(grad.max())
            raise ValueError(
                f"linear_cross_entropy weighs all tokens alike, got upstream gradients from {low} to {high}: "
                "mask tokens before it, or use linear_logps"
            )
        scale = grad.max() if len(grad) else 0.0  # NaN if one is
        of_hidden, of_weight = ctx.saved_tensors
        to_hidden, to_weight = ctx.dtypes
        grad_weight = None if of_weight is None else (of_weight * scale).to(to_weight)
        return (of_hidden * scale).to(to_hidden), grad_weight, None
