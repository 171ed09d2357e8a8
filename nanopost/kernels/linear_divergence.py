"""Divergence of a student's head from a teacher's, over the vocabulary, without the logits of either.

Distillation compares two (N, V) distributions. Tile by tile, a first walk over both heads finds the
logsumexps, a second one the divergence and one number more, and backward's walk makes each tile's gradient
from these. A divergence is two functions of a word's log-probabilities s (student) and t (teacher):

    D = Σ_v f(s_v, t_v),   ∂D/∂z_v = f'_v − p_v Σ_u f'_u,   f' = ∂f/∂s,   p = exp s

    forward   f = eᵗ (t − s)                          f' = −eᵗ
    reverse   f = eˢ (s − t)                          f' = eˢ (s − t + 1)
    jsd       f = β eᵗ (t − m) + (1 − β) eˢ (s − m)   f' = (1 − β) eˢ (s − m),   m = log(β eᵗ + (1 − β) eˢ)
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nanopost.kernels import dispatch
from nanopost.kernels.linear_logps import check_head
from nanopost.kernels.linear_logps_tiled import forward as head_forward
from nanopost.kernels.linear_logps_tiled import product
from nanopost.losses.checks import check_choice, check_open, check_positive, wide

KINDS = ("forward", "reverse", "jsd")
Head = tuple[Tensor, Tensor]  # hidden states (N, D) and weights (V, D)


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """Token-wise divergence of softmax(h Wᵀ/τ) from a teacher's, tile by tile.

        forward   τ² KL(p_T‖p_S)    reverse   τ² KL(p_S‖p_T)    jsd   τ² [β KL(p_T‖m) + (1 − β) KL(p_S‖m)]

    m = β p_T + (1 − β) p_S. Equal to `forward_kl`, `reverse_kl` and `generalized_jsd` of the two heads'
    logits but for rounding; all is float32 (or wider).

    Args:
        hidden: (N, D) of the student; carries the gradient.
        weight: (V, D); carries the gradient.
        teacher_hidden: (N, D'), its own width; no gradient.
        teacher_weight: (V, D'); no gradient.
        kind: one of the three.
        temperature: τ > 0, of both.
        beta: β in (0, 1), of jsd; the others do not read it.

    Returns:
        Shape (N,), nats × τ², ≥ 0 up to rounding, in promote_types(dtype, float32); 0 where both agree.

    Raises:
        ValueError: shapes that do not fit, an unknown kind, τ ≤ 0, β outside (0, 1).

    Reference:
        Hinton et al. 2015, §2.1; Agarwal et al. 2024 (GKD), §2.

    >>> one, student, teacher = torch.ones(1, 1), torch.tensor([[0.6], [0.4]]), torch.tensor([[0.9], [0.1]])
    >>> linear_divergence(one, student.log(), one, teacher.log(), kind="forward")
    tensor([0.2263])
    """
    none = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    check_head(hidden, weight, none)
    check_head(teacher_hidden, teacher_weight, none)
    if len(weight) != len(teacher_weight):
        raise ValueError(f"both heads must have as many words, got {len(weight)} and {len(teacher_weight)}")
    check_choice("kind", kind, KINDS)
    check_positive("temperature", temperature)
    check_open("beta", beta)
    numbers = kind, float(temperature), float(beta)
    return _LinearDivergence.apply(hidden, weight, teacher_hidden, teacher_weight, *numbers)


def _terms(kind: str, s: Tensor, t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """f and f' of a tile of log-probabilities."""
    p, q = s.exp(), t.exp()
    if kind == "forward":
        return q * (t - s), -q
    if kind == "reverse":
        return (gap := p * (s - t)), gap + p
    m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
    return beta * q * (t - m) + (slope := (1.0 - beta) * p * (s - m)), slope


def _tiles(
    student: Head, teacher: Head, lse: tuple[Tensor, Tensor]
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Tokens, words, and both log-probabilities of a tile; hidden states come divided by τ."""
    tokens, words = dispatch.tile(student[0])
    buffers = student[0].new_empty(2, tokens * words)
    for start in range(0, len(student[1]), words):
        columns = slice(start, start + words)
        weights = [w[columns].to(student[0].dtype) for _, w in (student, teacher)]
        for part in (slice(i, i + tokens) for i in range(0, len(student[0]), tokens)):
            s, t = (
                product(x[part], w, buffer).sub_(total[part].unsqueeze(1))
                for (x, _), w, buffer, total in zip((student, teacher), weights, buffers, lse, strict=True)
            )
            yield part, columns, s, t


class _LinearDivergence(torch.autograd.Function):
    """Two walks forward, a third backward."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, w: Tensor, h_t: Tensor, w_t: Tensor, kind: str, temperature: float, beta: float
    ) -> Tensor:
        student, teacher = (wide(h) / temperature, w), (wide(h_t).to(wide(h).dtype) / temperature, w_t)
        target = torch.zeros(len(h), dtype=torch.long, device=h.device)
        value, slope = student[0].new_zeros(2, len(h))
        with dispatch.fast_products(h):
            lse = head_forward(*student, target, 1.0)[2], head_forward(*teacher, target, 1.0)[2]
            for part, _, s, t in _tiles(student, teacher, lse):
                f, df = _terms(kind, s, t, beta)
                value[part] += f.sum(1)
                slope[part] += df.sum(1)
        ctx.save_for_backward(h, w, h_t, w_t, *lse, slope)
        ctx.numbers = kind, temperature, beta
        return temperature**2 * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, w, h_t, w_t, lse_s, lse_t, slope = ctx.saved_tensors
        kind, temperature, beta = ctx.numbers
        live = grad.ne(0).nonzero().squeeze(1)
        student, teacher = ((wide(x)[live].to(grad.dtype) / temperature, y) for x, y in ((h, w), (h_t, w_t)))
        scale = temperature**2 * grad[live].unsqueeze(1)
        grad_h, grad_w = torch.zeros_like(student[0]), torch.zeros_like(w, dtype=grad.dtype)
        slope = slope[live].unsqueeze(1)
        with dispatch.fast_products(h):
            for part, words, s, t in _tiles(student, teacher, (lse_s[live], lse_t[live])):
                pull = (_terms(kind, s, t, beta)[1] - s.exp() * slope[part]) * scale[part]
                grad_h[part].addmm_(pull, w[words].to(pull.dtype))
                grad_w[words].addmm_(pull.T, student[0][part])
        whole = torch.zeros_like(h).index_copy_(0, live, (grad_h / temperature).to(h.dtype))
        return whole, grad_w.to(w.dtype), None, None, None, None, None
