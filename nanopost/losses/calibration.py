"""Is a reward difference worth what it claims: Elo points, win fractions, and accuracy by size of difference.

A reward model is trained so that σ(r⁺ − r⁻) is the probability of being preferred. The functions here turn
that into the units people compare models in, and check it against preferences it has not seen.
"""

import itertools
import math

import torch
from torch import Tensor

from .checks import check_dims, check_finite, check_floats, held, wide

ELO_PER_NAT = 400.0 / math.log(10.0)  # 173.72 points for a reward difference of 1


def _check_edges(edges: tuple[float, ...]) -> None:
    """At least one bin, from 0 upwards without a gap; the last edge may be infinite."""
    rising = all(low < high for low, high in itertools.pairwise(edges))
    if len(edges) < 2 or edges[0] != 0.0 or not rising:
        raise ValueError(f"edges must rise from 0 and hold at least two numbers, got {edges!r}")


def elo_from_reward(difference: Tensor) -> Tensor:
    """A difference of rewards in Elo points.

        ΔElo = (400 / ln 10) · Δ ≈ 173.72 · Δ

    Δ is the reward of one answer less that of the other. Elo counts odds in powers of ten with 400 points a
    power, a Bradley–Terry reward in powers of e.

    Args:
        difference: any shape, floating point; carries the gradient 400/ln 10.

    Returns:
        Elo points, same shape, in promote_types(dtype, float32), with the sign of Δ; 173.72 for Δ = 1.

    Raises:
        ValueError: not floating point.

    Reference:
        Bai et al. 2022, who round it to 174; Askell et al. 2021 for the reward as log-odds.

    Page: docs/losses/elo_from_reward.md

    >>> elo_from_reward(torch.tensor([1.0, -2.0]))
    tensor([ 173.7178, -347.4356])
    """
    check_floats(difference=difference)
    return wide(difference) * ELO_PER_NAT


def win_fraction(elo_difference: Tensor) -> Tensor:
    """How often the side that is ahead by ΔElo wins.

        w = 1 / (1 + 10^{−ΔElo/400}) = σ(ΔElo · ln 10 / 400)

    ΔElo is the rating of the side in question less the other's: positive is ahead, and w > ½. Printed with
    +ΔElo in the exponent, as it sometimes is, the formula gives the other side's fraction, 1 − w.

    Args:
        elo_difference: any shape, floating point; carries the gradient w(1 − w) · ln 10/400.

    Returns:
        Fractions, same shape, in [0, 1]; ½ at 0, 10/11 at 400; w(ΔElo) + w(−ΔElo) = 1. The win fraction of
        `elo_from_reward(Δ)` is σ(Δ).

    Raises:
        ValueError: not floating point.

    Reference:
        Elo 1978, in its logistic form; Bai et al. 2022.

    Page: docs/losses/win_fraction.md

    >>> win_fraction(torch.tensor([0.0, 400.0, -400.0]))
    tensor([0.5000, 0.9091, 0.0909])
    """
    check_floats(elo_difference=elo_difference)
    return held(wide(elo_difference) / ELO_PER_NAT).sigmoid()


def calibration(
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, edges: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs, won pairs and expected wins, by the size of the reward difference.

        n_b = Σ_i 1[|Δ_i| ∈ bin b]     wins_b = Σ_i (1[Δ_i > 0] + ½·1[Δ_i = 0])     expected_b = Σ_i σ(|Δ_i|)

    Δ_i = r⁺_i − r⁻_i, the three sums over the pairs i of a bin, and bin b is edges[b] ≤ |Δ| < edges[b + 1].
    A calibrated reward model has wins ≈ expected in every bin. They are sums, so they add over micro-batches
    and processes, and an empty bin is 0 of 0; divide by the counts at the very end.

    Args:
        chosen_rewards: (B,), finite, of the answers people preferred; detached.
        rejected_rewards: (B,), finite; detached.
        edges: rising from 0, the last one may be math.inf. A finite last edge must lie above every |Δ|.

    Returns:
        (counts, wins, expected), each float64 of shape (len(edges) − 1,). One pair that leads by 1: 1 pair,
        1 win, .7311 expected.

    Raises:
        ValueError: shapes differ or are not (B,), rewards not floating point or not finite, edges that do not
            rise from 0, a difference on or beyond the last edge: no pair is dropped in silence.

    Reference:
        Bai et al. 2022, figure 9.

    Page: docs/losses/calibration.md

    >>> rewards = torch.tensor([1.0, 0.5, 3.0]), torch.tensor([0.0, 0.5, 5.0])
    >>> [sums.tolist() for sums in calibration(*rewards, edges=(0.0, 1.5, math.inf))][:2]
    [[2.0, 1.0], [1.5, 0.0]]
    """
    check_floats(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    check_dims("chosen_rewards", chosen_rewards, 1)
    check_finite("chosen_rewards", chosen_rewards)
    check_finite("rejected_rewards", rejected_rewards)
    _check_edges(edges)
    difference = chosen_rewards.detach().double() - rejected_rewards.detach().double()
    size = difference.abs()
    if (size >= edges[-1]).any():
        raise ValueError(f"edges end at {edges[-1]}, got a difference of {size.max().item()}")
    bounds = torch.tensor(edges, dtype=size.dtype, device=size.device)
    bins = torch.bucketize(size, bounds, right=True).unsqueeze(1)  # from 1: how many edges lie at or below
    inside = bins == torch.arange(1, len(edges), device=size.device)
    won = (1.0 + difference.sign()) / 2.0
    counts, wins, expected = torch.stack((torch.ones_like(size), won, size.sigmoid())) @ inside.double()
    return counts, wins, expected
