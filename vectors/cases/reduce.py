"""reduce: from per-token values to one number. The mask and the denominator go into the page's function."""

import math
from collections.abc import Iterator
from typing import Any

from case import Case, Drawn, Spec, nested, shape_of
from layout import Slot, Unit


def whole(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call with all rows and the mask."""
    values = nested(shape_of("BT", case), lambda index: Slot("values", index))
    yield [values, mask] if "values" in spec.inputs else [mask], [()]


DIALECTS = (  # mode, name of a denominator, projects
    ("token_mean", 7.0, "verl token-mean, TRL dapo"),
    ("sequence_mean", 3.0, "verl seq-mean-token-mean, TRL grpo, minimind"),
    ("sequence_sum", 3.0, "verl seq-mean-token-sum"),
    (
        "constant",
        3.0 * 11,
        "verl seq-mean-token-sum-norm (newer: times rows), TRL dr_grpo: constant length 11",
    ),
)
LENGTHS = {"tail": 9.0, "holes": 10.0}

AGGREGATE = Spec(
    "aggregate",
    inputs={"values": Drawn("BT", -3, 3), "mask": Drawn("BT")},
    layout=whole,
    output="",
    gradients=("values",),
    cases=(
        *(
            Case(
                f"{mode}, ragged",
                {"mode": mode, "denom": LENGTHS["tail"] if mode == "token_mean" else denom},
                dialect,
                mask="tail",
                mean=True,
            )
            for mode, denom, dialect in DIALECTS
        ),
        Case(
            "constant, the length alone",
            {"mode": "constant", "denom": 11.0},
            "verl seq-mean-token-sum-norm (older: the length alone)",
            mask="tail",
            mean=True,
        ),
        *(
            Case(f"{mode}, holes over NaN", {"mode": mode, "denom": 13.7}, mask="holes", junk=math.nan)
            for mode, *_ in DIALECTS
        ),
        Case("a row without tokens", {"mode": "sequence_mean", "denom": 2.0}, mask="row", junk=math.inf),
        Case("a step larger than this batch", {"mode": "token_mean", "denom": 912.0}, mask="head", junk=1e30),
        Case("one token", {"mode": "sequence_mean", "denom": 5.0}, mask="one", junk=-math.inf),
        Case("values of 1e4", {"mode": "sequence_sum", "denom": 3.0}, ranges={"values": (-1e4, 1e4)}),
        Case(
            "lengths 1 and 7",
            {"mode": "sequence_mean", "denom": 2.0},
            "verl seq-mean-token-mean, TRL grpo, minimind",
            sizes={"B": 2, "T": 7},
            given={"mask": [[1, 0, 0, 0, 0, 0, 0], [1] * 7]},
            mean=True,
        ),
    ),
)

LOCAL_DENOM = Spec(
    "local_denom",
    inputs={"mask": Drawn("BT")},
    layout=whole,
    output="",
    cases=(
        Case("tokens", {"mode": "token_mean"}, "verl token-mean, TRL dapo", mask="tail"),
        Case("tokens with holes", {"mode": "token_mean"}, mask="holes"),
        Case("tokens, a row without any", {"mode": "token_mean"}, mask="row"),
        Case("sequences", {"mode": "sequence_mean"}, "verl seq-mean-token-mean, TRL grpo", mask="tail"),
        Case("sequences, a row without tokens is none", {"mode": "sequence_mean"}, mask="row"),
        Case("sequences of sums", {"mode": "sequence_sum"}, "verl seq-mean-token-sum", mask="row"),
        Case(
            "a constant length",
            {"mode": "constant", "max_tokens": 11},
            "verl seq-mean-token-sum-norm (newer: times rows), TRL dr_grpo",
            mask="head",
        ),
        Case("a constant length, a row without tokens", {"mode": "constant", "max_tokens": 11}, mask="row"),
        Case("nothing supervised", {"mode": "token_mean"}, given={"mask": [[0] * 5] * 3}),
    ),
)

SPECS = (AGGREGATE, LOCAL_DENOM)
