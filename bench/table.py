"""The table and the picture of a results file.

python -m bench.table bench/results/FILE.json           print the table in Markdown
python -m bench.table bench/results/FILE.json --svg     and draw FILE.svg beside it
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.measure import verdict

HEAD = "| case | peer | bar | its default | its best | of the floor | memory | verdict |"
RULE = "|---|---|---|---|---|---|---|---|"


def times(found: dict[str, float]) -> str:
    """2.31× (2.25–2.40)."""
    return f"{found['median']:.2f}× ({found['p10']:.2f}–{found['p90']:.2f})"


def percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1 if share >= 0.01 else 2}f} %"


def bar_text(row: dict[str, Any]) -> str:
    """≥ 2× / 1.5×, ≤ 1.5 % memory: the default's bar, then the best setting's."""
    default, best = row["bars"]["default"], row["bars"]["best"]
    parts = [f"≥ {default:.3g}× / {best:.3g}×" if default else f"≥ {best:.3g}×"] if best else []
    if row.get("memory_bar") is not None:
        parts.append(f"≤ {percent(row['memory_bar'])} memory")
    return ", ".join(parts) or "–"


def peer_cells(record: dict[str, Any], name: str, row: dict[str, Any]) -> list[str]:
    """The cells of a row behind the case's name."""
    if "skipped" in row:
        return [name, "–", "–", "–", "–", "–", verdict(row)]
    memory = row.get("memory_share")
    best = f"{times(row['best'])}: {row['settings']['best']}"
    cells = [f"{name} {row['version']}", bar_text(row), times(row["default"]), best]
    return [*cells, "", "" if memory is None else percent(memory), verdict(row)]


def floor_cells(record: dict[str, Any]) -> list[str]:
    floor = record["floor"]
    row = {"bars": {"median": floor["bar"]}, "median": floor, "quiet": record["quiet"]}
    share = f"{percent(floor['median'])} ({percent(floor['p10'])}–{percent(floor['p90'])})"
    bar = f"≥ {percent(floor['bar'])}" if floor["bar"] else "–"
    return ["hardware", bar, "", "", f"{share} of {record['gemm_gflops']:.0f} GFLOP/s", "", verdict(row)]


def markdown(results: dict[str, Any]) -> str:
    """Every case, a row a peer and one for the floor; then what it was measured with."""
    lines = [HEAD, RULE]
    for record in results["cases"].values():
        rows = [peer_cells(record, peer, row) for peer, row in record["peers"].items()]
        for i, cells in enumerate([*rows, floor_cells(record)]):
            lines.append(f"| {record['title'] if i == 0 else ''} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", foot(results)])


def foot(results: dict[str, Any]) -> str:
    """Where and with what."""
    found, cases = results["machine"], results["cases"].values()
    commits = sorted({str(record["commit"])[:9] for record in cases})
    dates = sorted({record["date"][:10] for record in cases})
    twins = [abs(record["twin"]["median"] - 1) for record in cases]
    copy = max((record["copy_gb_s"] for record in cases), default=0.0)
    has, lacks = (" ".join(found[key]) or "none" for key in ("flags", "missing_flags"))
    packages = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    return (
        f"{found['cpu']} ({found['model']}; {has}; without {lacks}), {found['cores']} cores, one thread. "
        f"Python {found['python']}, {packages}. Copy: {copy:.1f} GB/s. Ours against its twin: within "
        f"{percent(max(twins, default=0.0))} of 1. {', '.join(dates)}, commit {', '.join(commits)}."
    )


def case_text(name: str, record: dict[str, Any]) -> str:
    """A case on a few lines, for the terminal."""
    twin = f"A/A {times(record['twin'])}{'' if record['quiet'] else '  noisy'}"
    lines = [f"  {name}: ours {record['ours_seconds']:.3f} s CPU   {twin}"]
    for peer, row in record["peers"].items():
        lines.append("    " + "   ".join(cell for cell in peer_cells(record, peer, row) if cell))
    return "\n".join([*lines, "    " + "   ".join(cell for cell in floor_cells(record) if cell)])


def picture(results: dict[str, Any], path: Path) -> None:
    """A bar a case and peer: how many times as fast as its best setting, p10 to p90, and the bar to clear."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "nanopost"
    from matplotlib import pyplot

    rows = [
        (f"{name} · {peer}", row["best"], row["bars"]["best"])
        for name, record in reversed(results["cases"].items())
        for peer, row in reversed(record["peers"].items())
        if "skipped" not in row
    ]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.32 * len(rows)), layout="constrained")
    for place, (_, found, bar) in enumerate(rows):
        middle = found["median"]
        spread = [[middle - found["p10"]], [found["p90"] - middle]]
        met = bar is None or middle >= bar
        axes.barh(place, middle, height=0.6, color="#4c78a8" if met else "#b8c4d3")
        axes.errorbar(middle, place, xerr=spread, color="#222222", capsize=3, linewidth=1)
        if bar is not None:
            axes.plot([bar, bar], [place - 0.42, place + 0.42], color="#d62728", linewidth=2)
    axes.axvline(1.0, color="#888888", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_xlabel("times as fast as the peer's best setting; whiskers p10–p90, red: the bar")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--svg", action="store_true", help="draw the picture too")
    given = parser.parse_args()
    results = json.loads(given.results.read_text(encoding="utf-8"))
    print(markdown(results))
    if given.svg:
        picture(results, given.results.with_suffix(".svg"))


if __name__ == "__main__":
    main()
