"""Rates are counts over counts, and a rate over nothing is an error that names what was missing."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopost.evals.accuracy import (
    best_of_k,
    mean_length,
    pass_at_k,
    rate,
    refusal_precision,
    refusal_recall,
)
from nanopost.rewards.verdict import Verdict
from nanopost.rollout.types import Rollout
from tests.pages import namespace, scalar

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30)
# n samples, c of them correct, k drawn
draws = st.integers(1, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


def verdicts(rows: list[tuple[bool, bool]]) -> list[Verdict]:
    """(refused, due) a row."""
    return [Verdict(0.0, {"refused": float(made), "due": float(due)}, "") for made, due in rows]


def rollout(length: int) -> Rollout:
    zeros = torch.zeros(length)
    return Rollout((1, 2), tuple(range(length)), zeros, zeros, "stop")


def test_worked_numbers() -> None:
    """Three refusals made, two of them due; four due, two of them made."""
    rows = [(True, True), (True, True), (True, False), (False, True), (False, True), (False, False)]
    assert refusal_precision(verdicts(rows)) == 2 / 3
    assert refusal_recall(verdicts(rows)) == 2 / 4
    assert rate(verdicts(rows), "refused") == 3 / 6
    assert mean_length([rollout(3), rollout(8)]) == 5.5


@given(pairs)
def test_precision_and_recall_are_counts(rows: list[tuple[bool, bool]]) -> None:
    both = [made and due for made, due in rows]
    for function, chosen, problem in (
        (refusal_precision, [made for made, _ in rows], f"no refusal was made in {len(rows)} completions"),
        (refusal_recall, [due for _, due in rows], f"no refusal was due in {len(rows)} completions"),
    ):
        if any(chosen):
            assert Fraction(function(verdicts(rows))).limit_denominator(1000) == Fraction(
                sum(both), sum(chosen)
            )
        else:
            with pytest.raises(ValueError, match=f"{function.__name__}: {problem}"):
                function(verdicts(rows))


@given(pairs, st.randoms(use_true_random=False))
def test_order_does_not_matter(rows: list[tuple[bool, bool]], rng: object) -> None:
    rows = [*rows, (True, True)]
    shuffled = rows[:]
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    for function in (refusal_precision, refusal_recall):
        assert function(verdicts(rows)) == function(verdicts(shuffled))


def test_over_refusal_and_under_refusal_are_told_apart() -> None:
    """Refusing everything has full recall, refusing once and rightly full precision; neither has both."""
    everything = verdicts([(True, due) for due in (True, False, False, False)])
    once = verdicts([(True, True), (False, True), (False, True), (False, False)])
    assert (refusal_precision(everything), refusal_recall(everything)) == (1 / 4, 1.0)
    assert (refusal_precision(once), refusal_recall(once)) == (1.0, 1 / 3)


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="exact: no verdicts to count"):
        rate([], "exact")
    with pytest.raises(ValueError, match="mean_length: no rollouts to count"):
        mean_length([])


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0])
def test_a_part_that_is_no_flag_is_an_error(value: float) -> None:
    found = [Verdict(0.0, {"exact": 1.0}, ""), Verdict(0.0, {"exact": value}, "")]
    with pytest.raises(ValueError, match=rf"verdicts\[1\]: the part 'exact' must be 0 or 1, it is {value}"):
        rate(found, "exact")


def test_a_part_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"verdicts\[0\]: the part 'json' must be 0 or 1, it is not among"):
        rate([Verdict(0.0, {"exact": 1.0}, "")], "json")


@given(draws, st.floats(0.0, 1.0))
def test_PK1_value_equals_the_page(draw: tuple[int, int, int], p: float) -> None:
    n, c, k = draw
    assert pass_at_k(n, c, k=k) == pytest.approx(scalar("pass_at_k")(n, c, k), abs=1e-12)
    assert best_of_k(p, k=k) == pytest.approx(namespace("pass_at_k")["best_of_k"](p, k), abs=1e-12)


@pytest.mark.parametrize("n", range(1, 8))
def test_PK2_it_is_the_share_of_subsets_with_a_right_one(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k=k) == sum(map(any, subsets)) / len(subsets)


@pytest.mark.parametrize("p", [Fraction(1, 5), Fraction(1, 2), Fraction(9, 10)])
@pytest.mark.parametrize("n", range(1, 10))
def test_PK3_its_mean_over_the_draws_is_best_of_k(n: int, p: Fraction) -> None:
    for k in range(1, n + 1):
        mean = sum(
            math.comb(n, c) * p**c * (1 - p) ** (n - c) * Fraction(pass_at_k(n, c, k=k)) for c in range(n + 1)
        )
        assert float(mean) == pytest.approx(best_of_k(float(p), k=k), abs=1e-14)
        assert best_of_k(float(p), k=k) == pytest.approx(float(1 - (1 - p) ** k), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(5000, 1, 2500), (4096, 3, 1024), (3000, 2999, 1), (2000, 700, 3)])
def test_PK4_thousands_of_samples_are_right_to_the_last_bit(n: int, c: int, k: int) -> None:
    all_wrong = Fraction(1)
    for drawn in range(k):
        all_wrong *= Fraction(max(n - c - drawn, 0), n - drawn)
    assert pass_at_k(n, c, k=k) == float(1 - all_wrong)


def test_PK4_a_small_chance_is_not_rounded_away() -> None:
    assert best_of_k(1e-18, k=5) == pytest.approx(5e-18, rel=1e-12)


@given(draws)
def test_PK5_it_rises_with_c_and_k_and_has_its_limits(draw: tuple[int, int, int]) -> None:
    n, c, k = draw
    found = pass_at_k(n, c, k=k)
    assert 0.0 <= found <= 1.0 and pass_at_k(n, c, k=1) == c / n and pass_at_k(n, 0, k=k) == 0.0
    assert (found == 1.0) == (n - c < k)
    assert c == n or pass_at_k(n, c + 1, k=k) > found or found == 1.0
    assert k == n or pass_at_k(n, c, k=k + 1) >= found
    assert best_of_k(c / n, k=1) == pytest.approx(c / n, abs=1e-15)


def test_PK5_best_of_k_at_the_ends_and_the_worked_value() -> None:
    assert (best_of_k(0.0, k=7), best_of_k(1.0, k=7)) == (0.0, 1.0)
    assert best_of_k(0.2, k=5) == pytest.approx(0.67232, abs=1e-15)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, 5, 1, r"correct must lie in \[0, 4\] with 4 samples, got 5"),
        (4, -1, 1, r"correct must lie in \[0, 4\] with 4 samples, got -1"),
        (4, 2, 5, r"k must lie in \[1, 4\] with 4 samples, got 5"),
        (4, 2, 0, r"k must lie in \[1, 4\] with 4 samples, got 0"),
        (0, 0, 1, r"k must lie in \[1, 0\] with 0 samples, got 1"),
    ],
)
def test_PK6_impossible_counts_are_refused(n: int, c: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k=k)


@pytest.mark.parametrize(
    ("p", "k", "message"),
    [
        (1.5, 3, r"p must lie in \[0, 1\], got 1.5"),
        (-0.1, 3, r"p must lie in \[0, 1\], got -0.1"),
        (math.nan, 3, r"p must lie in \[0, 1\], got nan"),
        (0.5, 0, "k must be at least 1, got 0"),
    ],
)
def test_PK6_impossible_chances_are_refused(p: float, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best_of_k(p, k=k)
