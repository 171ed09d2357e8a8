"""Win rates: counted by hand, and against simulations whose truth is known."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopost.data.schema import Candidate
from nanopost.evals.preference import (
    RIDGE,
    fit_logistic,
    head_to_head,
    judge,
    length_controlled_win_rate,
    win_rate,
)


def completion(correct: bool | None, tokens: int | None) -> Candidate:
    return Candidate("text", correct=correct, tokens=tokens)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((True, 40), (False, 4), 1.0),  # right beats wrong, however long
        ((False, 4), (True, 40), 0.0),
        ((True, 4), (True, 5), 1.0),
        ((True, 5), (True, 4), 0.0),
        ((True, 4), (True, 4), 0.5),
        ((False, 4), (False, 40), 0.5),  # two wrong ones tie, however long
        ((False, None), (False, 1), 0.5),
        ((True, None), (False, None), 1.0),
    ],
)
def test_the_judge(first: tuple, second: tuple, expected: float) -> None:
    assert judge(completion(*first), completion(*second)) == expected


def test_what_was_cut_does_not_win_by_its_verdict() -> None:
    cut = replace(completion(True, 4), cut=True)
    assert judge(cut, completion(True, 9)) == 0.0 and judge(completion(True, 9), cut) == 1.0
    assert judge(cut, completion(False, 9)) == judge(cut, cut) == 0.5


def test_the_judge_refuses_what_it_cannot_see() -> None:
    with pytest.raises(ValueError, match="both completions need `correct`"):
        judge(completion(True, 1), completion(None, 1))
    with pytest.raises(ValueError, match="told apart by `tokens`"):
        judge(completion(True, 1), completion(True, None))


def test_a_tie_is_half_a_win() -> None:
    assert win_rate([1.0, 1.0, 0.5, 0.0]) == 0.625
    assert win_rate([0.5, 0.5]) == 0.5
    assert (win_rate([0.0]), win_rate([1.0])) == (0.0, 1.0)


def test_nothing_to_count_is_an_error() -> None:
    for call in (
        lambda: win_rate([]),
        lambda: length_controlled_win_rate([], [], []),
        lambda: head_to_head([], []),
    ):
        with pytest.raises(ValueError, match="win_rate: no pairs to count"):
            call()


@pytest.mark.parametrize("win", [-0.5, 1.5, math.nan])
def test_a_judgement_outside_0_and_1_is_an_error(win: float) -> None:
    with pytest.raises(ValueError, match=r"wins\[1\] must lie in \[0, 1\]"):
        win_rate([1.0, win])


judgements = st.lists(
    st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 60), st.integers(1, 60)),
    min_size=1,
    max_size=30,
)


def simulated(
    theta: float, phi: float, shift: int, *, count: int, seed: int
) -> tuple[list, list, list, list]:
    """Judgements drawn from the model itself, one model's completions `shift` tokens longer on average."""
    rng = random.Random(seed)
    lengths = [rng.randint(20, 60) + shift for _ in range(count)]
    others = [rng.randint(20, 60) for _ in range(count)]
    deltas = [a - b for a, b in zip(lengths, others, strict=True)]
    mean = sum(deltas) / count
    spread = math.sqrt(sum((delta - mean) ** 2 for delta in deltas) / count)
    features = [math.tanh(delta / spread) for delta in deltas]
    chances = [1 / (1 + math.exp(-theta - phi * x)) for x in features]
    return [float(rng.random() < chance) for chance in chances], lengths, others, features


@pytest.mark.parametrize(("theta", "phi", "shift"), [(0.0, 1.5, 25), (0.8, -2.0, 10), (-0.5, 1.0, -20)])
def test_simulated_judgements_give_back_the_true_rate(theta: float, phi: float, shift: int) -> None:
    """σ(θ) within 4 standard errors, from the Fisher information at the truth; the plain rate is far off."""
    wins, lengths, others, features = simulated(theta, phi, shift, count=20000, seed=1)
    truth, found = 1 / (1 + math.exp(-theta)), length_controlled_win_rate(wins, lengths, others)
    x = torch.tensor(features, dtype=torch.float64)
    p = torch.sigmoid(theta + phi * x)
    a, b, c = ((p * (1 - p) * x**k).sum() for k in range(3))
    tolerance = 4 * truth * (1 - truth) * math.sqrt(c / (a * c - b * b))
    assert abs(found - truth) < tolerance < abs(win_rate(wins) - truth)


@given(judgements)
def test_swapping_the_models_swaps_the_rates(found: list[tuple[float, int, int]]) -> None:
    wins, lengths, others = map(list, zip(*found, strict=True))
    losses = [1 - win for win in wins]
    assert win_rate(losses) == pytest.approx(1 - win_rate(wins), abs=1e-12)
    swapped = length_controlled_win_rate(losses, others, lengths)
    assert swapped == pytest.approx(1 - length_controlled_win_rate(wins, lengths, others), abs=1e-9)


@given(judgements, st.integers(-5, 5))
def test_without_a_difference_in_length_it_is_the_plain_rate(found: list[tuple], gap: int) -> None:
    wins, lengths, _ = map(list, zip(*found, strict=True))
    others = [length + gap for length in lengths]
    assert length_controlled_win_rate(wins, lengths, others) == pytest.approx(win_rate(wins), abs=1e-12)


@given(judgements)
def test_the_fit_is_the_minimum_of_the_stated_loss(found: list[tuple[float, int, int]]) -> None:
    """By autograd in float64: the gradient vanishes at (θ, φ) and the loss is convex: it is the minimum."""
    wins, lengths, others = map(list, zip(*found, strict=True))
    features = [math.tanh((a - b) / 10) for a, b in zip(lengths, others, strict=True)]
    if win_rate(wins) in (0.0, 1.0):
        return
    point = torch.tensor(fit_logistic(wins, features), dtype=torch.float64, requires_grad=True)
    w, x = (torch.tensor(values, dtype=torch.float64) for values in (wins, features))
    z = point[0] + point[1] * x
    nll = -(w * torch.nn.functional.logsigmoid(z) + (1 - w) * torch.nn.functional.logsigmoid(-z)).sum()
    (nll + RIDGE * point[1] ** 2 / 2).backward()
    assert point.grad is not None and float(point.grad.abs().max()) < 1e-9


def test_judgements_that_length_alone_explains_leave_nothing_to_the_models() -> None:
    """Of two equal models the shorter completion always wins: half when the lengths are symmetric."""
    lengths, others = [10, 20, 30, 40] * 5, [40, 30, 20, 10] * 5
    wins = [float(a < b) for a, b in zip(lengths, others, strict=True)]
    assert length_controlled_win_rate(wins, lengths, others) == pytest.approx(0.5, abs=1e-12)
    # One model is shorter in most pairs: the plain rate rewards it, the controlled one much less.
    lengths, others = [10, 11, 12, 13, 40] * 5, [20, 24, 31, 35, 20] * 5
    wins = [float(a < b) for a, b in zip(lengths, others, strict=True)]
    assert win_rate(wins) == 0.8 and length_controlled_win_rate(wins, lengths, others) < 0.75


def test_all_wins_are_all_wins_at_any_length() -> None:
    assert length_controlled_win_rate([1.0, 1.0, 1.0], [1, 2, 3], [3, 5, 1]) == 1.0
    assert length_controlled_win_rate([0.0, 0.0], [1, 2], [3, 5]) == 0.0


def test_lists_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="other_lengths has 1 entries, wins has 2"):
        length_controlled_win_rate([1.0, 0.0], [1, 2], [3])
    with pytest.raises(ValueError, match="first has 1 completions, second has 0: not the same prompts"):
        head_to_head([completion(True, 1)], [])


def test_head_to_head_counts_by_hand() -> None:
    first = [completion(True, 4), completion(True, 9), completion(False, 3), completion(True, 4)]
    second = [completion(True, 6), completion(False, 9), completion(False, 7), completion(True, 2)]
    found = head_to_head(first, second)
    controlled = found.pop("length_controlled_win_rate")
    assert found == {
        "pairs": 4,
        "wins": 2,
        "ties": 1,
        "losses": 1,
        "win_rate": 0.625,
        "length": 5.0,
        "other_length": 6.0,
    }
    assert controlled == length_controlled_win_rate([1.0, 1.0, 0.5, 0.0], [4, 9, 3, 4], [6, 9, 7, 2])
    with pytest.raises(ValueError, match=r"second\[0\] has no tokens: its length is not known"):
        head_to_head([completion(True, 1)], [completion(False, None)])
