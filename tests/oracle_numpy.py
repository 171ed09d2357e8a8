"""The expected gradient of every estimator of docs/oracle.md by hand: no autograd, no library of ours.

A policy-gradient estimator is a weight on ∇ℓ_t for each token of each tuple, and ∇ℓ = onehot − p. So each
entry here is its formula's weights, summed over every tuple; where an estimator looks at the whole
distribution of a state, its gradient is written out for the state. tests/losses/test_oracle.py compares them
with autograd through `nanopost.losses`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.oracle import STOP, Array, Case, Draws, batches, groups, per_token, probabilities

BETA = 0.3  # of the objective E[r] − β·KL
CLIP = 0.2, 0.28

Estimator = Callable[[Case], Array]  # its expected gradient, (S, V)


@dataclass(frozen=True)
class Step:
    """A step's completions in every way they can be drawn: M tuples of G rows of T tokens."""

    case: Case
    draws: Draws

    @cached_property
    def mask(self) -> Array:
        """1 for a token, 0 for padding, (M, G, T)."""
        return self.pick(self.case.tree.mask).astype(np.float64)

    @cached_property
    def length(self) -> Array:
        """Tokens of each completion, (M, G, 1)."""
        return self.mask.sum(axis=2, keepdims=True)

    @cached_property
    def rewards(self) -> Array:
        """(M, G, 1)"""
        return self.pick(self.case.rewards)[..., None]

    @cached_property
    def mean(self) -> float:
        """The mean reward of what is drawn."""
        return float(self.draws.chance @ self.rewards.mean(axis=(1, 2)))

    def pick(self, array: NDArray[Any]) -> NDArray[Any]:
        """What an array over the completions, (N, ...), says of each one drawn, (M, G, ...)."""
        return array[self.draws.rows]

    def token(self, table: Array) -> Array:
        """The entry of a table (S, V) at each action, 0 in the padding, (M, G, T)."""
        return self.pick(per_token(self.case.tree, table))

    def sum(self, values: Array) -> Array:
        """Over the tokens of each completion, (M, G, 1)."""
        return (values * self.mask).sum(axis=2, keepdims=True)

    def at_state(self, vector: Array) -> Array:
        """The entry of a vector (S,) at each state, (M, G, T)."""
        return self.token(np.repeat(vector[:, None], self.case.logits.shape[1], axis=1))

    def climb(self, weights: Array, p: Array | None = None, temperature: float = 1.0) -> Array:
        """E[(1/G) Σ_i Σ_t w_it ∇ℓ_it], ∇ℓ = (onehot − p)/τ, p the distribution that scores, (S, V)."""
        tree, rows = self.case.tree, self.draws.rows
        p = self.case.policy if p is None else p
        weights = weights * self.mask * (self.draws.chance / rows.shape[1] / temperature)[:, None, None]
        cell = (tree.states * p.shape[1] + tree.actions)[rows]
        taken = np.bincount(cell.ravel(), weights.ravel(), p.size).reshape(p.shape)
        return taken - taken.sum(axis=1, keepdims=True) * p


def to_go(values: Array, decay: float = 1.0) -> Array:
    """Σ_{u ≥ t} decay^{u−t} v_u along the last axis; padding holds 0."""
    result, ahead = np.zeros_like(values), np.zeros(values.shape[:-1])
    for t in reversed(range(values.shape[-1])):
        ahead = values[..., t] + decay * ahead
        result[..., t] = ahead
    return result


def at_end(s: Step) -> Array:
    """r on the last token, 0 before it, (M, G, T)."""
    last = np.arange(s.mask.shape[2]) == s.length - 1
    return s.rewards * last


# ---- weights: what stands before ∇ℓ_t


def raw(s: Step) -> Array:
    return s.rewards


def centred(s: Step) -> Array:
    return s.rewards - s.mean


def group_mean(s: Step) -> Array:
    """F21"""
    return s.rewards - s.rewards.mean(axis=1, keepdims=True)


def left_out(s: Step) -> Array:
    """F23"""
    size = s.rewards.shape[1]
    return s.rewards - (s.rewards.sum(axis=1, keepdims=True) - s.rewards) / (size - 1)


def group_std(s: Step) -> Array:
    """F22 with the unbiased variance and ε = 1e-4; exactly 0 in a group of equal rewards."""
    advantages, size = group_mean(s), s.rewards.shape[1]
    variance = (advantages**2).sum(axis=1, keepdims=True) / (size - 1)
    return np.where(
        np.ptp(s.rewards, axis=1, keepdims=True) > 0, advantages / (np.sqrt(variance) + 1e-4), 0.0
    )


def whitened(s: Step, values: Array) -> Array:
    """F24: mean 0 and variance 1 over the tokens of the tuple."""
    n = s.mask.sum(axis=(1, 2), keepdims=True)
    mean = (values * s.mask).sum(axis=(1, 2), keepdims=True) / n
    gap = (values - mean) * s.mask
    variance = (gap**2).sum(axis=(1, 2), keepdims=True) / np.maximum(n - 1, 1)
    return np.where(np.abs(gap).max(axis=(1, 2), keepdims=True) > 1e-12, gap / np.sqrt(variance + 1e-8), 0.0)


def token_share(s: Step) -> Array:
    """What turns the mean over completions of a sum over tokens into the mean over the tuple's tokens."""
    return s.length.shape[1] / s.length.sum(axis=1, keepdims=True)


def ended(s: Step) -> Array:
    """1 for a completion that stopped by itself, 0 for one cut at the limit, (M, G, 1)."""
    stopped = ((s.case.tree.actions == STOP) & s.case.tree.mask).any(axis=1)
    return s.pick(stopped)[..., None]


def k1(s: Step) -> Array:
    """log π − log π_ref of each token, (M, G, T)."""
    return s.token(np.log(s.case.policy / s.case.anchor))


def k3(s: Step) -> Array:
    return np.exp(-k1(s)) - 1 + k1(s)


def shaped(s: Step, beta: float) -> Array:
    """F26"""
    return at_end(s) - beta * k1(s)


def estimated(s: Step, rewards: Array, values: Array, decay: float) -> Array:
    """F25 at γ = 1 and λ = decay: δ_t = R_t + V_{t+1} − V_t, summed with the decay; V is 0 after the end."""
    v = s.at_state(values)
    following = np.concatenate([v[..., 1:], np.zeros_like(v[..., :1])], axis=2)
    return to_go((rewards + following - v) * s.mask, decay)


def ratios(s: Step) -> Array:
    """π/π_old of each token, 1 in the padding, (M, G, T)."""
    return np.exp(s.token(np.log(s.case.policy / s.case.sampler)))


def whole(s: Step) -> Array:
    """π/π_old of the completion, (M, G, 1)."""
    return ratios(s).prod(axis=2, keepdims=True)


def unless_clipped(ratio: Array, advantages: Array) -> Array:
    """F27 with respect to ℓ: ρA, and 0 where the clip holds."""
    low, high = CLIP
    stuck = np.where(advantages > 0, ratio > 1 + high, ratio < 1 - low)
    return np.where(stuck, 0.0, ratio * advantages)


def shaping(s: Step) -> Array:
    """F34: d/dℓ of π/(π + γ) is γπ/(π + γ)², γ = .1."""
    pi = np.exp(s.token(np.log(s.case.policy)))
    return 0.1 * pi / (pi + 0.1) ** 2


def preferred(s: Step) -> Array:
    """F15 of the pair (a, b), labelled a ≻ b with chance σ(r_a − r_b): β σ(−βh), plus on a, minus on b.

    The other label has h of the opposite sign. Twice, as `climb` halves a pair.
    """
    gap = s.sum(k1(s))
    h = gap[:, :1] - gap[:, 1:]
    wins = 1 / (1 + np.exp(s.rewards[:, 1:] - s.rewards[:, :1]))
    push = wins * BETA / (1 + np.exp(BETA * h)) - (1 - wins) * BETA / (1 + np.exp(-BETA * h))
    return 2 * push * np.array([[[1.0], [-1.0]]])


# ---- the estimators


def weigh(
    weights: Callable[[Step], Array],
    size: int = 1,
    by: tuple[str, ...] = ("policy",),
    score: str = "policy",
    temperature: float = 1.0,
) -> Estimator:
    """E[(1/G) Σ_i Σ_t w_it ∇ℓ_it], drawn from and scored by distributions of the case."""

    def estimate(case: Case) -> Array:
        step = Step(case, groups(case.tree, size, *(getattr(case, name) for name in by)))
        return step.climb(weights(step), getattr(case, score), temperature)

    return estimate


def kept(weights: Callable[[Step], Array], size: int, *, redraw: bool) -> Estimator:
    """Groups with a signal alone: a dropped one is replaced by other prompts, or by the same one again."""

    def estimate(case: Case) -> Array:
        step = Step(case, groups(case.tree, size, case.policy))
        chance = step.draws.chance * (np.ptp(step.rewards, axis=(1, 2)) > 0)
        if redraw:
            prompts = chance.reshape(case.tree.prompts, -1)
            chance = (prompts / prompts.sum(axis=1, keepdims=True)).ravel()
        step = Step(case, Draws(step.draws.rows, chance / chance.sum()))
        return step.climb(weights(step))

    return estimate


def one_of_each(weights: Callable[[Step], Array]) -> Estimator:
    """A batch of one completion of each prompt."""

    def estimate(case: Case) -> Array:
        step = Step(case, batches(case.tree, case.policy))
        return step.climb(weights(step))

    return estimate


def visited(slope: Callable[[Case], Array], by: str = "policy") -> Estimator:
    """E[Σ_t g(s_t)], g written out for each state, the states as another distribution reaches them."""

    def estimate(case: Case) -> Array:
        tree, chance = case.tree, probabilities(case.tree, getattr(case, by))
        reach = np.bincount(tree.states.ravel(), (tree.mask * chance[:, None]).ravel(), tree.size)
        return reach[:, None] * slope(case)

    return estimate


def entropies(case: Case) -> Array:
    """H of each state, (S,)."""
    return -(case.policy * np.log(case.policy)).sum(axis=1)


def entropy_slope(case: Case) -> Array:
    """∂H/∂z of each state, −p (log p + H), (S, V)."""
    return -case.policy * (np.log(case.policy) + entropies(case)[:, None])


def reverse_slope(case: Case) -> Array:
    """∂KL(p‖q)/∂z of each state, p (log p/q − KL), (S, V)."""
    gap = np.log(case.policy / case.anchor)
    return case.policy * (gap - (case.policy * gap).sum(axis=1, keepdims=True))


def forward_slope(case: Case) -> Array:
    """∂KL(q‖p)/∂z of each state, p − q, (S, V)."""
    return case.policy - case.anchor


def both(one: Estimator, other: Estimator) -> Estimator:
    return lambda case: one(case) + other(case)


OLDER, TAUGHT = ("sampler",), ("anchor",)

BY_HAND: dict[str, Estimator] = {
    # ---- on policy
    "REINFORCE, no baseline (F35)": weigh(raw),
    "REINFORCE, constant baseline (F27 at ratio 1)": weigh(centred),
    "group mean, G = 2 (F21)": weigh(group_mean, 2),
    "group mean, G = 3 (F21)": weigh(group_mean, 3),
    "leave-one-out, G = 2 (F23)": weigh(left_out, 2),
    "leave-one-out, G = 3 (F23)": weigh(left_out, 3),
    "group standardised, G = 2 (F22)": weigh(group_std, 2),
    "group standardised, G = 3 (F22)": weigh(group_std, 3),
    "group standardised, G = 4, rewards 0 and 1 (F22)": weigh(group_std, 4),
    "sum over a constant length (F31)": weigh(lambda s: centred(s) / s.mask.shape[2]),
    "group mean over a constant length, G = 3 (F31)": weigh(lambda s: group_mean(s) / s.mask.shape[2], 3),
    "1/length of each completion (F30)": weigh(lambda s: centred(s) / s.length),
    "group standardised and 1/length, G = 3 (F30)": weigh(lambda s: group_std(s) / s.length, 3),
    "token mean of each pair, leave-one-out": weigh(lambda s: left_out(s) * token_share(s), 2),
    "token mean of each triple, standardised (F33)": weigh(lambda s: group_std(s) * token_share(s), 3),
    "pair whitened over its tokens (F24)": weigh(lambda s: whitened(s, raw(s) * s.mask), 2),
    "stop action left out of the mask": weigh(lambda s: centred(s) * s.pick(s.case.tree.actions != STOP)),
    "completions cut at the limit left out": weigh(lambda s: centred(s) * ended(s)),
    "drawn at τ = .7, scored at .7": weigh(centred, by=("warm",), score="warm", temperature=0.7),
    "drawn at τ = .7, scored at 1": weigh(centred, by=("warm",)),
    "drawn at τ = .7, scored at 1, one step": weigh(left_out, 2, by=("warm",)),
    "the same without a baseline": weigh(raw, by=("warm",)),
    "drawn with top-k = 2, scored so": weigh(centred, by=("top",), score="top"),
    "drawn with top-k = 2, scored in full": weigh(centred, by=("top",)),
    "the same against the full policy's gradient": weigh(centred, by=("top",)),
    # ---- off policy
    "older policy, one step, no clip (F27)": weigh(lambda s: ratios(s) * centred(s), by=OLDER),
    "older policy, product of the row's ratios": weigh(lambda s: whole(s) * centred(s), by=OLDER),
    "older policy, no correction": weigh(centred, by=OLDER),
    "older policy, token ratios, no clip (F27)": weigh(lambda s: ratios(s) * centred(s), by=OLDER),
    "older policy, token ratios, clip .2 and .28 (F27)": weigh(
        lambda s: unless_clipped(ratios(s), centred(s)), by=OLDER
    ),
    "CISPO on policy": weigh(centred),
    "CISPO, older policy, weights at most 1.28": weigh(
        lambda s: np.minimum(ratios(s), 1.28) * centred(s), by=OLDER
    ),
    "GSPO on policy, mean over the tokens (F32)": weigh(lambda s: centred(s) / s.length),
    "GSPO on policy, sum over the tokens (F32)": weigh(centred),
    "GSPO, older policy, sum, no clip (F32)": weigh(
        lambda s: whole(s) ** (1 / s.length) * centred(s), by=OLDER
    ),
    "GSPO, older policy, mean, no clip (F32)": weigh(
        lambda s: whole(s) ** (1 / s.length) * centred(s) / s.length, by=OLDER
    ),
    "GSPO, older policy, mean, clip .2 and .28 (F32)": weigh(
        lambda s: unless_clipped(whole(s) ** (1 / s.length), centred(s)) / s.length, by=OLDER
    ),
    "other sampler, token weights truncated at 2": weigh(
        lambda s: np.minimum(ratios(s), 2.0) * centred(s), by=OLDER
    ),
    "other sampler, token weights masked above 2": weigh(
        lambda s: np.where(ratios(s) > 2.0, 0.0, ratios(s)) * centred(s), by=OLDER
    ),
    "other sampler, sequence weights": weigh(lambda s: whole(s) * centred(s), by=OLDER),
    "other sampler, sequence weights truncated at 2": weigh(
        lambda s: np.minimum(whole(s), 2.0) * centred(s), by=OLDER
    ),
    "other sampler, sequence weights masked above 2": weigh(
        lambda s: np.where(whole(s) > 2.0, 0.0, whole(s)) * centred(s), by=OLDER
    ),
    "shaped loss on the policy's own samples (F34)": weigh(lambda s: centred(s) * shaping(s)),
    "pair of an own and a teacher's trace, the latter shaped (F34)": weigh(
        lambda s: group_mean(s) * np.where([[[1.0], [0.0]]], 1.0, shaping(s)), 2, by=("policy", "anchor")
    ),
    # ---- value function
    "GAE, exact V, γ = λ = 1 (F25)": weigh(lambda s: estimated(s, at_end(s), s.case.values, 1.0)),
    "GAE, exact V, λ = .5": weigh(lambda s: estimated(s, at_end(s), s.case.values, 0.5)),
    "GAE, exact V, λ = 0": weigh(lambda s: estimated(s, at_end(s), s.case.values, 0.0)),
    "GAE, wrong V, γ = λ = 1": weigh(lambda s: estimated(s, at_end(s), s.case.guess, 1.0)),
    "GAE, wrong V, λ = .95": weigh(lambda s: estimated(s, at_end(s), s.case.guess, 0.95)),
    "GAE, wrong V, λ = .5": weigh(lambda s: estimated(s, at_end(s), s.case.guess, 0.5)),
    "GAE, wrong V, λ = 0": weigh(lambda s: estimated(s, at_end(s), s.case.guess, 0.0)),
    "reward to go, γ = 1": weigh(raw),
    "reward to go, γ = .9": weigh(lambda s: to_go(at_end(s), 0.9)),
    # ---- KL: the estimate is of ∇ KL, downhill
    "KL: k1 as a loss (F29)": weigh(lambda s: s.mask),
    "KL: k2 as a loss (F29)": weigh(k1),
    "KL: k3 as a loss (F29)": weigh(lambda s: 1 - np.exp(-k1(s))),
    "KL: k3 × ratio as a loss": weigh(lambda s: k3(s) + 1 - np.exp(-k1(s))),
    "KL of each state in full as a loss": visited(reverse_slope),
    "KL: k1 in the reward of its own token": weigh(k1),
    "KL: k2 as a loss, one step": weigh(k1),
    "KL: k3 as a loss, one step": weigh(lambda s: 1 - np.exp(-k1(s))),
    "the same against the forward KL": weigh(lambda s: 1 - np.exp(-k1(s))),
    "KL: k1 in the reward, credited with what follows": weigh(lambda s: to_go(k1(s))),
    "KL: the loss with the correct gradient": weigh(lambda s: to_go(k1(s))),
    "KL: k3 in the reward, credited with what follows": weigh(lambda s: to_go(k3(s))),
    "KL: k3 in the reward and as a loss": weigh(lambda s: to_go(k3(s)) + 1 - np.exp(-k1(s))),
    "older policy, k3 × ratio as a loss, one step": weigh(lambda s: ratios(s) * k1(s), by=OLDER),
    "older policy, k2 × ratio as a loss, one step": weigh(
        lambda s: ratios(s) * (k1(s) ** 2 / 2 + k1(s)), by=OLDER
    ),
    "older policy, k2 × held ratio as a loss, one step": weigh(lambda s: ratios(s) * k1(s), by=OLDER),
    "older policy, k3 as a loss, one step": weigh(lambda s: 1 - np.exp(-k1(s)), by=OLDER),
    "older policy, k3 × ratio as a loss": weigh(lambda s: ratios(s) * k1(s), by=OLDER),
    "E[r] − β·KL: shaped rewards to go (F26)": weigh(lambda s: to_go(shaped(s, BETA))),
    "E[r] − β·KL: leave-one-out on r − β Σ k1, G = 2": weigh(
        lambda s: (s.rewards - BETA * s.sum(k1(s))) - (s.rewards - BETA * s.sum(k1(s)))[:, ::-1], 2
    ),
    "E[r] − β·KL: REINFORCE, k3 as a loss": weigh(lambda s: centred(s) - BETA * (1 - np.exp(-k1(s)))),
    "E[r] − β·KL: pair whitened, KL in the reward (F24)": weigh(
        lambda s: whitened(s, to_go(shaped(s, BETA))), 2
    ),
    "E[r] − β·KL: DPO on own pairs, Bradley–Terry labels (F15)": weigh(preferred, 2),
    # ---- entropy
    "entropy of each state as a bonus": visited(entropy_slope),
    "−ℓ in the reward, credited with what follows": weigh(lambda s: to_go(-s.token(np.log(s.case.policy)))),
    "entropy as a bonus and in the reward to go": both(
        visited(entropy_slope), weigh(lambda s: to_go(s.at_state(entropies(s.case))))
    ),
    # ---- distillation: the estimate is of the KL's gradient, downhill
    "NLL on the teacher's completions (F40)": weigh(lambda s: -s.mask, by=TAUGHT),
    "forward KL of each state, teacher's completions (F38)": visited(forward_slope, "anchor"),
    "forward KL of each state, own completions": visited(forward_slope),
    "reverse KL of each state, own completions (F39)": visited(reverse_slope),
    "reverse KL of each state, teacher's completions": visited(reverse_slope, "anchor"),
    # ---- two prompts
    "two prompts, leave-one-out, G = 2": weigh(left_out, 2),
    "two prompts, group standardised, G = 2": weigh(group_std, 2),
    "two prompts, group standardised, G = 3": weigh(group_std, 3),
    "two prompts, group standardised, G = 4": weigh(group_std, 4),
    "two prompts, dropped groups replaced by other prompts, G = 2": kept(group_mean, 2, redraw=False),
    "two prompts, dropped groups replaced by other prompts, G = 3": kept(group_mean, 3, redraw=False),
    "two prompts, dropped groups drawn again, G = 2": kept(group_mean, 2, redraw=True),
    "two prompts, token mean of each signal group, G = 3 (F33)": kept(
        lambda s: group_std(s) * token_share(s), 3, redraw=False
    ),
    "two prompts, mean of the batch as the baseline": one_of_each(group_mean),
    "two prompts, batch whitened (F24)": one_of_each(lambda s: whitened(s, raw(s) * s.mask)),
}


def variant(name: str, beta: float) -> Estimator:
    """A row of the table of variants: on policy, pairs of completions, an exact value function."""

    def penalised(s: Step) -> Array:
        return s.rewards - beta * s.sum(k1(s))

    def pulled(s: Step) -> Array:
        return group_std(s) - beta * (1 - np.exp(-k1(s)))

    weights: dict[str, Callable[[Step], Array]] = {
        "reinforce": raw,
        "rloo": lambda s: penalised(s) - penalised(s)[:, ::-1],
        "reinforce++": lambda s: whitened(s, to_go(shaped(s, beta))) * token_share(s),
        "ppo": lambda s: estimated(s, shaped(s, beta), s.case.values, 0.95) * token_share(s),
        "grpo": lambda s: pulled(s) / s.length,
        "dr_grpo": lambda s: group_mean(s) / s.mask.shape[2],
        "dapo": lambda s: group_std(s) * token_share(s),
        "gspo": lambda s: group_std(s) / s.length,
        "cispo": lambda s: group_std(s) * token_share(s),
        "luffy": lambda s: group_mean(s) / s.mask.shape[2],
        "nanopost": lambda s: group_mean(s) * token_share(s),
    }
    return weigh(weights[name], 2)
