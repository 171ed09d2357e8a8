"""The table of docs/determinism.md: read by tests row by row, and tight; `within` notices what it should."""

import json
import math
import re

import pytest
import torch

from tests import tolerances
from tests.ranks import ROOT
from tests.tolerances import largest, table, tolerance, within

NAMED = re.compile(r'\b(?:within|tolerance)\(\s*"([^"]+)"')


def test_every_row_has_its_tests_and_every_test_its_row() -> None:
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path.name != "test_tolerances.py"]
    names = [name for path in files for name in NAMED.findall(path.read_text(encoding="utf-8"))]
    assert {*names} == {*table()}


@pytest.mark.parametrize("name", table())
def test_what_is_promised_is_what_was_measured_five_times_over_or_says_why(name) -> None:
    measured, promised, reason = table()[name]
    assert 0 <= measured <= promised
    assert (promised > 5 * measured) == bool(reason), "a reason where, and only where, it is more"


def test_an_unknown_row_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"'world sizes, float8' is no row of .*determinism\.md: again, "):
        tolerance("world sizes, float8")


@pytest.fixture
def a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tolerances, "table", lambda: {"row": tolerances.Row(1e-4, 1e-3, "")})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"a": 1.002}, {"a": 1.0}),
        ([torch.tensor([0.0, 2.0])], [torch.tensor([0.002, 2.0])]),
        (torch.tensor([2000.0]), torch.tensor([2004.0])),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}),
        ({"a": 2}, {"a": 3}),
        ([1.0], [1.0, 2.0]),
        (torch.zeros(2), torch.zeros(3)),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (math.nan, 1.0),
        (math.inf, 1.0),
        ({"a": None}, {"a": 0.0}),
    ],
)
def test_a_difference_is_noticed(a_row: None, found, expected) -> None:
    with pytest.raises((AssertionError, TypeError, RuntimeError)):
        within("row", found, expected)


def test_what_is_near_enough_passes_and_is_measured(a_row: None, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NANOPOST_MEASURED", str(tmp_path / "found"))
    within(
        "row",
        {"a": [1.0, "b"], "c": torch.tensor([-math.inf, 2000.0])},
        {"a": [1.0005, "b"], "c": torch.tensor([-math.inf, 2001.0])},
    )
    within("row", 3, 3)
    assert len((tmp_path / "found").read_text().splitlines()) == 2
    gap, place, test = largest(tmp_path / "found")["row"]
    assert gap == pytest.approx(5e-4, rel=1e-2) and place in ("/a/0", "/c")
    assert test.endswith("test_what_is_near_enough_passes_and_is_measured")
    assert json.loads((tmp_path / "found").read_text().splitlines()[1])[1] == 0.0
