"""value: the critic's loss."""

import math
from typing import Any

from case import Case, Drawn, Spec
from layout import elements

NAN, INF = math.nan, math.inf
DIALECT = "with ½: verl since #2016, OpenAI baselines, torchtune"


def borders(value: Any, old_value: Any, ret: Any, clip: Any) -> list[Any]:
    """Where the clip begins to hold, and where the two errors are the same."""
    if clip is None:
        return []
    moved = value - old_value
    clipped = old_value + max(-clip, min(clip, moved))
    return [abs(moved) - clip, *([value + clipped - 2 * ret] if abs(moved) > clip else [])]


VALUE = Spec(
    "value_loss",
    inputs={"values": Drawn("BT", -2, 2), "old_values": Drawn("BT", -2, 2), "returns": Drawn("BT", -2, 2)},
    layout=elements,
    gradients=("values",),
    kinks=borders,
    cases=(
        Case("clip .2", {"clip": 0.2}, DIALECT, mask="tail", mean=True),
        Case("clip .2, weighted", {"clip": 0.2}, DIALECT, mask="tail"),
        Case("no clip", {"clip": None}, "½ squared error", mask="tail", mean=True),
        Case("no clip, weighted", {"clip": None}, "½ squared error", mask="tail"),
        Case("a wide clip", {"clip": 1.3}, mask="tail"),
        Case("holes over NaN", {"clip": 0.37}, mask="holes", junk=NAN),
        Case("no clip, holes over NaN", {"clip": None}, mask="holes", junk=NAN),
        Case("a row without tokens over inf", {"clip": 0.37}, mask="row", junk=INF),
        Case("left padding over 1e30", {"clip": 0.37}, mask="head", junk=1e30),
        Case("returns of 1e4", {"clip": 0.37}, ranges={"returns": (-1e4, 1e4)}),
        Case("values of 1e4", {"clip": 0.37}, ranges={"values": (-1e4, 1e4)}),
    ),
)

SPECS = (VALUE,)
