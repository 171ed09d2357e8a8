"""ratio: the policy over the one that sampled, and the weights that correct an engine's drift."""

import math
from typing import Any

from case import Case, Drawn, Spec
from layout import elements, rows_to_tokens

NAN, INF = math.nan, math.inf
TOKEN, SEQUENCE = {"level": "token"}, {"level": "sequence"}
FAR = {"old_logps": (-1e4, -9e3)}

POLICY_RATIO = Spec(
    "policy_ratio",
    inputs={"logps": Drawn("BT", -4, -0.05), "old_logps": Drawn("BT", -4, -0.05), "mask": Drawn("BT")},
    layout=rows_to_tokens,
    gradients=("logps",),
    cases=(
        Case("tokens", TOKEN, "PPO, GRPO: every framework", mask="tail", mean=True),
        Case("sequences", SEQUENCE, "GSPO: TRL sequence, verl gspo", mask="tail", mean=True),
        Case("tokens, weighted", TOKEN, "PPO, GRPO: every framework", mask="tail"),
        Case("sequences, weighted", SEQUENCE, "GSPO: TRL sequence", mask="tail"),
        Case("tokens, holes over NaN", TOKEN, mask="holes", junk=NAN),
        Case("sequences, holes over NaN", SEQUENCE, mask="holes", junk=NAN),
        Case("tokens, a row without any over inf", TOKEN, mask="row", junk=INF),
        Case("sequences, a row without tokens over 1e30", SEQUENCE, mask="row", junk=1e30),
        Case("sequences, left padding over −inf", SEQUENCE, mask="head", junk=-INF),
        Case("tokens, log-ratios of 1e4 are held at 60", TOKEN, mask="tail", ranges=FAR),
        Case("sequences, log-ratios of 1e4 are held at 60", SEQUENCE, mask="tail", ranges=FAR),
        Case("tokens, ratios of e^50", TOKEN, mask="holes", ranges={"old_logps": (-55, -45)}),
    ),
)


def bounds(ratio: Any, *, mode: str, high: Any, low: Any = 0) -> list[Any]:
    return [ratio - high, ratio - low]


IMPORTANCE = Spec(
    "importance_weights",
    inputs={"ratio": Drawn("BT", 0.02, 4)},
    layout=elements,
    kinks=bounds,
    cases=(
        Case("truncate", {"mode": "truncate", "high": 2.0}, "TIS: TRL, verl, slime, OpenRLHF", mask="tail"),
        Case("mask above", {"mode": "mask", "high": 3.0}, "masked above: TRL, verl", mask="tail"),
        Case("mask on both sides", {"mode": "mask", "low": 0.5, "high": 3.5}, "IcePop", mask="tail"),
        Case("truncate on both sides", {"mode": "truncate", "low": 0.4, "high": 1.7}, mask="tail"),
        Case("truncate, holes over NaN", {"mode": "truncate", "high": 2.3}, mask="holes", junk=NAN),
        Case("mask, holes over inf", {"mode": "mask", "low": 0.7, "high": 2.3}, mask="holes", junk=INF),
        Case("all inside", {"mode": "mask", "low": 0.01, "high": 9.5}, mask="row", junk=1e30),
        Case("all above, truncated", {"mode": "truncate", "high": 1.5}, ranges={"ratio": (2, 1e20)}),
        Case("all above, masked", {"mode": "mask", "high": 1.5}, ranges={"ratio": (2, 1e20)}),
    ),
)

SPECS = (POLICY_RATIO, IMPORTANCE)
