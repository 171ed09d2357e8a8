"""The policy-gradient family as one table: a variant is a row of five choices, and nothing else.

    baseline     what a completion's reward is compared with
    ratio        π_θ/π_old of each token, or one for the whole sequence
    surrogate    what the clip does with it
    aggregation  how per-token losses become one number (`aggregate`)
    kl           where the pull to the reference enters: the loss (k3), the reward (k1), nowhere

Read the rows side by side: that is the lesson. `token_advantages` and `policy_values` compute a row from the
functions of this room; `train_grpo.py --loss NAME` trains with it.

    python -m nanopost.losses.variants                        the table
    python -m nanopost.losses.variants --compare rollout.json  how each variant weighs each token of a rollout
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from .advantages import group_advantages, leave_one_out_advantages, whiten
from .checks import (
    check_choice,
    check_dims,
    check_fraction,
    check_groups,
    check_mask,
    check_range,
    check_same_shape,
    wide,
)
from .kl import kl_estimate
from .likelihood import sequence_logps
from .policy import cispo_loss, clipped_surrogate_loss, off_policy_shaped_loss, reinforce_loss
from .ratio import LEVELS, policy_ratio
from .reduce import MODES
from .returns import gae, kl_shaped_rewards, reward_to_go

BASELINES: dict[str, Callable[[Tensor, int], Tensor]] = {  # of a completion; batch and critic are of a token
    "none": lambda rewards, size: rewards,
    "group_mean": lambda rewards, size: group_advantages(rewards, group_size=size, scale="none"),
    "group_std": lambda rewards, size: group_advantages(rewards, group_size=size, scale="std"),
    "leave_one_out": lambda rewards, size: leave_one_out_advantages(rewards, group_size=size),
}
SURROGATES: dict[str, Callable[..., Tensor]] = {
    "log_prob": lambda logps, ratio, advantages, **clip: reinforce_loss(logps, advantages),
    "clip": lambda logps, ratio, advantages, **clip: clipped_surrogate_loss(ratio, advantages, **clip),
    "weight": lambda logps, ratio, advantages, **clip: cispo_loss(logps, ratio, advantages, **clip),
}
SURROGATES["traces"] = SURROGATES["clip"]  # on the policy's own samples; the traces have another


@dataclass(frozen=True)
class Variant:
    """A row of the table; ε and β are the source's numbers, or a framework's default where it gives none."""

    name: str
    baseline: str  # none, group_mean, group_std, leave_one_out, batch (whitened), critic (GAE)
    ratio: str  # token, sequence
    surrogate: str  # log_prob, clip, weight (CISPO), traces (LUFFY)
    clip_low: float  # 1: no lower bound
    clip_high: float  # infinite: no upper bound
    aggregation: str  # a mode of `aggregate`
    kl: str  # none, loss (k3), reward (k1)
    beta: float  # weight of the KL
    source: str

    def __post_init__(self) -> None:
        check_choice("baseline", self.baseline, (*BASELINES, "batch", "critic"))
        check_choice("ratio", self.ratio, LEVELS)
        check_choice("surrogate", self.surrogate, SURROGATES)
        check_range("clip_low", self.clip_low, 0.0, 1.0)
        check_range("clip_high", self.clip_high, 0.0, math.inf)
        check_choice("aggregation", self.aggregation, MODES)
        check_choice("kl", self.kl, ("none", "loss", "reward"))
        check_fraction("beta", self.beta, math.inf)


NO = 1.0, math.inf
ROWS = [  # name, baseline, ratio, surrogate, ε_low, ε_high, aggregation, kl, β, source
    Variant("reinforce", "none", "token", "log_prob", *NO, "sequence_sum", "none", 0.0, "Williams 1992"),
    Variant(
        "rloo", "leave_one_out", "token", "log_prob", *NO, "sequence_sum", "reward", 0.05, "Ahmadian 2024"
    ),
    Variant("reinforce++", "batch", "token", "clip", 0.2, 0.2, "token_mean", "reward", 0.01, "Hu 2025"),
    Variant("ppo", "critic", "token", "clip", 0.2, 0.2, "token_mean", "reward", 0.02, "Ouyang 2022"),
    Variant("grpo", "group_std", "token", "clip", 0.2, 0.2, "sequence_mean", "loss", 0.04, "Shao 2024"),
    Variant("dr_grpo", "group_mean", "token", "clip", 0.2, 0.2, "constant", "none", 0.0, "Liu 2025"),
    Variant("dapo", "group_std", "token", "clip", 0.2, 0.28, "token_mean", "none", 0.0, "Yu 2025"),
    Variant("gspo", "group_std", "sequence", "clip", 3e-4, 4e-4, "sequence_mean", "none", 0.0, "Zheng 2025"),
    Variant("cispo", "group_std", "token", "weight", 1.0, 4.0, "token_mean", "none", 0.0, "MiniMax 2025"),
    Variant("luffy", "group_mean", "token", "traces", *NO, "constant", "none", 0.0, "Yan 2025"),
    Variant(
        "nanopost", "group_mean", "token", "clip", 0.2, 0.28, "token_mean", "none", 0.0, "the default here"
    ),
]
VARIANTS = {row.name: row for row in ROWS}


def choose(loss: str, *, critic: bool = False, **overrides: float | None) -> Variant:
    """A row of the table by name, with other numbers for `clip_low`, `clip_high` or `beta` where not None.

    Raises: ValueError for an unknown name, a row that needs a critic where there is none, or a number that
        the row has no use for.
    """
    check_choice("loss", loss, VARIANTS)
    if VARIANTS[loss].baseline == "critic" and not critic:
        raise ValueError(f"loss={loss} needs a critic, which this script has not")
    row, given = VARIANTS[loss], {key: value for key, value in overrides.items() if value is not None}
    for key, value in given.items():
        if (row.kl == "none" and value != 0) if key == "beta" else row.surrogate == "log_prob":
            raise ValueError(f"{key} must not be given: {loss} has no such term, got {value!r}")
    return replace(row, **given)  # type: ignore[arg-type]


def token_advantages(
    variant: Variant,
    rewards: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    *,
    group_size: int,
    values: Tensor | None = None,
    gae_lambda: float = 0.95,
    total: Callable[[float], float] = lambda x: x,
) -> Tensor:
    """The advantage of every token of a rollout under a row's baseline, its KL in the reward included.

    Args:
        variant: a row of VARIANTS; its β counts here when its KL is in the reward.
        rewards: (N,), one a completion, the rows of a group adjacent. A row without a token is no sample: its
            reward is not read, and its group is compared without it.
        old_logps: (N, T), of the policy that sampled.
        ref_logps: (N, T), of the reference; not read when no KL is in the reward.
        mask: (N, T), the completion tokens.
        group_size: G.
        values: (N, T), the critic's, for the baseline "critic" (γ = 1).
        gae_lambda: λ, for the baseline "critic".
        total: sums a number over processes, for the baseline "batch"; the identity on one.
    Returns: (N, T), detached, 0 outside the mask.
    Raises: ValueError when the critic's values are missing, and what the functions of the row raise.
    """
    check_dims("mask", mask, 2)
    mask = check_mask("mask", mask)
    check_same_shape(rewards=rewards, rows=mask.any(dim=1))
    rewards = rewards.detach().masked_fill(~mask.any(dim=1), 0.0)
    check_groups("rewards", rewards, group_size)
    if variant.kl == "reward" and variant.baseline in BASELINES:
        rewards = rewards - variant.beta * sequence_logps((old_logps - ref_logps).detach(), mask)
    if variant.baseline in BASELINES:
        return _compared(variant.baseline, rewards, mask, group_size)
    shaped = kl_shaped_rewards(rewards, old_logps, ref_logps, mask, beta=variant.beta)
    if variant.baseline == "batch":
        return whiten(reward_to_go(shaped, mask, gamma=1.0), mask, total=total)
    if values is None:
        raise ValueError(f"values must be given: the baseline of {variant.name} is a critic, got None")
    return gae(shaped, values, mask, gamma=1.0, gae_lambda=gae_lambda)[0]


def _compared(baseline: str, rewards: Tensor, mask: Tensor, group_size: int) -> Tensor:
    """A baseline's advantages, (N, T): each group among its rows with a token; who is alone there has 0."""
    here, advantages = mask.any(dim=1), wide(torch.zeros_like(rewards))
    counts = here.view(-1, group_size).sum(dim=1).repeat_interleave(group_size).where(here, 0)
    for count in counts[here].unique().tolist():
        if count > 1 or group_size == 1 or baseline == "none":
            rows = counts == count
            advantages[rows] = BASELINES[baseline](rewards[rows], count)
    return advantages[:, None].expand(mask.shape).masked_fill(~mask, 0.0)


def policy_values(
    variant: Variant,
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    traces: Tensor | None = None,
) -> Tensor:
    """The per-token loss of a row, for `aggregate(…, mode=variant.aggregation)`.

    Args:
        variant: a row of VARIANTS; its β counts here when its KL is in the loss (k3).
        logps: (N, T); carries the gradient.
        old_logps: (N, T), of the policy that sampled; detached. A trace that no policy of ours sampled has 0.
        ref_logps: (N, T), of the reference; detached; not read when no KL is in the loss.
        advantages: (N, T), from `token_advantages`; detached.
        mask: (N, T).
        traces: (N,), bool: rows that are off-policy traces; "traces" shapes them by f(π) = π/(π + .1).
    Returns: (N, T), any sign.
    Raises: ValueError for traces that are not one a row, and what the functions of the row raise.
    """
    ratio = policy_ratio(logps, old_logps, mask, level=variant.ratio)
    clip = {"clip_low": variant.clip_low, "clip_high": variant.clip_high}
    values = SURROGATES[variant.surrogate](logps, ratio, advantages, **clip)
    if variant.surrogate == "traces" and traces is not None:
        check_same_shape(traces=traces, rows=mask.any(dim=1))
        shaped = off_policy_shaped_loss(logps, advantages)
        values = torch.where(check_mask("traces", traces)[:, None], shaped, values)
    if variant.kl == "loss":
        values = values + variant.beta * kl_estimate(logps, ref_logps, kind="k3")
    return values


def clip_holds(variant: Variant, ratio: Tensor, advantages: Tensor) -> Tensor:
    """Where a row's clip has bitten, (N, T) bool: the token has no gradient, or a clipped weight (CISPO)."""
    high, low = ratio > 1.0 + variant.clip_high, ratio < 1.0 - variant.clip_low
    if variant.surrogate == "weight":
        return high | low
    return (high & (advantages > 0.0)) | (low & (advantages < 0.0))


def table() -> str:
    """The rows as a Markdown table, the columns being the fields of `Variant`."""
    names = [field.name for field in fields(Variant)]
    lines = [names, ["---"] * len(names), *([str(getattr(row, name)) for name in names] for row in ROWS)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """The table, or with --compare the weights of a rollout's tokens."""
    from .compare import comparison, read_rollout

    parser = argparse.ArgumentParser(prog="python -m nanopost.losses.variants", description=main.__doc__)
    parser.add_argument("--compare", type=Path, metavar="ROLLOUT.json", help="a rollout with its log-probs")
    path = parser.parse_args().compare
    print(comparison(read_rollout(path)) if path else table())


if __name__ == "__main__":
    main()
