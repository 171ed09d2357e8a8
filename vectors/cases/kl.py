"""kl: one-sample estimates of the KL to the reference, the loss with the right gradient, the entropy."""

import math
from collections.abc import Iterator
from typing import Any

from case import Case, Drawn, Spec
from layout import Unit, elements, rows_to_tokens

CLOSE = {"logps": (-2, -0.05), "ref_logps": (-2, -0.05)}  # k3 stays below the caps of 10
FAR = {"logps": (-4, -3.2), "ref_logps": (-0.5, -0.05)}  # and here above
K3_CLOSE = "k3 below 10: TRL, verl low_var_kl, torchtune, open-instruct, OpenRLHF"
PAIR = {"logps": Drawn("BT", -4, -0.05), "ref_logps": Drawn("BT", -4, -0.05)}


def held_rows(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """The row's log-probabilities twice: as what carries the gradient, and as the numbers that are held."""
    for (logps, ref_logps), places in rows_to_tokens(spec, case, inputs, mask):
        yield [logps, ref_logps, [inputs["logps"][b][t] for _, (b, t) in logps]], places


KL_ESTIMATE = Spec(
    "kl_estimate",
    inputs=PAIR,
    layout=elements,
    gradients=("logps",),
    cases=(
        Case("k1", {"kind": "k1"}, mask="tail"),
        Case("k2", {"kind": "k2"}, "k2: OpenRLHF", mask="tail"),
        Case("k3", {"kind": "k3"}, K3_CLOSE, mask="tail", ranges=CLOSE),
        Case("k3, mean", {"kind": "k3"}, K3_CLOSE, mask="tail", ranges=CLOSE, mean=True),
        Case(
            "k3 above 10",
            {"kind": "k3"},
            "k3, no cap: TRL, torchtune, open-instruct",
            mask="tail",
            ranges=FAR,
        ),
        Case("k1, holes over NaN", {"kind": "k1"}, mask="holes", junk=math.nan),
        Case("k2, holes over inf", {"kind": "k2"}, mask="holes", junk=math.inf),
        Case("k3, a row without tokens over 1e30", {"kind": "k3"}, mask="row", junk=1e30),
        Case("k1 of 1e4", {"kind": "k1"}, ranges={"logps": (-1e4, -9e3)}),
        Case("k2 of 1e4", {"kind": "k2"}, ranges={"ref_logps": (-1e4, -9e3)}),
        Case("k3 of e^50", {"kind": "k3"}, ranges={"logps": (-55, -45)}),
        Case(
            "k3 of close policies",
            {"kind": "k3"},
            ranges={"logps": (-1.000004, -1.0), "ref_logps": (-1.0, -0.999996)},
        ),
    ),
)

KL_LOSS = Spec(
    "kl_loss_with_correct_gradient",
    inputs=PAIR | {"mask": Drawn("BT")},
    layout=held_rows,
    gradients=("logps",),
    cases=(
        Case("full", {}, mean=True),
        Case("ragged", {}, mask="tail"),
        Case("holes: tool tokens are no steps", {}, mask="holes"),
        Case("holes over NaN", {}, mask="holes", junk=math.nan),
        Case("a row without tokens over inf", {}, mask="row", junk=math.inf),
        Case("left padding over 1e30", {}, mask="head", junk=1e30, mean=True),
        Case("one token: the gradient is k1", {}, mask="one", junk=math.nan),
        Case("log-ratios of 1e4", {}, mask="tail", ranges={"ref_logps": (-1e4, -9e3)}),
    ),
)

ENTROPY = Spec(
    "entropy",
    inputs={"logits": Drawn("BTV", -3, 3)},
    layout=elements,
    gradients=("logits",),
    cases=(
        Case("temperature 1", {}, "every framework at temperature 1", mask="tail", mean=True),
        Case("temperature .7", {"temperature": 0.7}, mask="tail"),
        Case("temperature 1.9, NaN under the mask", {"temperature": 1.9}, mask="holes", junk=math.nan),
        Case("1e30 under the mask", {"temperature": 0.6}, mask="row", junk=1e30),
        Case(
            "a truncated support",
            {"temperature": 0.8},
            sizes={"B": 1, "T": 2, "V": 4},
            given={"logits": [[[0.3, -math.inf, 1.1, -math.inf], [-math.inf, 2.0, -0.5, 0.25]]]},
        ),
        Case(
            "a single token",
            {"temperature": 0.8},
            sizes={"B": 1, "T": 2, "V": 3},
            given={"logits": [[[-math.inf, 1.7, -math.inf], [0.2, 0.1, -math.inf]]]},
        ),
        Case(
            "logits of 1e4",
            {"temperature": 1.3},
            sizes={"B": 1, "T": 2, "V": 4},
            given={"logits": [[[1e4, -1e4, 9999.5, 3.5], [-1e4, -1e4, -9999.0, -1e4]]]},
        ),
        Case("nearly uniform", {"temperature": 0.9}, ranges={"logits": (-0.002, 0.002)}),
    ),
)

SPECS = (KL_ESTIMATE, KL_LOSS, ENTROPY)
