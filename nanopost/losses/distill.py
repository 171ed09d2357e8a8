"""From a teacher to a student: divergences between their distributions.

Only the student carries a gradient; the teacher is detached inside.
A row whose logits hold NaN or +∞, or nothing finite, is NaN; a divergence is +∞ where its second distribution
misses mass of its first. Both are loud values, and neither has a gradient: masked, they leave no trace.
"""

import math

import torch
from torch import Tensor

from .checks import (
    check_floating,
    check_floats,
    check_ids,
    check_logits,
    check_open,
    check_positive,
    check_same_shape,
    sound_rows,
    wide,
)

# Log-probabilities stored in half precision may add up to a little more or less than 1.
MASS_TOLERANCE = 0.01


def _log_probs(temperature: float, **logits: Tensor) -> list[Tensor]:
    """log softmax(z/τ) of each; a row that is broken in one is NaN in all of them and has no gradient."""
    check_floats(**logits)
    check_logits(next(iter(logits.values())))
    check_positive("temperature", temperature)
    rows = [sound_rows(wide(tensor) / temperature) for tensor in logits.values()]
    broken = torch.stack([wrong for _, wrong in rows]).any(dim=0).unsqueeze(-1)
    return [z.log_softmax(-1).masked_fill(broken, torch.nan) for z, _ in rows]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p − log q): 0 where p is 0; +∞, without gradient, for a row where q alone is 0."""
    p = log_p.exp()
    missed = (p > 0) & (log_q == -torch.inf)
    gap = (log_p - log_q).masked_fill((p == 0) | missed, 0.0)
    return (p * gap).sum(-1).masked_fill(missed.any(-1), torch.inf)


def _log_sum(log_values: Tensor) -> Tensor:
    """log Σ exp over the last dimension, kept; −∞, without gradient, where nothing is left to sum."""
    nothing = log_values.amax(-1, keepdim=True) == -torch.inf
    return log_values.masked_fill(nothing, 0.0).logsumexp(-1, keepdim=True).masked_fill(nothing, -torch.inf)


def _top_k(student_logits: Tensor, teacher_logps: Tensor, teacher_ids: Tensor) -> tuple[Tensor, ...]:
    """The teacher's list behind the door, and which rows (..., 1) of it are log-probabilities at all."""
    check_logits(student_logits, "student_logits")
    check_floating(teacher_logps=teacher_logps)
    check_same_shape(teacher_logps=teacher_logps, teacher_ids=teacher_ids)
    if teacher_ids.shape[:-1] != student_logits.shape[:-1] or not sum(teacher_ids.shape[-1:]):
        listed, shape = tuple(teacher_ids.shape), tuple(student_logits.shape)
        raise ValueError(f"teacher_ids must be (..., K) over student_logits (..., V): {listed} over {shape}")
    check_ids("teacher_ids", teacher_ids, student_logits.unsqueeze(-2).expand(*teacher_ids.shape, -1))
    logps = wide(teacher_logps).detach()
    sound = logps.exp().sum(-1, keepdim=True) <= 1.0 + MASS_TOLERANCE
    return logps.masked_fill(~sound, -torch.inf), teacher_ids.long(), sound


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL from the teacher to the student over the vocabulary, token by token: the classic distillation loss.

        L_t = τ² KL(p_T‖p_S) = τ² Σ_v p_T(v) log(p_T(v)/p_S(v)),  p = softmax(z_t/τ)

    z are the logits of teacher and student, τ is the temperature of both; the factor τ² keeps the size of the
    gradient as τ grows. The student has to cover whatever the teacher might say.

    Args:
        student_logits: (..., V), in practice (B, T, V); carries the gradient τ (p_S − p_T). −∞ only where the
            teacher has −∞ too: elsewhere the loss is +∞, with gradient 0.
        teacher_logits: the same shape; detached. −∞ is probability 0 and adds 0.
        temperature: τ > 0.

    Returns:
        Shape (...), nats × τ², ≥ 0 up to rounding, in promote_types(dtype, float32); 0 when both agree,
        .2263 for a teacher [.9, .1] and a student [.6, .4].

    Raises:
        ValueError: shapes differ, no vocabulary dimension, logits that are not floating point, τ ≤ 0.

    Reference:
        Hinton et al. 2015, §2 and §2.1; token by token: Kim & Rush 2016, §3.1.

    Page: docs/losses/forward_kl.md

    >>> forward_kl(torch.tensor([0.6, 0.4]).log(), torch.tensor([0.9, 0.1]).log())
    tensor(0.2263)
    """
    teacher_logits = teacher_logits.detach()
    log_s, log_t = _log_probs(temperature, student_logits=student_logits, teacher_logits=teacher_logits)
    return temperature**2 * _kl(log_t, log_s)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL from the student to the teacher over the vocabulary, token by token: on-policy distillation.

        L_t = τ² KL(p_S‖p_T) = τ² Σ_v p_S(v) log(p_S(v)/p_T(v)),  p = softmax(z_t/τ)

    z are the logits of teacher and student and τ is the temperature of both. The student has to avoid what
    the teacher would not say, and may leave out some of what it would.

    Args:
        student_logits: (..., V), in practice (B, T, V); carries the gradient τ p_S (log(p_S/p_T) − KL).
        teacher_logits: the same shape; detached. −∞ is probability 0: 0 is added where the student has −∞
            too, and where it has mass the loss is +∞, with gradient 0.
        temperature: τ > 0.

    Returns:
        Shape (...), nats × τ², ≥ 0 up to rounding, in promote_types(dtype, float32); 0 when both agree,
        .3112 for a teacher [.9, .1] and a student [.6, .4].

    Raises:
        ValueError: shapes differ, no vocabulary dimension, logits that are not floating point, τ ≤ 0.

    Reference:
        Agarwal et al. 2024 (GKD), §2; Gu et al. 2024 (MiniLLM), §2.

    Page: docs/losses/reverse_kl.md

    >>> reverse_kl(torch.tensor([0.6, 0.4]).log(), torch.tensor([0.9, 0.1]).log())
    tensor(0.3112)
    """
    teacher_logits = teacher_logits.detach()
    log_s, log_t = _log_probs(temperature, student_logits=student_logits, teacher_logits=teacher_logits)
    return temperature**2 * _kl(log_s, log_t)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, *, beta: float, temperature: float = 1.0
) -> Tensor:
    """Both KLs to a mixture of teacher and student: bounded, and between the two directions.

        L_t = τ² [β KL(p_T‖m) + (1 − β) KL(p_S‖m)],  m = β p_T + (1 − β) p_S,  p = softmax(z_t/τ)

    z are the logits, τ the temperature and β the weight of the teacher in the mixture. The loss itself
    vanishes at both ends of β: L/β tends to the forward KL as β → 0, L/(1 − β) to the reverse one as β → 1.

    Args:
        student_logits: (..., V), in practice (B, T, V); carries the gradient
            τ (1 − β) p_S (log(p_S/m) − KL(p_S‖m)).
        teacher_logits: the same shape; detached. −∞ on either side or both is fine.
        beta: β in (0, 1); at the ends use the KL that is meant.
        temperature: τ > 0.

    Returns:
        Shape (...), nats × τ², in [0, τ² H(β)] up to rounding, H(β) = −β log β − (1 − β) log(1 − β), which is
        log 2 at β = ½; 0 when the student is the teacher.

    Raises:
        ValueError: as `forward_kl`; β outside (0, 1).

    Reference:
        Agarwal et al. 2024 (GKD), §2; Lin 1991, §IV.

    Page: docs/losses/generalized_jsd.md

    >>> generalized_jsd(torch.tensor([0.6, 0.4]).log(), torch.tensor([0.9, 0.1]).log(), beta=0.5)
    tensor(0.0633)
    """
    check_open("beta", beta)
    teacher_logits = teacher_logits.detach()
    log_s, log_t = _log_probs(temperature, student_logits=student_logits, teacher_logits=teacher_logits)
    shares = torch.stack([log_t + math.log(beta), log_s + math.log1p(-beta)], dim=-1)
    log_m = _log_sum(shares).squeeze(-1)
    return temperature**2 * (beta * _kl(log_t, log_m) + (1.0 - beta) * _kl(log_s, log_m))


def top_k_forward_kl(
    student_logits: Tensor, teacher_logps: Tensor, teacher_ids: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Forward KL to a teacher of whom only the likeliest tokens are known; all others are one bucket.

        L_t = τ² [Σ_k p_T(k) log(p_T(k)/p_S(k)) + t_T log(t_T/t_S)],  t = 1 − Σ_k p(k),  p_S = softmax(z_t/τ)

    The sum runs over the K listed tokens, z are the student's logits, τ is the temperature, the teacher's
    log-probabilities being those at τ already, and t is the tail, the mass of what is not listed. The loss is
    at most the full forward KL and grows with K.

    Args:
        student_logits: (..., V), in practice (B, T, V); carries the gradient: τ (p_S − p_T) for a listed
            token, τ p_S (1 − t_T/t_S) for another. Where it has no mass, it is as in `forward_kl`.
        teacher_logps: (..., K); detached. −∞ fills up a shorter list: such an entry counts as not listed. A
            row whose mass exceeds 1 by more than `MASS_TOLERANCE` is NaN, with gradient 0.
        teacher_ids: (..., K), integers in [0, V), distinct where they have mass; no gradient.
        temperature: τ > 0.

    Returns:
        Shape (...), nats × τ², ≥ 0 up to rounding, in promote_types(dtype, float32); `forward_kl` for K = V,
        0 when both agree.

    Raises:
        ValueError: shapes that do not fit, ids outside [0, V) or twice in a row, τ ≤ 0.

    Reference:
        Hinton et al. 2015, §2, on a coarser alphabet; that this only loses: Cover & Thomas 2006, §2.7.

    Page: docs/losses/top_k_forward_kl.md

    >>> student, teacher = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.8]).log()
    >>> top_k_forward_kl(student, teacher, torch.tensor([0]))
    tensor(0.1927)
    """
    logps, ids, sound = _top_k(student_logits, teacher_logps, teacher_ids)
    (log_s,) = _log_probs(temperature, student_logits=student_logits)
    listed = torch.zeros_like(log_s).scatter_add(-1, ids, (logps > -torch.inf).to(log_s.dtype))
    if (listed > 1).any():
        raise ValueError(f"teacher_ids must be distinct, got {int(listed.argmax()) % listed.shape[-1]} twice")
    tail_s = _log_sum(log_s.masked_fill(listed > 0, -torch.inf))
    tail_t = 1.0 - logps.exp().sum(-1, keepdim=True)
    rounding = (tail_t < 0) | ((tail_s == -torch.inf) & (tail_t < MASS_TOLERANCE))
    log_p = torch.cat([logps, tail_t.masked_fill(rounding, 0.0).log()], dim=-1)
    log_q = torch.cat([log_s.gather(-1, ids), tail_s], dim=-1).masked_fill(~sound, torch.nan)
    return temperature**2 * _kl(log_p, log_q)
