"""How a page's scalar function lies over tensors: element by element, row by row, group by group.

A layout yields units. A unit is one call of the page's function: its arguments, in which a `Slot` stands for
one number of one input, and the places in the values where the numbers it returns belong, in their order.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from case import Case, Spec, at, indices, nested, shape_of


class Slot(NamedTuple):
    """One number of one input."""

    name: str
    index: tuple[int, ...]


Unit = tuple[list[Any], list[tuple[Any, ...]]]


def slots(tree: Any) -> Iterator[Slot]:
    """Every slot of a unit's arguments."""
    if isinstance(tree, Slot):
        yield tree
    elif isinstance(tree, list):
        for branch in tree:
            yield from slots(branch)


def names(spec: Spec) -> list[str]:
    """The inputs that the page's function takes: all but the mask."""
    return [name for name in spec.inputs if name != "mask"]


def dims(spec: Spec, name: str) -> int:
    return len(spec.inputs[name].dims)


def kept(mask: Any, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [index for index in indices(shape) if at(mask, index)]


def elements(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call an element of the mask. An input with more dimensions than the mask goes in as a list."""
    beyond = shape_of((spec.output or spec.masked)[len(spec.masked) :], case)
    for index in kept(mask, shape_of(spec.masked, case)):
        arguments = []
        for name in names(spec):
            own = index[: dims(spec, name)]
            rest = shape_of(spec.inputs[name].dims, case)[len(own) :]
            arguments.append(nested(rest, lambda i, name=name, own=own: Slot(name, (*own, *i))))
        yield arguments, [(*index, *i) for i in indices(beyond)]


def row_arguments(spec: Spec, inputs: dict[str, Any], mask: Any, b: int) -> list[Any]:
    """(B, T) inputs as the list of the row's masked tokens, (B,) inputs as one number."""
    places = [(b, t) for t, m in enumerate(mask[b]) if m]
    return [
        Slot(name, (b,)) if dims(spec, name) == 1 else [Slot(name, place) for place in places]
        for name in names(spec)
    ]


def rows(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call a row, which returns one number."""
    for b in range(len(mask)):
        yield row_arguments(spec, inputs, mask, b), [(b,)]


def rows_with_mask(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call a row with all of its tokens and their mask, which returns one number."""
    for b, row in enumerate(mask):
        yield [*([Slot(name, (b, t)) for t in range(len(row))] for name in names(spec)), row], [(b,)]


def rows_to_tokens(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call a row that has a token, which returns a number a token, for each of the outputs."""
    outputs = [(name,) for name in spec.output] if isinstance(spec.output, dict) else [()]
    for b in range(len(mask)):
        places = [(b, t) for t, m in enumerate(mask[b]) if m]
        if places:
            yield (
                row_arguments(spec, inputs, mask, b),
                [(*name, *place) for name in outputs for place in places],
            )


def groups(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call a group of adjacent samples."""
    size, (total,) = case.arguments["group_size"], shape_of(spec.masked, case)
    for start in range(0, total, size):
        places = [(i,) for i in range(start, start + size)]
        yield [[Slot(name, place) for place in places] for name in names(spec)], places


def flat(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call with everything inside the mask as one list."""
    places = kept(mask, shape_of(spec.masked, case))
    yield [[Slot(name, place) for place in places] for name in names(spec)], places
