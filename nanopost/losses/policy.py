"""The policy's own terms: the ratio to the policy that sampled, the clipped surrogate, KL, entropy.

Only the policy carries a gradient; what it is compared with is detached inside. A slot outside the mask may
hold anything: clamps and fills cut its gradient to exactly 0 instead of letting 0 · ∞ or 0 · NaN through.
"""

import torch
from torch import Tensor

from .checks import check_choice, check_logits, check_positive, check_range, check_same_shape, wide

# Log-ratios that are exponentiated stay inside ±60 nats; beyond that no gradient flows. e^60 ≈ 1e26 leaves
# float32 room for an advantage and a sum over tokens.
LOG_RATIO_LIMIT = 60.0
KL_KINDS = ("k1", "k2", "k3")


def _log_ratio(logps: Tensor, other_logps: Tensor, limit: float | None = None) -> Tensor:
    """log π − log π', π' detached, inside ±limit (None: any float). A NaN stays, its gradient is 0."""
    log_ratio = wide(logps) - wide(other_logps).detach()
    bound = torch.finfo(log_ratio.dtype).max if limit is None else limit
    return log_ratio.clamp(-bound, bound)


def policy_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """Probability ratio of the policy to the policy that sampled, token by token.

        ρ_t = exp(ℓ_t − ℓ_t^old)

    ℓ^old are the log-probabilities the sampler recorded, under the very distribution it drew from.

    Args:
        logps: (B, T); carries the gradient, ∂ρ_t/∂ℓ_t = ρ_t, and 0 where |ℓ_t − ℓ_t^old| > 60.
        old_logps: (B, T); detached.

    Returns:
        Ratios, shape (B, T), > 0 and inside e^±60; 1 when the policy is the one that sampled.

    Raises:
        ValueError: shapes differ.

    Reference:
        Schulman et al. 2017 (PPO), r_t(θ) above eq. 6.

    Page: docs/losses/policy_ratio.md

    >>> policy_ratio(torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[0.3, 0.4]]).log())
    tensor([[2.0000, 0.5000]])
    """
    check_same_shape(logps=logps, old_logps=old_logps)
    return _log_ratio(logps, old_logps, LOG_RATIO_LIMIT).exp()


def clipped_surrogate_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """The clipped policy-gradient loss of PPO and GRPO, token by token.

        L_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t),  ρ_t = exp(ℓ_t − ℓ_t^old)

    A is the advantage of each token; one advantage a sequence is expanded by the caller. The minimum is
    pessimistic: a step that has gone too far in the direction A asked for gets no gradient, one in the wrong
    direction keeps it.

    Args:
        logps: (B, T); carries the gradient −ρ_t A_t, and 0 where the clip holds: A > 0 with ρ > 1 + ε_high,
            A < 0 with ρ < 1 − ε_low.
        old_logps: (B, T); detached.
        advantages: (B, T); detached.
        clip_low: ε_low in (0, 1]; 1 removes the lower bound.
        clip_high: ε_high > 0.

    Returns:
        Losses, shape (B, T), any sign; −A_t when the policy is the one that sampled.

    Raises:
        ValueError: shapes differ, ε_low outside (0, 1], ε_high ≤ 0.

    Reference:
        Schulman et al. 2017 (PPO), eq. 7; two bounds: Yu et al. 2025 (DAPO), eq. 10.

    Page: docs/losses/clipped_surrogate_loss.md

    >>> logps, old_logps = torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[0.3, 0.4]]).log()
    >>> clipped_surrogate_loss(logps, old_logps, torch.tensor([[1.0, 1.0]]), clip_low=0.2, clip_high=0.28)
    tensor([[-1.2800, -0.5000]])
    """
    check_same_shape(logps=logps, old_logps=old_logps, advantages=advantages)
    check_range("clip_low", clip_low, 0.0, 1.0)
    check_positive("clip_high", clip_high)
    ratio = policy_ratio(logps, old_logps)
    advantages = wide(advantages).detach()
    ratio = ratio.masked_fill(~advantages.isfinite(), torch.nan)  # the value stays loud, the gradient is cut
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def kl_estimate(logps: Tensor, ref_logps: Tensor, *, kind: str) -> Tensor:
    """One-sample estimates of KL(π‖π_ref) at tokens drawn from π.

        k1 = ℓ_t − ℓ_t^ref        k2 = ½ k1²        k3 = e^{−k1} − 1 + k1

    ℓ^ref are the log-probabilities of the reference. As values, k1 and k3 have the mean KL; k2 is close to it
    when the two are close. As losses they are another matter: the gradient of k1 is zero on average, k2 is
    right for a single step and k3 gives the forward KL there; over several steps only k1 in the reward is
    right (docs/oracle.md).

    Args:
        logps: (B, T); carries the gradient: 1, k1 and 1 − e^{−k1}.
        ref_logps: (B, T); detached.
        kind: "k1", "k2" or "k3".

    Returns:
        Estimates, shape (B, T), nats; k2, k3 ≥ 0; 0 when π = π_ref. Inside k3, k1 is held inside ±60.

    Raises:
        ValueError: shapes differ, an unknown kind.

    Reference:
        Schulman 2020, "Approximating KL Divergence"; k3 in GRPO: Shao et al. 2024, eq. 4.

    Page: docs/losses/kl_estimate.md

    >>> kl_estimate(torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log(), kind="k3")
    tensor([[0.1931]])
    """
    check_same_shape(logps=logps, ref_logps=ref_logps)
    check_choice("kind", kind, KL_KINDS)
    k1 = _log_ratio(logps, ref_logps, LOG_RATIO_LIMIT if kind == "k3" else None)
    if kind == "k1":
        return k1
    return 0.5 * k1**2 if kind == "k2" else torch.expm1(-k1) + k1


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
        ValueError: no vocabulary dimension, τ ≤ 0.

    Reference:
        Shannon 1948, §6; as a regulariser of the policy: Mnih et al. 2016 (A3C), §4.

    Page: docs/losses/entropy.md

    >>> entropy(torch.tensor([[1.0, 1.0, float("-inf")]]))
    tensor([0.6931])
    """
    check_logits(logits)
    check_positive("temperature", temperature)
    log_probs = (wide(logits) / temperature).log_softmax(dim=-1)
    finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
    return -(log_probs.exp() * finite).sum(dim=-1)
