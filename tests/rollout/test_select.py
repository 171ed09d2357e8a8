"""Selection: rules by name, whole groups, and nothing that is missing taken for a zero."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nanopost.data.schema import Candidate, Group, Message, Provenance
from nanopost.losses.advantages import informative_groups
from nanopost.rollout.select import FILTERS, KEEP, best_of_n, informative, rejection_sample


def group(*rows: tuple, line: int = 1, answer: object = "18") -> Group:
    """A group of (text, score, correct, tokens)."""
    candidates = tuple(
        Candidate(text, score=score, correct=correct, tokens=tokens) for text, score, correct, tokens in rows
    )
    return Group((Message("user", "How many?"),), candidates, Provenance(), answer, "g.jsonl", line)


RAGGED = group(
    ("wrong", 0.1, False, 4),
    ("right and long", 1.0, True, 9),
    ("right", 1.0, True, 3),
    ("right, again", 1.0, True, 3),
    ("right and long", 1.0, True, 9),
)
rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]), st.sampled_from([0.0, 0.1, 1.0]), st.booleans(), st.integers(1, 4)
    ),
    min_size=1,
    max_size=6,
)


def test_the_best_is_the_highest_then_the_shortest_then_the_first() -> None:
    assert best_of_n(RAGGED) is RAGGED.candidates[2]
    assert best_of_n(group(("a", -1.0, False, 2), ("b", 0.5, True, 90), ("c", 0.4, True, 1))).text == "b"


@given(rows)
def test_nobody_beats_the_best(found: list[tuple]) -> None:
    some = group(*found)
    best = best_of_n(some)
    place = next(i for i, candidate in enumerate(some.candidates) if candidate is best)
    keys = [(-(c.score or 0.0), c.tokens, i) for i, c in enumerate(some.candidates)]
    assert min(keys) == keys[place]


def test_a_length_is_asked_for_only_where_scores_tie() -> None:
    apart = group(("a", 0.0, False, None), ("b", 1.0, True, None))
    assert best_of_n(apart).text == "b"
    with pytest.raises(ValueError, match=r"g\.jsonl:7: candidates\[1\] has no tokens, which is needed here"):
        best_of_n(group(("a", 1.0, True, 5), ("b", 1.0, True, None), line=7))


def test_a_score_of_zero_is_a_score_and_none_is_not() -> None:
    assert best_of_n(group(("a", -1.0, False, 1), ("b", 0.0, False, 1))).text == "b"
    with pytest.raises(ValueError, match=r"g\.jsonl:1: candidates\[0\] has no score, which is needed here"):
        best_of_n(group(("a", None, True, 1), ("b", 1.0, True, 1)))


@pytest.mark.parametrize(
    ("keep", "threshold", "places"),
    [
        ("best", 1.0, [2]),
        ("best", 1.1, []),
        ("right", 1.0, [1, 2, 3, 4]),
        ("right_unique", 1.0, [1, 2, 3]),
        ("shortest_right", 1.0, [2]),
    ],
)
def test_what_each_rule_keeps(keep: str, threshold: float, places: list[int]) -> None:
    kept = rejection_sample(RAGGED, keep=keep, threshold=threshold)
    assert [id(candidate) for candidate in kept] == [id(RAGGED.candidates[i]) for i in places]


@pytest.mark.parametrize("keep", KEEP)
def test_no_rule_keeps_what_is_wrong_or_blank(keep: str) -> None:
    assert rejection_sample(group(("a", 0.1, False, 2), ("b", 0.0, False, 1)), keep=keep) == []
    assert rejection_sample(group((" \n", 1.0, True, 1)), keep=keep) == []


@pytest.mark.parametrize("keep", ["right", "right_unique", "shortest_right"])
def test_what_was_not_judged_is_not_taken_for_wrong(keep: str) -> None:
    with pytest.raises(ValueError, match=r"g\.jsonl:1: candidates\[1\] has no correct, which is needed here"):
        rejection_sample(group(("a", 1.0, True, 1), ("b", 1.0, None, 1)), keep=keep)


def cut(some: Group, *places: int) -> Group:
    """The group with the candidates at these places cut, whatever else is said of them."""
    return replace(some, candidates=tuple(replace(c, cut=i in places) for i, c in enumerate(some.candidates)))


def test_the_best_is_never_cut() -> None:
    """The verifier scored the cut one highest; the best is the best of those that ended, or there is none."""
    some = group(("a", 0.5, False, 9), ("b", 1.0, False, 8), ("c", 0.5, False, 3))
    assert best_of_n(some) is some.candidates[1]  # nothing is known of its end: it counts as ended
    assert best_of_n(cut(some, 1)) == replace(some.candidates[2], cut=False)
    assert best_of_n(cut(some, 0, 1, 2)) is None
    assert [c.text for c in rejection_sample(cut(some, 1), keep="best", threshold=0.5)] == ["c"]
    assert rejection_sample(cut(some, 1), keep="best", threshold=0.6) == []


@pytest.mark.parametrize("keep", KEEP)
def test_no_rule_keeps_what_was_cut(keep: str) -> None:
    """Not even where somebody else's file calls it right."""
    some = cut(
        group(("a", 1.0, True, 1), ("b", 1.0, True, 5), ("a", 1.0, True, 2), ("c", 1.0, True, 4)), 0, 3
    )
    kept = rejection_sample(some, keep=keep)
    assert kept and {id(c) for c in kept} <= {id(some.candidates[1]), id(some.candidates[2])}
    assert rejection_sample(cut(some, 0, 1, 2, 3), keep=keep) == []


def test_filters_take_what_was_cut_for_wrong() -> None:
    for places, dropped in (((), "all_right"), ((0, 1), "all_wrong"), ((0,), None)):
        assert [name for name in ("all_right", "all_wrong") if FILTERS[name](cut(EASY, *places))] == (
            [dropped] if dropped else []
        )


EASY = group(("a", 1.0, True, 1), ("b", 1.0, True, 2), line=1)
HARD = group(("a", 0.0, False, 1), ("b", 0.1, False, 2), line=2)
DULL = group(("a", 0.1, False, 1), ("b", 0.1, False, 2), ("c", 0.1, False, 3), line=3)
MIXED = group(("a", 0.1, False, 1), ("b", 1.0, True, 2), line=4)


@pytest.mark.parametrize(
    ("drop", "lines", "dropped"),
    [
        ([], [1, 2, 3, 4], {}),
        (["all_equal"], [2, 4], {"all_equal": 2}),
        (["all_wrong"], [1, 4], {"all_wrong": 2}),
        (["all_right"], [2, 3, 4], {"all_right": 1}),
        (["all_right", "all_equal"], [2, 4], {"all_right": 1, "all_equal": 1}),
        (["all_equal", "all_right"], [2, 4], {"all_equal": 2, "all_right": 0}),
        (["all_right", "all_wrong"], [4], {"all_right": 1, "all_wrong": 2}),
    ],
)
def test_filters_drop_whole_groups_and_count_them(drop: list[str], lines: list[int], dropped: dict) -> None:
    kept, counts = informative([EASY, HARD, DULL, MIXED], drop=drop)
    assert [some.line for some in kept] == lines and counts == dropped


@given(st.lists(rows, max_size=6), st.lists(st.sampled_from(sorted(FILTERS)), unique=True))
def test_what_belongs_to_a_group_stays_with_it(found: list[list[tuple]], drop: Sequence[str]) -> None:
    """Prompt, answer, candidates and provenance of every kept group are those it came with."""
    groups = [group(*some, line=i, answer=f"answer {i}") for i, some in enumerate(found)]
    kept, dropped = informative(groups, drop=drop)
    assert [id(some) for some in kept] == [id(groups[some.line]) for some in kept]
    assert [some.line for some in kept] == sorted(some.line for some in kept)
    assert len(kept) + Counter(dropped).total() == len(groups)
    assert all(not FILTERS[name](some) for some in kept for name in drop)


@example([0.1, 0.1, 0.1])  # whose mean is not .1
@given(st.lists(st.sampled_from([0.1, 0.1 + 1e-17, 0.3, 0.1 + 0.2, 1.0]), min_size=1, max_size=5))
def test_all_equal_is_the_filter_of_the_losses(values: list[float]) -> None:
    some = group(*(("a", value, None, None) for value in values))
    kept = informative_groups(torch.tensor(values, dtype=torch.float64), group_size=len(values))
    assert FILTERS["all_equal"](some) == (not kept[0]) == (len(set(values)) == 1)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="keep must be one of best, right, right_unique, shortest_right, got 'x'"
    ):
        rejection_sample(RAGGED, keep="x")
    with pytest.raises(ValueError, match="drop must be one of all_equal, all_wrong, all_right, got 'equal'"):
        informative([], drop=["all_wrong", "equal"])


def test_a_group_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"g\.jsonl:1: the group has no candidates"):
        best_of_n(group())
