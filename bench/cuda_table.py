"""The short table at the end of the CUDA command, a line a number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.cuda_measure import Mark

WIDTHS = (14, 29, 36, 12, 10)


def amount(value: float, unit: str) -> str:
    """A share in percent, milliseconds, seconds, megabytes, times.

    >>> amount(0.9144, "of copy"), amount(3.518, "×"), amount(41.26, "ms")
    ('91.4 %', '3.52×', '41.3 ms')
    """
    if unit.startswith("of "):
        return f"{100 * value:.1f} %"
    return f"{value:.2f}×" if unit == "×" else f"{value:.3g} {unit}"


def verdict(mark: Mark) -> str:
    """Whether the median is on the right side of its bar."""
    if "skipped" in mark:
        return "skipped"
    if mark["bar"] is None:
        return "no bar"
    met = mark["value"] <= mark["bar"] if mark["most"] else mark["value"] >= mark["bar"]
    return "met" if met else "not met"


def bar_text(mark: Mark) -> str:
    return (
        "–" if mark["bar"] is None else f"{'≤' if mark['most'] else '≥'} {amount(mark['bar'], mark['unit'])}"
    )


def found_text(mark: Mark) -> str:
    """91.4 % (90.8–91.9) of copy."""
    if "skipped" in mark:
        return mark["skipped"]
    text = amount(mark["value"], mark["unit"])
    if mark["samples"] > 1:
        low, high = (amount(mark[name], mark["unit"]).split(" ")[0].rstrip("×") for name in ("p10", "p90"))
        text += f" ({low}–{high}{'' if mark['samples'] >= 20 else ', n ' + str(mark['samples'])})"
    return text + (f" {mark['unit']}" if mark["unit"].startswith("of ") else "")


def lines(name: str, record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """The cells of a row: its marks, or why there is none."""
    if "found" not in record:
        kind = next((kind for kind in ("wrong", "error", "not_reached") if kind in record), "error")
        yield name, f"{kind.upper().replace('_', ' ')}: {record.get(kind, 'nothing')}"[:150]
        return
    for i, mark in enumerate(record["found"]):
        time = f"{1e3 * mark['seconds']:.3g} ms" if mark["unit"] != "ms" and "seconds" in mark else ""
        more = "; ".join(filter(None, (time, mark.get("note", ""))))
        yield name if i == 0 else "", mark["label"], found_text(mark), bar_text(mark), verdict(mark), more


def text(results: dict[str, Any]) -> str:
    """All rows, then what they are shares of."""
    head = ("row", "what", "measured", "bar", "verdict", "time and more")
    cells = [head, *(line for name, record in results["rows"].items() for line in lines(name, record))]
    table = [" ".join(f"{x:<{w}}" for x, w in zip(row, (*WIDTHS, 0), strict=False)).rstrip() for row in cells]
    return "\n".join([*table, "", foot(results)])


def foot(results: dict[str, Any]) -> str:
    ceilings = results["ceilings"]
    if ceilings is None:
        return "no ceilings were measured, so no row was"
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    return (
        f"{ceilings['gpu']}: copy {ceilings['copy'] / 1e12:.2f} TB/s, bf16 products "
        f"{ceilings['gemm'] / 1e12:.0f} TFLOP/s ({ceilings['gemm_shape']}). {packages}. "
        f"{results['date'][:10]}, commit {str(results['commit'])[:9]}, {results['seconds']:.0f} s."
    )
