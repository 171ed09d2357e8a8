"""The offline page of a run, or of a demo with several: one HTML file to read, keep and send.

    python -m nanopost.report runs/demo        -> runs/demo/report.html

Stage table, curves, samples coloured by advantage, configuration. The page asks nothing of the network and
needs no JavaScript; what a model wrote is escaped, and the page's own policy forbids scripts. The same folder
gives the same bytes. Numbers are shaped here; the words and the looks are in report.html.jinja. The curves
need the extra `report`.
"""

import io
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from nanopost.metrics import read_records, read_rollouts

# Figures in their order, each with the keys of metrics.jsonl that share its axes. What none of them names
# follows under its own key.
REINFORCEMENT: tuple[str, ...] = ("reward eval_reward", "worked eval_worked", "length eval_length")
REINFORCEMENT += ("exact eval_exact", "entropy", "kl_ref", "kl_old", "no_signal", "grad_norm")
SUPERVISED = ("loss eval_loss", "lr", "grad_norm")
FURTHER = ("loss", "clipped", "stopped", "rollout_s verify_s train_s", "seconds", "tokens")
SECONDS = ("rollout_s", "verify_s", "train_s", "seconds")
SHARES = ("worked", "exact", "no_signal", "stopped")  # on an axis from 0 to 100 %
LEAST = 1e-3  # what an axis spans at least, so that a rounding error looks like the zero it is
POINTS = 500  # of a curve; more steps than that are averaged in bins
GROUPS = 3  # prompts shown of a rollout step
TOKENS = 12_000  # shown of a run's rollouts, so that the file stays small
SUMMARY = ("title", "intro", "machine", "seconds", "stages", "runs")
RATES = ("strict_json", "exact_greedy", "exact_sampled", "refusal_precision", "refusal_recall", "worked")
# Colours as matplotlib writes them, and what the page's light and dark themes call them.
COLOURS = {"#000001": "soft", "#000002": "grid", "#000003": "one", "#000004": "two", "#000005": "three"}
LINES = (("#000003", "-"), ("#000004", (0, (4, 1.6))), ("#000005", (0, (1.2, 1.4))))
STYLE: dict[Any, Any] = {"svg.hashsalt": "nanopost", "svg.fonttype": "none", "font.size": 11.5}
# Control characters have no place in HTML; their pictures have.
CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "␡"}


def write_report(folder: Path | str) -> Path:
    """Write FOLDER/report.html for a run, or for a demo: a summary.json and the runs it names.

    Args:
        folder: a run folder (args.json, env.json, metrics.jsonl, rollouts/), or one with a summary.json whose
            `stages` give the table and whose `runs` name run folders relative to it.
    Returns:
        The path of the page.
    Raises:
        ValueError: a file is missing, empty or not what it should be; it is named.
        ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder: {folder} is no folder; expected a run, or a demo with a summary.json")
    if (folder / "summary.json").exists():
        page = _demo(folder)
    else:
        run = _run(folder, folder.resolve().name, 0)
        page = {"title": run["name"], "intro": "", "about": run["about"], "stages": [], "runs": [run]}
    loader = FileSystemLoader(Path(__file__).parent)
    house = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    house.filters |= {"number": _number, "signed": _signed, "measure": _measure}
    house.filters["visible"] = lambda text: text.replace("\n", "↵\n").replace("\t", "→\t")
    text = house.get_template("report.html.jinja").render(page)
    (folder / "report.html").write_text(text.translate(CONTROLS), encoding="utf-8", newline="\n")
    return folder / "report.html"


def _demo(folder: Path) -> dict[str, Any]:
    path, asked = folder / "summary.json", dict[str, list[Any]]()
    summary = _read(path)
    if missing := [key for key in SUMMARY if key not in summary]:
        raise ValueError(f"{path}: no {missing[0]!r}")
    for stage in summary["stages"]:
        for key in RATES:
            if not 0 <= (stage.get(key) or 0) <= 1:
                raise ValueError(f"{path}: {key}: expected a rate between 0 and 1, got {stage[key]}")
        for sample in stage.get("samples") or ():
            asked.setdefault(sample["prompt"], []).append({"stage": stage["stage"], **sample})
    return {
        **summary,
        "about": {"Machine": summary["machine"], "In all": _measure(summary["seconds"], "seconds")},
        "asked": asked,
        "runs": [_run(folder / run["folder"], run["name"], i) for i, run in enumerate(summary["runs"])],
    }


def _run(folder: Path, name: str, index: int) -> dict[str, Any]:
    """Everything the page says about one run folder."""
    if not (records := read_records(folder)):
        raise ValueError(f"{folder / 'metrics.jsonl'}: no complete record; expected the metrics of a run")
    args, env = _read(folder / "args.json"), _read(folder / "env.json")
    keys = {k for record in records for k, v in record.items() if isinstance(v, int | float)} - {"step"}
    first = [
        panel for panel in (REINFORCEMENT if "reward" in keys else SUPERVISED) if keys & {*panel.split()}
    ]
    left = keys - {*" ".join(first).split()}
    further = [panel for panel in FURTHER if left & {*panel.split()}]
    further += sorted(left - {*" ".join(further).split()})
    spent = sum(record.get(key) or 0 for record in records for key in SECONDS)
    about = {"Model": args.get("model"), "Data": args.get("data"), "Steps": f"{len(records):,}"}
    return {
        "name": name,
        "id": f"run-{index}",
        "kind": "reinforcement" if "reward" in keys else "supervised",
        "about": about | {"Time in steps": _measure(spent, "seconds"), "Device": env.get("device")},
        "figures": [_figure(panel, records, f"r{index}-{i}") for i, panel in enumerate(first)],
        "further": [_figure(panel, records, f"r{index}-f{i}") for i, panel in enumerate(further)],
        "tables": {"args.json": args, "env.json": env},
        **_rollouts(folder),
    }


def _rollouts(folder: Path) -> dict[str, Any]:
    """Of the first and the last written step the groups that differ most, best sample first."""
    steps = sorted(int(path.name.split(".")[0]) for path in (folder / "rollouts").glob("*.jsonl.gz"))
    written: list[dict[str, Any]] = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        rows = read_rollouts(folder, step)
        groups = [list(g) for _, g in itertools.groupby(rows, key=lambda row: (row["line"], row["prompt"]))]
        groups = [sorted(group, key=lambda row: -row["advantage"]) for group in groups]
        flat = sum(all(row["advantage"] == 0 for row in group) for group in groups)
        groups.sort(key=lambda group: group[-1]["advantage"] - group[0]["advantage"])
        written.append({"step": step, "flat": flat, "count": len(groups), "groups": groups[:GROUPS]})
    shown = [row for step in written for group in step["groups"] for row in group]
    widest = max((abs(row["advantage"]) for row in shown), default=0.0)
    for row in shown:
        row["tone"] = round(abs(row["advantage"]) / widest, 2) if widest else 0.0
        tokens = [text or ("■" if row["finish"] == "stop" else "∅") for text in row["tokens"]]
        pieces = list(zip(tokens, row["old_logps"], strict=True))
        limit = max(40, TOKENS // len(shown))
        row["cut"], row["split"] = max(0, len(pieces) - limit), limit * 2 // 3
        row["pieces"] = pieces[: row["split"]] + pieces[row["split"] + row["cut"] :]
    return {"written": written, "widest": widest}


def _figure(panel: str, records: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The drawing of a panel, and the ends and bounds of its series."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('the curves need matplotlib: pip install "nanopost[report]"') from error
    series, buffer, kind = [], io.StringIO(), "share" if panel.split()[0] in SHARES else "number"
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the reader's own settings are
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(5, 2.5))  # 360 × 180 units in SVG
        axes = figure.add_axes((0.115, 0.115, 0.865, 0.85))
        for key, (colour, dash) in zip(panel.split(), LINES, strict=False):
            known = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
            if not known:
                continue
            x, y = (_binned(column) for column in zip(*known, strict=True))
            line = y if key == "lr" else _smoothed(y)
            if line != y:
                axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.4)
            marker = "o" if len(x) <= 12 else None
            axes.plot(x, line, color=colour, linewidth=1.9, linestyle=dash, marker=marker, markersize=4.5)
            series.append({"key": key, "first": line[0], "last": line[-1], "low": min(y), "high": max(y)})
        first, last = records[0]["step"], records[-1]["step"]
        room = 0.02 * (last - first) or 0.5
        axes.set_xlim(first - room, last + room)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=(1, 2, 5, 10)))
        if kind == "share":
            axes.set(ylim=(-0.02, 1.03), yticks=(0, 0.5, 1))
        elif panel != "lr" and max(-axes.dataLim.y0, axes.dataLim.y1) < LEAST:
            axes.set_ylim(min(0.0, axes.dataLim.y0), LEAST)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: _measure(value, kind))
        axes.tick_params(length=0, labelcolor="#000001", pad=5)
        axes.grid(axis="y", color="#000002", linewidth=1)
        axes.spines[:].set_visible(False)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return {"panel": panel, "kind": kind, "series": series, "drawing": _themed(buffer.getvalue(), name)}


def _themed(svg: str, name: str) -> Markup:
    """The inside of an SVG file for a page: its fonts and colours, ids of its own, two decimals."""
    body = svg[svg.index("</defs>") + len("</defs>") : svg.rindex("</svg>")]  # past metadata and global style
    body = re.sub(r"font-family: [^;\"]*(; )?", "", re.sub(r'<g id="[^"]*"', "<g", body))
    body = re.sub(r'\bid="|url\(#|href="#', lambda match: match[0] + name + "-", body)
    body = re.sub(r"\s*\n\s*", "\n", body.replace("xlink:href", "href"))
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), body)
    for colour, word in COLOURS.items():
        body = body.replace(colour, f"var(--{word})")
    return Markup(body)


def _binned(values: Sequence[float]) -> list[float]:
    size = math.ceil(len(values) / POINTS)
    return [statistics.fmean(values[i : i + size]) for i in range(0, len(values), size)]


def _smoothed(values: list[float]) -> list[float]:
    """Centred mean over a tenth of the run, nearer steps weighing more; over less towards its ends."""
    smooth, last = [], len(values) - 1
    for i in range(len(values)):
        reach = min(len(values) // 20, max(2, min(i, last - i)))
        near = range(max(0, i - reach), min(last, i + reach) + 1)
        smooth.append(statistics.fmean((values[j] for j in near), [1 + reach - abs(i - j) for j in near]))
    return smooth


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def _number(value: float) -> str:
    """Three significant digits, thousands in groups, a real minus; a mere rounding error is ≈0."""
    if 0 < abs(value) < 1e-9:
        return "≈0"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if value else "0"


def _measure(value: float, kind: str) -> str:
    """A number as its kind is read: rate 81.4%, share 81%, seconds 2 min 05 s."""
    if kind in ("rate", "share"):
        return f"{100 * value:.{1 if kind == 'rate' else 0}f}%"
    if kind == "seconds" and value >= 10:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds:02d} s" if minutes else f"{round(value)} s"
    return _number(value) + (" s" if kind == "seconds" else "")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m nanopost.report FOLDER")
    print(write_report(sys.argv[1]))
