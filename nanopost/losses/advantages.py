"""Advantages: how much better a sample did than what it is compared with, as detached weights.

Rewards come as (N,), the G samples of a prompt adjacent. Every group is first taken relative to its own first
reward, so a group of equal rewards gives exactly 0 in every dtype: a rounding residue divided by a small ε
would be a signal.
"""

from torch import Tensor

from .checks import check_choice, check_count, check_groups, check_positive, wide

SCALES = ("none", "std")


def _relative(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards as (groups, G), each group minus its first reward: exactly 0 in a constant group."""
    grouped = wide(rewards).detach().reshape(-1, group_size)
    return grouped - grouped[:, :1]


def group_advantages(
    rewards: Tensor, *, group_size: int, scale: str, ddof: int = 1, eps: float = 1e-4
) -> Tensor:
    """Reward against the mean of the group, as it stands or over the group's standard deviation.

        none   A_i = r_i − mean(r)
        std    A_i = (r_i − mean(r)) / (std(r) + ε),  std(r)² = Σ_j (r_j − mean(r))² / (G − ddof)

    r are the G rewards of one prompt. The mean includes r_i itself, so the expected gradient of "none" is the
    true one times (G − 1)/G; "std" bends its direction as well (docs/oracle.md).

    Args:
        rewards: (N,), finite; the rows of a group adjacent; detached.
        group_size: G ≥ 1, divides N.
        scale: "none" or "std".
        ddof: 1 for the unbiased variance, 0 for the biased one.
        eps: ε > 0, added to the standard deviation.

    Returns:
        Advantages, shape (N,), in promote_types(dtype, float32), without gradient; sum 0 within each group,
        exactly 0 in a group of equal rewards and for G = 1. Under "none" [1, 0, 0, 0] gives
        [.75, −.25, −.25, −.25].

    Raises:
        ValueError: rewards not (N,), empty or not finite, G < 1 or a G that does not divide N, an unknown
            scale, ddof not 0 or 1, ε ≤ 0.

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
    return advantages.flatten()


def leave_one_out_advantages(rewards: Tensor, *, group_size: int) -> Tensor:
    """Reward against the mean of the other samples of the group (RLOO).

        A_i = r_i − (1/(G − 1)) Σ_{j ≠ i} r_j = (G/(G − 1)) · (r_i − mean(r))

    r are the G rewards of one prompt. The baseline does not see r_i, so the expected gradient is exactly the
    true one.

    Args:
        rewards: (N,), finite; the rows of a group adjacent; detached.
        group_size: G ≥ 2, divides N; a group of one has no other sample to compare with.

    Returns:
        Advantages, shape (N,), in promote_types(dtype, float32), without gradient; sum 0 within each group,
        exactly 0 in a group of equal rewards. [1, 0, 0, 0] gives [1, −⅓, −⅓, −⅓].

    Raises:
        ValueError: rewards not (N,), empty or not finite, G < 2 or a G that does not divide N.

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
    return (relative - others).flatten()
