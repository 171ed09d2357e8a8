"""Distance to a reference policy, and the entropy: the policy's own regularisers.

Only the policy carries a gradient, the reference is detached inside. A slot outside the mask may hold
anything: clamps and fills cut its gradient to exactly 0 instead of letting 0 · ∞ or 0 · NaN through.
"""

import math

import torch
from torch import Tensor

from .checks import (
    check_choice,
    check_dims,
    check_floats,
    check_logits,
    check_mask,
    check_positive,
    check_same_shape,
    held,
    sound_rows,
    squared,
    wide,
)

KL_KINDS = ("k1", "k2", "k3")
K3_LOWEST = -60.0  # below it e^{−k1} is held: e^60 ≈ 1e26 leaves float32 room for a sum over tokens


def _log_ratio(logps: Tensor, other_logps: Tensor, low: float = -math.inf) -> Tensor:
    """log π − log π', π' detached, at least `low`. Below it, at a NaN and at ±∞ the gradient is 0."""
    return held(wide(logps) - wide(other_logps).detach(), low)


def kl_estimate(logps: Tensor, ref_logps: Tensor, *, kind: str) -> Tensor:
    """One-sample estimates of KL(π‖π_ref) at tokens drawn from π.

        k1 = ℓ_t − ℓ_t^ref        k2 = ½ k1²        k3 = e^{−k1} − 1 + k1

    ℓ^ref are the log-probabilities of the reference. As values, k1 and k3 have the mean KL; k2 is close to it
    when the two are close. As losses they are another matter: the gradient of k1 is zero on average, k2 is
    right for a single step and k3 gives the forward KL there; over several steps it takes k1 in the reward,
    or `kl_loss_with_correct_gradient` (docs/oracle.md).

    Args:
        logps: (B, T); carries the gradient: 1, k1 and 1 − e^{−k1}, the last one 0 where k1 < −60.
        ref_logps: (B, T); detached.
        kind: "k1", "k2" or "k3".

    Returns:
        Estimates, shape (B, T), nats; k2, k3 ≥ 0; 0 when π = π_ref. Inside k3, k1 is held at or above −60:
        e^60 ≈ 1e26 is the largest value, and below −60 there is no gradient. Above, k3 is exact.

    Raises:
        ValueError: shapes differ, inputs that are not floating point, an unknown kind.

    Reference:
        Schulman 2020, "Approximating KL Divergence"; k3 in GRPO: Shao et al. 2024, eq. 4.

    Page: docs/losses/kl_estimate.md

    >>> kl_estimate(torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log(), kind="k3")
    tensor([[0.1931]])
    """
    check_floats(logps=logps, ref_logps=ref_logps)
    check_choice("kind", kind, KL_KINDS)
    k1 = _log_ratio(logps, ref_logps, K3_LOWEST if kind == "k3" else -math.inf)
    if kind == "k1":
        return k1
    return 0.5 * squared(k1) if kind == "k2" else torch.expm1(-k1) + k1


def kl_loss_with_correct_gradient(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """A KL loss whose expected gradient is that of KL(π‖π_ref) over whole sequences.

        L_t = sg(k1_t) + sg(Σ_{s ≥ t} m_s k1_s) (ℓ_t − sg(ℓ_t)),  k1_s = ℓ_s − ℓ_s^ref

    sg stops the gradient and m is the completion mask. The value is k1, a one-sample estimate of the KL; the
    gradient is what REINFORCE gives the token for the divergence from there on: a choice is charged with the
    states it leads to, which no loss of its own log-ratio does. Tokens outside the mask (padding, tool
    results) are skipped, not charged. The gradient is the KL's under a sum over tokens alone
    (`aggregate` in mode "sequence_sum" or "constant"); "sequence_mean" divides by the row's length.

    Args:
        logps: (B, T), of tokens drawn from π; carries the gradient ∂L_t/∂ℓ_t = Σ_{s ≥ t} m_s k1_s, and 0
            outside the mask.
        ref_logps: (B, T); detached.
        mask: (B, T), bool or 0/1; no gradient.

    Returns:
        Losses, shape (B, T), nats, any sign, in promote_types(dtype, float32); 0 when π = π_ref and 0.0
        outside the mask.

    Raises:
        ValueError: shapes differ or are not (B, T), inputs that are not floating point, a mask that is not
            0/1.

    Reference:
        Tang and Munos 2025, "On a Few Pitfalls in KL Divergence Gradient Estimation for RL"; the surrogate:
        Schulman et al. 2015, "Gradient Estimation Using Stochastic Computation Graphs", §3.

    Page: docs/losses/kl_loss_with_correct_gradient.md

    >>> logps = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
    >>> loss = kl_loss_with_correct_gradient(logps, torch.tensor([[0.25, 0.25]]).log(), torch.ones(1, 2))
    >>> loss.detach(), *torch.autograd.grad(loss.sum(), logps)
    (tensor([[0.6931, 0.6931]]), tensor([[1.3863, 0.6931]]))
    """
    check_floats(logps=logps, ref_logps=ref_logps)
    check_same_shape(logps=logps, ref_logps=ref_logps, mask=mask)
    check_dims("logps", logps, 2)
    mask = check_mask("mask", mask)
    logps, k1 = (part.masked_fill(~mask, 0.0) for part in (wide(logps), _log_ratio(logps, ref_logps)))
    value = k1.detach()
    to_go = value.flip(1).cumsum(1).flip(1)
    return value + to_go * (logps - logps.detach())


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Exact entropy of the next-token distribution.

        H_t = −Σ_v p_v log p_v,  p = softmax(z_t/τ)

    z are the logits and τ the temperature. A logit of −∞ is a token outside the support and adds 0.

    Args:
        logits: (..., V); carries the gradient, ∂H/∂z_v = −p_v (log p_v + H)/τ, and 0 at −∞. A row needs one
            finite logit.
        temperature: τ > 0.

    Returns:
        Shape (...), nats, in [0, log V]; log V for equal logits, 0 for a single token.

    Raises:
        ValueError: no vocabulary dimension, logits that are not floating point, τ ≤ 0.

    Reference:
        Shannon 1948, §6; as a regulariser of the policy: Mnih et al. 2016 (A3C), §4.

    Page: docs/losses/entropy.md

    >>> entropy(torch.tensor([[1.0, 1.0, float("-inf")]]))
    tensor([0.6931])
    """
    check_logits(logits)
    check_positive("temperature", temperature)
    logits, broken = sound_rows(wide(logits) / temperature)
    log_probs = logits.log_softmax(dim=-1)
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    return -(log_probs.exp() * finite).sum(dim=-1).masked_fill(broken, torch.nan)
