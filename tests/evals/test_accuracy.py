"""Rates are counts over counts, and a rate over nothing is an error that names what was missing."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopost.evals.accuracy import mean_length, rate, refusal_precision, refusal_recall
from nanopost.rewards.verdict import Verdict
from nanopost.rollout.types import Rollout

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=30)


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
