"""returns: rewards of tokens and what follows them. Weights without a gradient, so only values."""

import math
from collections.abc import Iterator
from typing import Any

from case import Case, Drawn, Spec
from layout import Unit, rows_to_tokens
from mpmath import mpf

NAN, INF = math.nan, math.inf
TOKENS, MASK = Drawn("BT", -2, 2), {"mask": Drawn("BT")}

SHAPED = Spec(
    "kl_shaped_rewards",
    inputs={
        "rewards": Drawn("B", -1, 2),
        "logps": Drawn("BT", -4, -0.05),
        "ref_logps": Drawn("BT", -4, -0.05),
    }
    | MASK,
    layout=rows_to_tokens,
    cases=(
        Case("full", {"beta": 0.13}, "k1 in the reward: verl, OpenRLHF, torchtune"),
        Case("ragged", {"beta": 0.13}, "k1 in the reward: verl, OpenRLHF, torchtune", mask="tail"),
        Case("the score stands on the last action", {"beta": 0.07}, mask="holes"),
        Case("holes over NaN", {"beta": 0.07}, mask="holes", junk=NAN),
        Case("a row without tokens over inf", {"beta": 0.07}, mask="row", junk=INF),
        Case("left padding over 1e30", {"beta": 0.07}, mask="head", junk=1e30),
        Case("no KL", {"beta": 0.0}, mask="tail"),
        Case("a score of 0 is a score", {"beta": 0.31}, mask="tail", given={"rewards": [0.0, 0.0, 0.0]}),
        Case("log-ratios of 1e4", {"beta": 0.07}, mask="tail", ranges={"ref_logps": (-1e4, -9e3)}),
    ),
)

TO_GO = Spec(
    "reward_to_go",
    inputs={"rewards": TOKENS} | MASK,
    layout=rows_to_tokens,
    cases=(
        Case("γ = 1", {"gamma": 1.0}, "REINFORCE++: verl, OpenRLHF", mask="tail"),
        Case("γ = .93", {"gamma": 0.93}, mask="tail"),
        Case("γ = 0", {"gamma": 0.0}, mask="tail"),
        Case("tool tokens are no time", {"gamma": 0.71}, mask="holes"),
        Case("holes over NaN", {"gamma": 0.71}, mask="holes", junk=NAN),
        Case("a row without tokens over inf", {"gamma": 0.71}, mask="row", junk=INF),
        Case("left padding over 1e30", {"gamma": 0.71}, mask="head", junk=1e30),
        Case("rewards of 1e4", {"gamma": 0.93}, ranges={"rewards": (-1e4, 1e4)}),
    ),
)

GAE = Spec(
    "gae",
    inputs={"rewards": TOKENS, "values": TOKENS} | MASK,
    layout=rows_to_tokens,
    output={"advantages": "BT", "returns": "BT"},
    cases=(
        Case(
            "γ = 1, λ = .95",
            {"gamma": 1.0, "gae_lambda": 0.95},
            "verl before it whitens, OpenRLHF",
            mask="tail",
        ),
        Case("γ = .93, λ = .8", {"gamma": 0.93, "gae_lambda": 0.8}, mask="tail"),
        Case("λ = 0: one step", {"gamma": 0.93, "gae_lambda": 0.0}, mask="tail"),
        Case("γ = λ = 1: reward to go − V", {"gamma": 1.0, "gae_lambda": 1.0}, mask="tail"),
        Case("tool tokens are skipped", {"gamma": 0.93, "gae_lambda": 0.6}, mask="holes"),
        Case("holes over NaN", {"gamma": 0.93, "gae_lambda": 0.6}, mask="holes", junk=NAN),
        Case("values behind the end over inf", {"gamma": 0.93, "gae_lambda": 0.6}, mask="row", junk=INF),
        Case("values behind the end over 1e30", {"gamma": 1.0, "gae_lambda": 0.95}, mask="tail", junk=1e30),
        Case("left padding over −inf", {"gamma": 0.93, "gae_lambda": 0.6}, mask="head", junk=-INF),
        Case("values of 1e4", {"gamma": 0.93, "gae_lambda": 0.8}, ranges={"values": (-1e4, 1e4)}),
    ),
)


def lengths(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call a length, as a number that divides without rounding.

    The ramps of the cases divide by a power of two: from whole numbers many frameworks go to float32.
    """
    for i, length in enumerate(inputs["lengths"]):
        yield [mpf(length)], [(i,)]


def limits(name: str, max_tokens: int, cache: int, *given: int, dialect: str | None = None) -> Case:
    arguments = {"max_tokens": max_tokens, "cache": cache}
    return Case(name, arguments, dialect, sizes={"N": len(given)}, given={"lengths": list(given)})


OVERLONG = Spec(
    "overlong_penalty",
    inputs={"lengths": Drawn("N")},
    layout=lengths,
    masked="N",
    cases=(
        limits("DAPO", 20480, 4096, 1, 16383, 17000, 19999, 20479, dialect="DAPO: verl, TRL"),
        limits("the corners", 20480, 4096, 16384, 16385, 20480, dialect="DAPO: verl, TRL"),
        limits("beyond the limit", 20480, 4096, 20481, 30000),
        limits("quarters", 12, 4, 7, 8, 9, 10, 11, 12, 13),
        limits("eighths", 100, 8, 91, 92, 93, 95, 97, 99, 100, 101),
        limits("the ramp from 0", 16, 16, 0, 1, 5, 15, 16, 17),
        limits("a ramp of one token", 16, 1, 14, 15, 16, 17),
        limits("an empty completion", 64, 16, 0),
    ),
)

SPECS = (SHAPED, TO_GO, GAE, OVERLONG)
