"""Log-probabilities of given tokens, of whole completions and of pairs, and the loss that raises them.

Scoring happens here under the same temperature and truncation that a sampler draws from, so trainer and
sampler speak of one distribution. Nothing shifts: row t of the logits belongs to entry t of `target_ids`.
"""

import torch
from torch import Tensor

from .checks import (
    check_count,
    check_dims,
    check_floating,
    check_floats,
    check_ids,
    check_logits,
    check_mask,
    check_positive,
    check_range,
    check_same_shape,
    sound_rows,
    wide,
)


def token_logps(
    logits: Tensor, target_ids: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Log-probability of each target token under the distribution the sampler draws from.

        ℓ_t = z_{t,y_t}/τ − log Σ_{v ∈ S_t} exp(z_{t,v}/τ)

    z are the logits, y the targets, τ the temperature and S_t the support that top-k and top-p leave, the
    target always included. With the defaults S_t is the whole vocabulary. The logits are aligned with the
    targets already.

    Args:
        logits: (..., V), in practice (B, T, V); carries the gradient: (1[v = y_t] − p_v)/τ inside the
            support, 0 outside.
        target_ids: (...), integers in [0, V); no gradient. Padding needs any valid id, and a mask later.
        temperature: τ > 0.
        top_k: number of tokens kept; 0 keeps all.
        top_p: mass of the nucleus kept, in (0, 1]; 1.0 keeps all.

    Returns:
        Shape (...), nats, ≤ 0, in promote_types(dtype, float32); −log V for equal logits.

    Raises:
        ValueError: shapes that do not fit, logits that are not floating point, ids outside [0, V), τ ≤ 0,
            top_k < 0, top_p outside (0, 1].

    Reference:
        Softmax with temperature: Hinton et al. 2015, eq. 1. Truncation: see `truncate_logits`.

    Page: docs/losses/token_logps.md

    >>> token_logps(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([1])).exp()
    tensor([0.3333])
    """
    check_logits(logits)
    check_ids("target_ids", target_ids, logits)
    check_positive("temperature", temperature)
    logits = truncate_logits(wide(logits) / temperature, top_k=top_k, top_p=top_p, keep_ids=target_ids)
    logits, broken = sound_rows(logits)
    logps = logits.log_softmax(dim=-1).gather(-1, target_ids.long().unsqueeze(-1)).squeeze(-1)
    return logps.masked_fill(broken, torch.nan)


def truncate_logits(logits: Tensor, *, top_k: int, top_p: float, keep_ids: Tensor | None = None) -> Tensor:
    """Logits with −∞ outside the support that top-k and then top-p leave.

        K = the k tokens of largest logit,  q = softmax(z) renormalised on K
        S = the shortest prefix of K, by falling q, with Σ_{v ∈ S} q_v ≥ p,  joined by keep_ids

    z are logits that the temperature has divided already. Equal logits rank by the lower id. `keep_ids` is
    for the trainer: the sampled token was in the sampler's support, and a rounding at the edge must not throw
    it out here.

    Args:
        logits: (..., V); the gradient passes unchanged inside S and is 0 outside. S itself is a constant.
        top_k: number of tokens kept; 0 or any number ≥ V keeps all.
        top_p: mass of the nucleus kept, in (0, 1]; 1.0 keeps all.
        keep_ids: (...), ids that stay whatever happens, or None.

    Returns:
        Shape (..., V), promote_types(dtype, float32): z inside S, −∞ outside; at least one entry a row stays.
        Probabilities .5, .3, .2 with top_p = .7 keep the first two.

    Raises:
        ValueError: no vocabulary dimension, logits that are not floating point, top_k < 0, top_p outside
            (0, 1], keep_ids of the wrong shape or range.

    Reference:
        Top-k: Fan et al. 2018, §5.4. Top-p: Holtzman et al. 2020, eq. 2 and 3.

    Page: docs/losses/truncate_logits.md

    >>> truncate_logits(torch.tensor([3.0, 1.0, 2.0]), top_k=2, top_p=1.0)
    tensor([3., -inf, 2.])
    """
    check_logits(logits)
    check_count("top_k", top_k, 0)
    check_range("top_p", top_p, 0.0, 1.0)
    logits = wide(logits)
    if top_k == 0 and top_p == 1.0:
        return logits
    ranked, order = logits.detach().sort(dim=-1, descending=True, stable=True)
    beyond_k = torch.arange(logits.shape[-1], device=logits.device) >= (top_k or logits.shape[-1])
    probs = ranked.masked_fill(beyond_k, -torch.inf).softmax(dim=-1)
    mass_before = probs.cumsum(dim=-1) - probs
    outside = torch.empty_like(order, dtype=torch.bool).scatter(-1, order, beyond_k | (mass_before >= top_p))
    if keep_ids is not None:
        check_ids("keep_ids", keep_ids, logits)
        outside = outside.scatter(-1, keep_ids.long().unsqueeze(-1), False)
    return logits.masked_fill(outside, -torch.inf)


def sequence_logps(logps: Tensor, mask: Tensor, *, average: bool = False) -> Tensor:
    """Log-probability of each completion: the sum over its tokens, or their mean.

        log π(y) = Σ_t m_t ℓ_t        average: log π(y) = Σ_t m_t ℓ_t / Σ_t m_t

    ℓ are the log-probabilities of the targets, m the completion mask. The sum is the probability of the whole
    text (DPO, IPO, KTO); the mean takes the length out of it (ORPO, SimPO, length-normalised DPO).

    Args:
        logps: (B, T); carries the gradient m_t, over Σ_t m_t for the mean. Outside the mask it may hold
            anything and gets exactly 0.
        mask: (B, T), bool or 0/1; no gradient.
        average: the mean instead of the sum.

    Returns:
        Shape (B,), nats, ≤ 0, in promote_types(dtype, float32); 0 for a row without a token.

    Raises:
        ValueError: shapes differ or are not (B, T), logps not floating point, a mask that is not 0/1.

    Reference:
        The sum: Rafailov et al. 2023 (DPO), eq. 7. The mean: Meng et al. 2024 (SimPO), §2.

    Page: docs/losses/sequence_logps.md

    >>> logps = torch.tensor([[0.5, 0.5, 0.25]]).log()
    >>> sequence_logps(logps, torch.tensor([[True, True, False]])).exp()
    tensor([0.2500])
    """
    check_floats(logps=logps)
    check_dims("logps", logps, 2)
    check_same_shape(logps=logps, mask=mask)
    mask = check_mask("mask", mask)
    total = wide(logps).masked_fill(~mask, 0.0).sum(dim=1)
    return total / mask.sum(dim=1).clamp(min=1) if average else total


def preference_margin(chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """How much more likely the chosen completion is than the rejected one.

        Δ = log π(y⁺) − log π(y⁻)

    Args:
        chosen_logps: (B,); carries the gradient, ∂Δ/∂ log π(y⁺) = 1.
        rejected_logps: (B,); carries the gradient, ∂Δ/∂ log π(y⁻) = −1.

    Returns:
        Margins, shape (B,), nats, any sign, in promote_types(dtype, float32); log 3 for .6 against .2.

    Raises:
        ValueError: log-probabilities not floating point, not (B,) or of different shapes.

    Reference:
        Rafailov et al. 2023 (DPO): the two log π_θ terms of eq. 7.

    Page: docs/losses/preference_margin.md

    >>> preference_margin(torch.tensor([0.6]).log(), torch.tensor([0.2]).log())
    tensor([1.0986])
    """
    check_floats(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_dims("chosen_logps", chosen_logps, 1)
    return wide(chosen_logps) - wide(rejected_logps)


def sft_loss(logps: Tensor) -> Tensor:
    """Negative log-likelihood of the supervised tokens.

        L_t = −ℓ_t

    ℓ are the log-probabilities of the targets. `aggregate(mode="token_mean")` with the completion mask makes
    it the completion-only loss: divided by the supervised tokens of the whole optimiser step.

    Args:
        logps: (B, T) in practice, any shape; carries the gradient, ∂L_t/∂ℓ_t = −1.

    Returns:
        Losses of the same shape, nats, ≥ 0; log V for a uniform policy, 1.1394 in sum for tokens of
        probability .8 and .4.

    Raises:
        ValueError: logps that are not floating point.

    Reference:
        Radford et al. 2018, eq. 1 (the sum over tokens); Ouyang et al. 2022, §3.5 (on demonstrations).

    Page: docs/losses/sft_loss.md

    >>> sft_loss(torch.tensor([0.8, 0.4]).log()).sum()
    tensor(1.1394)
    """
    check_floating(logps=logps)
    return -wide(logps)
