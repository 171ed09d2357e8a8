"""likelihood: log-probabilities of targets, the support that truncation leaves, and the loss on them."""

import itertools
import math
from typing import Any

from case import Case, Drawn, Spec
from layout import elements, rows_with_mask


def mass_near_p(logits: list[Any], top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0) -> list[Any]:
    """How far the mass of each prefix stays from p, and equal logits from each other."""
    ranked = sorted((float(z) / float(temperature) for z in logits), reverse=True)
    gaps = [a - b for a, b in itertools.pairwise(ranked)] if top_k or top_p < 1 else []
    ranked = ranked[: top_k or len(ranked)]
    weights = [math.exp(z - ranked[0]) for z in ranked]
    masses = [sum(weights[: i + 1]) / sum(weights) - float(top_p) for i in range(len(weights))]
    return gaps + (masses if top_p < 1 else [])


def target_kinks(logits: list[Any], target_id: int, temperature=1.0, top_k=0, top_p=1.0) -> list[Any]:
    return mass_near_p(logits, top_k, top_p, temperature)


def support_kinks(logits: list[Any], keep_id: int | None = None, *, top_k: int, top_p: float) -> list[Any]:
    return mass_near_p(logits, top_k, top_p)


HUGE = [[1e4, -1e4, 0.0, 3.5, 2.25, -7.0], [-1e4, -1e4, -1e4, -1e4, -1e4, -9.99e3], [9.99e3, 1e4, 0, 0, 0, 1]]
HUGE = [[[float(z) for z in row] for row in HUGE]]
IDS = [[0, 4, 1]]

TOKEN_LOGPS = Spec(
    "token_logps",
    inputs={"logits": Drawn("BTV", -3, 3), "target_ids": Drawn("BT", below="V")},
    layout=elements,
    gradients=("logits",),
    kinks=target_kinks,
    cases=(
        Case("defaults", {}, "every framework at temperature 1", mask="tail", mean=True),
        Case("temperature .7", {"temperature": 0.7}, mask="tail"),
        Case("temperature 1.9, NaN under the mask", {"temperature": 1.9}, mask="holes", junk=math.nan),
        Case("top-k 3", {"temperature": 0.7, "top_k": 3}, mask="tail", junk=1e30),
        Case("top-p .6", {"temperature": 1.3, "top_p": 0.6}, mask="row", junk=math.nan),
        Case("top-k 4, then top-p .8", {"temperature": 0.9, "top_k": 4, "top_p": 0.8}, mask="head"),
        Case("greedy: top-k 1 leaves the best and the target", {"temperature": 1.1, "top_k": 1}, mask="tail"),
        Case(
            "logits of 1e4",
            {"temperature": 0.8},
            sizes={"B": 1, "T": 3},
            given={"logits": HUGE, "target_ids": IDS},
        ),
        Case(
            "a logit of −inf outside the support",
            {"temperature": 0.8},
            sizes={"B": 1, "T": 2, "V": 3},
            given={"logits": [[[0.3, -math.inf, 1.1], [-math.inf, 2.0, -0.5]]], "target_ids": [[2, 1]]},
        ),
    ),
)

TRUNCATE_LOGITS = Spec(
    "truncate_logits",
    inputs={"logits": Drawn("BTV", -3, 3)},
    layout=elements,
    gradients=("logits",),
    output="BTV",
    kinks=support_kinks,
    cases=(
        Case("nothing truncated", {"top_k": 0, "top_p": 1.0}),
        Case("top-k 3", {"top_k": 3, "top_p": 1.0}),
        Case("top-k 1", {"top_k": 1, "top_p": 1.0}),
        Case("top-k beyond the vocabulary", {"top_k": 40, "top_p": 1.0}),
        Case("top-p .5", {"top_k": 0, "top_p": 0.5}),
        Case("top-p .93", {"top_k": 0, "top_p": 0.93}),
        Case("top-p of almost nothing keeps the best", {"top_k": 0, "top_p": 0.0012}),
        Case("top-k 4, then top-p .7 of what it left", {"top_k": 4, "top_p": 0.7}),
        Case(
            "logits of 1e4",
            {"top_k": 3, "top_p": 0.9},
            sizes={"B": 1, "T": 2},
            given={"logits": [[[1e4, -1e4, 9999.5, 3.5, 2.25, -7.0], [-5e3, -1e4, 12.0, 11.5, 10.25, 9.0]]]},
        ),
    ),
)

SFT_LOSS = Spec(
    "sft_loss",
    inputs={"logps": Drawn("BT", -6, -0.01)},
    layout=elements,
    gradients=("logps",),
    cases=(
        Case("full", {}, "every framework", mean=True),
        Case("ragged", {}, mask="tail", mean=True),
        Case("weighted", {}, mask="tail"),
        Case("holes over NaN", {}, mask="holes", junk=math.nan),
        Case("a row without tokens over −inf", {}, mask="row", junk=-math.inf),
        Case("left padding over 1e30", {}, mask="head", junk=1e30, mean=True),
        Case("one token", {}, mask="one", junk=math.nan, mean=True),
        Case("log-probabilities of −1e4", {}, ranges={"logps": (-1e4, -9e3)}),
    ),
)

SEQUENCE_LOGPS = Spec(
    "sequence_logps",
    inputs={"logps": Drawn("BT", -6, -0.01), "mask": Drawn("BT")},
    layout=rows_with_mask,
    gradients=("logps",),
    output="B",
    cases=(
        Case("sum", {"average": False}, "DPO, IPO by sums: OpenRLHF, rlhf-book", mask="tail"),
        Case("mean", {"average": True}, "ORPO, SimPO, dpo_norm; IPO in TRL", mask="tail"),
        Case("sum, holes over NaN", {"average": False}, mask="holes", junk=math.nan),
        Case("mean, holes over NaN", {"average": True}, mask="holes", junk=math.nan),
        Case("sum, a row without tokens gives 0", {"average": False}, mask="row", junk=math.inf),
        Case("mean, a row without tokens gives 0", {"average": True}, mask="row", junk=-math.inf),
        Case("sum of −1e4 each", {"average": False}, mask="head", ranges={"logps": (-1e4, -9e3)}),
        Case("mean over the batch of means", {"average": True}, mask="head", junk=1e30, mean=True),
        Case("full", {"average": True}),
    ),
)

SPECS = (TOKEN_LOGPS, TRUNCATE_LOGITS, SFT_LOSS, SEQUENCE_LOGPS)
