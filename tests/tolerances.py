"""The table of docs/determinism.md: tests that compare two ways to one result have their tolerance from it.

    within("world sizes, float32", weights(two), weights(one))

What a comparison finds is kept where NANOPOST_MEASURED names a file: `NANOPOST_MEASURED=FILE pytest …`, then
`python -m tests.tolerances FILE` prints the largest difference of each row.
"""

import functools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

PAGE = Path(__file__).parent.parent / "docs" / "determinism.md"


class Row(NamedTuple):
    measured: float
    promised: float
    reason: str  # why more than five times what was measured is promised; empty: it is not


@functools.cache
def table() -> dict[str, Row]:
    """The rows of the page's table, by name."""
    pattern = r"^\| `([^`]+)` \|[^|]*\| ([^|]+) \| ([^|]+) \|([^|]*)\|$"
    rows = re.findall(pattern, PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {name: Row(float(seen), float(most), why.strip()) for name, seen, most, why in rows}
    if len(found) < len(rows) or not rows:
        raise ValueError(
            f"{PAGE}: expected a table whose rows have different names, got {[r[0] for r in rows]}"
        )
    return found


def tolerance(name: str) -> float:
    """The largest difference that the page promises under a name; an unknown one is a ValueError."""
    if name not in table():
        raise ValueError(f"{name!r} is no row of {PAGE}: {', '.join(table())}")
    return table()[name].promised


def within(name: str, found: Any, expected: Any) -> None:
    """Assert that two results differ by no more than a row promises, and in nothing but floats.

    Args:
        name: of the row.
        found, expected: numbers, texts and tensors, in dicts and lists of any depth. A difference is absolute
            where the expected number, or the largest of its tensor, is at most 1, and a share of that above.
    """
    most, worst = tolerance(name), (0.0, "")
    for gap, place in _gaps(found, expected, ""):
        assert gap <= most, f"{name}: {place or 'it'} differs by {gap:.3g}, promised is {most:g}"
        worst = max(worst, (gap, place))
    if path := os.environ.get("NANOPOST_MEASURED"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps([name, *worst, test]) + "\n")


def _gaps(found: Any, expected: Any, place: str) -> Iterator[tuple[float, str]]:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), (place, *found.keys() ^ expected.keys())
        for key in expected:
            yield from _gaps(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), place
        for i, pair in enumerate(zip(found, expected, strict=True)):
            yield from _gaps(*pair, f"{place}/{i}")
    elif isinstance(expected, float) or (isinstance(expected, torch.Tensor) and expected.is_floating_point()):
        a, b = (torch.as_tensor(x).detach().double() for x in (found, expected))
        assert a.shape == b.shape, (place, a.shape, b.shape)
        gap = torch.where(a == b, 0.0, (a - b).abs())  # ∞ is equal to ∞
        size = torch.where(b.isfinite(), b.abs(), 0.0).max() if b.numel() else 0.0
        yield (
            (float("inf") if gap.isnan().any() else float(gap.max() / max(1.0, size))) if b.numel() else 0.0,
            place,
        )
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    else:
        assert found == expected, f"{place}: {found!r}, expected {expected!r}"


def largest(path: Path) -> dict[str, tuple[float, str, str]]:
    """The largest difference of each row in a file of measurements, where it was, and its test."""
    found: dict[str, tuple[float, str, str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        name, gap, place, test = json.loads(line)
        found[name] = max(found.get(name, (0.0, "", "")), (gap, place, test))
    return found


if __name__ == "__main__":
    for name, (gap, place, test) in sorted(largest(Path(sys.argv[1])).items()):
        print(f"{name}: {gap:.2g} in {place or 'it'} of {test}, promised {tolerance(name):g}")
