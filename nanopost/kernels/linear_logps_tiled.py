"""The path of `linear_logps` in plain torch: tiles of logits small enough for a core's cache, in one buffer.

On a CPU a tile of 256 tokens × 1,024 words is 1 MiB of float32 and never leaves the L2 cache, where
exponentials cost a sixth of the product. Everything is float32 or wider, whatever the weights are stored in.
"""

import torch
from torch import Tensor

from nanopost.kernels import dispatch
from nanopost.losses.checks import wide


def product(x: Tensor, w: Tensor, buffer: Tensor) -> Tensor:
    """x wᵀ, (tokens, words), over whatever the buffer held."""
    return torch.mm(x, w.T, out=buffer[: len(x) * len(w)].view(len(x), len(w)))


def add_at_targets(grad: Tensor, target: Tensor, values: Tensor) -> None:
    """Add `values` (tokens, 1) in each row's target column, where that column is in this tile."""
    found = ((target >= 0) & (target < grad.shape[1])).nonzero().squeeze(1)
    grad[found, target[found]] += values[found, 0]


def forward(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, entropies and logsumexps, each (N,): see `linear_logps`."""
    tokens, words = dispatch.tile(hidden)
    parts = zip(hidden.split(tokens), target_ids.split(tokens), strict=True)
    folded = [_fold(wide(x) / temperature, weight, y, words) for x, y in parts]
    logps, entropies, logsumexps = (torch.cat(column) for column in zip(*folded, strict=True))
    return logps, entropies, logsumexps


def _fold(x: Tensor, weight: Tensor, y: Tensor, words: int) -> tuple[Tensor, Tensor, Tensor]:
    """An online softmax over the vocabulary.

    With m the maximum so far, l = Σ exp(s − m) and u = Σ exp(s − m)(s − m), a tile whose maximum is m − δ > m
    makes of them exp(δ) l and exp(δ)(u + δ l), and adds its own. In the end lse = m + log l, H = log l − u/l.
    """
    most = x.new_full((len(x),), torch.finfo(x.dtype).min / 2)
    total, moment, picked = x.new_zeros(3, len(x))
    buffer, second = x.new_empty(2, len(x) * words)
    for start in range(0, len(weight), words):
        s = product(x, weight[start : start + words].to(x.dtype), buffer)
        column = (y - start).clamp(0, s.shape[1] - 1)
        picked = torch.where(column == y - start, s.gather(1, column.unsqueeze(1)).squeeze(1), picked)
        peak = torch.maximum(most, s.amax(1))
        delta = most - peak
        exps = torch.exp(s.sub_(peak.unsqueeze(1)), out=second[: s.numel()].view_as(s))
        moment = delta.exp() * (moment + delta * total) + s.mul_(exps).sum(1)
        total = delta.exp() * total + exps.sum(1)
        most = peak
    return picked - most - total.log(), total.log() - moment / total, most + total.log()


def backward(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    temperature: float,
    logsumexps: Tensor,
    entropies: Tensor,
    upstream: tuple[Tensor, Tensor, Tensor],
    *,
    trained: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of hidden and weight from those of the three outputs; every tile of logits is made anew.

    The weight's is None where it is not `trained`: under an adapter the head is frozen.

    ∂/∂s_v = a (1[v = y] − p_v) − b p_v (log p_v + H) + c p_v,   (a, b, c) = upstream
    """
    tokens, words = dispatch.tile(hidden)
    x = wide(hidden) / temperature
    a, b, c = (grad.to(x.dtype).unsqueeze(1) for grad in upstream)
    slope, bends = c - a - b * entropies.unsqueeze(1), bool(b.any())
    grad_hidden, grad_weight = torch.zeros_like(x), x.new_zeros(weight.shape) if trained else None
    buffer = x.new_empty(tokens * words)
    for start in range(0, len(weight), words):
        w, target = weight[start : start + words].to(x.dtype), target_ids - start
        for part in (slice(i, i + tokens) for i in range(0, len(x), tokens)):
            s = product(x[part], w, buffer).sub_(logsumexps[part].unsqueeze(1))  # log p
            grad = torch.exp(s).mul_(slope[part] - b[part] * s) if bends else s.exp_().mul_(slope[part])
            add_at_targets(grad, target[part], a[part])
            grad_hidden[part].addmm_(grad, w)
            if grad_weight is not None:
                grad_weight[start : start + words].addmm_(grad.T, x[part])
    return grad_hidden.div_(temperature), grad_weight
