"""Preferences: a chosen completion against a rejected one, or a single one that was liked or not.

Every function takes one log-probability a completion, (B,): the sum over its tokens or their mean, both from
`sequence_logps`; its docstring says which. It returns one loss a row, for `aggregate` as (B, 1). A row that
is masked out there may hold NaN or infinities and gets no gradient.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .checks import (
    check_dims,
    check_finite,
    check_floating,
    check_floats,
    check_fraction,
    check_mask,
    check_positive,
    check_same_shape,
    held,
    squared,
    wide,
)
from .likelihood import preference_margin

FOUR = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
ODDS_LIMIT = 1e-7  # p = 1 has no odds p/(1 − p): in them a log-probability above −1e-7 counts as −1e-7
ROUNDING = 1e-6  # a mean log-probability further above 0 than this is none


def _gain(*logps: Tensor) -> Tensor:
    """h = Δ_θ − Δ_ref of the four log-probabilities in the order of `FOUR`; the reference is detached."""
    check_floats(**dict(zip(FOUR, logps, strict=True)))
    chosen, rejected, ref_chosen, ref_rejected = logps
    reference = preference_margin(ref_chosen, ref_rejected).detach()
    return held(preference_margin(chosen, rejected) - reference)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> Tensor:
    """Direct preference optimisation: a classifier of pairs, the policy's gain over a reference.

        L(h) = −log σ(β h),  h = [log π(y⁺) − log π(y⁻)] − [log π_ref(y⁺) − log π_ref(y⁻)]
        cDPO = (1 − ε) L(h) + ε L(−h)        robust = [(1 − ε) L(h) − ε L(−h)] / (1 − 2ε)

    log π are sums over completion tokens; means (`average=True`) give length-normalised DPO. ε is the share
    of labels believed flipped: cDPO aims at σ(βh) = 1 − ε, the robust loss averages to L over such labels.

    Args:
        chosen_logps, rejected_logps: (B,); carry the gradient, −β σ(−βh) and +β σ(−βh) for ε = 0.
        ref_chosen_logps, ref_rejected_logps: (B,); detached.
        beta: β > 0; small β lets the policy go far from the reference.
        label_smoothing: ε in [0, ½).
        robust: the third form instead of the second; the same for ε = 0.

    Returns:
        Losses, shape (B,), nats; log 2 when π = π_ref. ≥ 0, but the robust form has no lower bound for ε > 0.

    Raises:
        ValueError: log-probabilities not floating point, not (B,) or of different shapes, β ≤ 0, ε ∉ [0, ½).

    Reference:
        Rafailov et al. 2023, eq. 7. cDPO: Mitchell 2023, eq. 3. robust: Chowdhury et al. 2024.

    Page: docs/losses/dpo_loss.md

    >>> dpo_loss(*torch.tensor([[-5.0], [-9.0], [-7.0], [-8.0]]), beta=0.1)
    tensor([0.5544])
    """
    check_positive("beta", beta)
    check_fraction("label_smoothing", label_smoothing, 0.5)
    h = _gain(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    loss, flipped = -logsigmoid(beta * h), -logsigmoid(-beta * h)
    if robust:
        return ((1.0 - label_smoothing) * loss - label_smoothing * flipped) / (1.0 - 2.0 * label_smoothing)
    return (1.0 - label_smoothing) * loss + label_smoothing * flipped


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
) -> Tensor:
    """Identity preference optimisation: the gain over the reference is drawn to a fixed size.

        L = (h − 1/(2β))²,  h = [log π(y⁺) − log π(y⁻)] − [log π_ref(y⁺) − log π_ref(y⁻)]

    log π are sums over completion tokens. A pair that is certain cannot drive h to infinity, as in DPO.

    Args:
        chosen_logps, rejected_logps: (B,); carry the gradient, 2(h − 1/(2β)) and −2(h − 1/(2β)).
        ref_chosen_logps, ref_rejected_logps: (B,); detached.
        beta: β > 0, the paper's τ; the target is h = 1/(2β).

    Returns:
        Losses, shape (B,), nats², ≥ 0; 1/(4β²) when π = π_ref.

    Raises:
        ValueError: log-probabilities not floating point, not (B,) or of different shapes, β ≤ 0.

    Reference:
        Azar et al. 2024 (IPO), eq. 17.

    Page: docs/losses/ipo_loss.md

    >>> ipo_loss(*torch.tensor([[-5.0], [-9.0], [-7.0], [-8.0]]), beta=0.1)
    tensor([4.])
    """
    check_positive("beta", beta)
    h = _gain(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return squared(h - 1.0 / (2.0 * beta))


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman–Tversky optimisation: single completions that were liked or not, no pairs.

        L = λ_D (1 − σ(β(r − z))) if desirable else λ_U (1 − σ(β(z − r)))
        r = log π(y) − log π_ref(y),  z = max(0, KL)

    log π are sums over completion tokens. KL is the mean of log π(y') − log π_ref(y') where y' answers
    *another* prompt; the caller takes it over the whole step, all micro-batches and processes.

    Args:
        logps: (B,); carries the gradient ∓λβ σ'(β(r − z)), at most λβ/4.
        ref_logps: (B,); detached.
        desirable: (B,), bool or 0/1, in every row.
        kl: 0-dim tensor, finite; clamped at 0 and detached.
        beta: β > 0.
        desirable_weight, undesirable_weight: λ_D and λ_U, > 0.

    Returns:
        Losses, shape (B,), in [0, λ]; λ/2 when r = z, so at π = π_ref.

    Raises:
        ValueError: shapes or dtypes that do not fit, desirable not 0/1, kl no tensor or not finite, β, λ_D or
            λ_U ≤ 0.

    Reference:
        Ethayarajh et al. 2024 (KTO), §4.

    Page: docs/losses/kto_loss.md

    >>> kto_loss(torch.ones(2), torch.zeros(2), torch.tensor([True, False]), torch.tensor(0.0), beta=1.0)
    tensor([0.2689, 0.7311])
    """
    check_floats(logps=logps, ref_logps=ref_logps)
    check_dims("logps", logps, 1)
    check_same_shape(logps=logps, desirable=desirable)
    desirable = check_mask("desirable", desirable)
    check_dims("kl", kl, 0)
    check_floating(kl=kl)
    check_finite("kl", kl)
    check_positive("beta", beta)
    check_positive("desirable_weight", desirable_weight)
    check_positive("undesirable_weight", undesirable_weight)
    r = held(wide(logps) - wide(ref_logps).detach())
    z = wide(kl).detach().clamp(min=0.0)
    loss, flipped = torch.sigmoid(-beta * (r - z)), torch.sigmoid(-beta * (z - r))  # 1 − σ(x) = σ(−x)
    return torch.where(desirable, desirable_weight * loss, undesirable_weight * flipped)


def orpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, odds_weight: float) -> Tensor:
    """Odds-ratio preference optimisation: fine-tuning on the chosen, its odds above the rejected.

        L = −ℓ⁺ − λ log σ(log odds⁺ − log odds⁻),  odds = p/(1 − p),  log odds = ℓ − log(1 − e^ℓ)

    ℓ = log p are means over completion tokens. No reference.

    Args:
        chosen_logps: (B,), ≤ 0; carries the gradient −1 − λ σ(−x)/(1 − p⁺), x the difference of log odds.
        rejected_logps: (B,), ≤ 0; carries the gradient λ σ(−x)/(1 − p⁻).
        odds_weight: λ ≥ 0.

    Returns:
        Losses, shape (B,), nats, ≥ 0; −ℓ + λ log 2 for ℓ⁺ = ℓ⁻ = ℓ. The odds hold ℓ at or below −1e-7 and
        give no gradient above it. A row with an ℓ above 0 (by more than 1e-6, a rounding) is NaN, a loud
        value without a gradient: a row that a mask discards may hold anything.

    Raises:
        ValueError: log-probabilities not floating point, not (B,), of different shapes, λ < 0.

    Reference:
        Hong et al. 2024 (ORPO), eq. 6 and 7; the odds: eq. 4.

    Page: docs/losses/orpo_loss.md

    >>> orpo_loss(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), odds_weight=0.1)
    tensor([0.7219])
    """
    check_fraction("odds_weight", odds_weight, math.inf)
    check_floats(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    logps = [wide(ell).masked_fill(ell > ROUNDING, torch.nan) for ell in (chosen_logps, rejected_logps)]
    odds_logps = [held(ell, high=-ODDS_LIMIT) for ell in logps]
    log_odds = [ell - torch.log(-torch.expm1(ell)) for ell in odds_logps]
    return -logps[0] - odds_weight * logsigmoid(held(preference_margin(*log_odds)))


def simpo_loss(chosen_logps: Tensor, rejected_logps: Tensor, *, beta: float, margin: float) -> Tensor:
    """Simple preference optimisation: mean log-probabilities, a margin to beat, no reference.

        L = −log σ(β(ℓ⁺ − ℓ⁻) − γ)

    ℓ are means over completion tokens, so a long completion has no advantage.

    Args:
        chosen_logps, rejected_logps: (B,); carry the gradient, ∓β σ(γ − β(ℓ⁺ − ℓ⁻)).
        beta: β > 0.
        margin: γ ≥ 0, in units of β(ℓ⁺ − ℓ⁻); not the ratio γ/β.

    Returns:
        Losses, shape (B,), nats, ≥ 0; log 2 where β(ℓ⁺ − ℓ⁻) = γ.

    Raises:
        ValueError: log-probabilities not floating point, not (B,) or of different shapes, β ≤ 0, γ < 0.

    Reference:
        Meng et al. 2024 (SimPO), §2.

    Page: docs/losses/simpo_loss.md

    >>> simpo_loss(torch.tensor([-0.5]), torch.tensor([-1.25]), beta=2.0, margin=0.5)
    tensor([0.3133])
    """
    check_positive("beta", beta)
    check_fraction("margin", margin, math.inf)
    return -logsigmoid(beta * held(preference_margin(chosen_logps, rejected_logps)) - margin)
