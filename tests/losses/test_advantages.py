"""`group_advantages` and `leave_one_out_advantages`: values, and zeros that are exactly zero."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanopost.losses import group_advantages, leave_one_out_advantages
from tests.pages import scalar

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = st.integers(2, 9)
SCALES = ("none", "std")


@st.composite
def groups(draw: st.DrawFn, least: int = 1) -> tuple[list[list[float]], Tensor]:
    """Some groups of one size, as lists and as the flat tensor."""
    size = draw(st.integers(least, 7))
    reward = st.floats(-5.0, 5.0)
    rows = draw(st.lists(st.lists(reward, min_size=size, max_size=size), min_size=1, max_size=4))
    return rows, torch.tensor(rows, dtype=torch.float64).flatten()


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", SCALES)
@given(batch=groups(), eps=st.floats(1e-2, 2.0))
def test_G1_value_equals_the_page(
    scale: str, ddof: int, batch: tuple[list[list[float]], Tensor], eps: float
) -> None:
    rows, rewards = batch
    found = group_advantages(rewards, group_size=len(rows[0]), scale=scale, ddof=ddof, eps=eps)
    expected = [value for row in rows for value in scalar("group_advantages")(row, scale, ddof, eps)]
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


def test_G1_default_is_the_unbiased_deviation_and_a_small_eps() -> None:
    found = group_advantages(torch.tensor([1.0, 0, 0, 0]).double(), group_size=4, scale="std")
    assert found.tolist() == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_G2_equal_rewards_give_exactly_zero(scale: str, dtype: torch.dtype) -> None:
    for size in range(2, 65):
        for reward in (0.1, 1 / 3, 0.7, -1.1, 1e-3, 123.456):
            rewards = torch.full((2 * size,), reward, dtype=dtype)
            found = group_advantages(rewards, group_size=size, scale=scale, eps=1e-9)
            assert not found.any() and found.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("scale", SCALES)
@given(batch=groups(least=2), shift=st.floats(-3.0, 3.0))
def test_G3_groups_sum_to_zero_and_a_constant_drops_out(
    scale: str, batch: tuple[list[list[float]], Tensor], shift: float
) -> None:
    rows, rewards = batch
    found = group_advantages(rewards, group_size=len(rows[0]), scale=scale, eps=0.1)
    assert found.reshape(len(rows), -1).sum(1).tolist() == pytest.approx([0.0] * len(rows), abs=1e-12)
    moved = group_advantages(rewards + shift, group_size=len(rows[0]), scale=scale, eps=0.1)
    torch.testing.assert_close(moved, found, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@given(batch=groups(least=2), data=st.data())
def test_G4_groups_are_independent_and_unordered(
    scale: str, batch: tuple[list[list[float]], Tensor], data: st.DataObject
) -> None:
    rows, rewards = batch
    size = len(rows[0])
    found = group_advantages(rewards, group_size=size, scale=scale).reshape(-1, size)
    group_order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    order = torch.tensor(data.draw(st.permutations(range(size))))
    shuffled = rewards.reshape(-1, size)[group_order][:, order]
    moved = group_advantages(shuffled.flatten(), group_size=size, scale=scale).reshape(-1, size)
    torch.testing.assert_close(moved, found[group_order][:, order], rtol=1e-9, atol=1e-12)
    alone = group_advantages(rewards[:size], group_size=size, scale=scale)
    torch.testing.assert_close(alone, found[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", SCALES)
def test_G5_a_group_of_one_gives_exactly_zero(scale: str, ddof: int) -> None:
    found = group_advantages(torch.tensor([0.7, -3.0, 1e6]), group_size=1, scale=scale, ddof=ddof)
    assert found.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("scale", SCALES)
def test_G6_no_gradient(scale: str) -> None:
    rewards = torch.tensor([1.0, 0.6, 0.2, 0.0], requires_grad=True)
    found = group_advantages(rewards, group_size=4, scale=scale)
    assert not found.requires_grad and found.abs().max() > 0.4


@pytest.mark.parametrize("advantages", ["group", "leave one out"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_G7_rewards_that_are_not_finite_are_refused(bad: float, advantages: str) -> None:
    rewards = torch.tensor([1.0, 0.0, bad, 0.0])
    with pytest.raises(ValueError, match=rf"rewards must be finite, got {bad} at index \(2,\)"):
        if advantages == "group":
            group_advantages(rewards, group_size=2, scale="none")
        else:
            leave_one_out_advantages(rewards, group_size=2)


@given(batch=groups(least=2))
def test_L1_value_equals_the_page(batch: tuple[list[list[float]], Tensor]) -> None:
    rows, rewards = batch
    expected = [value for row in rows for value in scalar("leave_one_out_advantages")(row)]
    found = leave_one_out_advantages(rewards, group_size=len(rows[0]))
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


@given(batch=groups(least=2))
def test_L2_it_is_the_centred_reward_times_g_over_g_minus_one(
    batch: tuple[list[list[float]], Tensor],
) -> None:
    rows, rewards = batch
    size = len(rows[0])
    centred = group_advantages(rewards, group_size=size, scale="none")
    found = leave_one_out_advantages(rewards, group_size=size)
    torch.testing.assert_close(found, centred * size / (size - 1), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_L3_equal_rewards_give_exactly_zero(dtype: torch.dtype) -> None:
    for size in range(2, 65):
        for reward in (0.1, 1 / 3, 0.7, -1.1, 1e-3, 123.456):
            found = leave_one_out_advantages(torch.full((2 * size,), reward, dtype=dtype), group_size=size)
            assert not found.any() and found.dtype == torch.promote_types(dtype, torch.float32)


@given(batch=groups(least=2), change=st.floats(-4.0, 4.0))
def test_L4_the_baseline_does_not_see_its_own_reward(
    batch: tuple[list[list[float]], Tensor], change: float
) -> None:
    rows, rewards = batch
    size = len(rows[0])
    moved = rewards.clone()
    moved[1] += change
    before = rewards - leave_one_out_advantages(rewards, group_size=size)
    after = moved - leave_one_out_advantages(moved, group_size=size)
    assert after[1].item() == pytest.approx(before[1].item(), abs=1e-12)


def test_L5_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size must be a whole number of at least 2, got 1"):
        leave_one_out_advantages(torch.ones(3), group_size=1)


def test_L6_no_gradient() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    assert not leave_one_out_advantages(rewards, group_size=3).requires_grad


def test_integer_rewards_are_welcome() -> None:
    found = group_advantages(torch.tensor([1, 0, 0, 0]), group_size=4, scale="none")
    assert found.dtype == torch.float32 and found.tolist() == [0.75, -0.25, -0.25, -0.25]


@pytest.mark.parametrize(
    ("rewards", "changes", "message"),
    [
        (torch.ones(2, 2), {}, r"rewards must have 1 dimension\(s\), got shape \(2, 2\)"),
        (torch.ones(0), {}, r"group_size 2 must divide the number of rewards, got 0 of them"),
        (torch.ones(5), {}, r"group_size 2 must divide the number of rewards, got 5 of them"),
        (torch.ones(4), {"group_size": 0}, r"group_size must be a whole number of at least 1, got 0"),
        (torch.ones(4), {"group_size": 2.0}, r"group_size must be a whole number of at least 1, got 2.0"),
        (torch.ones(4), {"scale": "z"}, r"scale must be one of 'none', 'std', got 'z'"),
        (torch.ones(4), {"ddof": 2}, r"ddof must be one of 0, 1, got 2"),
        (torch.ones(4), {"eps": 0.0}, r"eps must be positive and finite, got 0.0"),
        (torch.ones(4), {"eps": math.nan}, r"eps must be positive and finite, got nan"),
    ],
)
def test_group_advantages_refuses(rewards: Tensor, changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"group_size": 2, "scale": "std"} | changes
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("rewards", [torch.ones(2, 2), torch.ones(0), torch.ones(5)])
def test_leave_one_out_advantages_refuses(rewards: Tensor) -> None:
    with pytest.raises(ValueError, match="rewards"):
        leave_one_out_advantages(rewards, group_size=2)
