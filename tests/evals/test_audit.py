"""What scores are worth: every number counted again by plain Python, and the audit pairs that ship."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from nanopost.evals.audit import (
    AUDIT,
    EDGES,
    audit_accuracy,
    correlation,
    label_evaluation,
    pair_evaluation,
    rating_evaluation,
    read_audit,
)

SCORES = torch.tensor([[2.0, 1.0], [0.5, 0.5], [-1.0, 1.0], [6.0, 0.0], [0.3, 0.25]], dtype=torch.float64)
TOKENS = torch.tensor([[4, 9], [7, 7], [5, 3], [2, 8], [9, 1]])
LEADS = [1.0, 0.0, -2.0, 6.0, 0.05]


def test_the_pairs_that_ship_are_three_categories_in_which_length_does_not_decide():
    pairs = read_audit()
    sizes = Counter(pair.provenance.meta["category"] for pair in pairs)
    assert list(sizes) == ["short_right", "fitting_refusal", "plain_right"] and min(sizes.values()) >= 6
    shorter = Counter(
        pair.provenance.meta["category"]
        for pair in pairs
        if len(pair.chosen[0].content) < len(pair.rejected[0].content)
    )
    assert shorter["short_right"] == sizes["short_right"]
    for name in ("fitting_refusal", "plain_right"):  # neither "longer" nor "shorter" passes
        assert 0.25 < shorter[name] / sizes[name] < 0.75
    texts = [pair.prompt[0].content for pair in pairs]
    assert len(set(texts)) == len(texts)
    for pair in pairs:
        assert pair.provenance.preference_reason
        assert max(len(pair.chosen[0].content), len(pair.rejected[0].content)) < 600  # fits a small context
    assert AUDIT.parent.name == "evals"  # in the package, so it is installed with it


def test_accuracy_by_category_counts_ties_half_and_keeps_categories_apart():
    pairs = read_audit()
    names = [pair.provenance.meta["category"] for pair in pairs]
    won = {"short_right": 0.0, "fitting_refusal": 1.0, "plain_right": 0.5}
    scores = torch.tensor([[won[name], 0.5] for name in names])
    scores[0] = torch.tensor([3.0, 1.0])
    found = audit_accuracy(pairs, scores)
    assert found["short_right"] == {"pairs": 8, "accuracy": 1 / 8}
    assert found["fitting_refusal"]["accuracy"] == 1.0 and found["plain_right"]["accuracy"] == 0.5
    mixed = [pairs[i] for i in (0, 8, 1, 16)]  # a category's pairs need not stand together
    found = audit_accuracy(mixed, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    assert {name: row["accuracy"] for name, row in found.items()} == {
        "short_right": 0.5,
        "fitting_refusal": 0.0,
        "plain_right": 1.0,
    }
    with pytest.raises(ValueError, match=r"scores must be two a pair, \(24, 2\), got \(23, 2\)"):
        audit_accuracy(pairs, scores[:23])


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_pairs_are_counted_as_by_hand(margin):
    found = pair_evaluation(SCORES, TOKENS, margin=margin)
    assert found["pairs"] == 5 and found["accuracy"] == (3 + 0.5) / 5
    assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(margin - x)) for x in LEADS) / 5, abs=1e-12)
    assert found["margin"] == pytest.approx(sum(LEADS) / 5, abs=1e-12)
    assert found["elo"] == pytest.approx(400 / math.log(10) * sum(LEADS) / 5, abs=1e-9)
    assert (found["pairs_chosen_shorter"], found["accuracy_chosen_shorter"]) == (2, 1.0)
    assert (found["pairs_chosen_longer"], found["accuracy_chosen_longer"]) == (2, 0.5)
    due = [1 / (1 + math.exp(-abs(x))) for x in LEADS]
    bins = {row["from"]: row for row in found["calibration"]}
    assert [row["from"] for row in found["calibration"]] == list(EDGES)[:-1]
    assert found["calibration"][-1]["to"] is None  # JSON has no infinity
    expected = {
        0.0: (2, 1.5, due[1] + due[4]),
        1.0: (1, 1.0, due[0]),
        2.0: (1, 0.0, due[2]),
        4.0: (1, 1, due[3]),
    }
    for low, row in bins.items():
        pairs, wins, hoped = expected.get(low, (0, 0.0, 0.0))
        assert (row["pairs"], row["wins"]) == (pairs, wins)
        assert row["expected"] == pytest.approx(hoped, abs=1e-12)
    error = sum(abs(wins - hoped) for _, wins, hoped in expected.values()) / 5
    assert found["calibration_error"] == pytest.approx(error, abs=1e-12)
    flat = torch.stack([SCORES.flatten(), TOKENS.double().flatten()])
    assert found["length_correlation"] == pytest.approx(float(torch.corrcoef(flat)[0, 1]), abs=1e-12)
    json.dumps(found, allow_nan=False)


def test_no_pair_of_a_kind_has_no_accuracy():
    found = pair_evaluation(SCORES[:1], TOKENS[:1])
    assert (found["pairs_chosen_longer"], found["accuracy_chosen_longer"]) == (0, None)
    assert pair_evaluation(torch.zeros(2, 2), TOKENS[:2])["length_correlation"] is None


def test_labels_are_counted_as_by_hand():
    logits, labels = torch.tensor([2.0, -1.0, 0.0, 3.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    tokens = torch.tensor([3, 9, 4, 4])
    found = label_evaluation(logits, labels, tokens)
    towards = [2.0, 1.0, 0.0, -3.0]
    assert (found["places"], found["accuracy"], found["right"]) == (4, 2.5 / 4, 0.5)
    assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-x)) for x in towards) / 4, abs=1e-12)
    assert found["margin"] == 0.0
    pearson = float(torch.corrcoef(torch.stack([logits, tokens.float()]))[0, 1])
    assert found["length_correlation"] == pytest.approx(pearson, abs=1e-6)


def test_ratings_are_counted_where_there_are_any():
    nan = math.nan
    predictions = torch.tensor([[1.0, 9.0, 1.0], [3.0, 2.0, 1.0]])
    ratings = torch.tensor([[0.0, nan, nan], [4.0, 0.0, nan]])
    found = rating_evaluation(predictions, ratings, torch.tensor([3, 5]), names=("a", "b", "c"))
    assert found["loss"] == (1 + 1 + 4) / 3
    assert (found["rated_a"], found["error_a"], found["spread_a"]) == (2, 1.0, 2.0)
    assert (found["rated_b"], found["error_b"], found["spread_b"]) == (1, 2.0, 0.0)
    assert (found["rated_c"], found["error_c"], found["spread_c"]) == (0, None, None)
    assert found["length_correlation_a"] == pytest.approx(1.0)
    assert found["length_correlation_c"] is None
    with pytest.raises(ValueError, match="ratings: there is none"):
        rating_evaluation(predictions, torch.full_like(predictions, nan), torch.tensor([3, 5]), names="abc")


def test_correlation_is_pearsons():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, generator=generator, dtype=torch.float64)
    y = x + torch.randn(40, generator=generator, dtype=torch.float64)
    assert correlation(x, y) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-12)
    assert correlation(x, -2 * x) == pytest.approx(-1.0)
    assert correlation(x, torch.ones(40)) is None and correlation(x[:0], x[:0]) is None


@pytest.mark.parametrize(("scores", "tokens"), [(torch.zeros(0, 2), TOKENS[:0]), (SCORES, TOKENS[:4])])
def test_nothing_and_unequal_numbers_are_refused(scores, tokens):
    with pytest.raises(
        ValueError, match="scores must be as many as what they are compared with, at least one"
    ):
        pair_evaluation(scores, tokens)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            "own.jsonl:1: an audit pair has no text 'category'",
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b", "category": 3},
            "own.jsonl:1: an audit pair has no text",
        ),
        (
            {"prompt": "p", "completion": "a", "label": True},
            "own.jsonl:1: an audit takes pairs, .* is Labelled",
        ),
    ],
)
def test_a_file_of_other_records_is_refused(tmp_path: Path, line: dict, message: str):
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=message):
        read_audit(tmp_path / "own.jsonl")
