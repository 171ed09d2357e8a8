"""policy: the policy-gradient losses, element by element."""

import math
from typing import Any

from case import Case, Drawn, Spec
from layout import elements

NAN, INF = math.nan, math.inf
LOGPS, ADVANTAGES, RATIO = Drawn("BT", -4, -0.05), Drawn("BT", -2, 2), Drawn("BT", 0.05, 2.5)
SIGNS = [[-1.25, 0.75, -0.5, 1.5, -2.0], [0.0, -0.25, 1.0, 0.6, -1.1], [1.4, -0.9, 0.0, -1.7, 0.3]]


def bounds(ratio: Any, advantage: Any, clip_low: Any, clip_high: Any, dual_clip: Any = None) -> list[Any]:
    return [ratio - 1 + clip_low, ratio - 1 - clip_high, *([] if dual_clip is None else [ratio - dual_clip])]


def cispo_bounds(logp: Any, ratio: Any, advantage: Any, clip_low: Any, clip_high: Any) -> list[Any]:
    return bounds(ratio, advantage, clip_low, clip_high)


def clip(low: float, high: float, dual: float | None = None) -> dict[str, float]:
    return {"clip_low": low, "clip_high": high} | ({} if dual is None else {"dual_clip": dual})


REINFORCE = Spec(
    "reinforce_loss",
    inputs={"logps": LOGPS, "advantages": ADVANTAGES},
    layout=elements,
    gradients=("logps",),
    cases=(
        Case("mean", {}, "REINFORCE, RLOO, REINFORCE++", mask="tail", mean=True),
        Case("weighted", {}, "REINFORCE, RLOO, REINFORCE++", mask="tail"),
        Case("full", {}),
        Case("holes over NaN", {}, mask="holes", junk=NAN),
        Case("a row without tokens over inf", {}, mask="row", junk=INF),
        Case("left padding over 1e30", {}, mask="head", junk=1e30),
        Case("log-probabilities of −1e4", {}, ranges={"logps": (-1e4, -9e3)}),
        Case("advantages of 1e4", {}, ranges={"advantages": (-1e4, 1e4)}),
        Case("an advantage of 0", {}, given={"advantages": SIGNS}),
    ),
)

CLIPPED = Spec(
    "clipped_surrogate_loss",
    inputs={"ratio": RATIO, "advantages": ADVANTAGES},
    layout=elements,
    gradients=("ratio",),
    kinks=bounds,
    cases=(
        Case("one ε", clip(0.2, 0.2), "PPO, GRPO: ε = .2 on both sides", mask="tail", mean=True),
        Case("two ε", clip(0.2, 0.28), "DAPO: .2 and .28", mask="tail", mean=True),
        Case("two ε, weighted", clip(0.2, 0.28), "DAPO: .2 and .28", mask="tail"),
        Case(
            "a sequence's ratio",
            clip(3e-4, 4e-4),
            "GSPO: 3e-4 and 4e-4",
            given={"ratio": [[r] * 5 for r in (0.9981, 1.0023, 0.9914)]},
            mean=True,
        ),
        Case(
            "dual clip 3", clip(0.2, 0.28, 3.0), "verl: dual clip 3", ranges={"ratio": (0.05, 9)}, mean=True
        ),
        Case(
            "dual clip 10",
            clip(0.2, 0.28, 10.0),
            "verl's DAPO recipe: dual clip 10",
            ranges={"ratio": (5, 30)},
        ),
        Case("dual clip, weighted", clip(0.15, 0.31, 2.2), mask="holes", ranges={"ratio": (0.05, 9)}),
        Case("no lower bound", clip(1.0, 0.37), mask="tail"),
        Case("holes over NaN", clip(0.15, 0.31), mask="holes", junk=NAN),
        Case("holes over NaN, dual clip", clip(0.15, 0.31, 2.2), mask="holes", junk=NAN),
        Case("a row without tokens over inf", clip(0.15, 0.31), mask="row", junk=INF),
        Case("a row without tokens over inf, dual clip", clip(0.15, 0.31, 2.2), mask="row", junk=INF),
        Case("left padding over 1e30", clip(0.15, 0.31), mask="head", junk=1e30),
        Case("ratios of 1e20", clip(0.15, 0.31), ranges={"ratio": (1e19, 1e20)}),
        Case("ratios near 0", clip(0.15, 0.31), ranges={"ratio": (0.0, 1e-3)}),
        Case("advantages of both signs and 0", clip(0.15, 0.31), given={"advantages": SIGNS}),
    ),
)

CISPO = Spec(
    "cispo_loss",
    inputs={"logps": LOGPS, "ratio": RATIO, "advantages": ADVANTAGES},
    layout=elements,
    gradients=("logps",),
    kinks=cispo_bounds,
    cases=(
        Case("two-sided", clip(0.2, 0.28), "verl: 1 − .2 to 1 + .28", mask="tail", mean=True),
        Case("upper bound 1.28", clip(1.0, 0.28), "open-instruct: at most 1 + .28", mask="tail", mean=True),
        Case(
            "upper bound 5, the ε itself",
            clip(1.0, 4.0),
            "TRL: epsilon_high 5 is the bound",
            mask="tail",
            ranges={"ratio": (0.05, 9)},
            mean=True,
        ),
        Case(
            "upper bound 5",
            clip(1.0, 4.0),
            "minimind: at most 5",
            mask="tail",
            ranges={"ratio": (2, 9)},
            mean=True,
        ),
        Case("weighted", clip(0.15, 0.31), mask="tail"),
        Case("holes over NaN", clip(0.15, 0.31), mask="holes", junk=NAN),
        Case("a row without tokens over inf", clip(0.15, 0.31), mask="row", junk=INF),
        Case("left padding over 1e30", clip(0.15, 0.31), mask="head", junk=1e30),
        Case("ratios of 1e20", clip(1.0, 0.31), ranges={"ratio": (1e19, 1e20)}),
        Case("log-probabilities of −1e4", clip(0.15, 0.31), ranges={"logps": (-1e4, -9e3)}),
        Case("advantages of both signs and 0", clip(0.15, 0.31), given={"advantages": SIGNS}),
    ),
)

SHAPED = Spec(
    "off_policy_shaped_loss",
    inputs={"logps": LOGPS, "advantages": ADVANTAGES},
    layout=elements,
    gradients=("logps",),
    cases=(
        Case("γ = .1", {"shaping_gamma": 0.1}, "LUFFY", mask="tail", mean=True),
        Case("γ = .1, weighted", {"shaping_gamma": 0.1}, "LUFFY", mask="tail"),
        Case("a large γ", {"shaping_gamma": 3.7}, mask="tail"),
        Case("holes over NaN", {"shaping_gamma": 0.23}, mask="holes", junk=NAN),
        Case("a row without tokens over −inf", {"shaping_gamma": 0.23}, mask="row", junk=-INF),
        Case("left padding over 1e30", {"shaping_gamma": 0.23}, mask="head", junk=1e30),
        Case("log-probabilities of −1e4", {"shaping_gamma": 0.23}, ranges={"logps": (-1e4, -9e3)}),
        Case("nearly sure", {"shaping_gamma": 0.23}, ranges={"logps": (-0.01, -0.0001)}),
        Case("advantages of both signs and 0", {"shaping_gamma": 0.23}, given={"advantages": SIGNS}),
    ),
)

SPECS = (REINFORCE, CLIPPED, CISPO, SHAPED)
