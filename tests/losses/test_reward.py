"""Pairs, rankings, attribute ratings, step labels, and the step scores as one number."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from nanopost.losses import (
    aggregate,
    aggregate_steps,
    attribute_loss,
    bradley_terry_loss,
    plackett_luce_loss,
    process_reward_loss,
    ranking_loss,
)
from tests.pages import scalar
from tests.properties import check_half, check_masked_slots, check_only_gradient, check_split, slope
from tests.ragged import JUNK, junk_outside, normal, ragged

Batch = tuple[Tensor, Generator]
Loss = Callable[..., Tensor]
HALVES = (torch.bfloat16, torch.float16)
MODES = ("sum", "product", "min", "last")
RANKINGS = {"ranking_loss": ranking_loss, "plackett_luce_loss": plackett_luce_loss}
by_ranking = pytest.mark.parametrize("name", RANKINGS)


@st.composite
def filled_rows(draw: st.DrawFn, least: int) -> Batch:
    """A ragged mask, every row of which keeps at least this many slots, in columns drawn at random."""
    mask, generator = draw(ragged())
    mask = torch.cat([torch.ones(len(mask), least, dtype=torch.bool), mask], dim=1)
    return mask[:, torch.randperm(mask.shape[1], generator=generator)], generator


def kept(tensor: Tensor, mask: Tensor) -> list[list[float]]:
    """What the mask keeps of every row, as lists of different length."""
    return [row[keep].tolist() for row, keep in zip(tensor, mask, strict=True)]


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def owners(rows: int, generator: Generator) -> Tensor:
    """To which of three micro-batches each row goes."""
    return torch.randint(0, 3, (rows,), generator=generator)


def check_rows(loss: Loss, values: Tensor, mask: Tensor, generator: Generator, junk: float) -> None:
    """For a loss (B, K) -> (B,): junk outside the mask, more padding and other rows change no bit."""
    weights = normal(generator, len(mask))

    def run(values: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        leaf = values.clone().requires_grad_()
        found = loss(leaf, mask)
        return found.detach(), torch.autograd.grad((found * weights).sum(), leaf)[0]

    value, gradient = run(values, mask, weights)
    assert value.shape == (len(mask),) and value.isfinite().all() and gradient.isfinite().all()
    soiled, soiled_gradient = run(junk_outside(values, mask, junk), mask, weights)
    assert torch.equal(soiled, value) and torch.equal(soiled_gradient, gradient)
    assert not gradient[~mask].any() and gradient[mask].any()
    wide = torch.nn.functional.pad(values, (2, 3), value=junk)
    wide_mask = torch.nn.functional.pad(mask, (2, 3))
    padded, padded_gradient = run(wide, wide_mask, weights)
    torch.testing.assert_close(padded, value, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(padded_gradient[wide_mask], gradient[mask], rtol=1e-14, atol=1e-14)
    order = torch.randperm(len(mask), generator=generator)
    shuffled, _ = run(values[order], mask[order], weights[order])
    torch.testing.assert_close(shuffled, value[order], rtol=1e-14, atol=1e-14)
    alone = torch.cat([loss(values[row : row + 1], mask[row : row + 1]) for row in range(len(mask))])
    torch.testing.assert_close(alone, value, rtol=1e-14, atol=1e-14)


# ---- pairs


@given(seed=st.integers(0, 2**31), margin=st.floats(-2.0, 3.0))
def test_BT1_value_equals_the_page(seed: int, margin: float) -> None:
    chosen, rejected = normal(torch.Generator().manual_seed(seed), 2, 9, scale=8.0)
    page = scalar("bradley_terry_loss")
    expected = [page(c, r, margin) for c, r in zip(chosen.tolist(), rejected.tolist(), strict=True)]
    found = bradley_terry_loss(chosen, rejected, margin=margin)
    torch.testing.assert_close(found, column(expected), rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**31))
def test_BT2_the_loss_is_a_log_probability(seed: int) -> None:
    chosen, rejected = normal(torch.Generator().manual_seed(seed), 2, 6, scale=4.0)
    first, second = bradley_terry_loss(chosen, rejected), bradley_terry_loss(rejected, chosen)
    odds = chosen.exp() / (chosen.exp() + rejected.exp())
    torch.testing.assert_close((-first).exp(), odds, rtol=1e-12, atol=0.0)
    torch.testing.assert_close((-first).exp() + (-second).exp(), torch.ones_like(chosen))


@pytest.mark.parametrize("reward", [-1e4, -0.3, 0.0, 7.0, 1e4])
def test_BT3_equal_rewards_give_log_2(reward: float) -> None:
    rewards = column([reward])
    assert bradley_terry_loss(rewards, rewards).item() == pytest.approx(math.log(2), rel=1e-15)


@given(seed=st.integers(0, 2**31), margin=st.floats(-2.0, 3.0))
def test_BT4_gradients_in_closed_form(seed: int, margin: float) -> None:
    inputs = [t.requires_grad_() for t in normal(torch.Generator().manual_seed(seed), 2, 5, scale=3.0)]
    gradients = torch.autograd.grad(bradley_terry_loss(*inputs, margin=margin).sum(), inputs)
    losing = 1.0 / (1.0 + (inputs[0] - inputs[1] - margin).detach().exp())
    torch.testing.assert_close(gradients[0], -losing, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradients[1], losing, rtol=1e-12, atol=1e-15)
    check_only_gradient(lambda c, r: bradley_terry_loss(c, r, margin=margin), inputs, to=[0, 1])


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_BT5_extreme_differences_are_finite(dtype: torch.dtype) -> None:
    chosen = torch.tensor([1e4, -1e4, 1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 1e4, 1e4], dtype=dtype)
    loss = bradley_terry_loss(chosen, rejected, margin=1.0)
    gap = 2.0 * chosen[0].item()  # 1e4 as the dtype holds it
    assert loss.tolist() == pytest.approx([0.0, gap + 1.0, math.log1p(math.e)], rel=1e-6)
    assert slope(loss, chosen).tolist() == pytest.approx([0.0, -1.0, -1.0 / (1.0 + math.exp(-1.0))], rel=4e-3)


def test_BT5_small_losses_keep_their_precision() -> None:
    found = bradley_terry_loss(column([25.0, 60.0]), column([0.0, 0.0]))
    assert found.tolist() == pytest.approx([math.exp(-25.0), math.exp(-60.0)], rel=1e-10, abs=0.0)


@given(seed=st.integers(0, 2**31), margin=st.floats(0.1, 3.0), shift=st.floats(-5.0, 5.0))
def test_BT6_only_the_difference_counts_and_the_margin_is_part_of_it(
    seed: int, margin: float, shift: float
) -> None:
    chosen, rejected = normal(torch.Generator().manual_seed(seed), 2, 5)
    found = bradley_terry_loss(chosen, rejected, margin=margin)
    shifted = bradley_terry_loss(chosen + shift, rejected + shift, margin=margin)
    torch.testing.assert_close(shifted, found, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(bradley_terry_loss(chosen - margin, rejected), found, rtol=1e-13, atol=0.0)
    assert (found > bradley_terry_loss(chosen, rejected)).all()


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_BT7_masked_pairs_may_hold_anything(soiled: int, junk: float, batch: Batch) -> None:
    mask, generator = batch

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return bradley_terry_loss(chosen.flatten(), rejected.flatten(), margin=0.3).reshape(mask.shape)

    check_masked_slots(loss, list(normal(generator, 2, *mask.shape)), mask, soiled, junk)


@given(seed=st.integers(0, 2**31))
def test_BT8_pairs_are_independent_and_halves_are_computed_in_float32(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = list(normal(generator, 2, 7, scale=2.0))
    for leaf in (0, 1):
        check_split(lambda c, r: bradley_terry_loss(c, r, margin=0.7), inputs, owners(7, generator), leaf)
    order = torch.randperm(7, generator=generator)
    shuffled = bradley_terry_loss(inputs[0][order], inputs[1][order])
    assert torch.equal(shuffled, bradley_terry_loss(*inputs)[order])
    for dtype in HALVES:
        check_half(lambda c, r: bradley_terry_loss(c, r, margin=0.7), inputs, dtype)


# ---- rankings


@given(batch=filled_rows(2))
def test_RL1_value_equals_the_page(batch: Batch) -> None:
    check_page("ranking_loss", batch)


@given(batch=filled_rows(2))
def test_PL1_value_equals_the_page(batch: Batch) -> None:
    check_page("plackett_luce_loss", batch)


def check_page(name: str, batch: Batch) -> None:
    mask, generator = batch
    rewards = normal(generator, *mask.shape, scale=4.0)
    expected = [scalar(name)(row) for row in kept(rewards, mask)]
    torch.testing.assert_close(RANKINGS[name](rewards, mask), column(expected), rtol=1e-9, atol=1e-9)
    soiled = RANKINGS[name](junk_outside(rewards, mask, torch.nan), mask.long())
    torch.testing.assert_close(soiled, column(expected), rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**31))
def test_PL2_the_probabilities_of_all_orders_sum_to_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for size in range(2, 6):
        rewards = normal(generator, size, scale=3.0)
        orders = torch.tensor(list(itertools.permutations(range(size))))
        hole = torch.full((len(orders), 1), torch.nan, dtype=torch.float64)
        ranked = torch.cat([rewards[orders[:, :1]], hole, rewards[orders[:, 1:]]], dim=1)
        total = (-plackett_luce_loss(ranked, ~ranked.isnan())).exp().sum().item()
        assert total == pytest.approx(1.0, abs=1e-12) and len(orders) == math.factorial(size)


@given(batch=filled_rows(2))
def test_RL2_two_candidates_are_bradley_terry(batch: Batch) -> None:
    check_two_candidates(ranking_loss, batch)


@given(batch=filled_rows(2))
def test_PL3_two_candidates_are_bradley_terry(batch: Batch) -> None:
    check_two_candidates(plackett_luce_loss, batch)


def check_two_candidates(loss: Loss, batch: Batch) -> None:
    mask, generator = batch
    pairs = mask & (mask.cumsum(dim=1) <= 2)
    rewards = normal(generator, *mask.shape, scale=3.0)
    found = loss(junk_outside(rewards, pairs, torch.nan), pairs)
    chosen, rejected = rewards[pairs].reshape(-1, 2).unbind(1)
    torch.testing.assert_close(found, bradley_terry_loss(chosen, rejected), rtol=1e-12, atol=1e-15)


@given(batch=filled_rows(2), level=st.floats(-1e4, 1e4))
def test_RL2_equal_rewards_give_log_2(batch: Batch, level: float) -> None:
    found = ranking_loss(torch.full(batch[0].shape, level, dtype=torch.float64), batch[0])
    torch.testing.assert_close(found, torch.full_like(found, math.log(2)), rtol=1e-13, atol=0.0)


@given(batch=filled_rows(2), level=st.floats(-1e4, 1e4))
def test_PL3_equal_rewards_give_log_of_k_factorial(batch: Batch, level: float) -> None:
    mask, _ = batch
    found = plackett_luce_loss(torch.full(mask.shape, level, dtype=torch.float64), mask)
    expected = column([math.log(math.factorial(int(row.sum()))) for row in mask])
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0)


@by_ranking
@given(batch=filled_rows(2))
def test_RL3_a_constant_for_a_prompt_changes_nothing(name: str, batch: Batch) -> None:
    mask, generator = batch
    rewards, shift = normal(generator, *mask.shape), normal(generator, len(mask), 1, scale=10.0)
    found = RANKINGS[name](rewards, mask)
    torch.testing.assert_close(RANKINGS[name](rewards + shift, mask), found, rtol=1e-12, atol=1e-13)


@given(batch=filled_rows(2))
def test_RL4_gradient_in_closed_form(batch: Batch) -> None:
    def closed(rewards: list[float]) -> list[float]:
        size = len(rewards)
        gradient = [0.0] * size
        for i, j in itertools.combinations(range(size), 2):
            push = 1.0 / (1.0 + math.exp(rewards[i] - rewards[j])) / (size * (size - 1) / 2)
            gradient[i], gradient[j] = gradient[i] - push, gradient[j] + push
        return gradient

    check_gradient(ranking_loss, closed, batch)


@given(batch=filled_rows(2))
def test_PL4_gradient_in_closed_form(batch: Batch) -> None:
    def closed(rewards: list[float]) -> list[float]:
        powers = [math.exp(reward) for reward in rewards]
        left = [sum(powers[k:]) for k in range(len(powers))]
        return [sum(power / left[k] for k in range(i + 1)) - 1.0 for i, power in enumerate(powers)]

    check_gradient(plackett_luce_loss, closed, batch)


def check_gradient(loss: Loss, closed: Callable[[list[float]], list[float]], batch: Batch) -> None:
    mask, generator = batch
    rewards = normal(generator, *mask.shape, scale=2.0).requires_grad_()
    gradient = slope(loss(rewards, mask), rewards)
    expected = [number for row in kept(rewards.detach(), mask) for number in closed(row)]
    torch.testing.assert_close(gradient[mask], column(expected), rtol=1e-11, atol=1e-13)
    sums = gradient.sum(dim=1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("junk", JUNK)
@given(batch=filled_rows(2))
def test_RL5_masked_candidates_may_hold_anything(junk: float, batch: Batch) -> None:
    check_rows(ranking_loss, normal(batch[1], *batch[0].shape), *batch, junk)


@pytest.mark.parametrize("junk", JUNK)
@given(batch=filled_rows(2))
def test_PL5_masked_candidates_may_hold_anything(junk: float, batch: Batch) -> None:
    check_rows(plackett_luce_loss, normal(batch[1], *batch[0].shape), *batch, junk)


@given(batch=filled_rows(2))
def test_RL6_prompts_are_independent(batch: Batch) -> None:
    check_prompts(ranking_loss, batch)


@given(batch=filled_rows(2))
def test_PL6_prompts_are_independent(batch: Batch) -> None:
    check_prompts(plackett_luce_loss, batch)


def check_prompts(loss: Loss, batch: Batch) -> None:
    mask, generator = batch
    inputs = [normal(generator, *mask.shape, scale=2.0), mask]
    check_rows(loss, *inputs, generator, 0.0)
    check_split(loss, inputs, owners(len(mask), generator))
    for dtype in HALVES:
        check_half(loss, inputs, dtype)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_RL7_extreme_rewards_are_finite(dtype: torch.dtype) -> None:
    check_extremes(ranking_loss, dtype, lambda size: [size / 3, math.log(2) / 3], share=3.0)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_PL7_extreme_rewards_are_finite(dtype: torch.dtype) -> None:
    check_extremes(plackett_luce_loss, dtype, lambda size: [size, math.log(2)], share=1.0)


def check_extremes(
    loss: Loss, dtype: torch.dtype, exact: Callable[[float], list[float]], *, share: float
) -> None:
    """1e4, −1e4, 0 with a hole: one pair is wrong by 1e4. 1e4, 1e4, −1e4: one pair is even."""
    rewards = torch.tensor([[1e4, torch.nan, -1e4, 0.0], [1e4, 1e4, -1e4, 1e4]], dtype=dtype)
    mask = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0]])
    rewards.requires_grad_()
    found = loss(rewards, mask)
    assert found.tolist() == pytest.approx(exact(rewards[0, 0].item()), rel=1e-6)
    gradient = slope(found, rewards)
    assert gradient[0].tolist() == pytest.approx([0.0, 0.0, -1.0 / share, 1.0 / share], rel=4e-3)
    assert gradient[1].tolist() == pytest.approx([-0.5 / share, 0.5 / share, 0.0, 0.0], rel=4e-3)


@by_ranking
def test_PL7_a_common_level_costs_no_precision(name: str) -> None:
    rewards, mask = torch.tensor([[2.0, 1.0, -1.0]]), torch.ones(1, 3)
    assert torch.equal(RANKINGS[name](rewards + 1e6, mask), RANKINGS[name](rewards, mask))


@pytest.mark.parametrize("row", [[False, False, False], [False, True, False]])
def test_RL8_fewer_than_two_candidates_are_refused(row: list[bool]) -> None:
    check_too_few(ranking_loss, row)


@pytest.mark.parametrize("row", [[False, False, False], [False, True, False]])
def test_PL8_fewer_than_two_candidates_are_refused(row: list[bool]) -> None:
    check_too_few(plackett_luce_loss, row)


def check_too_few(loss: Loss, row: list[bool]) -> None:
    with pytest.raises(ValueError, match=rf"mask must keep at least 2 .* got {sum(row)} in row 1"):
        loss(torch.zeros(2, 3), torch.tensor([[True, True, False], row]))


# ---- attributes


def ratings_of(mask: Tensor, generator: Generator) -> Tensor:
    """Whole ratings from 0 to 4, as they are collected."""
    return torch.randint(0, 5, mask.shape, generator=generator).double()


@given(batch=ragged())
def test_AT1_value_equals_the_page_and_is_zero_elsewhere(batch: Batch) -> None:
    mask, generator = batch
    predictions, ratings = normal(generator, *mask.shape, scale=3.0), ratings_of(mask, generator)
    found = attribute_loss(predictions, ratings, mask)
    rated = zip(predictions[mask].tolist(), ratings[mask].tolist(), strict=True)
    expected = column([scalar("attribute_loss")(*each) for each in rated])
    torch.testing.assert_close(found[mask], expected, rtol=1e-9, atol=1e-9)
    assert found.shape == mask.shape and not found[~mask].any()
    assert torch.equal(attribute_loss(predictions, ratings.long(), mask.long()), found)


@pytest.mark.parametrize("junk", [*JUNK, -100.0])
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_AT2_missing_ratings_may_hold_anything(soiled: int, junk: float, batch: Batch) -> None:
    mask, generator = batch
    inputs = [normal(generator, *mask.shape, scale=3.0), ratings_of(mask, generator)]
    check_masked_slots(lambda p, y: attribute_loss(p, y, mask), inputs, mask, soiled, junk)
    inputs[soiled] = junk_outside(inputs[soiled], mask, junk)
    assert not attribute_loss(*inputs, mask)[~mask].any()


def test_AT3_a_rating_of_zero_is_not_a_missing_one() -> None:
    predictions = torch.tensor([[3.0, 3.0]], requires_grad=True)
    loss = attribute_loss(predictions, torch.tensor([[0.0, 0.0]]), torch.tensor([[True, False]]))
    assert loss.tolist() == [[9.0, 0.0]] and slope(loss, predictions).tolist() == [[6.0, 0.0]]


@given(batch=ragged())
def test_AT4_gradient_in_closed_form_and_none_to_the_ratings(batch: Batch) -> None:
    mask, generator = batch
    predictions, ratings = normal(generator, *mask.shape, scale=3.0), ratings_of(mask, generator)
    check_only_gradient(lambda p, y: attribute_loss(p, y, mask), [predictions, ratings], to=[0])
    predictions.requires_grad_()
    gradient = slope(attribute_loss(predictions, ratings, mask), predictions)
    expected = torch.where(mask, 2.0 * (predictions.detach() - ratings), 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("rating", [-1.0, 4.5, 5.0, -100.0, float("nan"), float("inf")])
def test_AT5_present_ratings_lie_in_0_to_4(rating: float) -> None:
    ratings, mask = torch.tensor([[4.0, rating], [0.0, 2.0]]), torch.ones(2, 2, dtype=torch.bool)
    message = rf"ratings must lie in \[0, 4\] where the mask is 1, got {rating}"
    with pytest.raises(ValueError, match=message):
        attribute_loss(torch.zeros(2, 2), ratings, mask)
    mask[0, 1] = False
    assert attribute_loss(torch.zeros(2, 2), ratings, mask).tolist() == [[16.0, 0.0], [0.0, 4.0]]


@given(batch=ragged())
def test_AT6_any_split_gives_the_mean_over_the_rated_slots(batch: Batch) -> None:
    mask, generator = batch
    inputs = [normal(generator, *mask.shape, scale=3.0), ratings_of(mask, generator), mask]

    def step(predictions: Tensor, ratings: Tensor, some: Tensor) -> Tensor:
        losses = attribute_loss(predictions, ratings, some)
        return aggregate(losses, some, mode="token_mean", denom=float(mask.sum()))

    rated = zip(inputs[0][mask].tolist(), inputs[1][mask].tolist(), strict=True)
    errors = [scalar("attribute_loss")(*each) for each in rated]
    assert step(*inputs).item() == pytest.approx(sum(errors) / len(errors), rel=1e-12)
    check_split(step, inputs, owners(len(mask), generator))


def test_AT6_nothing_rated_adds_nothing() -> None:
    predictions = torch.full((2, 5), torch.nan, requires_grad=True)
    loss = attribute_loss(predictions, torch.full((2, 5), torch.nan), torch.zeros(2, 5))
    assert not loss.any() and not slope(loss, predictions).any()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_AT7_extremes_and_halves(dtype: torch.dtype) -> None:
    predictions = torch.tensor([[1e4, -1e4]], dtype=dtype, requires_grad=True)
    loss = attribute_loss(predictions, torch.tensor([[4, 0]]), torch.ones(1, 2))
    size = predictions[0, 0].item()
    assert loss[0].tolist() == pytest.approx([(size - 4.0) ** 2, size**2], rel=1e-6)
    assert slope(loss, predictions)[0].tolist() == pytest.approx([2 * (size - 4.0), -2 * size], rel=4e-3)
    if dtype in HALVES:
        generator = torch.Generator().manual_seed(3)
        mask = torch.tensor([[True, False, True], [True, True, True]])
        inputs = [normal(generator, 2, 3), ratings_of(mask, generator), mask]
        check_half(attribute_loss, inputs, dtype)


# ---- steps


def labels_of(mask: Tensor, generator: Generator) -> Tensor:
    return torch.randint(0, 2, mask.shape, generator=generator).double()


@given(batch=ragged())
def test_PR1_value_equals_the_page_and_is_zero_elsewhere(batch: Batch) -> None:
    mask, generator = batch
    logits, labels = normal(generator, *mask.shape, scale=8.0), labels_of(mask, generator)
    found = process_reward_loss(logits, labels, mask)
    steps = zip(logits[mask].tolist(), labels[mask].tolist(), strict=True)
    expected = column([scalar("process_reward_loss")(*each) for each in steps])
    torch.testing.assert_close(found[mask], expected, rtol=1e-9, atol=1e-9)
    assert found.shape == mask.shape and not found[~mask].any()


@pytest.mark.parametrize("junk", [*JUNK, -100.0])
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_PR2_outside_the_mask_anything_may_stand(soiled: int, junk: float, batch: Batch) -> None:
    mask, generator = batch
    inputs = [normal(generator, *mask.shape, scale=3.0), labels_of(mask, generator)]
    check_masked_slots(lambda z, c: process_reward_loss(z, c, mask), inputs, mask, soiled, junk)
    inputs[soiled] = junk_outside(inputs[soiled], mask, junk)
    assert not process_reward_loss(*inputs, mask)[~mask].any()


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32, torch.float64])
@given(batch=ragged())
def test_PR3_gradient_in_closed_form_and_none_to_the_labels(kind: torch.dtype, batch: Batch) -> None:
    mask, generator = batch
    logits, labels = normal(generator, *mask.shape, scale=3.0), labels_of(mask, generator)
    check_only_gradient(lambda z, c: process_reward_loss(z, c, mask), [logits, labels.to(kind)], to=[0])
    logits.requires_grad_()
    gradient = slope(process_reward_loss(logits, labels.to(kind), mask), logits)
    expected = torch.where(mask, 1.0 / (1.0 + (-logits.detach()).exp()) - labels, 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_PR4_extreme_logits_are_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4, -1e4]], dtype=dtype, requires_grad=True)
    loss = process_reward_loss(logits, torch.tensor([[1, 1, 0, 0]]), torch.ones(1, 4))
    size = logits[0, 0].item()
    assert loss[0].tolist() == pytest.approx([0.0, size, size, 0.0], rel=1e-7)
    assert slope(loss, logits)[0].tolist() == [0.0, -1.0, 1.0, 0.0]


@given(batch=ragged())
def test_PR5_undecided_costs_log_2_and_labels_mirror(batch: Batch) -> None:
    mask, generator = batch
    logits, labels = normal(generator, *mask.shape, scale=3.0), labels_of(mask, generator)
    undecided = process_reward_loss(torch.zeros_like(logits), labels, mask)[mask]
    torch.testing.assert_close(undecided, torch.full_like(undecided, math.log(2)), rtol=1e-14, atol=0.0)
    mirrored = process_reward_loss(-logits, 1.0 - labels, mask)
    assert torch.equal(mirrored, process_reward_loss(logits, labels, mask))


@given(batch=ragged())
def test_PR6_any_split_gives_the_mean_over_the_labelled_steps(batch: Batch) -> None:
    mask, generator = batch
    inputs = [normal(generator, *mask.shape, scale=2.0), labels_of(mask, generator), mask]

    def step(logits: Tensor, labels: Tensor, some: Tensor) -> Tensor:
        losses = process_reward_loss(logits, labels, some)
        return aggregate(losses, some, mode="token_mean", denom=float(mask.sum()))

    labelled = zip(inputs[0][mask].tolist(), inputs[1][mask].tolist(), strict=True)
    losses = [scalar("process_reward_loss")(*each) for each in labelled]
    assert step(*inputs).item() == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    check_split(step, inputs, owners(len(mask), generator))
    for dtype in HALVES:
        check_half(process_reward_loss, inputs, dtype)


@pytest.mark.parametrize("label", [-100.0, 0.5, 2.0, -1.0, float("nan")])
def test_PR7_a_present_label_is_zero_or_one(label: float) -> None:
    labels, mask = torch.tensor([[1.0, label]]), torch.tensor([[1, 1]])
    with pytest.raises(ValueError, match=rf"labels where the mask is 1 .*0 and 1, got the value {label}"):
        process_reward_loss(torch.zeros(1, 2), labels, mask)
    assert process_reward_loss(torch.zeros(1, 2), labels, torch.tensor([[1, 0]])).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@given(batch=filled_rows(1))
def test_AS1_value_equals_the_page(mode: str, batch: Batch) -> None:
    mask, generator = batch
    scores = normal(generator, *mask.shape, scale=1.5)
    expected = [scalar("aggregate_steps")(row, mode) for row in kept(scores, mask)]
    found = aggregate_steps(scores, mask, mode=mode)
    torch.testing.assert_close(found, column(expected), rtol=1e-9, atol=1e-9)
    assert torch.equal(aggregate_steps(scores, mask.double(), mode=mode), found)


@pytest.mark.parametrize("junk", [*JUNK, 0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
@given(batch=filled_rows(1))
def test_AS2_outside_the_mask_anything_may_stand(mode: str, junk: float, batch: Batch) -> None:
    mask, generator = batch
    scores = normal(generator, *mask.shape)
    check_rows(lambda r, m: aggregate_steps(r, m, mode=mode), scores, mask, generator, junk)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_AS3_the_last_step_is_not_the_last_column(place: int, padding: int) -> None:
    steps = torch.zeros(3, dtype=torch.bool).index_fill(0, torch.tensor([0, place]), True)
    mask = torch.nn.functional.pad(steps, (0, padding)).unsqueeze(0)
    scores = torch.arange(1.0, 4.0 + padding).unsqueeze(0).requires_grad_()
    last = aggregate_steps(scores, mask, mode="last")
    assert last.item() == place + 1.0
    assert slope(last, scores).nonzero().tolist() == [[0, place]]


@given(batch=filled_rows(1), zeros=st.integers(0, 3))
def test_AS4_gradient_of_the_product_with_zeros_among_the_scores(batch: Batch, zeros: int) -> None:
    mask, generator = batch
    scores = normal(generator, *mask.shape)
    hit = torch.randint(0, mask.numel(), (zeros,), generator=generator)
    scores.view(-1)[hit] = 0.0
    rows = kept(scores, mask)
    scores.requires_grad_()
    gradient = slope(aggregate_steps(scores, mask, mode="product"), scores)
    others = [math.prod(row[:i] + row[i + 1 :]) for row in rows for i in range(len(row))]
    torch.testing.assert_close(gradient[mask], column(others), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ties", [1, 2, 3])
def test_AS5_ties_of_the_minimum_share_its_gradient(ties: int) -> None:
    scores = torch.tensor([[0.2] * ties + [0.7, 0.1]], requires_grad=True)
    mask = torch.tensor([[1] * (ties + 1) + [0]])
    gradient = slope(aggregate_steps(scores, mask, mode="min"), scores)
    assert gradient[0].tolist() == pytest.approx([1.0 / ties] * ties + [0.0, 0.0])


@pytest.mark.parametrize("mode", MODES)
def test_AS6_a_row_without_a_step_is_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=r"mask must keep at least 1 in every row, got 0 in row 2"):
        aggregate_steps(torch.ones(3, 2), torch.tensor([[1, 1], [0, 1], [0, 0]]), mode=mode)


@pytest.mark.parametrize("mode", MODES)
@given(batch=filled_rows(1))
def test_AS7_one_step_is_its_own_score_and_order_matters_to_the_last_alone(mode: str, batch: Batch) -> None:
    mask, generator = batch
    scores = normal(generator, *mask.shape)
    single = mask & (mask.cumsum(dim=1) == 1)
    assert torch.equal(aggregate_steps(scores, single, mode=mode), scores[single])
    order = torch.randperm(mask.shape[1], generator=generator)
    moved = aggregate_steps(scores[:, order], mask[:, order], mode=mode)
    if mode == "last":
        expected = [row[-1] for row in kept(scores[:, order], mask[:, order])]
        assert moved.tolist() == expected
    else:
        here = aggregate_steps(scores, mask, mode=mode)
        torch.testing.assert_close(moved, here, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
@given(batch=filled_rows(1))
def test_AS8_rows_are_independent_and_halves_are_computed_in_float32(mode: str, batch: Batch) -> None:
    mask, generator = batch
    inputs = [normal(generator, *mask.shape), mask]
    check_split(lambda r, m: aggregate_steps(r, m, mode=mode), inputs, owners(len(mask), generator))
    for dtype in HALVES:
        check_half(lambda r, m: aggregate_steps(r, m, mode=mode), inputs, dtype)
    extreme = torch.tensor([[1e4, -1e4]], requires_grad=True)
    found = aggregate_steps(extreme, torch.ones(1, 2), mode=mode)
    assert found.item() == {"sum": 0.0, "product": -1e8, "min": -1e4, "last": -1e4}[mode]
    assert slope(found, extreme).isfinite().all()


@given(batch=filled_rows(2))
def test_gradcheck(batch: Batch) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape).requires_grad_()
    labels, ratings = labels_of(mask, generator), ratings_of(mask, generator)
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda r: ranking_loss(r, mask),
        lambda r: plackett_luce_loss(r, mask),
        lambda r: attribute_loss(r, ratings, mask),
        lambda r: process_reward_loss(r, labels, mask),
        lambda r: aggregate_steps(r, mask, mode="product"),
        lambda r: aggregate_steps(r, mask, mode="last"),
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, values)


ONES, PAIR = torch.ones(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bradley_terry_loss(PAIR, torch.ones(1)),
            r"chosen_rewards \(2,\), rejected_rewards \(1,\)",
        ),
        (
            lambda: bradley_terry_loss(ONES, ONES),
            r"chosen_rewards must have 1 dimension\(s\), got shape \(2, 3\)",
        ),
        (
            lambda: bradley_terry_loss(PAIR, PAIR.long()),
            r"rejected_rewards must be floating point, got torch.int64",
        ),
        (lambda: bradley_terry_loss(PAIR, PAIR, margin=math.inf), r"margin must be finite, got inf"),
        (lambda: ranking_loss(ONES, ONES[:1]), r"rewards \(2, 3\), mask \(1, 3\)"),
        (lambda: ranking_loss(ONES.long(), ONES), r"rewards must be floating point, got torch.int64"),
        (lambda: ranking_loss(PAIR, PAIR), r"mask must have 2 dimension\(s\), got shape \(2,\)"),
        (
            lambda: ranking_loss(ONES, 0.5 * ONES),
            r"mask must be bool or hold only 0 and 1, got the value 0.5",
        ),
        (lambda: plackett_luce_loss(ONES, ONES[:, :2]), r"rewards \(2, 3\), mask \(2, 2\)"),
        (
            lambda: attribute_loss(ONES, ONES[:1], ONES),
            r"predictions \(2, 3\), ratings \(1, 3\), mask \(2, 3\)",
        ),
        (lambda: attribute_loss(ONES.long(), ONES, ONES), r"predictions must be floating point"),
        (lambda: attribute_loss(PAIR, PAIR, PAIR), r"mask must have 2 dimension\(s\), got shape \(2,\)"),
        (
            lambda: process_reward_loss(ONES, ONES, ONES[:, :1]),
            r"logits \(2, 3\), labels \(2, 3\), mask \(2, 1\)",
        ),
        (lambda: process_reward_loss(ONES.long(), ONES, ONES), r"logits must be floating point"),
        (lambda: process_reward_loss(PAIR, PAIR, PAIR), r"mask must have 2 dimension\(s\), got shape \(2,\)"),
        (lambda: aggregate_steps(ONES, ONES[:1], mode="sum"), r"step_rewards \(2, 3\), mask \(1, 3\)"),
        (lambda: aggregate_steps(ONES.long(), ONES, mode="sum"), r"step_rewards must be floating point"),
        (
            lambda: aggregate_steps(ONES, ONES, mode="mean"),
            r"mode must be one of 'sum', 'product', 'min', 'last', got 'mean'",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
