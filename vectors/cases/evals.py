"""evals: pass@k, a function of three whole numbers."""

from collections.abc import Iterator
from typing import Any

from case import Case, Spec
from layout import Unit
from mpmath import mpf


def counts(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call; the samples go in as a number that divides without rounding."""
    yield [mpf(case.arguments["samples"]), case.arguments["correct"], case.arguments["k"]], [()]


def prompt(name: str, samples: int, correct: int, k: int) -> Case:
    return Case(
        name,
        {"samples": samples, "correct": correct, "k": k},
        "unbiased: HumanEval's code",
    )


PASS_AT_K = Spec(
    "pass_at_k",
    inputs={},
    layout=counts,
    for_layout=("samples", "correct", "k"),
    masked="",
    cases=(
        prompt("k = 1 is the share", 7, 3, 1),
        prompt("some of ten", 10, 3, 4),
        prompt("a pair", 5, 2, 2),
        prompt("none correct", 8, 0, 3),
        prompt("all correct", 8, 8, 3),
        prompt("too few wrong ones to fill k", 8, 5, 4),
        prompt("k = n", 6, 1, 6),
        prompt("one of two hundred", 200, 1, 100),
        prompt("many samples", 1000, 37, 64),
        prompt("rare", 100000, 2, 3),
    ),
)

SPECS = (PASS_AT_K,)
