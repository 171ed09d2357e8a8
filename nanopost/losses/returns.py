"""From a score to a signal per token: shaped rewards, sums of what follows, GAE, a penalty on length.

Time runs over the tokens that the policy chose. A slot outside the mask (prompt, tool result, padding) is no
step: it gets no reward, its value is never read, and nothing is discounted across it. It may hold anything.
"""

import math

import torch
from torch import Tensor

from .checks import (
    check_count,
    check_dims,
    check_finite,
    check_floating,
    check_floats,
    check_fraction,
    check_mask,
    check_rows,
    check_same_shape,
    check_scores,
    check_unit,
    wide,
)


def _inside(mask: Tensor, **tensors: Tensor) -> list[Tensor]:
    """Each tensor wide, detached and 0 outside the mask; what is inside must be finite."""
    filled = {name: wide(tensor).detach().masked_fill(~mask, 0.0) for name, tensor in tensors.items()}
    for name, tensor in filled.items():
        check_finite(name, tensor)
    return list(filled.values())


def kl_shaped_rewards(
    rewards: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, *, beta: float
) -> Tensor:
    """The sequence's score on its last token, and the distance to the reference paid token by token.

        R_t = −β (ℓ_t − ℓ_t^ref) + 1[t = last] · r

    r is the score of the whole completion, ℓ^ref are the log-probabilities of the reference. Their sum over a
    row is r − β Σ k1, whose mean under the policy is the objective E[r] − β·KL(π‖π_ref); credited with what
    follows (`reward_to_go`), it gives that objective's true gradient.

    Args:
        rewards: (B,), finite where the row has a token; 0.0 is a score like any other; detached.
        logps: (B, T), of the policy that sampled; detached.
        ref_logps: (B, T); detached.
        mask: (B, T), bool or 0/1; the last masked token of the row takes the score.
        beta: β ≥ 0, 0 leaves the score alone (the log-probabilities are then not read).

    Returns:
        Rewards, shape (B, T), without gradient; 0 outside the mask and in a row without a token, whose score
        is dropped. r = 1, k1 = (.5, −.2) and β = .1 give (−.05, 1.02).

    Raises:
        ValueError: shapes differ or are not (B, T), rewards not (B,), log-probabilities not floating point,
            scores that are bool or complex, a score or in the mask a log-probability that is not finite, a
            mask that is not 0/1, β < 0.

    Reference:
        Ziegler et al. 2019, eq. 2; Ouyang et al. 2022 (InstructGPT), eq. 2.

    Page: docs/losses/kl_shaped_rewards.md

    >>> logps, ref_logps = torch.tensor([[-1.0, -2.0, 7.0]]), torch.tensor([[-1.5, -1.8, 9.0]])
    >>> kl_shaped_rewards(torch.tensor([1.0]), logps, ref_logps, torch.tensor([[1, 1, 0]]), beta=0.1)
    tensor([[-0.0500,  1.0200,  0.0000]])
    """
    check_floats(logps=logps, ref_logps=ref_logps)
    check_same_shape(logps=logps, mask=mask)
    check_dims("logps", logps, 2)
    check_scores("rewards", rewards)
    check_fraction("beta", beta, math.inf)
    mask = check_mask("mask", mask)
    acts = mask.any(dim=1)
    check_same_shape(rewards=rewards, rows=acts)
    (scores,) = _inside(acts, rewards=rewards)
    left = mask.flip(1).cumsum(dim=1).flip(1)  # tokens from here to the row's end
    terminal = torch.where(mask & (left == 1), scores[:, None], 0.0)
    read = mask if beta > 0.0 else torch.zeros_like(mask)
    ours, reference = _inside(read, logps=logps, ref_logps=ref_logps)
    return terminal - beta * (ours - reference)


def reward_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """What a token is credited with when nothing is subtracted: its reward and the discounted ones after it.

        G_t = Σ_{s ≥ t} γ^{s−t} R_s

    R are rewards per token. s and t count masked tokens only: a tool result between two actions is one step
    of time, not as many as it has tokens.

    Args:
        rewards: (B, T); detached. Outside the mask they are dropped, so credit a tool's effect to an action.
        mask: (B, T), bool or 0/1.
        gamma: γ in [0, 1]; 1 is the plain sum.

    Returns:
        Sums, shape (B, T), in promote_types(dtype, float32), without gradient; 0 outside the mask. Rewards
        (1, 2, 4) and γ = ½ give (3, 4, 4).

    Raises:
        ValueError: shapes differ or are not (B, T), rewards that are bool, complex or in the mask not finite,
            a mask that is not 0/1, γ outside [0, 1].

    Reference:
        Sutton & Barto 2018, eq. 3.8; as the weight of the policy gradient: Schulman et al. 2016 (GAE), eq. 1,
        choice 2.

    Page: docs/losses/reward_to_go.md

    >>> reward_to_go(torch.tensor([[1.0, 2.0, 9.0, 4.0]]), torch.tensor([[1, 1, 0, 1]]), gamma=0.5)
    tensor([[3., 4., 0., 4.]])
    """
    check_scores("rewards", rewards)
    mask = check_rows(mask, rewards=rewards)
    check_unit("gamma", gamma)
    (rewards,) = _inside(mask, rewards=rewards)
    sums = torch.zeros_like(rewards)
    ahead = rewards.new_zeros(len(rewards))  # G of the next action
    for t in reversed(range(rewards.shape[1])):
        ahead = torch.where(mask[:, t], rewards[:, t] + gamma * ahead, ahead)
        sums[:, t] = ahead
    return sums.masked_fill(~mask, 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: between one step of the critic's word and the whole return.

        δ_t = R_t + γ V_{t+1} − V_t,  A_t = Σ_{s ≥ t} (γλ)^{s−t} δ_s,  G_t = A_t + V_t

    V_t is the critic's value before the t-th action, G the target it is fitted to. t + 1 is the next masked
    token, with any tool result between the two skipped; after the last one V is 0, whatever the critic says
    there. λ = 1 is `reward_to_go` − V, right on average whatever V is; λ = 0 is δ alone, as wrong as V.

    Args:
        rewards: (B, T), as from `kl_shaped_rewards`; detached.
        values: (B, T); detached.
        mask: (B, T), bool or 0/1.
        gamma: γ in [0, 1].
        gae_lambda: λ in [0, 1].

    Returns:
        Advantages and returns, each (B, T), in promote_types(dtype, float32), without gradient; 0 outside the
        mask. R = (0, 1), V = (.4, .6), γ = 1 and λ = .5 give A = (.4, .4) and G = (.8, 1).

    Raises:
        ValueError: shapes differ or are not (B, T), rewards that are bool or complex, values not floating
            point, one of them in the mask not finite, a mask that is not 0/1, γ or λ outside [0, 1].

    Reference:
        Schulman et al. 2016 (GAE), eq. 11 to 16.

    Page: docs/losses/gae.md

    >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.4, 0.6, 9.0]])
    >>> gae(rewards, values, torch.tensor([[1, 1, 0]]), gamma=1.0, gae_lambda=0.5)
    (tensor([[0.4000, 0.4000, 0.0000]]), tensor([[0.8000, 1.0000, 0.0000]]))
    """
    check_scores("rewards", rewards)
    check_floating(values=values)
    mask = check_rows(mask, rewards=rewards, values=values)
    check_unit("gamma", gamma)
    check_unit("gae_lambda", gae_lambda)
    rewards, values = _inside(mask, rewards=rewards, values=values)
    advantages = torch.zeros_like(rewards + values)
    ahead, next_values = advantages.new_zeros(2, len(mask))  # A and V of the next action
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        ahead = torch.where(mask[:, t], delta + gamma * gae_lambda * ahead, ahead)
        next_values = torch.where(mask[:, t], values[:, t], next_values)
        advantages[:, t] = ahead
    advantages = advantages.masked_fill(~mask, 0.0)
    return advantages, advantages + values


def overlong_penalty(lengths: Tensor, *, max_tokens: int, cache: int) -> Tensor:
    """A soft penalty on length, to be added to the score: a ramp before the limit instead of a cliff.

        P(n) = min(0, max(−1, (L_max − L_cache − n) / L_cache))

    n is the number of tokens of a completion, stop token included, L_max the limit and L_cache the length of
    the ramp in front of it. The formula counts tokens; characters are some other number.

    Args:
        lengths: (N,), whole numbers ≥ 0; no gradient.
        max_tokens: L_max ≥ 1.
        cache: L_cache in [1, L_max].

    Returns:
        Penalties, shape (N,), float32, in [−1, 0]: 0 up to L_max − L_cache tokens, −1 from L_max on. With
        L_max = 20480 and L_cache = 4096, 18432 tokens cost −.5.

    Raises:
        ValueError: lengths not (N,), not whole numbers or negative, L_max or L_cache < 1, L_cache > L_max.

    Reference:
        Yu et al. 2025 (DAPO), eq. 13.

    Page: docs/losses/overlong_penalty.md

    >>> overlong_penalty(torch.tensor([900, 18432, 20480]), max_tokens=20480, cache=4096)
    tensor([ 0.0000, -0.5000, -1.0000])
    """
    check_dims("lengths", lengths, 1)
    check_count("max_tokens", max_tokens, 1)
    check_count("cache", cache, 1)
    if cache > max_tokens:
        raise ValueError(f"cache must not exceed max_tokens {max_tokens}, got {cache}")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be whole numbers of tokens, got {lengths.dtype}")
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"lengths must be at least 0, got {int(lengths.min())}")
    room = max_tokens - cache - lengths.long()
    return wide(room.clamp(-cache, 0)) / cache
