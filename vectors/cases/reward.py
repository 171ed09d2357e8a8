"""reward: pairs, rankings, ratings and step labels that a reward model is trained on."""

import itertools
import math
from typing import Any

from case import Case, Drawn, Spec
from layout import elements, rows

PAIR = {"chosen_rewards": Drawn("P", -3, 3), "rejected_rewards": Drawn("P", -3, 3)}
RANKED = {"rewards": Drawn("BK", -3, 3), "mask": Drawn("BK")}
SOME = {"mask": [[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1]]}  # candidates: four, three, two
TWO = {"mask": [[1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 1, 0]]}
RATED = {"mask": [[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]]}
EQUAL = [1.5, -0.25, 0.0, 1e4, -7.0]
RATINGS = (0.0, 1.0, 2.0, 3.0, 4.0)


def ties(rewards: list[Any], mode: str) -> list[Any]:
    """The gap between the two least steps, where the minimum changes hands."""
    least = sorted(rewards)[:2]
    return [b - a for a, b in itertools.pairwise(least)] if mode == "min" else []


BRADLEY_TERRY = Spec(
    "bradley_terry_loss",
    inputs=PAIR,
    layout=elements,
    masked="P",
    gradients=("chosen_rewards", "rejected_rewards"),
    cases=(
        Case("no margin", {"margin": 0.0}, "TRL, OpenRLHF, LLaMA-Factory", mean=True),
        Case("no margin, weighted", {"margin": 0.0}, "TRL, OpenRLHF, LLaMA-Factory"),
        Case("margin", {"margin": 0.37}, "with a margin: TRL (a column), OpenRLHF, Llama 2", mean=True),
        Case("a negative margin", {"margin": -1.4}),
        Case("a dropped pair holds NaN", {"margin": 0.37}, mask="drop", junk=math.nan),
        Case("a dropped pair holds inf", {"margin": 0.37}, mask="drop", junk=math.inf),
        Case("a dropped pair holds 1e30", {"margin": 0.37}, mask="drop", junk=1e30),
        Case("chosen at −1e4", {"margin": 0.37}, ranges={"chosen_rewards": (-1e4, -9e3)}),
        Case("rejected at −1e4", {"margin": 0.37}, ranges={"rejected_rewards": (-1e4, -9e3)}),
        Case("equal rewards", {"margin": 0.0}, given={name: EQUAL for name in PAIR}),
    ),
)


def ranked(name: str, dialect: str | None) -> Spec:
    """Both losses on rankings are asked the same questions."""
    return Spec(
        name,
        inputs=RANKED,
        layout=rows,
        masked="BK",
        output="B",
        gradients=("rewards",),
        cases=(
            Case("four candidates", {}, dialect, mean=True),
            Case("four candidates, weighted", {}, dialect),
            Case("four, three and two candidates", {}, given=SOME),
            Case("two candidates: Bradley–Terry", {}, given=TWO),
            Case("missing candidates hold NaN", {}, given=SOME, junk=math.nan),
            Case("missing candidates hold inf", {}, given=SOME, junk=math.inf),
            Case("missing candidates hold 1e30", {}, given=TWO, junk=1e30),
            Case("rewards of 1e4", {}, given=SOME, ranges={"rewards": (-1e4, 1e4)}),
            Case("equal rewards", {}, given=SOME | {"rewards": [[0.7] * 4, [-1e4] * 4, [0.0] * 4]}),
        ),
    )


ATTRIBUTE = Spec(
    "attribute_loss",
    inputs={
        "predictions": Drawn("BA", -0.5, 4.5),
        "ratings": Drawn("BA", options=RATINGS),
        "mask": Drawn("BA"),
    },
    layout=elements,
    masked="BA",
    gradients=("predictions",),
    cases=(
        Case("all rated", {}, "HelpSteer2", mean=True),
        Case("all rated, weighted", {}, "HelpSteer2"),
        Case("missing ratings", {}, given=RATED, mean=True),
        Case("missing ratings hold NaN", {}, given=RATED, junk=math.nan),
        Case("missing ratings hold −inf", {}, given=RATED, junk=-math.inf),
        Case("missing ratings hold 1e30", {}, mask="holes", junk=1e30),
        Case("a rating of 0 is a rating", {}, mask="tail", given={"ratings": [[0.0] * 5] * 3}),
        Case("predictions of 1e4", {}, mask="holes", ranges={"predictions": (-1e4, 1e4)}),
    ),
)

PROCESS = Spec(
    "process_reward_loss",
    inputs={"logits": Drawn("BT", -4, 4), "labels": Drawn("BT", options=(0.0, 1.0)), "mask": Drawn("BT")},
    layout=elements,
    gradients=("logits",),
    cases=(
        Case("every token a step", {}, mean=True),
        Case("step ends", {}, mask="holes", mean=True),
        Case("step ends, weighted", {}, mask="holes"),
        Case("NaN between the steps", {}, mask="holes", junk=math.nan),
        Case("inf between the steps, a row without any", {}, mask="row", junk=math.inf),
        Case("1e30 before the steps", {}, mask="head", junk=1e30),
        Case("all right", {}, mask="tail", given={"labels": [[1.0] * 5] * 3}),
        Case("logits of 1e4", {}, mask="holes", ranges={"logits": (-1e4, 1e4)}),
    ),
)

ZEROS = [[0.9, 0.0, 0.4, 0.7, 0.2], [0.0, 0.8, 0.3, 0.0, 0.6], [0.5, 0.25, 0.0, 0.1, 0.0]]
STEPS = Spec(
    "aggregate_steps",
    inputs={"step_rewards": Drawn("BT", 0.05, 0.99), "mask": Drawn("BT")},
    layout=rows,
    output="B",
    gradients=("step_rewards",),
    kinks=ties,
    cases=(
        Case("sum", {"mode": "sum"}, mask="tail"),
        Case("product", {"mode": "product"}, "Lightman et al. 2023", mask="tail", mean=True),
        Case("min", {"mode": "min"}, "Math-Shepherd", mask="tail", mean=True),
        Case("last", {"mode": "last"}, "Snell et al. 2024", mask="tail"),
        Case("sum, NaN between the steps", {"mode": "sum"}, mask="holes", junk=math.nan),
        Case("product, NaN between the steps", {"mode": "product"}, mask="holes", junk=math.nan),
        Case("min, −inf between the steps", {"mode": "min"}, mask="holes", junk=-math.inf),
        Case("last, 1e30 behind the last", {"mode": "last"}, mask="holes", junk=1e30),
        Case("a product with zeros", {"mode": "product"}, mask="holes", given={"step_rewards": ZEROS}),
        Case("sum of 1e4", {"mode": "sum"}, mask="head", ranges={"step_rewards": (-1e4, 1e4)}),
        Case("min of 1e4", {"mode": "min"}, mask="head", ranges={"step_rewards": (-1e4, 1e4)}),
    ),
)

SPECS = (
    BRADLEY_TERRY,
    ranked("ranking_loss", "InstructGPT"),
    ranked("plackett_luce_loss", None),
    ATTRIBUTE,
    PROCESS,
    STEPS,
)
