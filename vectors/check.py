"""Does another implementation compute what the vectors say? `python vectors/check.py --adapter FILE`.

The adapter is a Python file with FRAMEWORK, VERSION, optionally TOLERANCE (relative, 1e-9 unless given) and a
function for each vector it offers, under the vector's name. It gets `inputs` (arrays by name; texts as
lists), `arguments` (a dict) and `upstream` (an array, or None) and returns a dict of what it can offer:
"values", "scalar" = Σ upstream · values, and "gradients" of that scalar by input name. It raises
NotImplementedError("why") for a case it cannot express.

Exit code: 0 all that is offered agrees, 1 something differs, 2 a file or the adapter is broken. This needs
numpy and whatever the adapter imports; it can be copied elsewhere together with the JSON files.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
PARTS = {"values", "scalar", "gradients"}
OUTCOMES = ("agrees", "differs", "not offered", "crashed")


# ---- files


def read_vectors(path: Path) -> dict[str, Any]:
    """A file of vectors whose digest is right; anything else ends the program."""
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
        stated = head.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        sys.exit(fail(f"{path.name}: not a file of vectors: {error!r}"))
    found = hashlib.sha256(json.dumps(head, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    if found != stated:
        sys.exit(fail(f"{path.name}: changed since it was made: its sha256 is {found}, it states {stated}"))
    return head


def read_adapter(path: Path) -> ModuleType:
    """The adapter as a module; one that does not load, or does not say what it is, ends the program."""
    spec = importlib.util.spec_from_file_location(f"adapter_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        sys.exit(fail(f"{path}: no such adapter"))
    adapter = importlib.util.module_from_spec(spec)
    sys.path.append(str(path.resolve().parent))  # an adapter may have a helper beside it
    try:
        spec.loader.exec_module(adapter)
        str(adapter.FRAMEWORK), str(adapter.VERSION)
    except Exception as error:  # whatever the framework's import raises
        sys.exit(fail(f"{path}: the adapter does not load: {error!r}"))
    return adapter


def fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def decode(tree: Any) -> Any:
    """Nested numbers as an array, with "nan", "inf" and "-inf" as floats; texts and what holds them as is."""
    if isinstance(tree, str):
        return SPECIAL.get(tree, tree)
    if isinstance(tree, list):
        tree = [decode(branch) for branch in tree]
        leaves = numbers(tree).values()
        return np.array(tree) if leaves and all(isinstance(leaf, int | float) for leaf in leaves) else tree
    return tree


def plain(value: Any) -> Any:
    """An argument as Python's own number, text or list."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def numbers(tree: Any, where: str = "") -> dict[str, Any]:
    """Every leaf of nested lists, arrays and dicts by its place: {"[1][3]": 0.5}, {".returns[0]": 2.0}."""
    if isinstance(tree, np.ndarray | np.generic):
        tree = tree.tolist()
    if isinstance(tree, dict):
        return {k: v for name in tree for k, v in numbers(tree[name], f"{where}.{name}").items()}
    if isinstance(tree, list | tuple):
        return {k: v for i, branch in enumerate(tree) for k, v in numbers(branch, f"{where}[{i}]").items()}
    return {where: SPECIAL.get(tree, tree) if isinstance(tree, str) else tree}


# ---- one part of one case


def gap(ours: Any, theirs: Any, scale: float) -> float:
    """How far apart, as a share of the scale; what is no finite number on either side must be the same."""
    if ours == theirs or (ours != ours and theirs != theirs):
        return 0.0
    if (
        isinstance(ours, str)
        or isinstance(theirs, str)
        or not (math.isfinite(ours) and math.isfinite(theirs))
    ):
        return math.inf
    return abs(theirs - ours) / max(abs(ours), scale)


def common_ratio(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> float | None:
    """theirs/ours, if it is one and the same everywhere and there are two places at least to see it."""
    ours = {place: v for place, v in ours.items() if v != theirs[place] or v not in (math.inf, -math.inf)}
    both = [v for place in ours for v in (ours[place], theirs[place])]
    if any(isinstance(v, str) or not math.isfinite(v) for v in both):
        return None
    ratios = [theirs[place] / value for place, value in ours.items() if value]
    zeros = all(abs(theirs[place]) <= tolerance for place, value in ours.items() if not value)
    constant = len(ratios) > 1 and max(ratios) - min(ratios) <= 10 * tolerance * abs(ratios[0])
    return ratios[0] if constant and zeros else None


def difference(part: str, ours: Any, theirs: Any, tolerance: float) -> dict[str, Any] | None:
    """Where the two lie furthest apart, or None if nowhere by more than the tolerance.

    An error is relative to our number or, where that is small, to the largest number of its array held inside
    1e-6 and 1: near a zero nobody's digits count, and what float64 rounds away is no other formula.
    """
    ours, theirs = numbers(ours), numbers(theirs)
    for place, leaf in theirs.items():
        if not isinstance(leaf, int | float | type(ours.get(place, 0.0))):
            raise TypeError(f"{part}{place} is {leaf!r:.60}, which is no number")
    if ours.keys() != theirs.keys():
        odd = min(ours.keys() ^ theirs.keys(), key=lambda place: (len(place), place))
        return {
            "part": part,
            "where": part + odd,
            "what": f"{'ours' if odd in ours else 'theirs'} alone has it",
        }
    ours = {place: value for place, value in ours.items() if value is not None}
    theirs = {place: theirs[place] for place in ours}
    sizes = [abs(v) for v in ours.values() if not isinstance(v, str) and math.isfinite(v)]
    scale = min(1.0, max(1e-6, *sizes)) if any(sizes) else 1.0
    gaps = {place: gap(value, theirs[place], scale) for place, value in ours.items()}
    worst = max(gaps, key=lambda place: gaps[place], default="")
    if not gaps or gaps[worst] <= tolerance:
        return None
    ratio = theirs[worst] / ours[worst] if isinstance(ours[worst], float) and ours[worst] else None
    return {
        "part": part,
        "where": part + worst,
        "ours": ours[worst],
        "theirs": theirs[worst],
        "ratio": ratio,
        "error": gaps[worst],
        "everywhere": common_ratio(ours, theirs, tolerance),
    }


# ---- one case


def offered(theirs: Any, case: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Ours and theirs of each part that the adapter returned and the case has."""
    if not isinstance(theirs, dict) or not theirs or not theirs.keys() <= PARTS:
        raise TypeError(f"an adapter returns a dict of some of {sorted(PARTS)}, got {theirs!r:.80}")
    gradients = theirs.get("gradients", {})
    if not isinstance(gradients, dict):
        raise TypeError(f"gradients is {gradients!r:.60}, not a dict by input name")
    if unknown := gradients.keys() - case["inputs"].keys():
        raise TypeError(f"gradients of what is no input: {sorted(unknown)}")
    pairs = {part: (case[part], theirs[part]) for part in ("values", "scalar") if part in theirs}
    names = case["gradients"].keys() & gradients.keys()
    pairs |= {f"gradients.{name}": (case["gradients"][name], gradients[name]) for name in names}
    return {part: pair for part, pair in pairs.items() if pair[0] is not None}


def run_case(function: Any, case: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Call the adapter and compare each part that it offers."""
    upstream = None if case["upstream"] is None else np.asarray(case["upstream"], dtype=np.float64)
    inputs = {name: decode(tree) for name, tree in case["inputs"].items()}
    arguments = {name: plain(decode(value)) for name, value in case["arguments"].items()}
    try:
        theirs = function(inputs, arguments, upstream)
        pairs = offered(theirs, case)
        found = [difference(part, *pair, tolerance) for part, pair in sorted(pairs.items())]
    except NotImplementedError as error:
        return {"outcome": "not offered", "why": str(error), "compared": [], "differences": []}
    except Exception as error:  # whatever a framework raises
        here, *frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == frames[0].filename != here.filename]
        at = f"{own[-1].filename}:{own[-1].lineno}" if own else ""
        return {"outcome": "crashed", "why": repr(error), "at": at, "compared": [], "differences": []}
    differences = [one for one in found if one]
    outcome = "differs" if differences else "agrees" if pairs else "not offered"
    why = "" if pairs else "nothing that this case has"
    return {"outcome": outcome, "why": why, "compared": sorted(pairs), "differences": differences}


def run(adapter: ModuleType, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The result of every case of a file."""
    function = getattr(adapter, head["function"], None)
    tolerance = float(getattr(adapter, "TOLERANCE", 1e-9))
    for case in head["cases"]:
        label = {"function": head["function"], "dialect": case["dialect"], "case": case["name"]}
        if function is None:
            yield label | {"outcome": "not offered", "why": "", "compared": [], "differences": []}
        else:
            yield label | run_case(function, case, tolerance)


# ---- the report


def words(one: dict[str, Any]) -> str:
    """A difference as a sentence."""
    if "what" in one:
        return f"{one['where']}: {one['what']}"
    text = f"{one['where']}: ours {one['ours']!r:.60}, theirs {one['theirs']!r:.60}"
    text += "" if one["ratio"] is None else f", ratio {one['ratio']:.6g}"
    text += f", relative error {one['error']:.2g}"
    return text if one["everywhere"] is None else f"{text}; everywhere ×{one['everywhere']:.6g}"


def gist(results: list[dict[str, Any]]) -> str:
    """What the cases of one line have in common, or the first thing that happened and in which case."""
    differences = [(result["case"], one) for result in results for one in result["differences"]]
    factor = next((one["everywhere"] for _, one in differences if one.get("everywhere") is not None), None)
    ratios = [one.get("ratio") for _, one in differences]
    if factor is not None and all(r is not None and math.isclose(r, factor, rel_tol=1e-4) for r in ratios):
        return f"everywhere ×{factor:.6g}"
    crashes = [f"{result['case']}: {result['why']}" for result in results if result["outcome"] == "crashed"]
    reasons = [f"{result['case']}: {result['why']}" for result in results if result["why"]]
    return next(iter([*crashes, *(f"{case}: {words(one)}" for case, one in differences), *reasons]), "")


def table(results: list[dict[str, Any]], verbose: bool) -> Iterator[str]:
    """One line for each function and dialect; with `verbose` each case below it; last what is not offered."""
    yield f"{'function':30} {'dialect':40} {'cases':>5}" + "".join(f" {name:>11}" for name in OUTCOMES)
    some = {result["function"] for result in results if result["outcome"] != "not offered" or result["why"]}
    ordered = sorted(results, key=lambda result: (result["function"], result["dialect"] or ""))
    shown = [result for result in ordered if result["function"] in some]
    for (function, dialect), group in groupby(shown, key=lambda r: (r["function"], r["dialect"])):
        lines = list(group)
        counts = [sum(line["outcome"] == name for line in lines) for name in OUTCOMES]
        label = dialect or "—"
        label = label if len(label) <= 40 else label[:39] + "…"
        row = f"{function:30} {label:40} {len(lines):5}" + "".join(f" {count:11}" for count in counts)
        yield f"{row}  {gist(lines)}".rstrip()
        for line in lines if verbose else ():
            case = f"    {line['case']}" + (f" ({dialect})" if dialect else "")
            at = f" at {line['at']}" if line.get("at") else ""
            yield f"{case}: {line['outcome']}" + (f": {line['why']}" if line["why"] else "") + at
            yield from (f"        {words(one)}" for one in line["differences"])
    if absent := sorted({result["function"] for result in results} - some):
        yield f"not offered: {', '.join(absent)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True, metavar="FILE")
    parser.add_argument("--function", nargs="+", metavar="NAME", help="only these functions")
    parser.add_argument("--vectors", type=Path, default=HERE, metavar="FOLDER", help="where the files lie")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    arguments = parser.parse_args()
    files = {path.stem: path for path in sorted(arguments.vectors.glob("*.json")) if path.stem != "schema"}
    unknown = sorted(set(arguments.function or ()) - files.keys())
    if unknown or not files:
        return fail(f"no vectors of {', '.join(unknown) or 'any function'} in {arguments.vectors}")
    heads = [read_vectors(files[name]) for name in arguments.function or files]
    adapter = read_adapter(arguments.adapter)
    results = [result for head in heads for result in run(adapter, head)]
    who = {"framework": adapter.FRAMEWORK, "version": adapter.VERSION}
    who |= {"tolerance": float(getattr(adapter, "TOLERANCE", 1e-9))}
    print("{framework} {version} against nanopost's vectors, relative tolerance {tolerance}".format(**who))
    print("\n".join(table(results, arguments.verbose)))
    if arguments.json:
        arguments.json.write_text(json.dumps(who | {"results": results}, indent=1) + "\n", encoding="utf-8")
    outcomes = {result["outcome"] for result in results}
    return 2 if "crashed" in outcomes else int("differs" in outcomes)


if __name__ == "__main__":
    sys.exit(main())
