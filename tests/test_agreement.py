"""docs/agreement.md says of other frameworks what their adapters find, wherever they are installed."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from vectors import agreement

ROOT = Path(__file__).resolve().parent.parent
TEXT = agreement.PAGE.read_text(encoding="utf-8")
CASES = {
    path.stem: len(json.loads(path.read_text(encoding="utf-8"))["cases"])
    for path in (ROOT / "vectors").glob("*.json")
    if path.stem != "schema"
}

MEND = "install the extra `oracle` and run `python vectors/agreement.py`"

frameworks = pytest.mark.parametrize("framework", agreement.ADAPTERS)


@frameworks
def test_the_page_counts_every_case_of_every_file(framework: str) -> None:
    _, counts, absent = agreement.stated(framework, TEXT)
    assert counts.keys() | absent == CASES.keys(), MEND
    assert not counts.keys() & absent
    cases = {name: sum(numbers) for name, numbers in counts.items()}
    assert cases == {name: CASES[name] for name in counts}, MEND


@frameworks
def test_a_row_with_a_difference_or_a_gap_says_why(framework: str) -> None:
    rows = agreement.rows_of(agreement.section(TEXT, framework))
    assert rows
    assert [name for name, ((_, *rest), prose) in rows.items() if any(rest) and not prose] == []


@frameworks
def test_the_page_states_what_the_adapter_finds(framework: str) -> None:
    page_version, counts, absent = agreement.stated(framework, TEXT)
    try:
        installed = version(agreement.ADAPTERS[framework][1])
    except PackageNotFoundError:
        pytest.skip("the extra `oracle` is not installed")
    if installed != page_version:
        pytest.skip(f"the page is about {framework} {page_version}, {installed} is installed")
    _, found = agreement.measure(framework)
    offered = {name: numbers for name, numbers in found.items() if any(numbers[:2])}
    assert offered == counts, MEND
    assert found.keys() - offered.keys() == absent, MEND


def test_new_numbers_keep_the_prose() -> None:
    page = (
        "# Page\n\n## TRL 1.0\n\n| function | agree | differ | not offered | |\n|---|---|---|---|---|\n"
        "| `a` | 1 | 0 | 1 | why |\n| `gone` | 1 | 0 | 0 | |\n\nNo counterpart: `c`.\n\n## Next 2\n\ntext\n"
    )
    new = agreement.rewritten("TRL", page, "1.1", {"a": (2, 1, 0), "b": (1, 0, 0), "d": (0, 0, 4)})
    assert agreement.stated("TRL", new) == ("1.1", {"a": (2, 1, 0), "b": (1, 0, 0)}, {"d"})
    assert "| `a` | 2 | 1 | 0 | why |" in new
    assert new.endswith("## Next 2\n\ntext\n")


def test_an_adapter_that_crashes_is_an_error() -> None:
    with pytest.raises(ValueError, match="crashed"):
        agreement.counts_of([{"function": "a", "outcome": "crashed"}])
