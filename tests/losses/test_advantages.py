"""Advantages of groups and of the whole step: values, zeros that are exactly zero, two processes as one."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from nanopost import distributed
from nanopost.losses import group_advantages, informative_groups, leave_one_out_advantages, whiten
from tests.pages import scalar
from tests.properties import check_half
from tests.ragged import JUNK, junk_outside, normal, ragged
from tests.ranks import run_function

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SIZES = st.integers(2, 9)
SCALES = ("none", "std")
TENTHS = torch.arange(1, 31, dtype=torch.float64) / 10  # rewards .1 to 3.0; with sizes 2 to 64: 1,890 groups


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "advantages",
    [
        lambda rewards, size: group_advantages(rewards, group_size=size, scale="none"),
        lambda rewards, size: group_advantages(rewards, group_size=size, scale="std", eps=1e-9),
        lambda rewards, size: leave_one_out_advantages(rewards, group_size=size),
        lambda rewards, size: informative_groups(rewards, group_size=size),
    ],
    ids=["none", "std", "leave_one_out", "informative"],
)
def test_G2_all_1890_constant_groups_give_exactly_zero(
    advantages: Callable[[Tensor, int], Tensor], dtype: torch.dtype
) -> None:
    for size in range(2, 65):
        assert not advantages(TENTHS.to(dtype).repeat_interleave(size), size).any()


def test_G2_a_plain_mean_leaves_a_residue_in_about_half_of_them() -> None:
    """The page's 910, give or take the order in which another machine adds."""
    rows = [
        reward.float().repeat(size) - reward.float().repeat(size).mean()
        for size in range(2, 65)
        for reward in TENTHS
    ]
    assert len(rows) == 1890 and 600 < sum(bool(row.any()) for row in rows) < 1300


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


def test_G7_large_rewards_do_not_overflow_and_integers_keep_their_differences() -> None:
    large = torch.tensor([3e19, 0.0])
    half = group_advantages(large, group_size=2, scale="std")
    assert half.dtype == torch.float32 and half.tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)])
    assert group_advantages(large, group_size=2, scale="none").tolist() == pytest.approx([1.5e19, -1.5e19])
    near = torch.tensor([2**24 + 1, 2**24, 2**40, 2**40])
    assert group_advantages(near, group_size=2, scale="none").tolist() == [0.5, -0.5, 0.0, 0.0]
    assert leave_one_out_advantages(near, group_size=2).tolist() == [1.0, -1.0, 0.0, 0.0]
    assert informative_groups(near, group_size=2).tolist() == [True, True, False, False]


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


TENTH = st.integers(0, 3).map(lambda tenth: tenth / 10)


@given(
    rows=st.integers(1, 6).flatmap(lambda n: st.lists(st.lists(TENTH, min_size=n, max_size=n), min_size=1))
)
def test_IG1_value_equals_the_page(rows: list[list[float]]) -> None:
    found = informative_groups(torch.tensor(rows).flatten(), group_size=len(rows[0]))
    assert found.dtype == torch.bool
    assert found.tolist() == [keep for row in rows for keep in scalar("informative_groups")(row)]


@given(
    rows=st.integers(2, 6).flatmap(lambda n: st.lists(st.lists(TENTH, min_size=n, max_size=n), min_size=1))
)
def test_IG2_dropped_exactly_if_every_advantage_of_the_group_is_zero(rows: list[list[float]]) -> None:
    rewards, size = torch.tensor(rows, dtype=torch.float64).flatten(), len(rows[0])
    kept = informative_groups(rewards, group_size=size).reshape(-1, size)[:, 0]
    for advantages in (
        group_advantages(rewards, group_size=size, scale="none"),
        group_advantages(rewards, group_size=size, scale="std"),
        leave_one_out_advantages(rewards, group_size=size),
    ):
        assert torch.equal(advantages.reshape(-1, size).ne(0.0).any(dim=1), kept)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64])
def test_IG3_equal_rewards_are_dropped_and_the_last_place_keeps(dtype: torch.dtype) -> None:
    for size in range(2, 65):
        rewards = torch.full((3 * size,), 0.7).mul(10).round().div(10).to(dtype)
        assert not informative_groups(rewards, group_size=size).any()
        moved = rewards.clone()
        moved[size] += 1 if dtype == torch.int64 else torch.finfo(dtype).eps / 2  # a place of .7
        expected = [False] * size + [True] * size + [False] * size
        assert informative_groups(moved, group_size=size).tolist() == expected


@given(batch=groups(least=2), data=st.data())
def test_IG4_groups_are_independent_and_unordered(
    batch: tuple[list[list[float]], Tensor], data: st.DataObject
) -> None:
    rows, rewards = batch
    size = len(rows[0])
    found = informative_groups(rewards, group_size=size).reshape(-1, size)
    assert torch.equal(found.all(dim=1), found.any(dim=1))
    group_order = torch.tensor(data.draw(st.permutations(range(len(rows)))))
    order = torch.tensor(data.draw(st.permutations(range(size))))
    shuffled = rewards.reshape(-1, size)[group_order][:, order].flatten()
    assert torch.equal(informative_groups(shuffled, group_size=size).reshape(-1, size), found[group_order])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_IG5_rewards_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"rewards must be finite, got {bad} at index \(1,\)"):
        informative_groups(torch.tensor([1.0, bad, 0.0, 0.0]), group_size=2)


@pytest.mark.parametrize(
    ("rewards", "group_size", "message"),
    [
        (torch.ones(2, 2), 2, r"rewards must have 1 dimension\(s\), got shape \(2, 2\)"),
        (torch.ones(5), 2, "group_size 2 must divide the number of rewards, got 5 of them"),
        (torch.ones(4), 0, "group_size must be a whole number of at least 1, got 0"),
    ],
)
def test_informative_groups_refuses(rewards: Tensor, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        informative_groups(rewards, group_size=group_size)


Ragged = tuple[Tensor, Generator]


def whole(values: Tensor, mask: Tensor, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """The page's function on the masked values, back in their places."""
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    expected[mask] = torch.tensor(scalar("whiten")(values[mask].tolist(), ddof, eps), dtype=torch.float64)
    return expected


@pytest.mark.parametrize("ddof", [0, 1])
@given(batch=ragged(), eps=st.floats(1e-2, 2.0), shift=st.floats(-30.0, 30.0))
def test_WH1_value_equals_the_page(ddof: int, batch: Ragged, eps: float, shift: float) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape, scale=3.0) + shift
    found = whiten(values, mask, ddof=ddof, eps=eps)
    torch.testing.assert_close(found, whole(values, mask, ddof, eps), rtol=1e-9, atol=1e-9)
    assert torch.equal(whiten(values, mask.long(), ddof=ddof, eps=eps), found)


def test_WH1_default_is_the_unbiased_variance_and_a_small_eps() -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, 9.0], [5.0, 7.0]], dtype=torch.float64) * 1e-4
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    deviations = torch.tensor([[-3.0, -2.0], [0.0, 5.0], [0.0, 0.0]], dtype=torch.float64) * 1e-4
    expected = deviations / math.sqrt(38e-8 / 3 + 1e-8)
    torch.testing.assert_close(whiten(values, mask), expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_WH2_all_1890_constant_steps_give_exactly_zero(dtype: torch.dtype, ddof: int) -> None:
    for size in range(1, 65):
        mask = torch.arange(size + 2).ge(2)[None]
        for reward in TENTHS.to(dtype)[ddof::2]:
            found = whiten(reward.expand(1, size + 2), mask, ddof=ddof, eps=1e-18)
            assert not found.any() and found.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("ranks", [2, 3, 5, 7, 11])
def test_WH2_equal_values_on_several_processes_give_exactly_zero(ranks: int) -> None:
    total = lambda x: sum([x] * ranks)  # noqa: E731  (every process holds the same)
    mask = torch.ones(1, 9, dtype=torch.bool)
    for reward in [
        *TENTHS,
        torch.tensor(1 / 3, dtype=torch.float64),
        torch.tensor(-1e150, dtype=torch.float64),
    ]:
        assert not whiten(reward.expand(1, 9), mask, total=total, eps=1e-30).any()


@given(batch=ragged(), scale=st.floats(0.1, 50.0), shift=st.floats(-20.0, 20.0))
def test_WH3_mean_zero_variance_one_shift_and_scale_drop_out(
    batch: Ragged, scale: float, shift: float
) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape)
    found = whiten(values, mask, eps=1e-15)
    assert found[mask].mean().item() == pytest.approx(0.0, abs=1e-12)
    moved = whiten(values * scale + shift, mask, eps=1e-15 * scale**2)
    torch.testing.assert_close(moved, found, rtol=1e-6, atol=1e-9)
    if mask.sum() > 1:
        assert found[mask].var(correction=1).item() == pytest.approx(1.0, abs=1e-6)
        biased = whiten(values, mask, eps=1e-15, ddof=0)
        assert biased[mask].var(correction=0).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("junk", JUNK)
@given(batch=ragged())
def test_WH4_masked_slots_may_hold_anything_and_come_out_as_zero(junk: float, batch: Ragged) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape) + 2.0
    found = whiten(junk_outside(values, mask, junk), mask)
    assert torch.equal(found, whiten(values, mask)) and not found[~mask].any()


def together(parts: list[tuple[Tensor, Tensor]], **arguments: float) -> list[Tensor]:
    """`whiten` on several ranks at once: threads that meet in `total`."""
    slots, meeting = [0.0] * len(parts), threading.Barrier(len(parts))

    def run(rank: int) -> Tensor:
        def total(x: float) -> float:
            slots[rank] = x
            meeting.wait(10.0)
            result = sum(slots)
            meeting.wait(10.0)
            return result

        return whiten(*parts[rank], total=total, **arguments)  # type: ignore[arg-type]

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(run, range(len(parts))))


@pytest.mark.parametrize("ddof", [0, 1])
@given(batch=ragged(), data=st.data())
def test_WH5_rows_dealt_to_three_ranks_are_whitened_as_one(
    ddof: int, batch: Ragged, data: st.DataObject
) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape) + 3.0
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in mask])
    parts = [(values[owner == rank], mask[owner == rank]) for rank in range(3)]
    expected = whiten(values, mask, ddof=ddof)
    for rank, found in enumerate(together(parts, ddof=ddof)):
        torch.testing.assert_close(found, expected[owner == rank], rtol=0.0, atol=1e-12)


RANK_CASES = {  # rows and mask of the step; the first two rows are rank 0's
    "ragged": ([[1.5, -2.0, 9.0], [0.1, 7.0, 3.0], [4.0, 2.0, 8.0], [1.0, 1.0, 6.0]], "110 100 111 010"),
    "one rank is empty": (
        [[1.5, -2.0, 9.0], [0.1, 7.0, 3.0], [4.0, 2.0, 8.0], [1.0, 1.0, 6.0]],
        "110 111 000 000",
    ),
    "equal": ([[0.1] * 3] * 4, "110 010 111 001"),
    "one token": ([[5.0, 6.0, 7.0]] * 4, "000 000 010 000"),
    "nothing": ([[5.0, 6.0, 7.0]] * 4, "000 000 000 000"),
}


def rank_case(name: str) -> tuple[Tensor, Tensor]:
    rows, mask = RANK_CASES[name]
    bits = torch.tensor([[bit == "1" for bit in row] for row in mask.split()])
    return torch.tensor(rows, dtype=torch.float64), bits


def whiten_on_a_rank() -> list[list[list[float]]]:
    """What a rank gets for its two rows of each case."""
    mine = slice(2 * distributed.rank(), 2 * distributed.rank() + 2)
    cases = [rank_case(name) for name in RANK_CASES]
    return [whiten(rows[mine], mask[mine], total=distributed.all_sum).tolist() for rows, mask in cases]


def test_WH5_two_gloo_ranks_give_the_numbers_of_one_process() -> None:
    first, second = run_function("tests.losses.test_advantages", "whiten_on_a_rank", ranks=2)
    for number, name in enumerate(RANK_CASES):
        found = torch.tensor(first[number] + second[number], dtype=torch.float64)
        expected = whiten(*rank_case(name))
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-14)
        assert bool(found.any()) == (name in ("ragged", "one rank is empty"))


@given(batch=ragged(), left=st.integers(0, 3), right=st.integers(0, 3), data=st.data())
def test_WH6_padding_and_row_order_change_nothing(
    batch: Ragged, left: int, right: int, data: st.DataObject
) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape) - 1.0
    expected = whiten(values, mask)
    padded = torch.nn.functional.pad(values, (left, right), value=float("nan"))
    found = whiten(padded, torch.nn.functional.pad(mask, (left, right)))
    assert torch.equal(found[:, left : left + mask.shape[1]], expected)
    order = torch.tensor(data.draw(st.permutations(range(len(mask)))))
    torch.testing.assert_close(whiten(values[order], mask[order]), expected[order], rtol=0.0, atol=1e-12)


def test_WH7_no_gradient() -> None:
    values = torch.tensor([[1.0, 3.0]], requires_grad=True)
    found = whiten(values, torch.ones(1, 2, dtype=torch.bool))
    assert not found.requires_grad and found.abs().min() > 0.7


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_WH8_a_value_in_the_mask_that_is_not_finite_is_refused(bad: float) -> None:
    values = torch.tensor([[1.0, 2.0], [bad, 3.0]])
    with pytest.raises(ValueError, match=rf"advantages must be finite, got {bad} at index \(1, 0\)"):
        whiten(values, torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_whiten_computes_half_precision_in_float32(dtype: torch.dtype) -> None:
    values, mask = torch.tensor([[0.3, -2.7, 5.1], [1.9, 0.4, 8.0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    check_half(whiten, [values, mask], dtype)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_whiten_extremes_are_finite(size: float) -> None:
    found = whiten(torch.tensor([[size, -size, 0.0]]), torch.ones(1, 3))
    torch.testing.assert_close(found, torch.tensor([[1.0, -1.0, 0.0]]))


@pytest.mark.parametrize(
    ("values", "mask", "changes", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), {}, r"shapes must be equal \(nothing broadcasts\)"),
        (torch.ones(3), torch.ones(3), {}, r"advantages must have 2 dimension\(s\), got shape \(3,\)"),
        (
            torch.ones(1, 2),
            torch.full((1, 2), 2),
            {},
            "mask must be bool or hold only 0 and 1, got the value 2",
        ),
        (torch.ones(1, 2), torch.ones(1, 2), {"ddof": 2}, "ddof must be one of 0, 1, got 2"),
        (torch.ones(1, 2), torch.ones(1, 2), {"eps": 0.0}, "eps must be positive and finite, got 0.0"),
    ],
)
def test_whiten_refuses(values: Tensor, mask: Tensor, changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whiten(values, mask, **changes)  # type: ignore[arg-type]
