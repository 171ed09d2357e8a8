"""Write the vectors: `python vectors/make.py [NAME …] [--out FOLDER]`.

Values and gradients come from the scalar Python of the formula pages (docs/losses/NAME.md), run with 120
digits; a gradient is a central difference with a step of 1e-40, so both are right to the last bit of float64.
No line of the library takes part.
"""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import page
from case import Case, Index, Spec, at, draw, mask_of, nested, shape_of
from cases import SPECS
from layout import Slot, Unit, slots
from mpmath import mp, mpf

HERE = Path(__file__).resolve().parent
STEP = mpf(10) ** -40
SMALLEST = mpf(10) ** -60  # what is smaller, relative to the numbers of a call, is rounding and means 0
KEEP_AWAY = 1e-3  # from clip borders and ties: no float64 implementation may land on the other side

Numbers = dict[Index, Any]  # a tensor being filled: index -> number


# ---- one call of the page's function


def exact(value: Any) -> Any:
    """A float as the number it is, with 120 digits; whole numbers, strings and None as they are."""
    if isinstance(value, list | tuple):
        return [exact(v) for v in value]
    return mpf(value) if isinstance(value, float) else value


def fill(tree: Any, inputs: dict[str, Any], moved: Slot | None = None, by: Any = 0) -> Any:
    """The arguments of a unit with numbers in place of the slots, one of them moved."""
    if isinstance(tree, Slot):
        value = exact(at(inputs[tree.name], tree.index))
        return value + by if tree == moved else value
    return [fill(branch, inputs, moved, by) for branch in tree] if isinstance(tree, list) else tree


def leaves(tree: Any) -> list[Any]:
    return [leaf for branch in tree for leaf in leaves(branch)] if isinstance(tree, list | tuple) else [tree]


def own_arguments(spec: Spec, case: Case) -> dict[str, Any]:
    """The keyword arguments that the page's function takes."""
    return {name: exact(value) for name, value in case.arguments.items() if name not in spec.for_layout}


def call(spec: Spec, case: Case, arguments: list[Any]) -> list[Any]:
    """The numbers that the page's function returns, in their order."""
    return leaves(page.scalar(spec.name)(*arguments, **own_arguments(spec, case)))


# ---- one case


def inputs_away_from_kinks(spec: Spec, case: Case, rng: random.Random) -> dict[str, Any]:
    """Draw until no number stands near a border where the formula bends or jumps."""
    for _ in range(1000):
        inputs = draw(spec, case, rng)
        units = spec.layout(spec, case, inputs, mask_of(spec, case))
        distances = [spec.kinks(*fill(tree, inputs), **own_arguments(spec, case)) for tree, _ in units]
        if all(abs(distance) >= KEEP_AWAY for unit in distances for distance in unit):
            return inputs
    raise ValueError(f"{spec.name}, {case.name!r}: no draw stays {KEEP_AWAY} away from every border")


def output_shapes(spec: Spec, case: Case) -> dict[str | None, tuple[int, ...]]:
    """The shape of each output; a function with one output has it under None."""
    output = spec.masked if spec.output is None else spec.output
    named = output if isinstance(output, dict) else {None: output}
    return {name: shape_of(dims, case) for name, dims in named.items()}


def weights(values: Numbers, case: Case, rng: random.Random) -> Numbers:
    """A weight for each finite value: 1/n, or some number of either sign."""
    finite = [index for index, value in sorted(values.items()) if mp.isfinite(value)]
    if case.mean:
        return {index: 1.0 / len(finite) for index in finite}
    return {index: round(rng.choice((-1, 1)) * rng.uniform(0.3, 1.7), 6) for index in finite}


def slopes(spec: Spec, case: Case, unit: Unit, inputs: Any, upstream: Numbers) -> Iterator[tuple[Slot, Any]]:
    """Σ upstream · ∂value/∂input of one call, for each of its inputs that carries a gradient."""
    tree, places = unit
    for slot in dict.fromkeys(slots(tree)):
        if slot.name in spec.gradients:
            above, below = (call(spec, case, fill(tree, inputs, slot, by)) for by in (STEP, -STEP))
            weighted = [
                (mpf(upstream[place]), (a - b) / (2 * STEP), abs(a))
                for place, a, b in zip(places, above, below, strict=True)
                if place in upstream
            ]
            large = [w * slope for w, slope, size in weighted if abs(slope) > SMALLEST * (1 + size)]
            yield slot, sum(large, mpf(0))


def solve(spec: Spec, case: Case) -> dict[str, Any]:
    """One case: inputs drawn, values and gradients by the page."""
    rng = random.Random(f"{spec.name}: {case.name}")
    inputs = inputs_away_from_kinks(spec, case, rng)
    units = list(spec.layout(spec, case, inputs, mask_of(spec, case)))
    values: Numbers = {}
    for tree, places in units:
        values |= zip(places, call(spec, case, fill(tree, inputs)), strict=True)
    upstream = weights(values, case, rng) if spec.gradients else {}
    gradients: dict[str, Numbers] = {name: {} for name in spec.gradients}
    for unit in units:
        for (name, index), slope in slopes(spec, case, unit, inputs, upstream):
            gradients[name][index] = gradients[name].get(index, 0) + slope
    shapes = output_shapes(spec, case)
    nests = {
        name: nested(shape, lambda i, n=name: values.get(i if n is None else (n, *i)))
        for name, shape in shapes.items()
    }
    return {
        "name": case.name,
        "dialect": case.dialect,
        "reduction": "mean" if case.mean else "weighted",
        "inputs": inputs,
        "arguments": case.arguments,
        "upstream": nested(shapes[None], lambda i: upstream.get(i, 0.0)) if spec.gradients else None,
        "values": nests.get(None, nests),
        "scalar": sum(mpf(w) * values[i] for i, w in upstream.items()) if spec.gradients else None,
        "gradients": {
            name: nested(shape_of(spec.inputs[name].dims, case), lambda i, n=name: gradients[n].get(i, 0.0))
            for name in spec.gradients
        },
    }


# ---- one file


def plain(tree: Any) -> Any:
    """JSON of Python's own numbers: each mpf as the nearest float64, what is not finite as a string."""
    if isinstance(tree, dict):
        return {name: plain(branch) for name, branch in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(branch) for branch in tree]
    if isinstance(tree, mpf):
        with mp.workprec(180):  # a slope's last digits are not its own and must not decide a tie
            tree = float(+tree) if abs(tree) > SMALLEST else 0.0
    if isinstance(tree, float) and not math.isfinite(tree):
        return "nan" if math.isnan(tree) else "inf" if tree > 0 else "-inf"
    return tree


def digest(head: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of everything but the digest itself."""
    rest = {name: value for name, value in head.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def document(spec: Spec) -> dict[str, Any]:
    head: dict[str, Any] = {
        "schema": 1,
        "function": spec.name,
        "module": page.module(spec.name),
        "page": page.path(spec.name).relative_to(HERE.parent).as_posix(),
        "formulas": page.formulas(spec.name),
        "cases": [plain(solve(spec, case)) for case in spec.cases],
    }
    return head | {"sha256": digest(head)}


def layout_of(tree: Any, indent: str = "") -> str:
    """JSON with a line for each name and for each tensor."""
    if isinstance(tree, dict) and any(isinstance(branch, dict | list) for branch in tree.values()):
        lines = [f"{indent} {json.dumps(name)}: {layout_of(v, indent + ' ')}" for name, v in tree.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(tree, list) and tree and all(isinstance(branch, dict) for branch in tree):
        lines = [f"{indent} {layout_of(branch, indent + ' ')}" for branch in tree]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(tree, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="functions; all by default")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    arguments = parser.parse_args()
    for name in arguments.names or SPECS:
        text = layout_of(document(SPECS[name])) + "\n"
        (arguments.out / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}.json: {len(SPECS[name].cases)} cases")


if __name__ == "__main__":
    main()
