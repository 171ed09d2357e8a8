"""Pairs and labels: which of a group come out by each rule, and that nothing of the group is lost."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopost.data.preference import parse_preference, preference_line
from nanopost.data.schema import Candidate, Group, Message, Preference, Provenance
from nanopost.rollout.pairs import RULES, build_labels, build_pairs, describe_pairs

OWN = Provenance(
    error_type="sum",
    review_round=2,
    disagreement=0.0,
    verifier_name="nanopost.rewards.math:gsm8k",
    verifier_version="0.1.0",
    test_case_hash="ab12",
    sampling={"temperature": 0.7, "seed": 3},
    meta={"source": "hand"},
)


def group(*rows: tuple, provenance: Provenance = OWN, answer: object = "18") -> Group:
    """A group of (text, score, correct, tokens); each has a reason of its own."""
    candidates = tuple(
        Candidate(text, score=score, correct=correct, tokens=tokens, reason=f"reason {i}")
        for i, (text, score, correct, tokens) in enumerate(rows)
    )
    return Group((Message("user", "How many?"),), candidates, provenance, answer, "g.jsonl", 5)


def texts(pairs: list[Preference]) -> list[tuple[str, str]]:
    for pair in pairs:
        assert [message.role for message in (*pair.chosen, *pair.rejected)] == ["assistant"] * 2
    return [(pair.chosen[0].content, pair.rejected[0].content) for pair in pairs]


MIXED = group(
    ("w0", 0.0, False, 5),
    ("r1", 1.0, True, 12),
    ("r2", 1.0, True, 8),
    ("w3", 0.1, False, 2),
    ("r4", 1.0, True, 30),
    ("r5", 1.0, True, 8),
    ("w6", 0.1, False, 40),
    ("r4", 1.0, True, 30),
    (" ", 0.0, False, 1),
)


def test_right_over_wrong_pairs_them_in_their_order_and_uses_each_once() -> None:
    assert texts(build_pairs(MIXED, rule="right_over_wrong")) == [("r1", "w0"), ("r2", "w3"), ("r4", "w6")]


@pytest.mark.parametrize(
    ("margin", "rejected"),
    [
        (0, ["r4", "w0", "r1", "w3", "w6"]),
        (3, ["r4", "w0", "r1", "w3", "w6"]),
        (4, ["r4", "w0", "w3", "w6"]),  # r1 is longer by 4, which is not more than 4
        (21, ["r4", "w0", "w3", "w6"]),
        (22, ["w0", "w3", "w6"]),
    ],
)
def test_right_and_concise_is_over_right_and_padded_and_over_wrong(
    margin: float, rejected: list[str]
) -> None:
    pairs = texts(build_pairs(MIXED, rule="right_and_concise", margin=margin))
    assert pairs == [("r2", other) for other in rejected]


def test_right_and_concise_without_a_tier() -> None:
    alone = group(("r0", 1.0, True, 5), ("r1", 1.0, True, 5))
    assert build_pairs(alone, rule="right_and_concise") == []
    assert build_pairs(group(("w", 0.0, False, 5)), rule="right_and_concise") == []
    unmeasured = group(("w0", 0.0, False, None), ("r1", 1.0, True, 5))  # a wrong one's length plays no part
    assert texts(build_pairs(unmeasured, rule="right_and_concise")) == [("r1", "w0")]


def test_score_pairs_the_highest_with_the_lowest_beyond_the_margin() -> None:
    some = group(
        ("a", 0.5, None, None), ("b", 0.25, None, None), ("c", 1.0, None, None), ("d", 0.0, None, None)
    )
    assert texts(build_pairs(some, rule="score")) == [("c", "d"), ("a", "b")]
    assert texts(build_pairs(some, rule="score", margin=0.25)) == [("c", "d")]
    assert build_pairs(some, rule="score", margin=1.0) == []
    assert build_pairs(group(("a", 0.1, None, 1), ("b", 0.1, None, 9)), rule="score") == []


def cut(some: Group, *places: int) -> Group:
    """The group with the candidates at these places cut, whatever else is said of them."""
    return replace(some, candidates=tuple(replace(c, cut=i in places) for i, c in enumerate(some.candidates)))


def test_score_never_chooses_what_was_cut_and_may_reject_it() -> None:
    some = group(("a", 0.5, None, 1), ("b", 0.25, None, 1), ("c", 1.0, None, 1), ("d", 0.0, None, 1))
    assert texts(build_pairs(cut(some, 2), rule="score")) == [("a", "d")]
    assert texts(build_pairs(cut(some, 2, 3), rule="score")) == [("a", "d")]  # over d, which was cut too
    assert texts(build_pairs(cut(some, 3), rule="score")) == [("c", "d"), ("a", "b")]
    assert build_pairs(cut(some, 0, 1, 2), rule="score") == []


def test_right_by_somebody_elses_word_and_cut_is_not_right() -> None:
    some = cut(group(("r0", 1.0, True, 3), ("r1", 1.0, True, 5), ("w2", 0.0, False, 2)), 0)
    for rule in ("right_over_wrong", "right_and_concise"):
        assert texts(build_pairs(some, rule=rule)) == [("r1", "r0")] + [("r1", "w2")] * (
            rule == "right_and_concise"
        )
        assert build_pairs(some, rule=rule)[0].provenance.pass_rate == 1 / 3
    assert [label.label for label in build_labels(some)] == [False, True, False]


def test_a_text_that_ended_stands_for_the_same_text_cut() -> None:
    some = cut(group(("a", 1.0, False, 4), ("w", 0.0, False, 2), ("a", 1.0, True, 5)), 0)
    for rule in RULES:
        assert texts(build_pairs(some, rule=rule)) == [("a", "w")]
    assert describe_pairs(build_pairs(some, rule="score")).startswith("mean tokens: chosen 5.0, rejected 2.0")


def test_at_most_so_many_pairs_a_group_and_they_are_the_first() -> None:
    for rule in RULES:
        everything = build_pairs(MIXED, rule=rule)
        assert len(everything) > 2
        for count in (1, 2, 99):
            assert build_pairs(MIXED, rule=rule, pairs_per_group=count) == everything[:count]


rows = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", "d", "e", " "]),
        st.sampled_from([0.0, 0.1, 1.0]),
        st.booleans(),
        st.integers(1, 9),
        st.sampled_from([None, False, True]),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda row: row[0],
)


@given(rows, st.sampled_from(sorted(RULES)), st.integers(0, 3))
def test_every_pair_is_on_its_rules_side(found: list[tuple], rule: str, margin: int) -> None:
    """Chosen is above rejected by the rule's own measure; where nothing comes out, nothing could."""
    ended = [not cut for *_, cut in found]
    some, margin = group(*(row[:4] for row in found)), 0 if rule == "right_over_wrong" else margin
    some = cut(some, *(i for i, fine in enumerate(ended) if not fine))
    row = {
        text: (score, right and fine, tokens, fine)
        for (text, score, right, tokens, _), fine in zip(found, ended, strict=True)
        if text.strip()
    }
    pairs = texts(build_pairs(some, rule=rule, margin=margin))

    def above(chosen: str, rejected: str) -> bool:
        (s, r, n, fine), (other_s, other_r, other_n, _) = row[chosen], row[rejected]
        shortest = min([tokens for _, right, tokens, _ in row.values() if right], default=0)
        padded = rule == "right_and_concise" and r and other_r and other_n - n > margin
        if rule == "score":
            return fine and s - other_s > margin
        return ((r and not other_r) or padded) and (rule != "right_and_concise" or n == shortest)

    assert all(above(*pair) for pair in pairs) and len(set(pairs)) == len(pairs)
    assert bool(pairs) == any(above(*pair) for pair in product(row, row) if pair[0] != pair[1])
    assert not {" "} & {text for pair in pairs for text in pair}


@pytest.mark.parametrize("rule", RULES)
def test_a_pair_keeps_its_group_and_names_its_rule(rule: str) -> None:
    for pair in build_pairs(MIXED, rule=rule):
        found = pair.provenance
        assert found.candidates == MIXED.candidates and found.preference_reason == rule
        rejected = next(c for c in MIXED.candidates if c.text == pair.rejected[0].content)
        assert found.failure_reason == rejected.reason
        assert found.pass_rate == 5 / 9
        assert found.meta == {"source": "hand", "answer": "18"}
        changed = {"preference_reason", "failure_reason", "pass_rate", "candidates", "meta"}
        assert {k: v for k, v in vars(found).items() if k not in changed} == {
            k: v for k, v in vars(OWN).items() if k not in changed
        }
        assert (pair.prompt, pair.file, pair.line) == (MIXED.prompt, "g.jsonl", 5)
    assert MIXED.provenance.meta == {"source": "hand"}  # the group itself is as it was


def test_the_reasons_of_the_group_itself_go_on_in_meta() -> None:
    """A group says why it was collected and why its prompt fails: the record's own reasons are others."""
    own = replace(OWN, preference_reason="judged by hand", failure_reason="sum wrong")
    some = replace(MIXED, provenance=own)
    kept = {"group_preference_reason": "judged by hand", "group_failure_reason": "sum wrong"}
    for record in (build_pairs(some, rule="score")[0], build_labels(some)[1]):
        assert record.provenance.meta == {"source": "hand", "answer": "18", **kept}
        assert record.provenance.preference_reason in ("score", "outcome")
        assert parse_preference(preference_line(record), file="g.jsonl", line=5) == record
    taken = replace(MIXED, provenance=replace(own, meta={"group_failure_reason": "x"}))
    with pytest.raises(ValueError, match=r"g\.jsonl:5: meta has 'group_failure_reason', a name that is kept"):
        build_pairs(taken, rule="score")


def test_a_pass_rate_is_counted_only_where_none_is_named_and_all_are_judged() -> None:
    named = replace(MIXED, provenance=replace(OWN, pass_rate=0.0))
    assert build_pairs(named, rule="score")[0].provenance.pass_rate == 0.0
    partly = group(("a", 1.0, True, 1), ("b", 0.0, None, 1))
    assert build_pairs(partly, rule="score")[0].provenance.pass_rate is None
    unanswered = group(("a", 1.0, True, 1), ("b", 0.0, False, 1), answer=None)
    assert build_pairs(unanswered, rule="score")[0].provenance.meta == {"source": "hand"}


def test_labels_are_every_text_with_its_verdict() -> None:
    labels = build_labels(MIXED)
    assert [(label.completion[0].content, label.label) for label in labels] == [
        (candidate.text, candidate.correct) for candidate in MIXED.candidates if candidate.text.strip()
    ]
    assert len(labels) == 8
    for label in labels:
        found = label.provenance
        assert found.candidates == MIXED.candidates and found.preference_reason == "outcome"
        assert (found.verifier_name, found.sampling) == (OWN.verifier_name, OWN.sampling)
        assert (found.failure_reason is None) == label.label
    assert [label.provenance.failure_reason for label in labels[:2]] == ["reason 0", None]
    with pytest.raises(ValueError, match=r"g\.jsonl:5: candidates\[0\] has no correct"):
        build_labels(group(("a", 1.0, None, 1)))


def test_what_a_rule_reads_must_be_there() -> None:
    for rule, row, field in (
        ("right_over_wrong", ("b", 1.0, None, 1), "correct"),
        ("right_and_concise", ("b", 1.0, True, None), "tokens"),
        ("score", ("b", None, True, 1), "score"),
    ):
        with pytest.raises(ValueError, match=rf"g\.jsonl:5: candidates\[1\] has no {field}"):
            build_pairs(group(("a", 1.0, True, 1), row), rule=rule)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "best"}, "rule must be one of right_over_wrong, right_and_concise, score, got 'best'"),
        ({"rule": "score", "margin": -1.0}, r"margin must be finite and at least 0, got -1\.0"),
        ({"rule": "right_over_wrong", "margin": 2.0}, r"margin must be 0 with right_over_wrong, got 2\.0"),
        ({"rule": "score", "pairs_per_group": 0}, "pairs_per_group must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_pairs(MIXED, **options)


def test_a_length_bias_is_told() -> None:
    pairs = build_pairs(MIXED, rule="right_over_wrong")  # tokens 12 5, 8 2, 30 40
    assert describe_pairs(pairs) == (
        "mean tokens: chosen 16.7, rejected 15.7; chosen is longer in 66.7% of the pairs, as long in 0.0%"
    )
    unmeasured = group(
        ("abc", 1.0, True, None), ("de", 0.0, False, 1), ("f", 1.0, True, 1), ("g", 0.0, False, 1)
    )
    assert describe_pairs(build_pairs(unmeasured, rule="right_over_wrong")) == (
        "mean characters: chosen 2.0, rejected 1.5; chosen is longer in 50.0% of the pairs, as long in 50.0%"
    )
    with pytest.raises(ValueError, match="describe_pairs: no pairs to count"):
        describe_pairs([])
