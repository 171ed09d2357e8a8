"""The ratio of two policies: of the trained one to the one that sampled, and of trainer to sampler.

The ratio carries the gradient of the policy and of nothing else. Whatever stands outside the mask, the ratio
there is 1 and has no gradient.
"""

from torch import Tensor

from .checks import (
    check_choice,
    check_dims,
    check_floats,
    check_mask,
    check_positive,
    check_same_shape,
    check_unit,
    wide,
)
from .likelihood import sequence_logps

# Log-ratios that are exponentiated stay inside ±60 nats; beyond that no gradient flows. e^60 ≈ 1e26 leaves
# float32 room for an advantage and a sum over tokens.
LOG_RATIO_LIMIT = 60.0
LEVELS = ("token", "sequence")
WEIGHT_MODES = ("truncate", "mask")


def policy_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor, *, level: str = "token") -> Tensor:
    """Probability ratio of the policy to the policy that sampled, of each token or of the whole sequence.

        token      ρ_t = exp(ℓ_t − ℓ_t^old)
        sequence   ρ_t = s = exp((1/|o|) Σ_u m_u (ℓ_u − ℓ_u^old)),  |o| = Σ_u m_u

    ℓ^old are the log-probabilities the sampler recorded, under the very distribution it drew from; m is the
    completion mask. A sequence has one s, the geometric mean of its token ratios, and every token of the row
    holds it: what follows clips all of them or none.

    Args:
        logps: (B, T); carries the gradient: ∂ρ_t/∂ℓ_t = ρ_t, or s/|o| for each token of the row; 0 outside
            the mask and where the log-ratio (its mean, for a sequence) is beyond ±60.
        old_logps: (B, T); detached.
        mask: (B, T), bool or 0/1; no gradient.
        level: "token" or "sequence".

    Returns:
        Ratios, shape (B, T), in promote_types(dtype, float32), > 0 and inside e^±60; 1 when the policy is the
        one that sampled, and exactly 1.0 outside the mask.

    Raises:
        ValueError: shapes differ or are not (B, T), a mask that is not 0/1, an unknown level.

    Reference:
        token: Schulman et al. 2017 (PPO), r_t(θ) above eq. 6. sequence: Zheng et al. 2025 (GSPO), eq. 7.

    Page: docs/losses/policy_ratio.md

    >>> import torch
    >>> logps, old_logps = torch.tensor([[0.6, 0.2]]).log(), torch.tensor([[0.3, 0.4]]).log()
    >>> policy_ratio(logps, old_logps, torch.tensor([[True, True]]))
    tensor([[2.0000, 0.5000]])
    >>> policy_ratio(logps, old_logps, torch.tensor([[True, True]]), level="sequence")
    tensor([[1., 1.]])
    """
    check_floats(logps=logps, old_logps=old_logps)
    check_same_shape(logps=logps, old_logps=old_logps, mask=mask)
    check_dims("logps", logps, 2)
    check_choice("level", level, LEVELS)
    mask = check_mask("mask", mask)
    log_ratio = (wide(logps) - wide(old_logps).detach()).masked_fill(~mask, 0.0)
    if level == "sequence":
        mean = sequence_logps(log_ratio, mask, average=True)
        log_ratio = mean[:, None].expand_as(log_ratio).masked_fill(~mask, 0.0)
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def importance_weights(ratio: Tensor, *, mode: str, high: float, low: float = 0.0) -> Tensor:
    """Weights that correct for a sampler whose probabilities are not quite the trainer's.

        truncate   w_t = min(max(ρ_t, low), high)
        mask       w_t = ρ_t · 1[low ≤ ρ_t ≤ high]

    ρ is the ratio of the trainer's old policy to the sampler that drew the tokens (other kernels, another
    precision): `policy_ratio(trainer_old_logps, sampler_logps, mask)`. The loss of a token is multiplied by
    its weight. Truncating bounds the variance and keeps every token; masking drops the tokens on which the
    two disagree too much.

    Args:
        ratio: (B, T) or any shape; detached.
        mode: "truncate" or "mask".
        high: the upper bound, finite and at least `low`.
        low: the lower bound, ≥ 0; 0 removes it.

    Returns:
        Weights of the same shape, in promote_types(dtype, float32), without gradient, in [low, high] or, for
        "mask", in {0} ∪ [low, high]; 1 where the two policies agree, as long as low ≤ 1 ≤ high. A NaN stays.

    Raises:
        ValueError: a ratio that is not floating point, an unknown mode, high ≤ 0 or not finite, low < 0 or
            above high.

    Reference:
        truncate: Ionides 2008; between sampler and trainer: Yao et al. 2025 (TIS). mask: Ling Team 2025
        (IcePop).

    Page: docs/losses/importance_weights.md

    >>> import torch
    >>> importance_weights(torch.tensor([0.25, 1.0, 4.0]), mode="truncate", high=2.0)
    tensor([0.2500, 1.0000, 2.0000])
    >>> importance_weights(torch.tensor([0.25, 1.0, 4.0]), mode="mask", low=0.5, high=2.0)
    tensor([0., 1., 0.])
    """
    check_floats(ratio=ratio)
    check_choice("mode", mode, WEIGHT_MODES)
    check_positive("high", high)
    check_unit("low", low, high)
    ratio = wide(ratio).detach()
    if mode == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
