"""The arithmetic of a comparison, by hand."""

import doctest
import math
from typing import Any

import pytest
import torch

from bench import floor, inputs, machine, measure


def test_ratios_are_paired_and_their_percentiles_are_on_straight_lines() -> None:
    found = measure.ratio([1.0, 2.0, 4.0], [2.0, 6.0, 4.0])  # 2, 3 and 1 times as fast
    assert found == {"median": 2.0, "p10": pytest.approx(1.2), "p90": pytest.approx(2.8), "pairs": 3}
    assert measure.ratio([5.0], [1.0])["p90"] == 0.2
    with pytest.raises(ValueError, match="zip"):
        measure.ratio([1.0, 2.0], [1.0])


def test_docstrings_hold() -> None:
    for module in (measure, machine):
        tried = doctest.testmod(module)
        assert tried.attempted and not tried.failed


def test_every_other_pass_goes_backwards() -> None:
    turns = measure.order(["a", "b", "c"], 4)
    assert ["".join(names) for names in turns] == ["abc", "cba", "abc", "cba"]
    flat = [name for names in turns for name in names]
    places = {name: sum(i for i, other in enumerate(flat) if other == name) for name in "abc"}
    assert len(set(places.values())) == 1  # a machine that slows down steadily favours nobody


@pytest.mark.parametrize(("median", "verdict"), [(1.0, True), (1.049, True), (1.06, False), (0.94, False)])
def test_a_twin_within_five_percent_is_quiet(median: float, verdict: bool) -> None:
    assert measure.quiet({"median": median}) is verdict


def test_differences_are_relative_to_the_largest_entry_and_exact_for_whole_numbers() -> None:
    ours = {"loss": torch.tensor([4.0, 0.0]), "tokens": torch.tensor([1, 2, 3])}
    near = {"loss": torch.tensor([4.0, 3e-5]), "tokens": torch.tensor([1, 2, 3])}
    assert measure.differences(ours, near, 1e-5) == []
    far = {"loss": torch.tensor([4.0, 5e-5]), "tokens": torch.tensor([1, 0, 0])}
    found = measure.differences(ours, far, 1e-5)
    assert len(found) == 2 and "1.2e-05" in found[0] and "2 of 3 entries" in found[1]
    assert measure.differences(ours, far | {"tokens": ours["tokens"]}, 1e-9, {"loss": 1e-4}) == []
    assert measure.differences(ours, near | {"loss": torch.tensor([math.nan, 0.0])}, 1.0)
    assert measure.differences(ours, {"loss": ours["loss"]}, 1.0) == ["tokens: only one side has it"]
    assert "shapes" in measure.differences(ours, near | {"tokens": torch.tensor([1])}, 1.0)[0]


def test_verdicts() -> None:
    row: dict[str, Any] = {"default": {"median": 2.1}, "best": {"median": 1.6}, "quiet": True}
    row["bars"] = {"default": 2.0, "best": 1.5}
    assert measure.verdict(row) == "met"
    assert measure.verdict(row | {"best": {"median": 1.4}}) == "not met"
    assert measure.verdict(row | {"default": {"median": 1.9}}) == "not met"
    assert measure.verdict(row | {"quiet": False}) == "noisy"
    assert measure.verdict(row | {"memory_bar": 0.01, "memory_share": 0.02}) == "not met"
    assert measure.verdict(row | {"bars": {"default": None, "best": None}}) == "no bar"
    assert measure.verdict({"skipped": "x is not installed"}) == "skipped: x is not installed"


def test_the_floor_counts_products_and_nothing_else() -> None:
    # D 4: q 16, k and v 8 each, o 16, gate, up and down 48 each: 192 a layer; the head 4 · 6
    sizes = {"width": 4, "layers": 2, "vocabulary": 6}
    assert floor.flops([(10, 5, False)], **sizes) == 2 * (10 * 2 * 192 + 5 * 24)
    assert floor.flops([(10, 5, True)], **sizes) == 6 * (10 * 2 * 192 + 5 * 24)
    assert sum(a * b for a, b in floor.layer_shapes(4)) == 192


def test_ragged_lengths_are_the_quantiles_of_a_geometric_law() -> None:
    lengths = inputs.ragged_lengths(64, 32.0, 256)
    assert max(lengths) == math.ceil(-32 * math.log(0.5 / 64)) and min(lengths) == 1
    assert abs(sum(lengths) / 64 - 32) < 1 and lengths == inputs.ragged_lengths(64, 32.0, 256)
    rows = inputs.ragged_rows(32, 95.0, 256, 50)
    inside = sum(len(row) - 1 for row in rows)
    assert max(map(len, rows)) == 257 and 0.64 < 1 - inside / (32 * 256) < 0.66
    assert inputs.STOP not in {token for row in rows for token in row}
