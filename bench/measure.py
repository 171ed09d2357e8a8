"""The arithmetic of a comparison: the order of the runs, paired ratios, what counts as quiet, equal and met.

Nothing here measures anything; it is told times and tensors. So a test can check every number by hand.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

QUIET = 0.05  # an A/A ratio further from 1 than this is noise
WARM_UPS = 2  # iterations of a side before its first timed one
MIN_PAIRS = 7


def order(sides: Sequence[str], passes: int) -> list[list[str]]:
    """Who runs when: every pass runs each side once, and every other pass goes backwards (ABBA).

    A machine that slows down steadily favours whoever runs first; backwards it favours the others as much.

    >>> order(["ours", "peer"], 2)
    [['ours', 'peer'], ['peer', 'ours']]
    """
    return [list(sides) if i % 2 == 0 else list(reversed(sides)) for i in range(passes)]


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, straight lines between them.

    >>> quantile([1.0, 2.0, 4.0], 0.5), quantile([1.0, 2.0, 4.0], 0.75)
    (2.0, 3.0)
    """
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """How many times as fast ours is: theirs over ours, pass by pass; median, p10 and p90 of these ratios."""
    paired = [their / our for our, their in zip(ours, theirs, strict=True)]
    return {
        "median": statistics.median(paired),
        "p10": quantile(paired, 0.1),
        "p90": quantile(paired, 0.9),
        "pairs": len(paired),
    }


def quiet(twin: Mapping[str, float]) -> bool:
    """Whether a program measured against itself came out within 5 % of 1."""
    return abs(twin["median"] - 1.0) <= QUIET


def differences(
    ours: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    tolerance: float,
    special: Mapping[str, float] | None = None,
) -> list[str]:
    """Where two digests differ: whole numbers must be equal, others within `tolerance` of the largest entry.

    `special` has the tolerances of tensors with one of their own. Both must hold the same names and shapes; a
    value that is not finite is a difference.
    """
    found = [f"{name}: only one side has it" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if a.shape != b.shape:
            found.append(f"{name}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
        elif not a.is_floating_point():
            if wrong := int((a != b).sum()):
                found.append(f"{name}: {wrong} of {a.numel()} entries differ")
        else:
            a, b = a.double(), b.double()
            error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
            allowed = (special or {}).get(name, tolerance)
            if not error <= allowed:
                found.append(f"{name}: off by {error:.1e} of its largest entry, {allowed:.0e} allowed")
    return found


def verdict(row: Mapping[str, Any]) -> str:
    """What a row of the results comes to: "met", "not met", "noisy", "no bar", or why there is no number.

    The gate is the peer's best setting; where there is a bar for its default as well, both must hold.
    """
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    if not row.get("quiet", True):
        return "noisy"
    held = [row[name]["median"] >= bar for name, bar in row["bars"].items() if bar is not None]
    if row.get("memory_bar") is not None:
        held.append(row["memory_share"] <= row["memory_bar"])
    return "no bar" if not held else "met" if all(held) else "not met"
