"""Advantages: how much better a sample did than what it is compared with, as detached weights.

Rewards come as (N,), the G samples of a prompt adjacent. Every group is first taken relative to its own first
reward, so a group of equal rewards gives exactly 0 in every dtype: a rounding residue divided by a small ε
would be a signal. `whiten` does the same for a whole step. All of it is computed in float64, where the
squares of float32 numbers have room, and rounded once at the end.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import (
    check_choice,
    check_count,
    check_dims,
    check_finite,
    check_floating,
    check_groups,
    check_mask,
    check_positive,
    check_same_shape,
    wide,
)

SCALES = ("none", "std")


def _relative(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards as (groups, G), float64, each group minus its first reward: exactly 0 in a constant group."""
    grouped = rewards.detach().double().reshape(-1, group_size)
    return grouped - grouped[:, :1]


def _as_weights(advantages: Tensor, rewards: Tensor) -> Tensor:
    """One number a reward again, (N,), in promote_types(the rewards' dtype, float32)."""
    return advantages.flatten().to(torch.promote_types(rewards.dtype, torch.float32))


def group_advantages(
    rewards: Tensor, *, group_size: int, scale: str, ddof: int = 1, eps: float = 1e-4
) -> Tensor:
    """Reward against the mean of the group, as it stands or over the group's standard deviation.

        none   A_i = r_i − mean(r)
        std    A_i = (r_i − mean(r)) / (std(r) + ε),  std(r)² = Σ_j (r_j − mean(r))² / (G − ddof)

    r are the G rewards of one prompt. The mean includes r_i itself, so the expected gradient of "none" is the
    true one times (G − 1)/G; "std" bends its direction as well (docs/oracle.md).

    Args:
        rewards: (N,), finite, integers too; the rows of a group adjacent; detached.
        group_size: G ≥ 1, divides N.
        scale: "none" or "std".
        ddof: 1 for the unbiased variance, 0 for the biased one.
        eps: ε > 0, added to the standard deviation.

    Returns:
        Advantages, shape (N,), in promote_types(dtype, float32), without gradient; sum 0 within each group,
        exactly 0 in a group of equal rewards and for G = 1. Under "none" [1, 0, 0, 0] gives
        [.75, −.25, −.25, −.25].

    Raises:
        ValueError: rewards not (N,), empty, not finite, bool or complex, G < 1 or a G that does not divide N,
            an unknown scale, ddof not 0 or 1, ε ≤ 0.

    Reference:
        "std": Shao et al. 2024 (GRPO), §4.1.2. "none": Liu et al. 2025 (Dr. GRPO), §3.

    Page: docs/losses/group_advantages.md

    >>> import torch
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), group_size=4, scale="none")
    tensor([ 0.7500, -0.2500, -0.2500, -0.2500])
    """
    check_count("group_size", group_size, 1)
    check_groups("rewards", rewards, group_size)
    check_choice("scale", scale, SCALES)
    check_choice("ddof", ddof, (0, 1))
    check_positive("eps", eps)
    relative = _relative(rewards, group_size)
    advantages = relative - relative.mean(dim=1, keepdim=True)
    if scale == "std":
        variance = advantages.square().sum(dim=1, keepdim=True) / max(group_size - ddof, 1)
        advantages = advantages / (variance.sqrt() + eps)
    return _as_weights(advantages, rewards)


def leave_one_out_advantages(rewards: Tensor, *, group_size: int) -> Tensor:
    """Reward against the mean of the other samples of the group (RLOO).

        A_i = r_i − (1/(G − 1)) Σ_{j ≠ i} r_j = (G/(G − 1)) · (r_i − mean(r))

    r are the G rewards of one prompt. The baseline does not see r_i, so the expected gradient is exactly the
    true one.

    Args:
        rewards: (N,), finite, integers too; the rows of a group adjacent; detached.
        group_size: G ≥ 2, divides N; a group of one has no other sample to compare with.

    Returns:
        Advantages, shape (N,), in promote_types(dtype, float32), without gradient; sum 0 within each group,
        exactly 0 in a group of equal rewards. [1, 0, 0, 0] gives [1, −⅓, −⅓, −⅓].

    Raises:
        ValueError: rewards not (N,), empty, not finite, bool or complex, G < 2 or a G that does not divide N.

    Reference:
        Kool et al. 2019; Ahmadian et al. 2024 (RLOO), §2.

    Page: docs/losses/leave_one_out_advantages.md

    >>> import torch
    >>> leave_one_out_advantages(torch.tensor([1.0, 0.0]), group_size=2)
    tensor([ 1., -1.])
    """
    check_count("group_size", group_size, 2)
    check_groups("rewards", rewards, group_size)
    relative = _relative(rewards, group_size)
    others = (relative.sum(dim=1, keepdim=True) - relative) / (group_size - 1)
    return _as_weights(relative - others, rewards)


def informative_groups(rewards: Tensor, *, group_size: int) -> Tensor:
    """Which rows belong to a group that can teach something: its rewards are not all equal.

        keep_i = 1[max_j r_j > min_j r_j],  the same for each row of a group

    r are the G rewards of one prompt. A group of equal rewards, all right or all wrong, has advantages 0
    under every baseline; dynamic sampling drops it and draws other prompts until the step is full. Equal
    means equal as float64 numbers, in which the advantages are computed.

    Args:
        rewards: (N,), finite, integers too; the rows of a group adjacent; no gradient.
        group_size: G ≥ 1, divides N.

    Returns:
        Booleans, shape (N,); [1, 0, 0, 0] is kept whole, [.1, .1, .1] dropped whole. A group of one is always
        dropped: it has nothing to compare with.

    Raises:
        ValueError: rewards not (N,), empty, not finite (a missing reward is no reward of 0), bool or complex,
            G < 1 or a G that does not divide N.

    Reference:
        Yu et al. 2025 (DAPO), eq. 11.

    Page: docs/losses/informative_groups.md

    >>> import torch
    >>> informative_groups(torch.tensor([1.0, 0.0, 0.1, 0.1]), group_size=2)
    tensor([ True,  True, False, False])
    """
    check_count("group_size", group_size, 1)
    check_groups("rewards", rewards, group_size)
    differs = _relative(rewards, group_size) != 0.0
    return differs.any(dim=1).repeat_interleave(group_size)


def whiten(
    advantages: Tensor,
    mask: Tensor,
    *,
    ddof: int = 1,
    eps: float = 1e-8,
    total: Callable[[float], float] = float,
) -> Tensor:
    """Advantages with mean 0 and variance 1 over the tokens of the whole step (REINFORCE++).

        A'_bt = (A_bt − mean(A)) / √(var(A) + ε),  var(A) = Σ m_bt (A_bt − mean(A))² / (n − ddof)

    m is the completion mask; the mean runs over the n = Σ m_bt tokens of the optimiser step, all its
    micro-batches and processes together: pass a process's rows at once and give `total` the sum over
    processes. Whitening each part by its own mean and spread is another formula, and a noisier one the
    smaller the part.

    Args:
        advantages: (B, T), finite in the mask, anything outside it; detached.
        mask: (B, T), bool or 0/1.
        ddof: 1 for the unbiased variance, 0 for the biased one.
        eps: ε > 0, added to the variance.
        total: sums a float over the processes (`distributed.all_sum`); the default is one process's own. It
            is called equally often on each, also where a process has no token.

    Returns:
        Weights, shape (B, T), in promote_types(dtype, float32), without gradient; 0 outside the mask, and
        exactly 0 everywhere when the step has one token or all its values are equal. [1, 3] gives
        [−.7071, .7071] and with ddof = 0 [−1, 1].

    Raises:
        ValueError: shapes differ or are not (B, T), advantages not floating point or in the mask not finite,
            a mask that is not 0/1, ddof not 0 or 1, ε ≤ 0.

    Reference:
        Hu et al. 2025 (REINFORCE++), global advantage normalisation.

    Page: docs/losses/whiten.md

    >>> import torch
    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]), ddof=0)
    tensor([[-1.,  1.,  0.]])
    """
    check_floating(advantages=advantages)
    check_same_shape(advantages=advantages, mask=mask)
    check_dims("advantages", advantages, 2)
    check_choice("ddof", ddof, (0, 1))
    check_positive("eps", eps)
    mask = check_mask("mask", mask)
    values = wide(advantages).detach().masked_fill(~mask, 0.0)
    check_finite("advantages", values)
    inside = values[mask].double()
    n = total(float(inside.numel()))
    origin = total(float(inside[:1].sum())) / max(total(float(inside.numel() > 0)), 1.0)
    relative = inside - origin  # equal values leave one exact number each, and their sum is exact
    centred = relative - total(float(relative.sum())) / max(n, 1.0)
    variance = total(float(centred.square().sum())) / max(n - ddof, 1.0)
    return values.masked_scatter(mask, (centred / (variance + eps) ** 0.5).to(values.dtype))
