"""Policy-gradient losses: what an advantage does to a token that was sampled, on policy and off.

The policy alone carries a gradient; advantages, and ratios that only weigh, are detached inside. These losses
take no mask, `aggregate` has it. A slot it discards may hold anything: an advantage that is not finite keeps
its loud value, and the gradient is cut instead of letting 0 · ∞ or 0 · NaN through.
"""

import math

import torch
from torch import Tensor

from .checks import check_floats, check_positive, check_range, held, wide


def _cut(tensor: Tensor, weights: Tensor) -> Tensor:
    """The tensor; where its weight is not finite a NaN, so that the value is loud and no gradient flows."""
    return tensor.masked_fill(~weights.isfinite(), torch.nan)


def reinforce_loss(logps: Tensor, advantages: Tensor) -> Tensor:
    """The plain policy gradient, token by token.

        L_t = −A_t ℓ_t

    ℓ is the log-probability of a token the policy has just sampled and A its advantage: the reward minus a
    baseline that does not depend on the token. The value means nothing, only its gradient is the estimate.

    Args:
        logps: (B, T) or any shape; carries the gradient, ∂L_t/∂ℓ_t = −A_t.
        advantages: the same shape; detached.

    Returns:
        Losses of the same shape, any sign, in promote_types(dtype, float32); 0 for an advantage of 0, and
        log 2 for advantage 1 and a token of probability ½.

    Raises:
        ValueError: shapes differ, inputs that are not floating point.

    Reference:
        Williams 1992 (REINFORCE), theorem 1.

    Page: docs/losses/reinforce_loss.md

    >>> reinforce_loss(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, -1.0]]))
    tensor([[ 0.6931, -0.6931]])
    """
    check_floats(logps=logps, advantages=advantages)
    advantages = wide(advantages).detach()
    return -advantages * _cut(wide(logps), advantages)


def clipped_surrogate_loss(
    ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """The clipped policy-gradient loss of PPO, GRPO, DAPO and, with a sequence's ratio, GSPO.

        L_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t)
        L_t ≤ −c A_t where A_t < 0, with dual_clip = c

    ρ is what `policy_ratio` returned, with its gradient, and A the advantage of each token; one advantage a
    sequence is expanded by the caller. The minimum is pessimistic: a step that has gone too far in the
    direction A asked for gets no gradient, one in the wrong direction keeps it. The dual clip ends that too,
    for a token the policy has come to like c times as much and should not have.

    Args:
        ratio: (B, T) or any shape; carries the gradient ∂L_t/∂ρ_t = −A_t, and 0 where a clip holds: A > 0
            with ρ > 1 + ε_high, A < 0 with ρ < 1 − ε_low, and A < 0 with ρ > c.
        advantages: the same shape; detached.
        clip_low: ε_low in (0, 1]; 1 removes the lower bound.
        clip_high: ε_high > 0; infinity removes the upper bound.
        dual_clip: c > 1, or None for no such bound. With c ≤ 1 + ε_high a token of A < 0 is given up earlier
            than the clip holds one of A > 0.

    Returns:
        Losses of the same shape, any sign, in promote_types(dtype, float32); −A_t at ratio 1, when the policy
        is the one that sampled.

    Raises:
        ValueError: shapes differ, inputs that are not floating point, ε_low outside (0, 1], ε_high ≤ 0,
            c ≤ 1.

    Reference:
        Schulman et al. 2017 (PPO), eq. 7; two bounds: Yu et al. 2025 (DAPO), eq. 10; dual clip: Ye et al.
        2020. Sequences: Zheng et al. 2025 (GSPO), eq. 5.

    Page: docs/losses/clipped_surrogate_loss.md

    >>> ratio, advantages = torch.tensor([[2.0, 0.5, 5.0]]), torch.tensor([[1.0, 1.0, -1.0]])
    >>> clipped_surrogate_loss(ratio, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    tensor([[-1.2800, -0.5000,  3.0000]])
    """
    check_floats(ratio=ratio, advantages=advantages)
    check_range("clip_low", clip_low, 0.0, 1.0)
    check_range("clip_high", clip_high, 0.0, math.inf)
    advantages = wide(advantages).detach()
    ratio = _cut(wide(ratio), advantages)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is None:
        return loss
    check_range("dual_clip", dual_clip, 1.0, math.inf)
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def cispo_loss(
    logps: Tensor, ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """REINFORCE with a clipped importance weight (CISPO): the weight is bounded, no token is dropped.

        L_t = −sg(clip(ρ_t, 1 − ε_low, 1 + ε_high)) A_t ℓ_t

    sg stops the gradient. Where PPO's clip holds, a token teaches nothing; here its weight stops growing and
    its gradient stays, so rare tokens whose probability moved a lot (the "however" of a correction) go on
    learning.

    Args:
        logps: (B, T) or any shape; carries the gradient, ∂L_t/∂ℓ_t = −clip(ρ_t) A_t, 0 for A = 0 alone.
        ratio: the same shape, from `policy_ratio`; detached.
        advantages: the same shape; detached.
        clip_low: ε_low in (0, 1]; 1 removes the lower bound.
        clip_high: ε_high > 0; infinity removes the upper bound.

    Returns:
        Losses of the same shape, any sign, in promote_types(dtype, float32); −A_t ℓ_t at ratio 1.

    Raises:
        ValueError: shapes differ, inputs that are not floating point, ε_low outside (0, 1], ε_high ≤ 0.

    Reference:
        MiniMax 2025 (MiniMax-M1), eq. 4 and 5.

    Page: docs/losses/cispo_loss.md

    >>> logps, ratio = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[4.0, 1.0]])
    >>> cispo_loss(logps, ratio, torch.ones(1, 2), clip_low=1.0, clip_high=1.0)
    tensor([[1.3863, 0.6931]])
    """
    check_floats(logps=logps, ratio=ratio, advantages=advantages)
    check_range("clip_low", clip_low, 0.0, 1.0)
    check_range("clip_high", clip_high, 0.0, math.inf)
    weights = wide(ratio).detach().clamp(1.0 - clip_low, 1.0 + clip_high) * wide(advantages).detach()
    return -weights * _cut(wide(logps), weights)


def off_policy_shaped_loss(logps: Tensor, advantages: Tensor, *, shaping_gamma: float = 0.1) -> Tensor:
    """The loss of tokens that another policy wrote, shaped so that unlikely ones still teach (LUFFY).

        L_t = −A_t π_t / (π_t + γ) = −A_t σ(ℓ_t − log γ),  π_t = exp(ℓ_t)

    The trace comes from a stronger policy whose probabilities are taken as 1, so the ratio is π itself, and
    no clip is used. The weight of ∇ℓ falls like π for an unlikely token under the plain ratio; shaped, it
    falls like π/γ below γ, is largest at π = γ, and fades for what is learnt already.

    Args:
        logps: (B, T) or any shape; carries the gradient, ∂L_t/∂ℓ_t = −A_t π_t γ / (π_t + γ)².
        advantages: the same shape; detached.
        shaping_gamma: γ > 0.

    Returns:
        Losses of the same shape, between 0 and −A_t, in promote_types(dtype, float32); −A_t/2 at π = γ.

    Raises:
        ValueError: shapes differ, inputs that are not floating point, γ ≤ 0 or not finite.

    Reference:
        Yan et al. 2025 (LUFFY), policy shaping via regularized importance sampling.

    Page: docs/losses/off_policy_shaped_loss.md

    >>> off_policy_shaped_loss(torch.tensor([0.1, 0.4]).log(), torch.ones(2))
    tensor([-0.5000, -0.8000])
    """
    check_floats(logps=logps, advantages=advantages)
    check_positive("shaping_gamma", shaping_gamma)
    advantages = wide(advantages).detach()
    logits = _cut(wide(logps), advantages) - math.log(shaping_gamma)
    return -advantages * torch.sigmoid(held(logits))
