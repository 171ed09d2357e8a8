"""calibration: what a difference of rewards means in Elo points and wins, and whether it holds."""

import math
from collections.abc import Iterator
from typing import Any

from case import Case, Drawn, Spec
from layout import Unit, elements
from mpmath import mpf


def bins(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call with all differences; each bin gives a count, a sum of wins and a sum of expected wins."""
    pairs = zip(inputs["chosen_rewards"], inputs["rejected_rewards"], strict=True)
    differences = [mpf(chosen) - mpf(rejected) for chosen, rejected in pairs]
    places = range(len(case.arguments["edges"]) - 1)
    yield [differences], [(name, i) for i in places for name in ("counts", "wins", "expected")]


def edge_gaps(differences: list[Any], edges: list[Any]) -> list[Any]:
    return [abs(d) - edge for d in differences for edge in edges if d or edge]


def over(name: str, argument: str, unit: float) -> Spec:
    """A function of one difference."""
    return Spec(
        name,
        inputs={argument: Drawn("P", -3 * unit, 3 * unit)},
        layout=elements,
        masked="P",
        gradients=(argument,),
        cases=(
            Case("weighted", {}),
            Case("mean", {}, mean=True),
            Case("ahead", {}, ranges={argument: (0.1 * unit, unit)}),
            Case("behind", {}, ranges={argument: (-unit, -0.1 * unit)}),
            Case("level and one unit away", {}, given={argument: [0.0, unit, -unit, 2 * unit, -2 * unit]}),
            Case("close", {}, ranges={argument: (-1e-4 * unit, 1e-4 * unit)}),
            Case("a dropped row holds NaN", {}, mask="drop", junk=math.nan),
            Case("1e4", {}, ranges={argument: (-1e4, 1e4)}),
            Case("one", {}, sizes={"P": 1}),
        ),
    )


UNIT = {"edges": [0.0, 0.5, 1.25, 2.0, 6.5]}
OPEN = {"edges": [0.0, 0.7, math.inf]}
CALIBRATION = Spec(
    "calibration",
    inputs={"chosen_rewards": Drawn("N", -3, 3), "rejected_rewards": Drawn("N", -3, 3)},
    layout=bins,
    masked="N",
    output={"counts": "K", "wins": "K", "expected": "K"},
    kinks=edge_gaps,
    cases=(
        Case("four bins", UNIT),
        Case("more pairs", UNIT, sizes={"N": 20}),
        Case("open end", OPEN, sizes={"K": 2}),
        Case("one bin", {"edges": [0.0, math.inf]}, sizes={"K": 1}),
        Case("an empty bin", UNIT, ranges={"chosen_rewards": (3, 4), "rejected_rewards": (1.3, 1.5)}),
        Case(
            "a tie counts half",
            OPEN,
            sizes={"N": 4, "K": 2},
            given={"chosen_rewards": [0.3, 1.5, -2.0, 0.1], "rejected_rewards": [0.3, 0.2, -2.0, 0.25]},
        ),
        Case("always wrong", OPEN, sizes={"K": 2}, ranges={"chosen_rewards": (-9, -3.5)}),
        Case("differences of 1e4", OPEN, sizes={"K": 2}, ranges={"chosen_rewards": (-1e4, 1e4)}),
    ),
)

SPECS = (
    over("elo_from_reward", "difference", 1.0),
    over("win_fraction", "elo_difference", 400 / math.log(10)),
    CALIBRATION,
)
