"""Log-probabilities under a linear head, without ever storing its logits.

The logits of N tokens over V words are the largest tensor of post-training: 8,192 tokens of a 128,256-word
model take 4.2 GB in float32, before a softmax copies them twice. None of it is needed: a loss reads three
numbers a token. A path (`dispatch.head_path`) walks over the logits tile by tile and folds each tile into
those three; backward walks once more and turns each tile into its part of the two gradients.
"""

from typing import Any

import torch
from torch import Tensor

from nanopost.kernels import dispatch
from nanopost.losses.checks import check_dims, check_floating, check_positive

Outputs = tuple[Tensor, Tensor, Tensor]


def linear_logps(hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float = 1.0) -> Outputs:
    """Log-probability of each target, entropy and logsumexp of softmax(h Wᵀ/τ), tile by tile.

        s = h Wᵀ/τ,   ℓ = s_y − log Σ_v exp s_v,   H = −Σ_v p_v log p_v,   p = softmax(s)

    h are hidden states, W the head, y the targets, τ the temperature. Equal to the slow path

        s = wide(hidden @ weight.T) / temperature
        token_logps(s, target_ids), entropy(s), s.logsumexp(-1)

    but for rounding: sums and gradients are float32 (or wider), and p_y − 1 is taken there before anything is
    rounded. (On a GPU a tile of logits has the dtype of h, as in a model that stores them.) Rows whose
    upstream gradients are all 0 are skipped in backward.

    Args:
        hidden: (N, D); carries the gradient Σ_v (∂/∂s_v) W_v/τ.
        weight: (V, D); carries the gradient Σ_n (∂/∂s_v) h_n/τ, summed in float32. Their dtypes may differ.
        target_ids: (N,), integers in [0, V); no gradient.
        temperature: τ > 0.

    Returns:
        Three tensors of shape (N,), nats, in promote_types(dtype, float32): log-probabilities ≤ 0, entropies
        in [0, log V], logsumexps of any sign. With ∂ℓ/∂s_v = 1[v = y] − p_v, ∂H/∂s_v = −p_v (log p_v + H) and
        ∂lse/∂s_v = p_v. −log V, log V and log V where every logit is 0.

    Raises:
        ValueError: shapes that do not fit, nothing floating point, an id outside [0, V), τ ≤ 0.

    Reference:
        Milakov & Gimelshein 2018 (online softmax), algorithm 3; Wijmans et al. 2024 (cut cross-entropy), §4.

    >>> logps, entropies, logsumexps = linear_logps(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))
    >>> logps.exp(), entropies.exp(), logsumexps.exp()
    (tensor([0.2500]), tensor([4.]), tensor([4.]))
    """
    check_head(hidden, weight, target_ids)
    check_positive("temperature", temperature)
    return _LinearLogps.apply(hidden, weight, target_ids, float(temperature))


def check_head(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> None:
    """Hidden states (N, D), a head (V, D) and N ids below V."""
    check_floating(hidden=hidden, weight=weight)
    for name, tensor, dims in (("hidden", hidden, 2), ("weight", weight, 2), ("target_ids", target_ids, 1)):
        check_dims(name, tensor, dims)
    shapes = (
        f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, target_ids {tuple(target_ids.shape)}"
    )
    if hidden.shape[1] != weight.shape[1] or len(hidden) != len(target_ids):
        raise ValueError(f"shapes must be (N, D), (V, D) and (N,), got {shapes}")
    if target_ids.dtype.is_floating_point or target_ids.dtype in (torch.bool, torch.complex64):
        raise ValueError(f"target_ids must hold integers, got {target_ids.dtype}")
    if len(target_ids) and not 0 <= int(target_ids.min()) <= int(target_ids.max()) < len(weight):
        worst = int(target_ids.min()) if int(target_ids.min()) < 0 else int(target_ids.max())
        raise ValueError(f"target_ids must lie in [0, {len(weight)}), got {worst}")


class _LinearLogps(torch.autograd.Function):
    """The path's forward and backward, and what lies between them: h, W, y, the logsumexps and entropies."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float) -> Outputs:
        path = dispatch.head_path(hidden, weight)
        with dispatch.fast_products(hidden):
            logps, entropies, logsumexps = path.forward(hidden, weight, target_ids, temperature)
        ctx.save_for_backward(hidden, weight, target_ids, logsumexps, entropies)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logps, entropies, logsumexps

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target_ids, logsumexps, entropies = ctx.saved_tensors
        zeros = torch.zeros_like(logsumexps)
        grads = torch.stack([zeros if grad is None else grad for grad in upstream])
        live = grads.ne(0).any(0).nonzero().squeeze(1)
        x, y, lse, h = (tensor[live] for tensor in (hidden, target_ids, logsumexps, entropies))
        path, scale = dispatch.head_path(hidden, weight), ctx.temperature
        with dispatch.fast_products(hidden):
            some, grad_weight = path.backward(
                x, weight, y, scale, lse, h, tuple(grads[:, live]), trained=ctx.needs_input_grad[1]
            )
        grad_hidden = torch.zeros_like(hidden).index_copy_(0, live, some.to(hidden.dtype))
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype), None, None
