"""What each estimator gives on average, against the exact gradient, over every completion and every group.

The table of docs/oracle.md is computed here; the exact facts are asserted to rounding, the biased ones as
biased.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nanopost.losses import (
    aggregate,
    clipped_surrogate_loss,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    policy_ratio,
    token_logps,
)
from tests.oracle import (
    STOP,
    Array,
    Samples,
    Tree,
    compare,
    distribution,
    expected_gradient,
    forward_kl_gradient,
    grow,
    kl,
    kl_gradient,
    probabilities,
    value_gradient,
)
from tests.pages import table

PAGE = Path(__file__).parents[2] / "docs" / "oracle.md"
TREE, STEP = grow(vocabulary=3, steps=3), grow(vocabulary=3, steps=1)
RANDOM = np.random.default_rng(7)
LOGITS, REFERENCE, OLD = (RANDOM.normal(size=(TREE.size, 3)) for _ in range(3))
REWARDS = RANDOM.uniform(size=len(TREE.actions)).round(2)
STEP_LOGITS, STEP_REFERENCE, STEP_OLD = LOGITS[:1], REFERENCE[:1], OLD[:1]
STEP_REWARDS = REWARDS[: len(STEP.actions)]
POLICY = distribution(LOGITS)
MEAN_REWARD = float(probabilities(TREE, POLICY) @ REWARDS)
TRUE = value_gradient(TREE, POLICY, REWARDS)


def surrogate(samples: Samples, advantages: Tensor, **scoring: float) -> Tensor:
    """F27 on policy (ratio 1): −ρA per token, so that minus its gradient is Σ A ∇ℓ."""
    logps = token_logps(samples.logits, samples.target_ids, **scoring)  # type: ignore[arg-type]
    spread = advantages.reshape(-1, 1).expand_as(logps) if advantages.dim() == 1 else advantages
    return clipped_surrogate_loss(logps, logps.detach(), spread, clip_low=0.2, clip_high=0.28)


def total(samples: Samples, values: Tensor, mode: str = "sequence_sum", denom: float | None = None) -> Tensor:
    """The expectation over tuples: each row weighted by its tuple's probability, G sequences a step."""
    return aggregate(values * samples.weight, samples.mask, mode=mode, denom=denom or samples.group_size)


def ascent(
    loss: Callable[[Samples], Tensor], *, group_size: int = 1, drawn_from: Array | None = None
) -> Array:
    """The direction the estimator moves the logits in: minus the expected gradient of its loss."""
    return -expected_gradient(TREE, LOGITS, REWARDS, loss, group_size=group_size, drawn_from=drawn_from)


def centred(samples: Samples) -> Tensor:
    """Rewards against a constant, the expected reward."""
    return samples.rewards - MEAN_REWARD


def grouped(scale: str) -> Callable[[Samples], Tensor]:
    """F21 or F22 over the tuple."""
    return lambda samples: group_advantages(samples.rewards, group_size=samples.group_size, scale=scale)


def left_out(samples: Samples) -> Tensor:
    """F23 over the tuple."""
    return leave_one_out_advantages(samples.rewards, group_size=samples.group_size)


def with_baseline(baseline: Callable[[Samples], Tensor], group_size: int = 1) -> Array:
    return ascent(lambda s: total(s, surrogate(s, baseline(s))), group_size=group_size)


def without_stop(samples: Samples) -> Tensor:
    """The stop action left out of the mask."""
    mask = samples.mask & (samples.target_ids != STOP)
    values = surrogate(samples, centred(samples)) * samples.weight
    return aggregate(values, mask, mode="sequence_sum", denom=1)


def mean_over_tuple_tokens(samples: Samples) -> Tensor:
    """Leave-one-out, each pair divided by its own number of tokens."""
    tokens = samples.mask.sum(dim=1).reshape(-1, samples.group_size).sum(dim=1)
    share = samples.group_size / tokens.repeat_interleave(samples.group_size)[:, None]
    return total(samples, surrogate(samples, left_out(samples)) * share)


def other_logps(samples: Samples, tree: Tree, logits: Array) -> Tensor:
    """Log-probabilities of the sampled actions under another table of logits, by the oracle's own softmax."""
    return torch.tensor(np.log(distribution(logits))[tree.states, tree.actions])[samples.rows]


def off_policy(tree: Tree, old: Array, clip_low: float, clip_high: float) -> Callable[[Samples], Tensor]:
    """F27 with tokens drawn from an older table of logits."""

    def loss(samples: Samples) -> Tensor:
        logps, old_logps = token_logps(samples.logits, samples.target_ids), other_logps(samples, tree, old)
        advantages = centred(samples)[:, None].expand_as(logps)
        values = clipped_surrogate_loss(logps, old_logps, advantages, clip_low=clip_low, clip_high=clip_high)
        return total(samples, values)

    return loss


def kl_terms(samples: Samples, kind: str, tree: Tree = TREE, reference: Array = REFERENCE) -> Tensor:
    """F29 per token against the reference table."""
    logps = token_logps(samples.logits, samples.target_ids)
    return kl_estimate(logps, other_logps(samples, tree, reference), kind=kind)


def kl_as_loss(kind: str) -> Callable[[Samples], Tensor]:
    return lambda samples: total(samples, kl_terms(samples, kind))


def kl_of_a_step(kind: str) -> Callable[[Samples], Tensor]:
    return lambda samples: total(samples, kl_terms(samples, kind, STEP, STEP_REFERENCE))


def weighted_k3(samples: Samples) -> Tensor:
    """k3 times the importance ratio, the gradient through both."""
    logps = token_logps(samples.logits, samples.target_ids)
    return total(samples, policy_ratio(logps, logps.detach()) * kl_terms(samples, "k3"))


def k1_in_reward(samples: Samples) -> Tensor:
    """−k1 as a reward of its token, each token credited with the sum from there on."""
    k1 = kl_terms(samples, "k1").detach().masked_fill(~samples.mask, 0.0)
    to_go = k1.flip(1).cumsum(1).flip(1)
    return total(samples, surrogate(samples, -to_go))


def step_gradient(loss: Callable[[Samples], Tensor], drawn_from: Array | None = None) -> Array:
    """The same for completions of one step."""
    return expected_gradient(STEP, STEP_LOGITS, STEP_REWARDS, loss, drawn_from=drawn_from)


WARM, TOP = distribution(LOGITS, temperature=0.7), distribution(LOGITS, top_k=2)
TRUE_WARM = value_gradient(TREE, WARM, REWARDS, temperature=0.7)
TRUE_TOP = value_gradient(TREE, TOP, REWARDS)
TRUE_KL = kl_gradient(TREE, POLICY, distribution(REFERENCE))
STEP_KL = kl_gradient(STEP, distribution(STEP_LOGITS), distribution(STEP_REFERENCE))
STEP_FORWARD_KL = forward_kl_gradient(STEP, distribution(STEP_LOGITS), distribution(STEP_REFERENCE))
STEP_TRUE = value_gradient(STEP, distribution(STEP_LOGITS), STEP_REWARDS)


def scored(advantages: Callable[[Samples], Tensor], drawn_from: Array, **scoring: float) -> Array:
    return ascent(lambda s: total(s, surrogate(s, advantages(s), **scoring)), drawn_from=drawn_from)


def reduced(mode: str, denom: float) -> Array:
    return ascent(lambda s: total(s, surrogate(s, centred(s)), mode, denom))


# estimator as the page names it -> (expected gradient, true gradient, norm ratio if exact, else None)
ESTIMATORS: dict[str, tuple[Callable[[], Array], Array, float | None]] = {
    "REINFORCE, constant baseline (F27 at ratio 1)": (lambda: with_baseline(centred), TRUE, 1.0),
    "group mean, G = 2 (F21)": (lambda: with_baseline(grouped("none"), 2), TRUE, 1 / 2),
    "group mean, G = 3 (F21)": (lambda: with_baseline(grouped("none"), 3), TRUE, 2 / 3),
    "leave-one-out, G = 2 (F23)": (lambda: with_baseline(left_out, 2), TRUE, 1.0),
    "leave-one-out, G = 3 (F23)": (lambda: with_baseline(left_out, 3), TRUE, 1.0),
    "group standardised, G = 2 (F22)": (lambda: with_baseline(grouped("std"), 2), TRUE, None),
    "group standardised, G = 3 (F22)": (lambda: with_baseline(grouped("std"), 3), TRUE, None),
    "sum over a constant length of 3 (F31)": (lambda: reduced("constant", 3), TRUE, 1 / 3),
    "1/length of each completion (F30)": (lambda: reduced("sequence_mean", 1), TRUE, None),
    "token mean of each pair, leave-one-out": (
        lambda: ascent(mean_over_tuple_tokens, group_size=2),
        TRUE,
        None,
    ),
    "stop action left out of the mask": (lambda: ascent(without_stop), TRUE, None),
    "drawn at τ = .7, scored at .7": (lambda: scored(centred, WARM, temperature=0.7), TRUE_WARM, 1.0),
    "drawn at τ = .7, scored at 1": (lambda: scored(centred, WARM), TRUE_WARM, None),
    "drawn with top-k = 2, scored so": (lambda: scored(centred, TOP, top_k=2), TRUE_TOP, 1.0),
    "drawn with top-k = 2, scored in full": (lambda: scored(centred, TOP), TRUE_TOP, None),
    "the same against the full policy's gradient": (lambda: scored(centred, TOP), TRUE, None),
    "older policy, one step, no clip (F27)": (
        lambda: -step_gradient(off_policy(STEP, STEP_OLD, 1.0, 1e9), distribution(STEP_OLD)),
        STEP_TRUE,
        1.0,
    ),
    "older policy, token ratios, no clip (F27)": (
        lambda: ascent(off_policy(TREE, OLD, 1.0, 1e9), drawn_from=distribution(OLD)),
        TRUE,
        None,
    ),
    "older policy, token ratios, clip .2 and .28 (F27)": (
        lambda: ascent(off_policy(TREE, OLD, 0.2, 0.28), drawn_from=distribution(OLD)),
        TRUE,
        None,
    ),
    "KL: k1 as a loss (F29)": (lambda: -ascent(kl_as_loss("k1")), TRUE_KL, 0.0),
    "KL: k2 as a loss (F29)": (lambda: -ascent(kl_as_loss("k2")), TRUE_KL, None),
    "KL: k3 as a loss (F29)": (lambda: -ascent(kl_as_loss("k3")), TRUE_KL, None),
    "KL: k3 × ratio as a loss": (lambda: -ascent(weighted_k3), TRUE_KL, None),
    "KL: k2 as a loss, one step": (lambda: step_gradient(kl_of_a_step("k2")), STEP_KL, 1.0),
    "KL: k3 as a loss, one step": (lambda: step_gradient(kl_of_a_step("k3")), STEP_KL, None),
    "the same against the forward KL": (lambda: step_gradient(kl_of_a_step("k3")), STEP_FORWARD_KL, 1.0),
    "KL: k1 in the reward, credited with what follows": (lambda: -ascent(k1_in_reward), TRUE_KL, 1.0),
}


def page_row(name: str) -> tuple[str, str]:
    """Cosine and norm ratio of an estimator as the page prints them."""
    estimate, truth, _ = ESTIMATORS[name]
    cosine, ratio = compare(estimate(), truth)
    return "–" if math.isnan(cosine) else f"{cosine:.4f}", f"{ratio:.4f}"


def test_completions_are_all_there() -> None:
    assert len(TREE.actions) == 15 and TREE.size == 7
    np.testing.assert_allclose(probabilities(TREE, POLICY).sum(), 1.0, rtol=1e-15)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_hand_written_gradients_equal_finite_differences(temperature: float) -> None:
    other = distribution(REFERENCE)

    def differences(value: Callable[[Array], float]) -> Array:
        result, h = np.zeros_like(LOGITS), 1e-6
        for place in np.ndindex(LOGITS.shape):
            bump = np.zeros_like(LOGITS)
            bump[place] = h
            result[place] = (value(LOGITS + bump) - value(LOGITS - bump)) / (2 * h)
        return result

    p = distribution(LOGITS, temperature)
    reward = differences(lambda z: float(probabilities(TREE, distribution(z, temperature)) @ REWARDS))
    np.testing.assert_allclose(value_gradient(TREE, p, REWARDS, temperature), reward, rtol=0.0, atol=1e-9)
    backward = differences(lambda z: kl(TREE, distribution(z), other))
    np.testing.assert_allclose(TRUE_KL, backward, rtol=0.0, atol=1e-9)
    forward = differences(lambda z: kl(TREE, other, distribution(z)))
    np.testing.assert_allclose(forward_kl_gradient(TREE, POLICY, other), forward, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row[2] is not None])
def test_estimator_is_exact(name: str) -> None:
    estimate, truth, norm_ratio = ESTIMATORS[name]
    gradient = estimate()
    assert norm_ratio is not None and np.linalg.norm(truth) > 1e-2
    np.testing.assert_allclose(gradient, norm_ratio * truth, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if row[2] is None])
def test_estimator_is_biased(name: str) -> None:
    estimate, truth, _ = ESTIMATORS[name]
    cosine, ratio = compare(estimate(), truth)
    assert 0.0 < cosine < 0.9999 and ratio > 0.1


def test_importance_weighted_k3_is_k2() -> None:
    np.testing.assert_allclose(ascent(weighted_k3), ascent(kl_as_loss("k2")), rtol=0.0, atol=1e-15)


def test_forward_kl_of_one_step_is_p_minus_q() -> None:
    p, q = distribution(STEP_LOGITS), distribution(STEP_REFERENCE)
    np.testing.assert_allclose(STEP_FORWARD_KL, p - q, rtol=0.0, atol=1e-15)
    np.testing.assert_allclose(step_gradient(kl_of_a_step("k3")), p - q, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_K6_one_step_down_the_estimate_lowers_the_exact_kl(kind: str) -> None:
    before = kl(TREE, POLICY, distribution(REFERENCE))
    moved = LOGITS + 0.05 * ascent(kl_as_loss(kind))
    assert kl(TREE, distribution(moved), distribution(REFERENCE)) < before - 1e-3


def test_page_states_the_numbers_of_the_oracle() -> None:
    computed = [(name, *page_row(name)) for name in ESTIMATORS]
    stated = [
        (row["estimator"], row["cosine"], row["norm ratio"])
        for row in table(PAGE.read_text(encoding="utf-8"))
        if "estimator" in row
    ]
    fresh = "\n".join(f"| {' | '.join(row)} |" for row in computed)
    assert stated == computed, f"docs/oracle.md should say:\n{fresh}"
