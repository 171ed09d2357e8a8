"""What a file of vectors is made from: a `Spec` for each function, a `Case` for each row of it.

Numbers are drawn from `random.Random` with a seed made of the names and rounded to six decimals, so a file is
the same wherever it is made and can be read by eye.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

# Batch, tokens, vocabulary, candidates, attributes, widths of student and teacher, samples, pairs.
SIZES = {"B": 3, "T": 5, "V": 6, "K": 4, "A": 5, "S": 3, "D": 2, "N": 8, "P": 5}

Index = tuple[Any, ...]


@dataclass(frozen=True)
class Drawn:
    """How one input is drawn: its dimensions, as letters of SIZES, and a range or a choice."""

    dims: str
    low: float = 0.0
    high: float = 1.0
    options: tuple[Any, ...] = ()  # drawn from these in place of the range
    below: str = ""  # whole numbers in [0, size of this letter)
    distinct: bool = False  # no whole number twice in a row


@dataclass(frozen=True)
class Case:
    """One row of a file; what it leaves out is drawn as the spec says."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    dialect: str | None = None  # the projects that compute it this way
    mask: str = "full"  # a name of MASKS
    junk: float | None = None  # what stands under the mask
    mean: bool = False  # upstream is 1/n everywhere, as in a framework that returns a mean
    sizes: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)  # inputs in full, not drawn


@dataclass(frozen=True)
class Spec:
    """A function: its inputs, which of them carry a gradient, how the page's scalar lies over the tensors."""

    name: str
    inputs: dict[str, Drawn]
    layout: Callable[..., Iterator[Any]]
    cases: tuple[Case, ...]
    gradients: tuple[str, ...] = ()
    for_layout: tuple[str, ...] = ()  # arguments that the layout reads and the page's function does not take
    masked: str = "BT"  # dimensions of the mask
    output: str | dict[str, str] | None = None  # dimensions of the values, the mask's by default
    kinks: Callable[..., list[Any]] = lambda *_, **__: []  # the page's arguments -> distances to borders


MASKS: dict[str, Callable[[int, int, int, int], bool]] = {  # row, column, rows, columns
    "full": lambda b, t, rows, width: True,
    "tail": lambda b, t, rows, width: t < max(1, width - 2 * b),
    "head": lambda b, t, rows, width: t >= min(2 * b, width - 1),
    "holes": lambda b, t, rows, width: (t + b) % 3 != 1,
    "row": lambda b, t, rows, width: b != 1 and t < max(1, width - b),
    "one": lambda b, t, rows, width: b == rows - 1 and t == width // 2,
}


def shape_of(dims: str, case: Case) -> tuple[int, ...]:
    return tuple((SIZES | case.sizes)[letter] for letter in dims)


def indices(shape: tuple[int, ...]) -> Iterator[Index]:
    return itertools.product(*map(range, shape))


def nested(shape: tuple[int, ...], make: Callable[[Index], Any], at: Index = ()) -> Any:
    """Lists in lists of this shape, filled from the index."""
    if not shape:
        return make(at)
    return [nested(shape[1:], make, (*at, i)) for i in range(shape[0])]


def at(tree: Any, index: Index) -> Any:
    for step in index:
        tree = tree[step]
    return tree


def mask_of(spec: Spec, case: Case) -> Any:
    """The mask as nested 0 and 1; of a mask over sequences alone, every kind but "full" drops the second."""
    if "mask" in case.given:
        return case.given["mask"]
    shape = shape_of(spec.masked, case)
    if len(shape) < 2:
        return nested(shape, lambda i: int(case.mask == "full" or i != (1,)))
    return nested(shape, lambda i: int(MASKS[case.mask](*i[:2], *shape[:2])))


def draw_input(drawn: Drawn, case: Case, name: str, rng: random.Random) -> Any:
    shape, size = shape_of(drawn.dims, case), (SIZES | case.sizes).get(drawn.below, 0)
    if drawn.distinct:
        return nested(shape[:-1], lambda _: rng.sample(range(size), shape[-1]))
    if drawn.options or drawn.below:
        return nested(shape, lambda _: rng.choice(drawn.options or range(size)))
    low, high = case.ranges.get(name, (drawn.low, drawn.high))
    return nested(shape, lambda _: round(rng.uniform(low, high), 6))


def draw(spec: Spec, case: Case, rng: random.Random) -> dict[str, Any]:
    """The inputs of a case: given or drawn, with junk in every masked slot that may hold it."""
    mask, inputs = mask_of(spec, case), {}
    for name, drawn in spec.inputs.items():
        if name == "mask":
            inputs[name] = mask
            continue
        whole = case.given[name] if name in case.given else draw_input(drawn, case, name, rng)
        floats = not drawn.below and all(isinstance(option, float) for option in drawn.options)
        junk = case.junk is not None and floats and drawn.dims.startswith(spec.masked)

        def kept(index: Index, whole: Any = whole, junk: bool = junk) -> Any:
            return case.junk if junk and not at(mask, index[: len(spec.masked)]) else at(whole, index)

        inputs[name] = nested(shape_of(drawn.dims, case), kept)
    return inputs
