"""Shaped rewards, sums of what follows, GAE and the overlong penalty; exact gradients by enumeration."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from nanopost.losses import gae, kl_shaped_rewards, overlong_penalty, reward_to_go, token_logps
from tests.oracle import (
    Array,
    Samples,
    compare,
    distribution,
    expected_gradient,
    grow,
    kl_gradient,
    probabilities,
    value_gradient,
)
from tests.pages import scalar
from tests.properties import check_half
from tests.ragged import JUNK, junk_outside, normal, ragged

Ragged = tuple[Tensor, Generator]
UNIT = st.floats(0.05, 0.95)
PAD = torch.nn.functional.pad
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    # per-token tensors and the mask -> one tensor
    "reward_to_go": lambda rewards, mask: reward_to_go(rewards, mask, gamma=0.7),
    "gae": lambda rewards, values, mask: torch.stack(gae(rewards, values, mask, gamma=0.9, gae_lambda=0.6)),
    "kl_shaped_rewards": lambda logps, ref_logps, mask: kl_shaped_rewards(
        torch.linspace(-1.0, 2.0, len(mask)).double(), logps, ref_logps, mask, beta=0.3
    ),
}
TENSORS = {"reward_to_go": 1, "gae": 2, "kl_shaped_rewards": 2}


def drawn(batch: Ragged, number: int) -> list[Tensor]:
    """Some (B, T) tensors of a ragged batch."""
    mask, generator = batch
    return [normal(generator, *mask.shape, scale=2.0) for _ in range(number)]


def by_row(function: Callable[..., list[float]], mask: Tensor, *tensors: Tensor) -> Tensor:
    """A function of lists over the masked tokens of each row, its results put back in their places."""
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for row, keep in enumerate(mask):
        if keep.any():
            results = function(*(tensor[row, keep].tolist() for tensor in tensors))
            expected[row, keep] = torch.tensor(results, dtype=torch.float64)
    return expected


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def check_junk(name: str, batch: Ragged, soiled: int, junk: float) -> None:
    """Junk outside the mask of one argument changes no bit, and exact zeros come out there."""
    mask, inputs = batch[0], drawn(batch, TENSORS[name])
    clean = FUNCTIONS[name](*inputs, mask)
    inputs[soiled] = junk_outside(inputs[soiled], mask, junk)
    found = FUNCTIONS[name](*inputs, mask)
    assert torch.equal(found, clean) and not found.masked_select(~mask).any() and found.any()


def check_padding(name: str, batch: Ragged, left: int, right: int, data: st.DataObject) -> None:
    """Padding of any content and a permutation of the rows change no bit."""
    mask, inputs = batch[0], drawn(batch, TENSORS[name])
    expected = FUNCTIONS[name](*inputs, mask)
    padded = [PAD(tensor, (left, right), value=float("nan")) for tensor in inputs]
    found = FUNCTIONS[name](*padded, PAD(mask, (left, right)))
    assert torch.equal(found[..., left : left + mask.shape[1]], expected)
    if name != "kl_shaped_rewards":  # its scores come by row
        order = torch.tensor(data.draw(st.permutations(range(len(mask)))))
        moved = FUNCTIONS[name](*(tensor[order] for tensor in inputs), mask[order])
        assert torch.equal(moved, expected[..., order, :])


def check_deletion(name: str, batch: Ragged) -> None:
    """Each row alone, with everything outside its mask cut out, gives the same numbers on its tokens."""
    mask, inputs = batch[0], drawn(batch, TENSORS[name])
    found = FUNCTIONS[name](*inputs, mask)
    for row, keep in enumerate(mask):
        alone = [tensor[row, keep][None] for tensor in inputs]
        short = FUNCTIONS[name](*alone, torch.ones(1, int(keep.sum()), dtype=torch.bool))
        assert torch.equal(short[..., 0, :], found[..., row, :][..., keep])


# ---- rewards with the KL in them


@given(batch=ragged(), beta=st.floats(0.05, 3.0))
def test_KS1_value_equals_the_page(batch: Ragged, beta: float) -> None:
    mask, generator = batch
    logps, ref_logps = drawn(batch, 2)
    rewards = normal(generator, len(mask))
    found = kl_shaped_rewards(rewards, logps, ref_logps, mask, beta=beta)
    scores = rewards[:, None].expand_as(logps)
    page = lambda r, logp, ref: scalar("kl_shaped_rewards")(r[0], logp, ref, beta)  # noqa: E731
    close(found, by_row(page, mask, scores, logps, ref_logps))
    assert torch.equal(kl_shaped_rewards(rewards, logps, ref_logps, mask.long(), beta=beta), found)


@given(batch=ragged(), beta=st.floats(0.05, 3.0))
def test_KS2_row_sum_is_the_score_less_the_kl_and_the_score_is_on_the_last_token(
    batch: Ragged, beta: float
) -> None:
    mask, generator = batch
    logps, ref_logps = drawn(batch, 2)
    rewards, acts = normal(generator, len(mask)), mask.any(dim=1)
    found = kl_shaped_rewards(rewards, logps, ref_logps, mask, beta=beta)
    k1 = torch.where(mask, logps - ref_logps, 0.0)
    close((found * mask).sum(1)[acts], (rewards - beta * k1.sum(1))[acts], 1e-12)
    without = kl_shaped_rewards(torch.zeros_like(rewards), logps, ref_logps, mask, beta=beta)
    for row in acts.nonzero()[:, 0].tolist():
        last = int(mask[row].nonzero().max())
        assert (found - without)[row].nonzero()[:, 0].tolist() == [last]


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_KS3_a_score_of_zero_is_a_score_and_one_that_is_missing_is_refused(beta: float) -> None:
    logps, mask = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]]), torch.ones(2, 2)
    ref_logps = torch.tensor([[-1.5, -2.25], [-1.5, -2.25]])
    found = kl_shaped_rewards(torch.tensor([0.0, 1.0]), logps, ref_logps, mask, beta=beta)
    close(found, torch.tensor([[-0.5 * beta, -0.25 * beta], [-0.5 * beta, 1.0 - 0.25 * beta]]), 1e-6)
    for missing in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=rf"rewards must be finite, got {missing} at index \(1,\)"):
            kl_shaped_rewards(torch.tensor([0.0, missing]), logps, ref_logps, mask, beta=beta)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logps", "ref_logps", "rewards", "values"])
def test_what_is_not_finite_in_the_mask_is_refused(name: str, junk: float) -> None:
    sound, broken = torch.ones(2, 3), torch.ones(2, 3)
    broken[1, 2] = junk
    calls: dict[str, list[Callable[[], object]]] = {
        "logps": [lambda: kl_shaped_rewards(sound[:, 0], broken, sound, sound, beta=0.1)],
        "ref_logps": [lambda: kl_shaped_rewards(sound[:, 0], sound, broken, sound, beta=0.1)],
        "rewards": [
            lambda: reward_to_go(broken, sound, gamma=0.9),
            lambda: gae(broken, sound, sound, gamma=0.9, gae_lambda=0.9),
        ],
        "values": [lambda: gae(sound, broken, sound, gamma=0.9, gae_lambda=0.9)],
    }
    for call in calls[name]:
        with pytest.raises(ValueError, match=rf"^{name} must be finite, got {junk} at index \(1, 2\)"):
            call()


@pytest.mark.parametrize("junk", JUNK)
def test_KS3_without_a_kl_the_log_probabilities_are_not_read(junk: float) -> None:
    logps, mask = torch.full((1, 2), junk), torch.ones(1, 2)
    for pair in ((logps, mask), (mask, logps)):
        assert kl_shaped_rewards(torch.tensor([0.5]), *pair, mask, beta=0.0).tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_KS4_masked_slots_may_hold_anything(soiled: int, junk: float, batch: Ragged) -> None:
    check_junk("kl_shaped_rewards", batch, soiled, junk)


@pytest.mark.parametrize("score", [0.0, 5.0, float("nan"), float("inf")])
def test_KS5_a_row_without_a_token_is_zero_whatever_its_score(score: float) -> None:
    logps, mask = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]]), torch.tensor([[0, 0], [1, 0]])
    found = kl_shaped_rewards(torch.tensor([score, 2.0]), logps, torch.zeros(2, 2), mask, beta=0.5)
    assert found.tolist() == [[0.0, 0.0], [3.5, 0.0]]


def test_KS6_no_gradient() -> None:
    inputs = [
        torch.ones(1, requires_grad=True),
        *(torch.full((1, 2), x, requires_grad=True) for x in (1.0, 0.5)),
    ]
    found = kl_shaped_rewards(*inputs, torch.ones(1, 2), beta=0.5)
    assert not found.requires_grad and found.tolist() == [[-0.25, 0.75]]


# ---- exact gradients: every completion of three actions and at most three steps, no sampling

TREE = grow(vocabulary=3, steps=3)
RANDOM = np.random.default_rng(11)
LOGITS, REFERENCE = (RANDOM.normal(size=(TREE.size, 3)) for _ in range(2))
REWARDS = RANDOM.uniform(size=len(TREE.actions)).round(2)
POLICY = distribution(LOGITS)
TRUE = value_gradient(TREE, POLICY, REWARDS)
TRUE_KL = kl_gradient(TREE, POLICY, distribution(REFERENCE))
GUESS = RANDOM.normal(size=TREE.size)  # a critic that is wrong: any number for each prefix


def true_values() -> Array:
    """V of each prefix: the mean reward of the completions that go through it."""
    chances, values = probabilities(TREE, POLICY), np.zeros(TREE.size)
    for state in range(TREE.size):
        through = ((TREE.states == state) & TREE.mask).any(axis=1)
        values[state] = chances[through] @ REWARDS[through] / chances[through].sum()
    return values


def ascent(advantages: Callable[[Samples, Tensor, Tensor], Tensor]) -> Array:
    """E[Σ A ∇ℓ] for advantages made of the samples, ℓ and ℓ^ref."""

    def loss(samples: Samples) -> Tensor:
        logps = token_logps(samples.logits, samples.target_ids)
        ref_logps = torch.tensor(np.log(distribution(REFERENCE))[TREE.states, TREE.actions])[samples.rows]
        weights = advantages(samples, logps, ref_logps)
        assert not weights.requires_grad
        return -(samples.weight * weights * logps).masked_fill(~samples.mask, 0.0).sum()

    return -expected_gradient(TREE, LOGITS, REWARDS, loss)


def with_critic(values: Array, gae_lambda: float, beta: float = 0.0) -> Array:
    """The policy gradient with GAE's advantages under a critic, γ = 1."""

    def advantages(samples: Samples, logps: Tensor, ref_logps: Tensor) -> Tensor:
        shaped = kl_shaped_rewards(samples.rewards, logps, ref_logps, samples.mask, beta=beta)
        critic = torch.tensor(values[TREE.states])[samples.rows]
        return gae(shaped, critic, samples.mask, gamma=1.0, gae_lambda=gae_lambda)[0]

    return ascent(advantages)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_KS7_credited_with_what_follows_it_gives_the_true_gradient(beta: float) -> None:
    def advantages(samples: Samples, logps: Tensor, ref_logps: Tensor) -> Tensor:
        shaped = kl_shaped_rewards(samples.rewards, logps, ref_logps, samples.mask, beta=beta)
        return reward_to_go(shaped, samples.mask, gamma=1.0)

    assert np.linalg.norm(TRUE) > 1e-2 and np.linalg.norm(TRUE_KL) > 1e-2
    np.testing.assert_allclose(ascent(advantages), TRUE - beta * TRUE_KL, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize(
    "values", [np.zeros(TREE.size), np.full(TREE.size, 0.7), GUESS], ids=["0", ".7", "any"]
)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_GA9_lambda_one_gives_the_true_gradient_under_any_critic(beta: float, values: Array) -> None:
    found = with_critic(values, gae_lambda=1.0, beta=beta)
    np.testing.assert_allclose(found, TRUE - beta * TRUE_KL, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5])
def test_GA9_a_smaller_lambda_is_biased_unless_the_critic_is_right(gae_lambda: float) -> None:
    cosine, _ = compare(with_critic(GUESS, gae_lambda), TRUE)
    assert cosine < 0.99
    np.testing.assert_allclose(with_critic(true_values(), gae_lambda), TRUE, rtol=0.0, atol=1e-13)


# ---- what follows


@given(batch=ragged(), gamma=UNIT)
def test_TG1_value_equals_the_page(batch: Ragged, gamma: float) -> None:
    mask, (rewards,) = batch[0], drawn(batch, 1)
    page = lambda row: scalar("reward_to_go")(row, gamma)  # noqa: E731
    close(reward_to_go(rewards, mask, gamma=gamma), by_row(page, mask, rewards))
    assert torch.equal(
        reward_to_go(rewards, mask.long(), gamma=gamma), reward_to_go(rewards, mask, gamma=gamma)
    )


@given(batch=ragged())
def test_TG2_gamma_one_is_the_plain_sum_and_gamma_zero_the_reward(batch: Ragged) -> None:
    mask, (rewards,) = batch[0], drawn(batch, 1)
    filled = torch.where(mask, rewards, 0.0)
    sums = torch.where(mask, filled.flip(1).cumsum(1).flip(1), 0.0)
    close(reward_to_go(rewards, mask, gamma=1.0), sums, 1e-12)
    assert torch.equal(reward_to_go(rewards, mask, gamma=0.0), filled)


@given(batch=ragged())
def test_TG3_deleting_what_is_outside_the_mask_changes_nothing(batch: Ragged) -> None:
    check_deletion("reward_to_go", batch)


def test_TG3_a_tool_result_costs_no_discount_and_ends_nothing() -> None:
    rewards, mask = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([[1, 0, 0, 1]])
    assert reward_to_go(rewards, mask, gamma=0.5).tolist() == [[0.5, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize("junk", JUNK)
@given(batch=ragged())
def test_TG4_masked_slots_may_hold_anything(junk: float, batch: Ragged) -> None:
    check_junk("reward_to_go", batch, 0, junk)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(batch=ragged(), left=st.integers(0, 3), right=st.integers(0, 3), data=st.data())
def test_TG5_padding_and_row_order_change_nothing(
    name: str, batch: Ragged, left: int, right: int, data: st.DataObject
) -> None:
    check_padding(name, batch, left, right, data)


def test_TG6_no_gradient() -> None:
    found = reward_to_go(torch.ones(1, 2, requires_grad=True), torch.ones(1, 2), gamma=0.5)
    assert not found.requires_grad and found.tolist() == [[1.5, 1.0]]


# ---- generalised advantages


def schulman(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """Eq. 11 to 16 as the paper derives them: the exponentially weighted mean of the k-step estimators.

    Â^(k) = −V_t + r_t + … + γ^{k−1} r_{t+k−1} + γ^k V_{t+k}; from the end of the episode on all are the same.
    """
    r, v, result = np.asarray(rewards), np.append(values, 0.0), []
    for t in range(len(r)):
        steps = len(r) - t
        estimators = [
            -v[t] + np.sum(gamma ** np.arange(k) * r[t : t + k]) + gamma**k * v[t + k]
            for k in range(1, steps + 1)
        ]
        weights = (1.0 - lam) * lam ** np.arange(steps)
        weights[-1] = lam ** (steps - 1)
        result.append(float(weights @ np.array(estimators)))
    return result


@given(batch=ragged(), gamma=UNIT, gae_lambda=UNIT)
def test_GA1_value_equals_the_page_and_the_mean_of_k_step_estimators(
    batch: Ragged, gamma: float, gae_lambda: float
) -> None:
    mask, (rewards, values) = batch[0], drawn(batch, 2)
    found = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    for number, result in enumerate(found):
        page = lambda r, v, n=number: scalar("gae")(r, v, gamma, gae_lambda)[n]  # noqa: E731
        close(result, by_row(page, mask, rewards, values))
    close(found[0], by_row(lambda r, v: schulman(r, v, gamma, gae_lambda), mask, rewards, values))
    numbers = gae(rewards, values, mask.long(), gamma=gamma, gae_lambda=gae_lambda)
    assert torch.equal(torch.stack(numbers), torch.stack(found))


@given(batch=ragged(), gamma=UNIT)
def test_GA2_lambda_one_is_the_return_less_the_value(batch: Ragged, gamma: float) -> None:
    mask, (rewards, values) = batch[0], drawn(batch, 2)
    for discount in (gamma, 1.0):
        to_go = reward_to_go(rewards, mask, gamma=discount)
        advantages, returns = gae(rewards, values, mask, gamma=discount, gae_lambda=1.0)
        close(advantages, torch.where(mask, to_go - values, 0.0), 1e-12)
        close(returns, to_go, 1e-12)


@given(batch=ragged(), gamma=UNIT, gae_lambda=UNIT)
def test_GA3_lambda_zero_is_the_one_step_error(batch: Ragged, gamma: float, gae_lambda: float) -> None:
    mask, (rewards, values) = batch[0], drawn(batch, 2)

    def one_step(r: list[float], v: list[float]) -> list[float]:
        return [r[t] + gamma * ([*v, 0.0][t + 1]) - v[t] for t in range(len(r))]

    advantages, _ = gae(rewards, values, mask, gamma=gamma, gae_lambda=0.0)
    close(advantages, by_row(one_step, mask, rewards, values), 1e-12)
    myopic, _ = gae(rewards, values, mask, gamma=0.0, gae_lambda=gae_lambda)
    assert torch.equal(myopic, torch.where(mask, rewards - values, 0.0))


@given(batch=ragged(), gamma=UNIT, gae_lambda=UNIT)
def test_GA4_returns_are_advantages_plus_values(batch: Ragged, gamma: float, gae_lambda: float) -> None:
    mask, (rewards, values) = batch[0], drawn(batch, 2)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    assert torch.equal(returns, torch.where(mask, advantages + values, 0.0))


@given(batch=ragged())
def test_GA5_deleting_the_tool_tokens_changes_nothing_on_the_actions(batch: Ragged) -> None:
    check_deletion("gae", batch)


def test_GA5_the_next_value_is_that_of_the_next_action() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.875, 0.25]])
    advantages, _ = gae(rewards, values, torch.tensor([[1, 0, 1]]), gamma=1.0, gae_lambda=0.5)
    assert advantages.tolist() == [[-0.25 + 0.5 * 0.75, 0.0, 0.75]]


@pytest.mark.parametrize("junk", [*JUNK, 100.0])
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_GA6_nothing_outside_the_mask_is_read(soiled: int, junk: float, batch: Ragged) -> None:
    check_junk("gae", batch, soiled, junk)


@given(batch=ragged(), left=st.integers(0, 3), right=st.integers(0, 3), data=st.data())
def test_GA7_padding_and_row_order_change_nothing(
    batch: Ragged, left: int, right: int, data: st.DataObject
) -> None:
    check_padding("gae", batch, left, right, data)


def test_GA8_no_gradient() -> None:
    rewards, values = (torch.full((1, 2), x, requires_grad=True) for x in (1.0, 0.25))
    for found in gae(rewards, values, torch.ones(1, 2), gamma=0.5, gae_lambda=0.5):
        assert not found.requires_grad and found.min() > 0.5


# ---- the ramp


@given(
    lengths=st.lists(st.integers(0, 40000), min_size=1, max_size=9),
    max_tokens=st.integers(1, 30000),
    share=st.floats(0.0, 1.0),
)
def test_OV1_value_equals_the_page(lengths: list[int], max_tokens: int, share: float) -> None:
    cache = max(1, round(share * max_tokens))
    lengths += [max_tokens - cache, max_tokens - cache // 2, max_tokens, max_tokens + 1]
    found = overlong_penalty(torch.tensor(lengths), max_tokens=max_tokens, cache=cache)
    expected = [scalar("overlong_penalty")(length, max_tokens, cache) for length in lengths]
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("max_tokens", "cache"), [(200, 64), (7, 7), (10, 1)])
def test_OV2_it_never_rises_and_a_token_costs_at_most_one_part(max_tokens: int, cache: int) -> None:
    penalties = overlong_penalty(torch.arange(300), max_tokens=max_tokens, cache=cache)
    steps = penalties.double().diff()
    assert (steps <= 0.0).all() and steps.min() >= -1.0 / cache - 1e-7
    assert penalties[0] == 0.0 and penalties[max_tokens - cache] == 0.0
    assert (penalties[max_tokens:] == -1.0).all() and (penalties > -1.0).sum() == max_tokens


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([3.0]), "lengths must be whole numbers of tokens, got torch.float32"),
        (torch.tensor([True]), "lengths must be whole numbers of tokens, got torch.bool"),
        (torch.tensor([5, -1]), "lengths must be at least 0, got -1"),
        (torch.tensor([[3]]), r"lengths must have 1 dimension\(s\), got shape \(1, 1\)"),
    ],
)
def test_OV3_anything_but_a_count_of_tokens_is_refused(lengths: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlong_penalty(lengths, max_tokens=8, cache=4)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_OV4_lengths_of_any_integer_type_are_exact(dtype: torch.dtype) -> None:
    lengths = torch.tensor([0, 90, 100, 127], dtype=dtype)
    assert overlong_penalty(lengths, max_tokens=100, cache=20).tolist() == [0.0, -0.5, -1.0, -1.0]
    limit = 2**26 + 8
    found = overlong_penalty(torch.tensor([limit - 7, limit - 8]), max_tokens=limit, cache=8)
    assert found.tolist() == [-0.125, 0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1, got 0"),
        ({"max_tokens": 8.0}, "max_tokens must be a whole number of at least 1, got 8.0"),
        ({"cache": 0}, "cache must be a whole number of at least 1, got 0"),
        ({"cache": 9}, "cache must not exceed max_tokens 8, got 9"),
    ],
)
def test_overlong_penalty_refuses(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlong_penalty(torch.tensor([3]), **({"max_tokens": 8, "cache": 4} | changes))


# ---- what they share


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
@given(batch=ragged())
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype, batch: Ragged) -> None:
    if name == "kl_shaped_rewards":
        rewards, inputs = normal(batch[1], len(batch[0])), drawn(batch, 2)
        check_half(lambda *t: kl_shaped_rewards(*t, beta=0.3), [rewards, *inputs, batch[0]], dtype)
    else:
        check_half(FUNCTIONS[name], [*drawn(batch, TENSORS[name]), batch[0]], dtype)


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_extremes_are_finite(name: str, size: float) -> None:
    inputs = [torch.full((2, 3), size), torch.full((2, 3), -size)][: TENSORS[name]]
    assert FUNCTIONS[name](*inputs, torch.ones(2, 3)).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (3, 2)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_in_the_mask_gives_zeros(name: str, shape: tuple[int, int]) -> None:
    inputs = [torch.full(shape, math.nan)] * TENSORS[name]
    found = FUNCTIONS[name](*inputs, torch.zeros(shape, dtype=torch.bool))
    assert found.shape[-2:] == shape and not found.any()


ONES, OTHER = torch.ones(2, 3), torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reward_to_go(ONES, OTHER, gamma=1.0), "shapes must be equal"),
        (lambda: reward_to_go(ONES[0], ONES[0], gamma=1.0), r"mask must have 2 dimension\(s\)"),
        (lambda: reward_to_go(ONES, 2 * ONES, gamma=1.0), "mask must be bool or hold only 0 and 1"),
        (lambda: reward_to_go(ONES, ONES, gamma=1.01), r"gamma must lie in \[0, 1\], got 1.01"),
        (lambda: reward_to_go(ONES, ONES, gamma=math.nan), r"gamma must lie in \[0, 1\], got nan"),
        (lambda: gae(ONES, OTHER, ONES, gamma=1.0, gae_lambda=1.0), "shapes must be equal"),
        (lambda: gae(ONES, ONES, 2 * ONES, gamma=1.0, gae_lambda=1.0), "mask must be bool or hold only"),
        (lambda: gae(ONES[0], ONES[0], ONES[0], gamma=1.0, gae_lambda=1.0), "mask must have 2 dim"),
        (lambda: gae(ONES, ONES, ONES, gamma=-0.1, gae_lambda=1.0), r"gamma must lie in \[0, 1\], got -0.1"),
        (
            lambda: gae(ONES, ONES, ONES, gamma=1.0, gae_lambda=2.0),
            r"gae_lambda must lie in \[0, 1\], got 2.0",
        ),
        (lambda: kl_shaped_rewards(ONES[0], ONES, ONES, ONES, beta=1.0), r"rewards \(3,\), rows \(2,\)"),
        (lambda: kl_shaped_rewards(ONES[:, 0], ONES, OTHER, ONES, beta=1.0), "shapes must be equal"),
        (lambda: kl_shaped_rewards(ONES[:, 0], ONES, ONES, 2 * ONES, beta=1.0), "mask must be bool or hold"),
        (lambda: kl_shaped_rewards(ONES, *[ONES[0]] * 3, beta=1.0), r"logps must have 2 dimension\(s\)"),
        (lambda: kl_shaped_rewards(ONES[:, 0], ONES, ONES, ONES, beta=-0.1), r"beta must lie in \[0, inf\)"),
    ],
)
def test_wrong_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
