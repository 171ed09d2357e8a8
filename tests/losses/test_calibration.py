"""Elo points, win fractions, and accuracy by the size of a reward difference."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanopost.losses import bradley_terry_loss, calibration, elo_from_reward, win_fraction
from tests.pages import scalar
from tests.properties import check_half, slope
from tests.ragged import normal

INF = math.inf
EDGES = st.sampled_from([(0.0, INF), (0.0, 0.5, 1.0, INF), (0.0, 0.25, 3.0, 3.5, 40.0)])
DIFFERENCES = st.lists(
    st.sampled_from([0.0, 0.5, -0.5, 1.0, -3.0]) | st.floats(-30.0, 30.0), min_size=1, max_size=12
)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairs(differences: list[float]) -> tuple[Tensor, Tensor]:
    """Rewards with exactly these differences."""
    return column(differences), torch.zeros(len(differences), dtype=torch.float64)


def by_bin(sums: tuple[Tensor, Tensor, Tensor]) -> list[list[float]]:
    return torch.stack(sums, dim=1).tolist()


# ---- Elo


@given(seed=st.integers(0, 2**31))
def test_EL1_value_equals_the_page(seed: int) -> None:
    differences = normal(torch.Generator().manual_seed(seed), 6, scale=20.0)
    expected = column([scalar("elo_from_reward")(each) for each in differences.tolist()])
    torch.testing.assert_close(elo_from_reward(differences), expected, rtol=1e-13, atol=0.0)
    for dtype in (torch.bfloat16, torch.float16):
        found = elo_from_reward(differences.to(dtype))
        exact = elo_from_reward(differences.to(dtype).double())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0.0)


@given(seed=st.integers(0, 2**31))
def test_EL2_linear_and_odd(seed: int) -> None:
    one, two = normal(torch.Generator().manual_seed(seed), 2, 6)
    both = elo_from_reward(one) + elo_from_reward(two)
    torch.testing.assert_close(elo_from_reward(one + two), both, rtol=1e-12, atol=1e-12)
    assert torch.equal(elo_from_reward(-one), -elo_from_reward(one))


@pytest.mark.parametrize("powers", [-2, -1, 0, 1, 3])
def test_EL3_odds_of_ten_to_one_are_400_points(powers: int) -> None:
    found = elo_from_reward(column([math.log(10.0**powers)])).item()
    assert found == pytest.approx(400.0 * powers, abs=1e-12 * 400)


@given(difference=st.floats(-40.0, 40.0))
def test_EL4_the_three_ways_to_a_probability_agree(difference: float) -> None:
    exact = 1.0 / (1.0 + math.exp(-difference))
    reward = column([difference])
    assert win_fraction(elo_from_reward(reward)).item() == pytest.approx(exact, rel=0.0, abs=1e-15)
    from_loss = (-bradley_terry_loss(reward, torch.zeros_like(reward))).exp().item()
    assert from_loss == pytest.approx(exact, rel=0.0, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_EL5_gradient_and_extremes(dtype: torch.dtype) -> None:
    difference = torch.tensor([[1e4, -1e4], [0.0, 2.0]], dtype=dtype, requires_grad=True)
    found = elo_from_reward(difference)
    assert found.shape == (2, 2) and found.isfinite().all()
    gradient = slope(found, difference)
    exact = torch.full_like(gradient, 400.0 / math.log(10.0))
    torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=0.0)


# ---- win fraction


@given(seed=st.integers(0, 2**31))
def test_WF1_value_equals_the_page(seed: int) -> None:
    differences = normal(torch.Generator().manual_seed(seed), 6, scale=600.0)
    expected = column([scalar("win_fraction")(each) for each in differences.tolist()])
    torch.testing.assert_close(win_fraction(differences), expected, rtol=1e-12, atol=0.0)
    for dtype in (torch.bfloat16, torch.float16):
        check_half(win_fraction, [differences], dtype)


@given(difference=st.floats(-5000.0, 5000.0))
def test_WF2_the_two_sides_sum_to_one(difference: float) -> None:
    sides = win_fraction(column([difference, -difference]))
    assert sides.sum().item() == pytest.approx(1.0, abs=1e-15)
    assert win_fraction(column([0.0])).item() == 0.5


@given(difference=st.floats(1e-3, 4000.0))
def test_WF3_the_side_ahead_wins_more_than_half(difference: float) -> None:
    ahead, behind = win_fraction(column([difference, -difference])).tolist()
    assert ahead > 0.5 > behind
    assert (win_fraction(column([-800.0, -1.0, 0.0, 3.0, 900.0])).diff() > 0).all()


@given(difference=st.floats(-1000.0, 1000.0))
def test_WF4_400_points_multiply_the_odds_by_ten(difference: float) -> None:
    some, more = win_fraction(column([difference, difference + 400.0])).tolist()
    assert more / (1.0 - more) == pytest.approx(10.0 * some / (1.0 - some), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_WF5_extremes_do_not_overflow(dtype: torch.dtype) -> None:
    difference = torch.tensor([1e6, -1e6, 2e4, -2e4], dtype=dtype, requires_grad=True)
    found = win_fraction(difference)
    assert found.tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0], abs=1e-45)
    assert slope(found, difference).isfinite().all()


def test_WF7_a_dropped_nan_leaves_no_trace() -> None:
    leaf = torch.tensor([120.0, math.nan, -40.0], dtype=torch.float64, requires_grad=True)
    found = win_fraction(leaf)
    assert found.isnan().tolist() == [False, True, False]
    kept = found.masked_fill(found.isnan(), 0.0).sum()
    (gradient,) = torch.autograd.grad(kept, leaf)
    assert gradient[1] == 0.0 and (gradient[::2] > 0).all()


@given(seed=st.integers(0, 2**31))
def test_WF6_gradient_in_closed_form(seed: int) -> None:
    difference = normal(torch.Generator().manual_seed(seed), 5, scale=500.0).requires_grad_()
    fraction = win_fraction(difference)
    exact = (fraction * (1.0 - fraction)).detach() * math.log(10.0) / 400.0
    torch.testing.assert_close(slope(fraction, difference), exact, rtol=1e-12, atol=0.0)


# ---- calibration


@given(differences=DIFFERENCES, edges=EDGES)
def test_CB1_value_equals_the_page(differences: list[float], edges: tuple[float, ...]) -> None:
    expected = [list(map(float, sums)) for sums in scalar("calibration")(differences, edges)]
    found = by_bin(calibration(*pairs(differences), edges=edges))
    assert found == [pytest.approx(row, rel=1e-9) for row in expected]


@given(data=st.data(), edges=EDGES)
def test_CB2_any_split_adds_up(data: st.DataObject, edges: tuple[float, ...]) -> None:
    chosen, rejected = pairs(data.draw(DIFFERENCES))
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in chosen])
    parts = [calibration(chosen[owner == part], rejected[owner == part], edges=edges) for part in range(3)]
    whole = calibration(chosen, rejected, edges=edges)
    for found, each in zip(zip(*parts, strict=True), whole, strict=True):
        torch.testing.assert_close(sum(found), each, rtol=1e-14, atol=0.0)


@given(differences=DIFFERENCES, edges=EDGES)
def test_CB3_no_pair_is_lost(differences: list[float], edges: tuple[float, ...]) -> None:
    counts, wins, _ = calibration(*pairs(differences), edges=edges)
    assert counts.sum() == len(differences) and (wins <= counts).all()


@pytest.mark.parametrize("difference", [2.0, -2.0, 7.5])
def test_CB3_a_difference_beyond_the_last_edge_is_an_error(difference: float) -> None:
    chosen, rejected = pairs([0.1, difference, -0.3])
    message = rf"edges end at 2.0, got a difference of {abs(difference)}"
    with pytest.raises(ValueError, match=message):
        calibration(chosen, rejected, edges=(0.0, 1.0, 2.0))
    assert calibration(chosen, rejected, edges=(0.0, 1.0, INF))[0].tolist() == [2.0, 1.0]


def test_CB4_a_tie_is_half_a_win() -> None:
    counts, wins, expected = calibration(*pairs([0.0, 0.0, 0.0]), edges=(0.0, 1e-300, INF))
    assert counts.tolist() == [3.0, 0.0] and wins.tolist() == expected.tolist() == [1.5, 0.0]


@given(differences=DIFFERENCES, edges=EDGES, seed=st.integers(0, 2**31))
def test_CB5_order_is_free_and_swapping_turns_wins_into_losses(
    differences: list[float], edges: tuple[float, ...], seed: int
) -> None:
    chosen, rejected = pairs(differences)
    counts, wins, expected = calibration(chosen, rejected, edges=edges)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
    shuffled = calibration(chosen[order], rejected[order], edges=edges)
    assert torch.equal(shuffled[0], counts) and torch.equal(shuffled[1], wins)
    torch.testing.assert_close(shuffled[2], expected, rtol=1e-14, atol=0.0)
    swapped = calibration(rejected, chosen, edges=edges)
    assert torch.equal(swapped[0], counts) and torch.equal(swapped[1], counts - wins)
    assert torch.equal(swapped[2], expected)


@given(difference=st.floats(-40.0, 40.0))
def test_CB6_expected_wins_are_the_win_fraction_of_the_better(difference: float) -> None:
    expected = calibration(*pairs([difference]), edges=(0.0, INF))[2].item()
    assert expected == pytest.approx(1.0 / (1.0 + math.exp(-abs(difference))), rel=0.0, abs=1e-15)
    better = win_fraction(elo_from_reward(column([abs(difference)]))).item()
    assert expected == pytest.approx(better, rel=0.0, abs=1e-15)


def test_CB7_empty_bins_and_empty_batches_are_zeros() -> None:
    for sums in calibration(*pairs([]), edges=(0.0, 1.0, INF)):
        assert sums.tolist() == [0.0, 0.0]
    for sums in calibration(*pairs([5.0]), edges=(0.0, 1.0, INF)):
        assert sums[0] == 0.0 and sums[1] > 0.0


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_CB8_preferences_of_the_model_are_calibrated(scale: float) -> None:
    generator = torch.Generator().manual_seed(11)
    first, second = normal(generator, 2, 100_000)
    uniform = torch.rand(len(first), generator=generator, dtype=torch.float64)
    preferred = uniform < win_fraction(elo_from_reward(first - second))
    chosen, rejected = torch.where(preferred, first, second), torch.where(preferred, second, first)
    counts, wins, expected = calibration(scale * chosen, scale * rejected, edges=(0.0, 0.5, 1.0, 2.0, INF))
    deviations = (wins - expected) / (counts / 4.0).sqrt()
    if scale == 1.0:
        assert deviations.abs().max() < 4.0
    else:  # a model three times too sure
        assert deviations[-1] < -20.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_CB9_sums_are_float64_without_a_gradient(dtype: torch.dtype) -> None:
    chosen = torch.tensor([1.0, 2.0, -0.5], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([2.0, -1.0, -0.5], dtype=dtype, requires_grad=True)
    sums = calibration(chosen, rejected, edges=(0.0, 2.0, INF))
    assert all(each.dtype == torch.float64 and not each.requires_grad for each in sums)
    page = scalar("calibration")([-1.0, 3.0, 0.0], [0.0, 2.0, INF])
    assert by_bin(sums) == [pytest.approx(list(map(float, row)), rel=1e-12) for row in page]


ONES = torch.ones(2)
NAN = torch.tensor([0.0, math.nan])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: elo_from_reward(torch.tensor([1])), r"difference must be floating point, got torch.int64"),
        (lambda: win_fraction(torch.tensor([1])), r"elo_difference must be floating point, got torch.int64"),
        (
            lambda: calibration(ONES, torch.ones(3), edges=(0.0, INF)),
            r"chosen_rewards \(2,\), rejected_rewards \(3,\)",
        ),
        (
            lambda: calibration(torch.ones(2, 1), torch.ones(2, 1), edges=(0.0, INF)),
            r"chosen_rewards must have 1 dimension\(s\), got shape \(2, 1\)",
        ),
        (
            lambda: calibration(ONES.long(), ONES.long(), edges=(0.0, INF)),
            r"chosen_rewards must be floating point",
        ),
        (lambda: calibration(NAN, ONES, edges=(0.0, INF)), r"chosen_rewards must be finite, got nan"),
        (lambda: calibration(ONES, NAN, edges=(0.0, INF)), r"rejected_rewards must be finite, got nan"),
        (lambda: calibration(ONES, ONES, edges=(0.0,)), r"edges must rise from 0 .*, got \(0.0,\)"),
        (lambda: calibration(ONES, ONES, edges=()), r"edges must rise from 0 .*, got \(\)"),
        (lambda: calibration(ONES, ONES, edges=(0.5, 1.0)), r"edges must rise from 0 .*, got \(0.5, 1.0\)"),
        (
            lambda: calibration(ONES, ONES, edges=(0.0, 1.0, 1.0)),
            r"edges must rise from 0 .*, got \(0.0, 1.0, 1.0\)",
        ),
        (
            lambda: calibration(ONES, ONES, edges=(0.0, math.nan)),
            r"edges must rise from 0 .*, got \(0.0, nan\)",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
