"""Where the losses lead: the optimum of each objective, found by descent, against its closed form.

The space is enumerated (15 completions of at most three steps, ragged by the stop action; a table of logits
with a row a prefix), every expectation is a sum over all completions, pairs or groups, and all is float64, so
nothing is sampled and nothing is noise. The targets are closed forms over whole completions and use no
function of ours; the descent uses nothing else. The table of docs/optima.md is asserted here.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanopost.losses import (
    aggregate,
    clipped_surrogate_loss,
    dpo_loss,
    forward_kl,
    gae,
    generalized_jsd,
    ipo_loss,
    kl_estimate,
    kl_loss_with_correct_gradient,
    kl_shaped_rewards,
    policy_ratio,
    reinforce_loss,
    reverse_kl,
    reward_to_go,
    sequence_logps,
    sft_loss,
    token_logps,
    value_loss,
)
from nanopost.losses.variants import VARIANTS, policy_values, token_advantages
from tests.oracle import Array, distribution, groups, grow, per_token, probabilities

PAGE = Path(__file__).parents[2] / "docs" / "optima.md"
BETAS, TEMPERATURES = (0.3, 1.0, 2.0), (1.0, 2.0)
FLIPPED = 0.2  # share of labels turned round, and ε
# Total variation, in [0, 1]. PPO, the slowest descent, ends at 2e-6 of its target and the others below 1e-7;
# what leads elsewhere ends 1e-2 away or more.
TOLERANCE, APART = 1e-5, 5e-3
FAR = 0.4  # every start is at least that far from its target
STEPS, RATE = 400, 0.2

TREE = grow(3, 3)
RANDOM = np.random.default_rng(11)
REFERENCE = distribution(RANDOM.normal(size=(TREE.size, 3)))  # and the teacher
START = 2.0 * RANDOM.normal(size=(TREE.size, 3))
REWARDS = (2.0 * RANDOM.uniform(size=len(TREE.actions))).round(2)
WEIGHTS = {  # with what probability a completion is put into a pair
    "uniform": np.full(len(TREE.actions), 1 / len(TREE.actions)),
    "reference": probabilities(TREE, REFERENCE),
    "another": RANDOM.dirichlet(np.ones(len(TREE.actions))),
}
ACTIONS, STATES, MASK = (torch.tensor(x) for x in (TREE.actions, TREE.states, TREE.mask))
REF_LOGPS = torch.tensor(per_token(TREE, np.log(REFERENCE)))  # by the oracle's own softmax
TEACHER = torch.tensor(np.log(REFERENCE))[STATES]

Loss = Callable[[Tensor], Tensor]  # of the table of logits, (S, V)


# ---- closed forms


def tilted(exponent: Array) -> Array:
    """π ∝ π_ref e^{exponent} over whole completions; with r/β in it the optimum of F13."""
    weights = probabilities(TREE, REFERENCE) * np.exp(exponent)
    return weights / weights.sum()


def optimum(beta: float) -> Array:
    return tilted(REWARDS / beta)


def preferred() -> Array:
    """p(y ≻ y') of Bradley and Terry (F9), (N, N); ½ on the diagonal."""
    return 1.0 / (1.0 + np.exp(REWARDS[None, :] - REWARDS[:, None]))


def length_tilted(beta: float) -> Array:
    """π_ref e^{|y| (r + c)/β}, c by bisection so that it sums to 1: where length-normalised DPO leads."""
    length, low, high = TREE.mask.sum(axis=1), -50.0, 50.0
    for _ in range(200):
        c = (low + high) / 2.0
        weights = probabilities(TREE, REFERENCE) * np.exp(length * (REWARDS + c) / beta)
        low, high = (c, high) if weights.sum() < 1.0 else (low, c)
    return weights


def soft_values(beta: float) -> Array:
    """β log Σ_y π_ref(y | s) e^{r/β} of each state: what a critic says at the optimum, (S,)."""
    mass, total = np.zeros(TREE.size), np.zeros(TREE.size)
    for row, step in zip(*np.nonzero(TREE.mask), strict=True):
        chance = probabilities(TREE, REFERENCE)[row]
        mass[TREE.states[row, step]] += chance
        total[TREE.states[row, step]] += chance * np.exp(REWARDS[row] / beta)
    return beta * np.log(total / mass)


# ---- descent


def policy(table: Tensor) -> Array:
    return probabilities(TREE, distribution(table.detach().numpy()))


def chance(table: Tensor) -> Tensor:
    """The probability of each completion, (N, 1): a weight, without gradient."""
    return torch.tensor(policy(table))[:, None]


def summed(values: Tensor, weights: Tensor | float, mask: Tensor = MASK) -> Tensor:
    return aggregate(values * weights, mask, mode="sequence_sum", denom=1.0)


def descend(loss: Loss, *others: Tensor, steps: int = STEPS, memory: float = 0.99) -> Array:
    """Adam from START with a rate that falls to 0; the probability of each completion where it ends.

    `memory` is that of the squared gradient. ε is next to nothing: a state that is visited once in a thousand
    times has small gradients and shall learn as the others do.
    """
    table = torch.tensor(START, requires_grad=True)
    adam = torch.optim.Adam([table, *others], lr=RATE, betas=(0.9, memory), eps=1e-30)
    for step in range(steps):
        adam.param_groups[0]["lr"] = RATE * (1.0 - step / steps)
        adam.zero_grad()
        loss(table).backward()
        adam.step()
    return policy(table)


def distance(p: Array, q: Array) -> float:
    """Total variation, in [0, 1]."""
    return float(0.5 * np.abs(p - q).sum())


# ---- preferences: the population loss over all ordered pairs


def pairs(
    per_row: Callable[..., Tensor], *, weights: str = "uniform", flipped: float = 0.0, average: bool = False
) -> Loss:
    """Σ_{i≠j} μ_i μ_j p(i ≻ j) L(i over j), with a share of the labels turned round."""
    mu, p = WEIGHTS[weights], preferred()
    p = (1.0 - flipped) * p + flipped * p.T
    i, j = np.nonzero(~np.eye(len(mu), dtype=bool))
    weight = torch.tensor(mu[i] * mu[j] * p[i, j])[:, None]
    ref = sequence_logps(REF_LOGPS, MASK, average=average)

    def loss(table: Tensor) -> Tensor:
        logps = sequence_logps(token_logps(table[STATES], ACTIONS), MASK, average=average)
        losses = per_row(logps[i], logps[j], ref[i], ref[j])[:, None]
        return summed(losses, weight, torch.ones_like(losses, dtype=torch.bool))

    return loss


@functools.cache
def dpo(beta: float, *, epsilon: float = 0.0, robust: bool = False, **population: Any) -> Array:
    per_row = functools.partial(dpo_loss, beta=beta, label_smoothing=epsilon, robust=robust)
    return descend(pairs(per_row, **population))


@functools.cache
def ipo(beta: float, weights: str = "uniform") -> Array:
    return descend(pairs(functools.partial(ipo_loss, beta=beta), weights=weights))


# ---- policy gradients: the expectation over all completions, or all pairs, that the policy would sample


def shaped(logps: Tensor, beta: float) -> Tensor:
    return kl_shaped_rewards(torch.tensor(REWARDS), logps, REF_LOGPS, MASK, beta=beta)


def reinforce(beta: float) -> Array:
    def loss(table: Tensor) -> Tensor:
        logps = token_logps(table[STATES], ACTIONS)
        advantages = reward_to_go(shaped(logps, beta), MASK, gamma=1.0)
        return summed(reinforce_loss(logps, advantages), chance(table))

    return descend(loss, steps=2 * STEPS)


def reinforce_with_a_kl_loss(beta: float, term: Callable[[Tensor], Tensor]) -> Array:
    scores = torch.tensor(REWARDS)[:, None].expand(MASK.shape)

    def loss(table: Tensor) -> Tensor:
        logps = token_logps(table[STATES], ACTIONS)
        return summed(reinforce_loss(logps, scores) + beta * term(logps), chance(table))

    return descend(loss, steps=2 * STEPS)


def correct_kl(logps: Tensor) -> Tensor:
    return kl_loss_with_correct_gradient(logps, REF_LOGPS, MASK)


def k3(logps: Tensor) -> Tensor:
    return kl_estimate(logps, REF_LOGPS, kind="k3")


def rloo(beta: float) -> Array:
    variant = replace(VARIANTS["rloo"], beta=beta)

    def loss(table: Tensor) -> Tensor:
        draws = groups(TREE, 2, distribution(table.detach().numpy()))  # every pair, with its probability
        rows, ref = draws.rows.flatten(), REF_LOGPS[draws.rows.flatten()]
        weight = torch.tensor(draws.chance).repeat_interleave(2)[:, None]
        logps, mask = token_logps(table[STATES[rows]], ACTIONS[rows]), MASK[rows]
        scores, old = torch.tensor(REWARDS[rows]), logps.detach()
        advantages = token_advantages(variant, scores, old, ref, mask, group_size=2)
        return summed(policy_values(variant, logps, old, ref, advantages, mask), weight / 2.0, mask)

    return descend(loss, steps=2 * STEPS)


def exact_values(rewards: Tensor, weight: Tensor) -> Tensor:
    """V(s) = E[G | s] of the shaped rewards under the policy that sampled, (N, T)."""
    to_go, weight = reward_to_go(rewards, MASK, gamma=1.0), weight.expand(MASK.shape)
    worth, reach = torch.zeros(2, TREE.size, dtype=torch.float64)
    worth.index_put_((STATES[MASK],), (weight * to_go)[MASK], accumulate=True)
    reach.index_put_((STATES[MASK],), weight[MASK], accumulate=True)
    return (worth / reach)[STATES]


def ppo(beta: float, critic: Tensor | None = None) -> Array:
    """Every fourth step looks at the world again; the other three are off-policy and clipped.

    Without a critic V is exact; with one, a table of a value a state, `value_loss` fits it along the way.
    """
    rollout: list[Tensor] = []
    count = iter(range(10**9))

    def loss(table: Tensor) -> Tensor:
        logps = token_logps(table[STATES], ACTIONS)
        if next(count) % 4 == 0:
            old, weight = logps.detach(), chance(table)
            rewards = shaped(old, beta)
            values = exact_values(rewards, weight) if critic is None else critic.detach()[STATES]
            advantages, returns = gae(rewards, values, MASK, gamma=1.0, gae_lambda=0.95)
            rollout[:] = old, weight, values, advantages, returns
        old, weight, values, advantages, returns = rollout
        ratio = policy_ratio(logps, old, MASK)
        total = summed(clipped_surrogate_loss(ratio, advantages, clip_low=0.2, clip_high=0.2), weight)
        if critic is not None:
            total = total + summed(value_loss(critic[STATES], values, returns, clip=0.2), weight)
        return total

    return descend(loss, *([] if critic is None else [critic]), steps=3 * STEPS, memory=0.999)


@functools.cache
def actor_critic(beta: float) -> tuple[Array, Array]:
    """Where PPO with a learned critic ends: the policy, (N,), and the values of the states, (S,)."""
    critic = torch.zeros(TREE.size, dtype=torch.float64, requires_grad=True)
    return ppo(beta, critic), critic.detach().numpy()


# ---- distillation: the teacher is the reference


def distil(divergence: Callable[[Tensor, Tensor], Tensor], *, on_policy: bool) -> Array:
    """Divergences of the next-token distributions, over the states of the student, or of the teacher."""
    forced = torch.tensor(probabilities(TREE, REFERENCE))[:, None]
    return descend(
        lambda table: summed(divergence(table[STATES], TEACHER), chance(table) if on_policy else forced)
    )


def distil_text(_: float) -> Array:
    """F40: the likelihood of everything that the teacher may write, with the probability that it does."""
    forced = torch.tensor(probabilities(TREE, REFERENCE))[:, None]
    return descend(lambda table: summed(sft_loss(token_logps(table[STATES], ACTIONS)), forced))


def warmer(temperature: float) -> Array:
    return probabilities(TREE, REFERENCE)  # equal at any temperature is equal


def azar(beta: float, weights: str = "uniform") -> Array:
    """IPO's optimum: the tilt is the chance to be preferred to a completion of μ, not the reward."""
    return tilted(preferred() @ WEIGHTS[weights] / beta)


@dataclass(frozen=True)
class Claim:
    """`reach` descends and `target` is the closed form; `settings` are values of β or of τ."""

    reach: Callable[[float], Array]
    target: Callable[[float], Array]
    settings: tuple[float, ...] = BETAS


CLAIMS = {
    "dpo": Claim(dpo, optimum),
    "dpo, pairs of the reference": Claim(functools.partial(dpo, weights="reference"), optimum),
    "dpo, pairs of another policy": Claim(functools.partial(dpo, weights="another"), optimum),
    "robust dpo, labels flipped": Claim(
        functools.partial(dpo, epsilon=FLIPPED, robust=True, flipped=FLIPPED), optimum
    ),
    "dpo, length-normalised": Claim(
        lambda beta: descend(pairs(functools.partial(dpo_loss, beta=beta), average=True)), length_tilted
    ),
    "ipo": Claim(ipo, azar),
    "ipo, pairs of another policy": Claim(
        functools.partial(ipo, weights="another"), functools.partial(azar, weights="another")
    ),
    "reinforce, KL in the reward": Claim(reinforce, optimum),
    "reinforce, KL as a loss": Claim(functools.partial(reinforce_with_a_kl_loss, term=correct_kl), optimum),
    "rloo": Claim(rloo, optimum),
    "ppo, exact critic": Claim(ppo, optimum),
    "ppo, learned critic": Claim(lambda beta: actor_critic(beta)[0], optimum),
    "distillation, on-policy, reverse KL": Claim(
        lambda tau: distil(functools.partial(reverse_kl, temperature=tau), on_policy=True),
        warmer,
        TEMPERATURES,
    ),
    "distillation, on-policy, JSD": Claim(
        lambda tau: distil(functools.partial(generalized_jsd, beta=0.3, temperature=tau), on_policy=True),
        warmer,
        TEMPERATURES,
    ),
    "distillation, teacher-forced, forward KL": Claim(
        lambda tau: distil(functools.partial(forward_kl, temperature=tau), on_policy=False),
        warmer,
        TEMPERATURES,
    ),
    "distillation, teacher-forced, JSD": Claim(
        lambda tau: distil(functools.partial(generalized_jsd, beta=0.3, temperature=tau), on_policy=False),
        warmer,
        TEMPERATURES,
    ),
    "distillation, the teacher's text": Claim(distil_text, warmer, (1.0,)),
}
# What leads elsewhere: the same descent ends at least APART from the optimum of F13.
ELSEWHERE: dict[str, Callable[[float], Array]] = {
    "cdpo": lambda beta: dpo(beta, epsilon=FLIPPED),
    "dpo, length-normalised": CLAIMS["dpo, length-normalised"].reach,
    "ipo": ipo,
    "reinforce, k3 as a loss": functools.partial(reinforce_with_a_kl_loss, term=k3),
}


@functools.cache
def ends(name: str, setting: float) -> tuple[float, float]:
    """Distance to the target at the start and at the end."""
    claim = CLAIMS[name]
    target = claim.target(setting)
    return distance(policy(torch.tensor(START)), target), distance(claim.reach(setting), target)


@functools.cache
def astray(name: str, beta: float) -> float:
    """Distance to the optimum of F13 where another objective ends."""
    return distance(ELSEWHERE[name](beta), optimum(beta))


# ---- the claims


@pytest.mark.parametrize("beta", BETAS)
def test_the_target_maximises_reward_minus_beta_kl(beta: float) -> None:
    """F13, by itself: the closed form is worth β log Z, and every other policy less by β KL(π‖π*)."""
    reference, best = probabilities(TREE, REFERENCE), optimum(beta)

    def worth(p: Array) -> float:
        return float(p @ REWARDS - beta * p @ np.log(p / reference))

    top = beta * float(np.log(reference @ np.exp(REWARDS / beta)))
    assert worth(best) == pytest.approx(top, rel=1e-12)
    for p in (*WEIGHTS.values(), policy(torch.tensor(START))):
        assert distance(p, best) > 0.05
        assert worth(p) == pytest.approx(top - beta * float(p @ np.log(p / best)), rel=1e-9)


@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name, claim in CLAIMS.items() for setting in claim.settings]
)
def test_it_reaches_the_optimum(name: str, setting: float) -> None:
    start, end = ends(name, setting)
    assert start > FAR
    assert end < TOLERANCE


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_leads_elsewhere(name: str, beta: float) -> None:
    """The same descent, so that the reaching above is no property of the space."""
    assert astray(name, beta) > APART


@pytest.mark.parametrize("beta", BETAS)
def test_the_shift_of_cdpo(beta: float) -> None:
    """With q = (1 − ε) p + ε (1 − p) it ends where Σ_j μ_j σ(β(g_i − g_j)) = Σ_j μ_j q_ij, g = log π/π_ref.

    That is DPO's own end under labels of which a share ε is turned round. For the pair alone it says
    β(g_i − g_j) = logit q_ij: a reward difference is drawn towards 0.
    """
    end = dpo(beta, epsilon=FLIPPED)
    g = np.log(end / probabilities(TREE, REFERENCE))
    chosen = 1.0 / (1.0 + np.exp(beta * (g[None, :] - g[:, None])))
    q = (1.0 - FLIPPED) * preferred() + FLIPPED * preferred().T
    assert np.abs((chosen - q).mean(axis=1)).max() < 1e-6  # a gradient at the end of the descent
    assert np.abs((chosen - preferred()).mean(axis=1)).max() > 0.01
    assert distance(end, dpo(beta, flipped=FLIPPED)) < TOLERANCE
    spread = beta * (g[:, None] - g[None, :])[REWARDS[:, None] - REWARDS[None, :] > 1.0]
    assert len(spread) > 10 and spread.max() < np.log((1.0 - FLIPPED) / FLIPPED)  # no q lies above 1 − ε


@pytest.mark.parametrize("beta", BETAS)
def test_the_critic_ends_at_the_soft_values(beta: float) -> None:
    _, values = actor_critic(beta)
    assert np.abs(soft_values(beta)).min() > 0.1
    assert np.abs(values - soft_values(beta)).max() < TOLERANCE


def rows(heading: str) -> dict[str, list[str]]:
    """The table under a heading of the page: first cell → the others, without its head."""
    part = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|(.*)\|$", part, re.MULTILINE)[2:]
    return {
        name.strip(): [cell.strip() for cell in others] for name, *others in (x.split("|") for x in lines)
    }


def test_the_page_says_where_each_one_starts_and_ends() -> None:
    """Starts to the printed digit; ends, which are rounding and tail of a descent, inside the bound."""
    table = rows("What reaches its target")
    assert list(table) == list(CLAIMS)
    for name, (*_, starts, ended) in table.items():
        found = [ends(name, setting) for setting in CLAIMS[name].settings]
        assert starts.split(" · ") == [f"{start:.2f}" for start, _ in found], name
        assert len(ended.split(" · ")) == len(found) and max(map(float, ended.split(" · "))) < TOLERANCE
    assert f"{TOLERANCE:.0e}" in PAGE.read_text(encoding="utf-8")


def test_the_page_says_how_far_the_others_stay() -> None:
    table = rows("What leads elsewhere")
    assert list(table) == list(ELSEWHERE)
    for name, (*_, distances) in table.items():
        assert distances.split(" · ") == [f"{astray(name, beta):.2f}" for beta in BETAS], name
