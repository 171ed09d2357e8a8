"""What each estimator gives on average, against the exact gradient, over every completion and every group.

Three computations meet here: the true gradient (tests/oracle.py), the expected gradient by autograd through
`nanopost.losses`, and the same by hand (tests/oracle_numpy.py). The tables of docs/oracle.md are computed
from them; the exact facts are asserted to rounding and for several policies, the biased ones as biased.
"""

import ast
import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nanopost.losses import (
    aggregate,
    cispo_loss,
    clipped_surrogate_loss,
    dpo_loss,
    entropy,
    gae,
    group_advantages,
    importance_weights,
    informative_groups,
    kl_estimate,
    kl_loss_with_correct_gradient,
    kl_shaped_rewards,
    leave_one_out_advantages,
    local_denom,
    off_policy_shaped_loss,
    policy_ratio,
    reinforce_loss,
    reward_to_go,
    sequence_logps,
    sft_loss,
    token_logps,
    whiten,
)
from nanopost.losses.distill import forward_kl, reverse_kl
from nanopost.losses.variants import VARIANTS, policy_values, token_advantages
from tests import oracle_numpy, pages
from tests.oracle import (
    STOP,
    Array,
    Case,
    Samples,
    batches,
    cases,
    compare,
    distribution,
    entropy_gradient,
    forward_kl_gradient,
    gradient_over,
    groups,
    kl,
    kl_gradient,
    per_token,
    probabilities,
    value_gradient,
)
from tests.oracle_numpy import BETA, BY_HAND, Estimator

PAGE = Path(__file__).parents[2] / "docs" / "oracle.md"
SEED = 7
HERE = cases(3, 3, SEED)
OTHERS = [cases(3, 2, 1), cases(3, 3, 2), cases(4, 2, 3), cases(4, 3, 4)]
CROWD = [cases(3, 3, seed) for seed in range(100, 120)]

Loss = Callable[[Samples], Tensor]
Advantages = Callable[[Samples], Tensor]


# ---- how a training script calls the losses


def scored(s: Samples, **scoring: float) -> Tensor:
    return token_logps(s.logits, s.target_ids, **scoring)  # type: ignore[arg-type]


def under(s: Samples, p: Array) -> Tensor:
    """Log-probabilities of the sampled actions under another distribution, by the oracle's own softmax."""
    return s.look_up(per_token(s.case.tree, np.log(p)))


def total(s: Samples, values: Tensor, mode: str = "sequence_sum", length: int = 1) -> Tensor:
    """The expectation over tuples: each row weighted by its tuple's probability, G sequences a step."""
    return aggregate(values * s.weight, s.mask, mode=mode, denom=s.group_size * length)


def by_tuple_tokens(s: Samples) -> Tensor:
    """What turns the mean over the tuple's sequences into the mean over its tokens."""
    tokens = s.mask.double().sum(dim=1).reshape(-1, s.group_size).sum(dim=1)
    return s.group_size / tokens.repeat_interleave(s.group_size)[:, None]


def surrogate(s: Samples, advantages: Tensor, logps: Tensor) -> Tensor:
    """F27 on policy (ratio 1): −ρA per token, so that minus its gradient is Σ A ∇ℓ."""
    spread = advantages[:, None].expand_as(logps) if advantages.dim() == 1 else advantages
    ratio = policy_ratio(logps, logps.detach(), s.mask)
    return clipped_surrogate_loss(ratio, spread, clip_low=0.2, clip_high=0.28)


def averaged(loss: Loss, size: int, by: tuple[str, ...], sign: float) -> Estimator:
    """The expected gradient of a loss, uphill (sign −1) or downhill (1)."""

    def estimate(case: Case) -> Array:
        draws = groups(case.tree, size, *(getattr(case, name) for name in by))
        return sign * gradient_over(case, draws, loss)

    return estimate


def climb(loss: Loss, size: int = 1, by: tuple[str, ...] = ("policy",)) -> Estimator:
    return averaged(loss, size, by, -1.0)


def descend(loss: Loss, by: tuple[str, ...] = ("policy",)) -> Estimator:
    return averaged(loss, 1, by, 1.0)


# ---- baselines


def raw(s: Samples) -> Tensor:
    return s.rewards


def centred(s: Samples) -> Tensor:
    """Rewards against a constant, the expected reward of what is drawn."""
    return s.rewards - (s.weight[:, 0] * s.rewards).sum() / s.weight.sum()


def grouped(scale: str) -> Advantages:
    return lambda s: group_advantages(s.rewards, group_size=s.group_size, scale=scale)


def left_out(s: Samples) -> Tensor:
    return leave_one_out_advantages(s.rewards, group_size=s.group_size)


def whitened(advantages: Tensor, s: Samples) -> Tensor:
    """`whiten` takes a step at a time, and here every tuple is one."""
    pairs = zip(advantages.split(s.group_size), s.mask.split(s.group_size), strict=True)
    return torch.cat([whiten(*pair) for pair in pairs])


def shaped(s: Samples, beta: float) -> Tensor:
    return kl_shaped_rewards(s.rewards, scored(s), under(s, s.case.anchor), s.mask, beta=beta)


def estimated(values: str, gae_lambda: float) -> Advantages:
    """GAE with the exact values of the case or a guess."""

    def advantages(s: Samples) -> Tensor:
        by_state = np.repeat(getattr(s.case, values)[:, None], s.case.logits.shape[1], axis=1)
        said = s.look_up(per_token(s.case.tree, by_state))
        return gae(shaped(s, 0.0), said, s.mask, gamma=1.0, gae_lambda=gae_lambda)[0]

    return advantages


# ---- estimators


def reinforced(
    advantages: Advantages,
    size: int = 1,
    by: tuple[str, ...] = ("policy",),
    mode: str = "sequence_sum",
    token_mean: bool = False,
    **scoring: float,
) -> Estimator:
    """A baseline, the surrogate at ratio 1, a reduction."""

    def loss(s: Samples) -> Tensor:
        values = surrogate(s, advantages(s), scored(s, **scoring))
        share = by_tuple_tokens(s) if token_mean else 1.0
        return total(s, values * share, mode, s.mask.shape[1] if mode == "constant" else 1)

    return climb(loss, size, by)


def plain(s: Samples) -> Tensor:
    logps = scored(s)
    return total(s, reinforce_loss(logps, s.rewards[:, None].expand_as(logps)))


def masked(keep: Callable[[Samples], Tensor]) -> Loss:
    """A mask that leaves something out."""

    def loss(s: Samples) -> Tensor:
        values = surrogate(s, centred(s), scored(s)) * s.weight
        return aggregate(values, s.mask & keep(s), mode="sequence_sum", denom=1)

    return loss


def has_ended(s: Samples) -> Tensor:
    return ((s.target_ids == STOP) & s.mask).any(dim=1, keepdim=True)


def resampled(advantages: Advantages, size: int, *, redraw: bool, token_mean: bool = False) -> Estimator:
    """Dynamic sampling: groups without a signal are replaced by other prompts, or by the same one again."""

    def loss(s: Samples) -> Tensor:
        weight = s.weight * informative_groups(s.rewards, group_size=s.group_size)[:, None]
        chance = weight.reshape(s.case.tree.prompts if redraw else 1, -1)
        chance = s.group_size * chance / chance.sum(dim=1, keepdim=True) / len(chance)
        values = surrogate(s, advantages(s), scored(s)) * (by_tuple_tokens(s) if token_mean else 1.0)
        return aggregate(values * chance.reshape_as(weight), s.mask, mode="sequence_sum", denom=s.group_size)

    return climb(loss, size)


def one_of_each(advantages: Advantages) -> Estimator:
    """A batch of one completion of each prompt."""

    def loss(s: Samples) -> Tensor:
        return total(s, surrogate(s, advantages(s), scored(s)))

    return lambda case: -gradient_over(case, batches(case.tree, case.policy), loss)


def older(s: Samples, level: str = "token") -> Tensor:
    """π/π_old with the gradient."""
    return policy_ratio(scored(s), under(s, s.case.sampler), s.mask, level=level)


def row_ratio(s: Samples) -> Tensor:
    """π/π_old of the whole completion in each slot: the sequence ratio to the power of the length."""
    return older(s, "sequence") ** s.mask.sum(dim=1, keepdim=True)


def off_policy(
    ratio: Callable[[Samples], Tensor], clip: bool = False, mode: str = "sequence_sum"
) -> Estimator:
    """F27 with completions drawn from an older table of logits."""
    bounds = {"clip_low": 0.2, "clip_high": 0.28} if clip else {"clip_low": 1.0, "clip_high": math.inf}

    def loss(s: Samples) -> Tensor:
        value = ratio(s)
        return total(s, clipped_surrogate_loss(value, centred(s)[:, None].expand_as(value), **bounds), mode)

    return climb(loss, by=("sampler",))


def sequence_weighted(s: Samples) -> Tensor:
    """F27 with one ratio for the whole row, counted once: the product of the token ratios."""
    once = s.mask & (s.mask.cumsum(dim=1) == 1)
    ratio = row_ratio(s)
    values = clipped_surrogate_loss(
        ratio, centred(s)[:, None].expand_as(ratio), clip_low=1.0, clip_high=math.inf
    )
    return aggregate(values * s.weight, once, mode="sequence_sum", denom=1)


def older_row(s: Samples) -> Tensor:
    """GSPO's one ratio a sequence."""
    return older(s, "sequence")


def gspo(mode: str) -> Loss:
    def loss(s: Samples) -> Tensor:
        logps = scored(s)
        ratio = policy_ratio(logps, logps.detach(), s.mask, level="sequence")
        values = clipped_surrogate_loss(
            ratio, centred(s)[:, None].expand_as(ratio), clip_low=0.2, clip_high=0.28
        )
        return total(s, values, mode)

    return loss


def cispo(older_policy: bool) -> Loss:
    def loss(s: Samples) -> Tensor:
        logps = scored(s)
        ratio = older(s) if older_policy else policy_ratio(logps, logps.detach(), s.mask)
        spread = centred(s)[:, None].expand_as(logps)
        return total(s, cispo_loss(logps, ratio, spread, clip_low=1.0, clip_high=0.28))

    return loss


def corrected(
    ratio: Callable[[Samples], Tensor] | None, mode: str = "truncate", high: float = 1e9
) -> Estimator:
    """The trainer's policy is the current one, the sampler drew from a slightly different one."""

    def loss(s: Samples) -> Tensor:
        values = surrogate(s, centred(s), scored(s))
        weights = 1.0 if ratio is None else importance_weights(ratio(s), mode=mode, high=high)
        return total(s, values * weights)

    return climb(loss, by=("sampler",))


def own_shaped(s: Samples) -> Tensor:
    logps = scored(s)
    return total(s, off_policy_shaped_loss(logps, centred(s)[:, None].expand_as(logps), shaping_gamma=0.1))


def mixed(s: Samples) -> Tensor:
    """Of each pair the first completion is the policy's, the second the teacher's."""
    logps, advantages = scored(s), grouped("none")(s)
    traces = torch.arange(len(logps))[:, None] % 2 == 1
    foreign = off_policy_shaped_loss(logps, advantages[:, None].expand_as(logps), shaping_gamma=0.1)
    return total(s, torch.where(traces, foreign, surrogate(s, advantages, logps)))


def kl_terms(s: Samples, kind: str) -> Tensor:
    return kl_estimate(scored(s), under(s, s.case.anchor), kind=kind)


def kl_as_loss(kind: str) -> Loss:
    return lambda s: total(s, kl_terms(s, kind))


def weighted(kind: str, ratio: Callable[[Samples], Tensor]) -> Loss:
    """A KL estimate times an importance ratio, the gradient through whatever carries one."""
    return lambda s: total(s, ratio(s) * kl_terms(s, kind))


def at_one(s: Samples) -> Tensor:
    return policy_ratio(scored(s), scored(s).detach(), s.mask)


def in_reward(kind: str, follows: bool = True) -> Loss:
    """A KL estimate as a cost of its token, each charged with the sum from there on or with its own alone."""

    def loss(s: Samples) -> Tensor:
        cost = kl_terms(s, kind).detach()
        charge = reward_to_go(cost, s.mask, gamma=1.0 if follows else 0.0)
        return total(s, surrogate(s, -charge, scored(s)))

    return loss


def correct(s: Samples) -> Tensor:
    return total(s, kl_loss_with_correct_gradient(scored(s), under(s, s.case.anchor), s.mask))


def shaped_to_go(s: Samples) -> Tensor:
    return reward_to_go(shaped(s, BETA), s.mask, gamma=1.0)


def penalised(s: Samples) -> Tensor:
    """RLOO with the KL of the whole completion in its reward."""
    distance = sequence_logps(kl_terms(s, "k1").detach(), s.mask)
    return leave_one_out_advantages(s.rewards - BETA * distance, group_size=s.group_size)


def with_k3(s: Samples) -> Tensor:
    return total(s, surrogate(s, centred(s), scored(s)) + BETA * kl_terms(s, "k3"))


def bonus(s: Samples) -> Tensor:
    return total(s, -entropy(s.logits))


def surprise(s: Samples) -> Tensor:
    return reward_to_go(-scored(s), s.mask, gamma=1.0)


def entropy_in_reward(s: Samples) -> Tensor:
    return reward_to_go(entropy(s.logits), s.mask, gamma=1.0)


def distilled(divergence: Callable[..., Tensor]) -> Loss:
    """The divergence of each state over the whole vocabulary."""

    def loss(s: Samples) -> Tensor:
        teacher = torch.tensor(s.case.reference[s.case.tree.states[s.rows]])
        return total(s, divergence(s.logits, teacher))

    return loss


def preferred(s: Samples) -> Tensor:
    """DPO on pairs of the policy's own, each labelled both ways with the chances of Bradley–Terry."""
    rows = sequence_logps(scored(s), s.mask).reshape(-1, 2)
    anchor = sequence_logps(under(s, s.case.anchor), s.mask).reshape(-1, 2)
    rewards = s.rewards.reshape(-1, 2)
    values = dpo_loss(rows[:, 0], rows[:, 1], anchor[:, 0], anchor[:, 1], beta=BETA)
    chance = s.weight[::2, 0] * torch.sigmoid(rewards[:, 0] - rewards[:, 1])
    return 2 * (chance * values).sum()  # the other label of (a, b) is this one of (b, a)


def as_variant(name: str) -> Estimator:
    """A row of the table of variants, on policy, pairs of completions, called the way a script calls it."""
    variant = VARIANTS[name]

    def loss(s: Samples) -> Tensor:
        logps, anchor = scored(s), under(s, s.case.anchor)
        values = s.look_up(
            per_token(s.case.tree, np.repeat(s.case.values[:, None], s.logits.shape[2], axis=1))
        )
        expected = []
        parts = (logps, anchor, values, s.mask, s.rewards, s.weight)
        for now, ref, said, mask, rewards, weight in zip(*(part.split(2) for part in parts), strict=True):
            old = now.detach()
            advantages = token_advantages(variant, rewards, old, ref, mask, group_size=2, values=said)
            tokens = policy_values(variant, now, old, ref, advantages, mask)
            denom = local_denom(mask, mode=variant.aggregation, max_tokens=mask.shape[1])
            expected.append(weight[0, 0] * aggregate(tokens, mask, mode=variant.aggregation, denom=denom))
        return torch.stack(expected).sum()

    return climb(loss, 2)


# ---- what is true


def reward(case: Case) -> Array:
    return case.true


def reward_warm(case: Case) -> Array:
    return value_gradient(case.tree, case.warm, case.rewards, temperature=0.7)


def reward_top(case: Case) -> Array:
    return value_gradient(case.tree, case.top, case.rewards)


def distance(case: Case) -> Array:
    return kl_gradient(case.tree, case.policy, case.anchor)


def coverage(case: Case) -> Array:
    return forward_kl_gradient(case.tree, case.policy, case.anchor)


def objective(beta: float) -> Estimator:
    return lambda case: case.true - beta * distance(case)


def spread_out(case: Case) -> Array:
    return entropy_gradient(case.tree, case.policy)


def successes(case: Case) -> Array:
    """The chance of reward 1 of each prompt."""
    chance = probabilities(case.tree, case.policy) * case.tree.prompts
    return (chance * case.rewards).reshape(case.tree.prompts, -1).sum(axis=1)


def standardised(size: int, p: float) -> float:
    """E[A | r = 1] − E[A | r = 0] of F22 with rewards 0 and 1 and success rate p, by the binomial."""

    def advantage(right: int, own: int) -> float:
        return (own - right / size) / (math.sqrt(right * (size - right) / size / (size - 1)) + 1e-4)

    return sum(
        math.comb(size - 1, k) * p**k * (1 - p) ** (size - 1 - k) * (advantage(k + 1, 1) - advantage(k, 0))
        for k in range(size)
    )


def standardising(size: int) -> Callable[[Case], float]:
    return lambda case: standardised(size, *successes(case))


def signal(size: int) -> Callable[[Case], float]:
    """(G − 1)/G over the chance that a group has a signal."""

    def factor(case: Case) -> float:
        p = successes(case)
        return (size - 1) / size / float(np.mean(1 - p**size - (1 - p) ** size))

    return factor


def over_length(share: float) -> Callable[[Case], float]:
    return lambda case: share / case.tree.mask.shape[1]


@dataclass(frozen=True)
class Row:
    """An estimator of the page: which world of the case, what it should be, and by which factor it is."""

    estimate: Estimator
    truth: Estimator = reward
    exact: float | Callable[[Case], float] | None = 1.0  # None: biased
    world: str = "tree"

    def factor(self, case: Case) -> float | None:
        return self.exact(case) if callable(self.exact) else self.exact


BIASED = None
OLDER, TAUGHT, WARM, TOP = ("sampler",), ("anchor",), ("warm",), ("top",)
PAIR_STD = 0.5 / (math.sqrt(0.5) + 1e-4)
TRIPLE_STD = 2 / 3 / (math.sqrt(1 / 3) + 1e-4)

ROWS = {
    # ---- on policy
    "REINFORCE, no baseline (F35)": Row(climb(plain)),
    "REINFORCE, constant baseline (F27 at ratio 1)": Row(reinforced(centred)),
    "group mean, G = 2 (F21)": Row(reinforced(grouped("none"), 2), exact=1 / 2),
    "group mean, G = 3 (F21)": Row(reinforced(grouped("none"), 3), exact=2 / 3),
    "leave-one-out, G = 2 (F23)": Row(reinforced(left_out, 2)),
    "leave-one-out, G = 3 (F23)": Row(reinforced(left_out, 3)),
    "group standardised, G = 2 (F22)": Row(reinforced(grouped("std"), 2), exact=BIASED),
    "group standardised, G = 3 (F22)": Row(reinforced(grouped("std"), 3), exact=BIASED),
    "group standardised, G = 4, rewards 0 and 1 (F22)": Row(
        reinforced(grouped("std"), 4), exact=standardising(4), world="binary"
    ),
    "sum over a constant length (F31)": Row(reinforced(centred, mode="constant"), exact=over_length(1)),
    "group mean over a constant length, G = 3 (F31)": Row(
        reinforced(grouped("none"), 3, mode="constant"), exact=over_length(2 / 3)
    ),
    "1/length of each completion (F30)": Row(reinforced(centred, mode="sequence_mean"), exact=BIASED),
    "group standardised and 1/length, G = 3 (F30)": Row(
        reinforced(grouped("std"), 3, mode="sequence_mean"), exact=BIASED
    ),
    "token mean of each pair, leave-one-out": Row(reinforced(left_out, 2, token_mean=True), exact=BIASED),
    "token mean of each triple, standardised (F33)": Row(
        reinforced(grouped("std"), 3, token_mean=True), exact=BIASED
    ),
    "pair whitened over its tokens (F24)": Row(
        reinforced(lambda s: whitened(s.rewards[:, None].expand(s.mask.shape), s), 2), exact=BIASED
    ),
    "stop action left out of the mask": Row(climb(masked(lambda s: s.target_ids != STOP)), exact=BIASED),
    "completions cut at the limit left out": Row(climb(masked(has_ended)), exact=BIASED),
    "drawn at τ = .7, scored at .7": Row(reinforced(centred, by=WARM, temperature=0.7), reward_warm),
    "drawn at τ = .7, scored at 1": Row(reinforced(centred, by=WARM), reward_warm, BIASED),
    "drawn at τ = .7, scored at 1, one step": Row(reinforced(left_out, 2, WARM), reward_warm, 0.7, "step"),
    "the same without a baseline": Row(reinforced(raw, by=WARM), reward_warm, BIASED, "step"),
    "drawn with top-k = 2, scored so": Row(reinforced(centred, by=TOP, top_k=2), reward_top),
    "drawn with top-k = 2, scored in full": Row(reinforced(centred, by=TOP), reward_top, BIASED),
    "the same against the full policy's gradient": Row(reinforced(centred, by=TOP), exact=BIASED),
    # ---- off policy
    "older policy, one step, no clip (F27)": Row(off_policy(older), world="step"),
    "older policy, product of the row's ratios": Row(climb(sequence_weighted, by=OLDER)),
    "older policy, no correction": Row(corrected(None), exact=BIASED),
    "older policy, token ratios, no clip (F27)": Row(off_policy(older), exact=BIASED),
    "older policy, token ratios, clip .2 and .28 (F27)": Row(off_policy(older, clip=True), exact=BIASED),
    "CISPO on policy": Row(climb(cispo(False))),
    "CISPO, older policy, weights at most 1.28": Row(climb(cispo(True), by=OLDER), exact=BIASED),
    "GSPO on policy, mean over the tokens (F32)": Row(climb(gspo("sequence_mean")), exact=BIASED),
    "GSPO on policy, sum over the tokens (F32)": Row(climb(gspo("sequence_sum"))),
    "GSPO, older policy, sum, no clip (F32)": Row(off_policy(older_row), exact=BIASED),
    "GSPO, older policy, mean, no clip (F32)": Row(off_policy(older_row, mode="sequence_mean"), exact=BIASED),
    "GSPO, older policy, mean, clip .2 and .28 (F32)": Row(
        off_policy(older_row, clip=True, mode="sequence_mean"), exact=BIASED
    ),
    "other sampler, token weights truncated at 2": Row(corrected(older, high=2.0), exact=BIASED),
    "other sampler, token weights masked above 2": Row(corrected(older, "mask", 2.0), exact=BIASED),
    "other sampler, sequence weights": Row(corrected(row_ratio)),
    "other sampler, sequence weights truncated at 2": Row(corrected(row_ratio, high=2.0), exact=BIASED),
    "other sampler, sequence weights masked above 2": Row(corrected(row_ratio, "mask", 2.0), exact=BIASED),
    "shaped loss on the policy's own samples (F34)": Row(climb(own_shaped), exact=BIASED),
    "pair of an own and a teacher's trace, the latter shaped (F34)": Row(
        climb(mixed, 2, ("policy", "anchor")), exact=BIASED
    ),
    # ---- value function
    "GAE, exact V, γ = λ = 1 (F25)": Row(reinforced(estimated("values", 1.0))),
    "GAE, exact V, λ = .5": Row(reinforced(estimated("values", 0.5))),
    "GAE, exact V, λ = 0": Row(reinforced(estimated("values", 0.0))),
    "GAE, wrong V, γ = λ = 1": Row(reinforced(estimated("guess", 1.0))),
    "GAE, wrong V, λ = .95": Row(reinforced(estimated("guess", 0.95)), exact=BIASED),
    "GAE, wrong V, λ = .5": Row(reinforced(estimated("guess", 0.5)), exact=BIASED),
    "GAE, wrong V, λ = 0": Row(reinforced(estimated("guess", 0.0)), exact=BIASED),
    "reward to go, γ = 1": Row(reinforced(lambda s: reward_to_go(shaped(s, 0.0), s.mask, gamma=1.0))),
    "reward to go, γ = .9": Row(
        reinforced(lambda s: reward_to_go(shaped(s, 0.0), s.mask, gamma=0.9)), exact=BIASED
    ),
    # ---- KL: the estimate is of ∇ KL, downhill
    "KL: k1 as a loss (F29)": Row(descend(kl_as_loss("k1")), distance, 0.0),
    "KL: k2 as a loss (F29)": Row(descend(kl_as_loss("k2")), distance, BIASED),
    "KL: k3 as a loss (F29)": Row(descend(kl_as_loss("k3")), distance, BIASED),
    "KL: k3 × ratio as a loss": Row(descend(weighted("k3", at_one)), distance, BIASED),
    "KL of each state in full as a loss": Row(descend(distilled(reverse_kl)), distance, BIASED),
    "KL: k1 in the reward of its own token": Row(descend(in_reward("k1", follows=False)), distance, BIASED),
    "KL: k2 as a loss, one step": Row(descend(kl_as_loss("k2")), distance, world="step"),
    "KL: k3 as a loss, one step": Row(descend(kl_as_loss("k3")), distance, BIASED, "step"),
    "the same against the forward KL": Row(descend(kl_as_loss("k3")), coverage, world="step"),
    "KL: k1 in the reward, credited with what follows": Row(descend(in_reward("k1")), distance),
    "KL: the loss with the correct gradient": Row(descend(correct), distance),
    "KL: k3 in the reward, credited with what follows": Row(descend(in_reward("k3")), distance, BIASED),
    "KL: k3 in the reward and as a loss": Row(
        descend(lambda s: in_reward("k3")(s) + kl_as_loss("k3")(s)), distance
    ),
    "older policy, k3 × ratio as a loss, one step": Row(
        descend(weighted("k3", older), OLDER), distance, world="step"
    ),
    "older policy, k2 × ratio as a loss, one step": Row(
        descend(weighted("k2", older), OLDER), distance, BIASED, "step"
    ),
    "older policy, k2 × held ratio as a loss, one step": Row(
        descend(weighted("k2", lambda s: older(s).detach()), OLDER), distance, world="step"
    ),
    "older policy, k3 as a loss, one step": Row(descend(kl_as_loss("k3"), OLDER), distance, BIASED, "step"),
    "older policy, k3 × ratio as a loss": Row(descend(weighted("k3", older), OLDER), distance, BIASED),
    "E[r] − β·KL: shaped rewards to go (F26)": Row(reinforced(shaped_to_go), objective(BETA)),
    "E[r] − β·KL: leave-one-out on r − β Σ k1, G = 2": Row(reinforced(penalised, 2), objective(BETA)),
    "E[r] − β·KL: REINFORCE, k3 as a loss": Row(climb(with_k3), objective(BETA), BIASED),
    "E[r] − β·KL: pair whitened, KL in the reward (F24)": Row(
        reinforced(lambda s: whitened(shaped_to_go(s), s), 2), objective(BETA), BIASED
    ),
    "E[r] − β·KL: DPO on own pairs, Bradley–Terry labels (F15)": Row(
        climb(preferred, 2), objective(BETA), BIASED
    ),
    # ---- entropy
    "entropy of each state as a bonus": Row(climb(bonus), spread_out, BIASED),
    "−ℓ in the reward, credited with what follows": Row(reinforced(surprise), spread_out),
    "entropy as a bonus and in the reward to go": Row(
        lambda case: climb(bonus)(case) + reinforced(entropy_in_reward)(case), spread_out
    ),
    # ---- distillation: the estimate is of the KL's gradient, downhill
    "NLL on the teacher's completions (F40)": Row(
        descend(lambda s: total(s, sft_loss(scored(s))), TAUGHT), coverage
    ),
    "forward KL of each state, teacher's completions (F38)": Row(
        descend(distilled(forward_kl), TAUGHT), coverage
    ),
    "forward KL of each state, own completions": Row(descend(distilled(forward_kl)), coverage, BIASED),
    "reverse KL of each state, own completions (F39)": Row(descend(distilled(reverse_kl)), distance, BIASED),
    "reverse KL of each state, teacher's completions": Row(
        descend(distilled(reverse_kl), TAUGHT), distance, BIASED
    ),
    # ---- two prompts
    "two prompts, leave-one-out, G = 2": Row(reinforced(left_out, 2), world="prompts"),
    "two prompts, group standardised, G = 2": Row(reinforced(grouped("std"), 2), reward, PAIR_STD, "prompts"),
    "two prompts, group standardised, G = 3": Row(
        reinforced(grouped("std"), 3), reward, TRIPLE_STD, "prompts"
    ),
    "two prompts, group standardised, G = 4": Row(reinforced(grouped("std"), 4), reward, BIASED, "prompts"),
    "two prompts, dropped groups replaced by other prompts, G = 2": Row(
        resampled(grouped("none"), 2, redraw=False), reward, signal(2), "prompts"
    ),
    "two prompts, dropped groups replaced by other prompts, G = 3": Row(
        resampled(grouped("none"), 3, redraw=False), reward, signal(3), "prompts"
    ),
    "two prompts, dropped groups drawn again, G = 2": Row(
        resampled(grouped("none"), 2, redraw=True), reward, BIASED, "prompts"
    ),
    "two prompts, token mean of each signal group, G = 3 (F33)": Row(
        resampled(grouped("std"), 3, redraw=False, token_mean=True), reward, BIASED, "prompts"
    ),
    "two prompts, mean of the batch as the baseline": Row(
        one_of_each(grouped("none")), reward, 1 / 2, "prompts"
    ),
    "two prompts, batch whitened (F24)": Row(
        one_of_each(lambda s: whitened(s.rewards[:, None].expand(s.mask.shape), s)), reward, BIASED, "prompts"
    ),
}

for _name, _exact in {  # pairs; `ppo` with the exact values of the reward
    "reinforce": 1.0,
    "rloo": 1.0,
    "reinforce++": BIASED,
    "ppo": BIASED,
    "grpo": BIASED,
    "dr_grpo": over_length(1 / 2),
    "dapo": BIASED,
    "gspo": BIASED,
    "cispo": BIASED,
    "luffy": over_length(1 / 2),
    "nanopost": BIASED,
}.items():
    _beta = VARIANTS[_name].beta
    for _label, _world in ((f"`{_name}`", "tree"), (f"`{_name}`, rewards 0 and 1", "binary")):
        _truth = objective(_beta) if _beta else reward
        ROWS[_label] = Row(as_variant(_name), _truth, _exact, _world)
        BY_HAND[_label] = oracle_numpy.variant(_name, _beta)

# rows that are the same on average, whatever the policy: the second is the first times a factor
SAME = [
    ("KL: k2 as a loss (F29)", "KL: k3 × ratio as a loss", 1.0),
    ("KL: k2 as a loss (F29)", "KL: k1 in the reward of its own token", 1.0),
    ("KL: k2 as a loss (F29)", "KL of each state in full as a loss", 1.0),
    ("KL: k2 as a loss (F29)", "reverse KL of each state, own completions (F39)", 1.0),
    ("1/length of each completion (F30)", "GSPO on policy, mean over the tokens (F32)", 1.0),
    ("REINFORCE, no baseline (F35)", "GSPO on policy, sum over the tokens (F32)", 1.0),
    ("REINFORCE, no baseline (F35)", "CISPO on policy", 1.0),
    ("`dapo`", "`cispo`", 1.0),
    ("`dr_grpo`", "`luffy`", 1.0),
    ("`dapo`, rewards 0 and 1", "`nanopost`, rewards 0 and 1", math.sqrt(0.5) + 1e-4),
]


@functools.cache
def gradient(name: str) -> Array:
    """The expected gradient by autograd, for the policy of the page."""
    return ROWS[name].estimate(HERE[ROWS[name].world])


def of(case: Case, name: str) -> tuple[float, float]:
    """Cosine and norm ratio by hand."""
    return compare(BY_HAND[name](case), ROWS[name].truth(case))


def page_row(name: str) -> tuple[str, ...]:
    """The row as the page prints it: this policy, and the range over a crowd of other ones."""
    row = ROWS[name]
    cosine, ratio = compare(gradient(name), row.truth(HERE[row.world]))
    crowd = np.array([of(each[row.world], name) for each in CROWD])
    low, high = crowd.min(axis=0) + 0.0, crowd.max(axis=0) + 0.0
    spans = [
        f"{a:.2f} … {b:.2f}" if f"{a:.2f}" != f"{b:.2f}" else f"{a:.2f}"
        for a, b in zip(low, high, strict=True)
    ]
    if math.isnan(cosine):
        return "–", f"{ratio:.4f}", "–", spans[1]
    return f"{cosine:.4f}", f"{ratio:.4f}", *spans


EXACT = [name for name, row in ROWS.items() if row.exact is not None]
UNEVEN = [name for name, row in ROWS.items() if row.exact is None]


# ---- the tests


def test_completions_are_all_there() -> None:
    case = HERE["tree"]
    assert len(case.tree.actions) == 15 and case.tree.size == 7
    for worlds in (HERE, *OTHERS):
        for case in worlds.values():
            np.testing.assert_allclose(probabilities(case.tree, case.policy).sum(), 1.0, rtol=1e-14)
            for draws in (groups(case.tree, 2, case.policy, case.anchor), batches(case.tree, case.policy)):
                np.testing.assert_allclose(draws.chance.sum(), 1.0, rtol=1e-14)
        assert np.all(successes(worlds["prompts"]) > 0.01) and np.all(successes(worlds["prompts"]) < 0.99)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_hand_written_gradients_equal_finite_differences(temperature: float) -> None:
    case = HERE["tree"]
    tree, logits, other = case.tree, case.logits, case.anchor

    def differences(value: Callable[[Array], float]) -> Array:
        result, h = np.zeros_like(logits), 1e-6
        for place in np.ndindex(logits.shape):
            bump = np.zeros_like(logits)
            bump[place] = h
            result[place] = (value(logits + bump) - value(logits - bump)) / (2 * h)
        return result

    def surprise(z: Array) -> float:
        chance = probabilities(tree, distribution(z))
        return float(-chance @ np.log(chance))

    def close(gradient: Array, value: Callable[[Array], float]) -> None:
        np.testing.assert_allclose(gradient, differences(value), rtol=0.0, atol=1e-9)

    p = distribution(logits, temperature)
    close(
        value_gradient(tree, p, case.rewards, temperature),
        lambda z: float(probabilities(tree, distribution(z, temperature)) @ case.rewards),
    )
    close(distance(case), lambda z: kl(tree, distribution(z), other))
    close(coverage(case), lambda z: kl(tree, other, distribution(z)))
    close(spread_out(case), surprise)


def test_truncated_policy_has_no_gradient_outside_its_support() -> None:
    case = HERE["tree"]
    assert np.all(reward_top(case)[case.top == 0] == 0) and np.all((case.top > 0).sum(axis=1) == 2)


def test_every_row_is_derived_twice() -> None:
    assert list(ROWS) == list(BY_HAND)
    nodes = list(ast.walk(ast.parse(Path(oracle_numpy.__file__).read_text(encoding="utf-8"))))
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    ours = {module for module in modules if (module or "").split(".")[0] not in sys.stdlib_module_names}
    assert ours == {"numpy", "numpy.typing", "tests.oracle"}


@pytest.mark.parametrize("name", EXACT)
def test_estimator_is_exact(name: str) -> None:
    row = ROWS[name]
    case = HERE[row.world]
    factor, truth = row.factor(case), row.truth(case)
    assert factor is not None and np.linalg.norm(truth) > 1e-2
    np.testing.assert_allclose(gradient(name), factor * truth, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("name", UNEVEN)
def test_estimator_is_biased(name: str) -> None:
    cosine, ratio = compare(gradient(name), ROWS[name].truth(HERE[ROWS[name].world]))
    assert cosine < 1 - 1e-6 and ratio > 0.1
    uneven = [of(worlds[ROWS[name].world], name)[0] < 1 - 1e-7 for worlds in CROWD]
    assert sum(uneven) > 0.8 * len(CROWD)  # a bound that no weight reaches does no harm


@pytest.mark.parametrize("name", ROWS)
def test_autograd_and_hand_agree(name: str) -> None:
    np.testing.assert_allclose(gradient(name), BY_HAND[name](HERE[ROWS[name].world]), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("name", ROWS)
def test_other_policies_agree(name: str) -> None:
    """Three and four actions, two and three steps by autograd, a crowd by hand."""
    row = ROWS[name]
    for worlds in OTHERS[:-1] if name.startswith("`") else OTHERS:  # a variant is called tuple by tuple
        case = worlds[row.world]
        np.testing.assert_allclose(row.estimate(case), BY_HAND[name](case), rtol=0.0, atol=1e-12)
    for case in (worlds[row.world] for worlds in (*OTHERS, *CROWD)):
        factor = row.factor(case)
        if factor is not None:
            np.testing.assert_allclose(BY_HAND[name](case), factor * row.truth(case), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("one, other, factor", SAME)
def test_two_names_for_one_expected_gradient(one: str, other: str, factor: float) -> None:
    for case in (worlds[ROWS[one].world] for worlds in (HERE, *OTHERS, *CROWD)):
        expected = BY_HAND[one](case)
        assert np.linalg.norm(expected) > 1e-3
        np.testing.assert_allclose(factor * expected, BY_HAND[other](case), rtol=0.0, atol=1e-13)


def test_temperature_mismatch_of_a_single_step_is_a_factor() -> None:
    """A fixture of one step cannot see the bug; one of two steps can."""
    mismatch = reinforced(left_out, 2, WARM)
    for worlds in (HERE, *OTHERS):
        cosine, ratio = compare(mismatch(worlds["step"]), reward_warm(worlds["step"]))
        assert cosine == pytest.approx(1.0, abs=1e-12) and ratio == pytest.approx(0.7, abs=1e-12)
        assert compare(mismatch(worlds["binary"]), reward_warm(worlds["binary"]))[0] < 1 - 1e-6


def test_a_baseline_is_free_only_where_the_score_is_the_sampler_s_own() -> None:
    """Scored by what sampled, a constant changes nothing; by another policy, it turns the gradient."""
    for case in (worlds["tree"] for worlds in (HERE, *OTHERS)):
        own = [reinforced(advantages)(case) for advantages in (raw, centred)]
        foreign = [reinforced(advantages, by=WARM)(case) for advantages in (raw, centred)]
        np.testing.assert_allclose(own[0], own[1], rtol=0.0, atol=1e-14)
        assert np.abs(foreign[0] - foreign[1]).max() > 1e-2


def test_forward_kl_of_one_step_is_p_minus_q() -> None:
    for case in (worlds["step"] for worlds in (HERE, *OTHERS)):
        np.testing.assert_allclose(coverage(case), case.policy - case.anchor, rtol=0.0, atol=1e-15)
        estimate = descend(kl_as_loss("k3"))(case)
        np.testing.assert_allclose(estimate, case.policy - case.anchor, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_K6_one_step_down_the_estimate_lowers_the_exact_kl(kind: str) -> None:
    for case in (worlds["tree"] for worlds in (HERE, *OTHERS)):
        moved = distribution(case.logits - 0.05 * descend(kl_as_loss(kind))(case))
        before, after = (kl(case.tree, p, case.anchor) for p in (case.policy, moved))
        assert after < before - 1e-3


def test_dpo_rests_where_the_objective_does() -> None:
    """At π* ∝ π_ref e^{r/β} both gradients are 0, whoever sampled the pairs: another path, the same end."""
    for case in (worlds["tree"] for worlds in (HERE, *OTHERS)):
        best = probabilities(case.tree, case.anchor) * np.exp(case.rewards / BETA)
        weight = np.zeros_like(case.logits)
        for row, step in zip(*np.nonzero(case.tree.mask), strict=True):
            weight[case.tree.states[row, step], case.tree.actions[row, step]] += best[row]
        there = dataclasses.replace(case, logits=np.log(weight))
        np.testing.assert_allclose(probabilities(there.tree, there.policy), best / best.sum(), rtol=1e-12)
        np.testing.assert_allclose(objective(BETA)(there), 0.0, atol=1e-13)
        for by in ("policy", "sampler"):
            np.testing.assert_allclose(climb(preferred, 2, (by,))(there), 0.0, atol=1e-13)
        assert np.linalg.norm(climb(preferred, 2)(case)) > 1e-3


def test_page_states_the_factor_of_standardising() -> None:
    """How much more a hard prompt weighs than one of success rate ½, under F22 with rewards 0 and 1."""
    text = PAGE.read_text(encoding="utf-8")
    rows = [row for row in pages.table(text) if "success rate" in row]
    assert len(rows) >= 3
    for row in rows:
        sizes = [column for column in row if column.startswith("G = ")]
        for column in sizes:
            size, p = int(column.removeprefix("G = ")), float(row["success rate"])
            assert row[column] == f"{standardised(size, p) / standardised(size, 0.5):.2f}"


def test_page_repeats_its_own_numbers_beside_those_of_other_tables() -> None:
    rows = pages.table(PAGE.read_text(encoding="utf-8"))
    ours = {row["estimator"]: f"{row['cosine']}, {row['norm ratio']}" for row in rows if "estimator" in row}
    beside = [row for row in rows if "the row of ours" in row]
    assert len(beside) >= 12
    for row in beside:
        assert row["ours"] == ours[row["the row of ours"]]


def test_page_states_the_numbers_of_the_oracle() -> None:
    columns = ("estimator", "cosine", "norm ratio", "cosine of others", "norm ratio of others")
    computed = [(name, *page_row(name)) for name in ROWS]
    rows = [row for row in pages.table(PAGE.read_text(encoding="utf-8")) if "estimator" in row]
    stated = [(row["estimator"].replace("`", ""), *(row[column] for column in columns[1:])) for row in rows]
    fresh = "\n".join(f"| {' | '.join(row)} |" for row in computed)
    plain = [(name.replace("`", ""), *numbers) for name, *numbers in computed]
    assert stated == plain, f"docs/oracle.md should say:\n{fresh}"
