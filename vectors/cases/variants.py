"""variants: a whole policy-gradient loss, from rewards and log-probabilities to one number."""

import math
from collections.abc import Iterator
from typing import Any

import page
from case import Case, Drawn, Spec
from layout import Slot, Unit


def whole(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call with all completions; what a stop-gradient holds goes in as numbers and not as slots."""
    tokens = [[(b, t) for t, m in enumerate(row) if m] for b, row in enumerate(mask)]

    def rows(name: str) -> list[list[Slot]]:
        return [[Slot(name, place) for place in row] for row in tokens]

    names = ("values", "logps", "old_logps", "ref_logps")
    rewards = [Slot("rewards", (b,)) for b in range(len(mask))]
    held = [[inputs["logps"][b][t] for b, t in row] for row in tokens]
    yield [rewards, *map(rows, names), inputs["traces"], held], [()]


def bounds(
    rewards: Any, values: Any, logps: Any, old_logps: Any, ref_logps: Any, traces: Any, held: Any, **own: Any
) -> list[Any]:
    """How far each ratio stands from the bounds of its clip."""
    row = page.scalar("variants").__globals__["TABLE"][own["variant"]]
    level, low, high = row[1], row[3], row[4]
    gaps = [
        [new - old for new, old in zip(*pair, strict=True)] for pair in zip(logps, old_logps, strict=True)
    ]
    flat = [sum(g) / len(g) for g in gaps] if level == "sequence" else [gap for g in gaps for gap in g]
    ratios = [math.exp(gap) for gap in flat]
    return [r - border for r in ratios for border in (1 - low, 1 + high) if math.isfinite(border)]


NAMES = {
    "reinforce": None,
    "rloo": None,
    "reinforce++": None,
    "ppo": None,
    "grpo": "TRL grpo with β .04, GRPO of Shao 2024",
    "dr_grpo": "TRL dr_grpo with scale_rewards none",
    "dapo": "TRL dapo with ε .2 and .28, verl token-mean",
    "gspo": "TRL grpo with importance_sampling_level sequence",
    "cispo": "TRL cispo with epsilon_high 5, minimind",
    "luffy": None,
    "nanopost": None,
}
TWO_GROUPS = {"group_size": 3, "max_tokens": 9}

VARIANTS = Spec(
    "variants",
    inputs={
        "rewards": Drawn("N", -0.5, 1.5),
        "values": Drawn("NT", -0.5, 1.0),
        "logps": Drawn("NT", -2.5, -0.05),
        "old_logps": Drawn("NT", -2.5, -0.05),
        "ref_logps": Drawn("NT", -2.5, -0.05),
        "traces": Drawn("N", options=(False, True)),
        "mask": Drawn("NT"),
    },
    layout=whole,
    masked="NT",
    output="",
    gradients=("logps",),
    kinks=bounds,
    cases=(
        *(
            Case(name, {"variant": name} | TWO_GROUPS, dialect, mask="tail", sizes={"N": 6})
            for name, dialect in NAMES.items()
        ),
        *(
            Case(
                f"{name}, left padding over NaN",
                {"variant": name, "group_size": 4, "max_tokens": 17},
                mask="head",
                junk=math.nan,
                sizes={"N": 4},
            )
            for name in NAMES
        ),
        *(
            Case(
                f"{name}, equal rewards",
                {"variant": name, "group_size": 3, "max_tokens": 5},
                mask="holes",
                sizes={"N": 3},
                given={"rewards": [0.7, 0.7, 0.7]},
            )
            for name in ("grpo", "rloo", "reinforce++")
        ),
    ),
)

SPECS = (VARIANTS,)
