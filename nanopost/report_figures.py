"""The drawings of a report, as SVG that takes its fonts and colours from the page; needs the extra `report`.

    curves       one panel of a run: keys of metrics.jsonl by step, those after a | on an axis of their own
    paths        one key of several runs, by step or against another key
    calibration  how often a reward model's lead was right, beside what 1/(1 + e^−Δ) promises

A drawing is a function of its numbers alone: the same ones give the same text.
"""

import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

SHARES: tuple[str, ...] = ("worked", "exact", "no_signal", "stopped", "accuracy", "agreement", "verified")
SHARES += ("eval_verified", "eval_accuracy_chosen_shorter", "eval_accuracy_chosen_longer", "eval_right")
LEAST = 1e-3  # what an axis spans at least, so that a rounding error looks like the zero it is
POINTS = 500  # of a curve; more steps than that are averaged in bins
# Colours as matplotlib writes them, and what the page's light and dark themes call them.
COLOURS = {"#000001": "soft", "#000002": "grid", "#000003": "one", "#000004": "two", "#000005": "three"}
LINES = (("#000003", "-"), ("#000004", (0, (4, 1.6))), ("#000005", (0, (1.2, 1.4))))
STYLE: dict[Any, Any] = {"svg.hashsalt": "nanopost", "svg.fonttype": "none", "font.size": 11.5}
Series = dict[str, Any]  # key, x and y (the steps themselves), line (smoothed)


def keys_of(panel: str) -> list[str]:
    """The keys that a panel draws: "reward|verified" -> reward, verified."""
    return panel.replace("|", " ").split()


def curves(panel: str, records: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """A panel of one run.

    Args:
        panel: keys of the records; those after a | have the axis on the right.
        records: of metrics.jsonl, at least one.
        name: in front of the drawing's ids.
    Returns: panel and drawing; of each series its key, kind ("share" or "number"), points, first and last (of
        the smoothed line), low and high (of the steps).
    """
    keys, right = keys_of(panel), keys_of(panel.partition("|")[2])
    series = [one for one in (_series(key, records, "step", label=key) for key in keys) if one["x"]]
    sides = [[s for s in series if s["key"] not in right], [s for s in series if s["key"] in right]]

    def plot(axes: Any) -> None:
        for side, own in zip((axes, axes.twinx()) if right else (axes,), sides, strict=False):
            for one in own:
                one["kind"] = own[0]["kind"]  # they share an axis
                _line(side, one, LINES[series.index(one)], faint=one["line"] != one["y"])
            _scale(side, own[0]["kind"], least=0.0 if panel == "lr" else LEAST)
            if right:
                side.tick_params(axis="y", labelcolor=LINES[series.index(own[0])][0])
        _steps(axes, records[0]["step"], records[-1]["step"])

    drawing = _drawn(plot, name, width=0.755 if right else 0.865)
    return {"panel": panel, "drawing": drawing, "series": list(map(_ends, series))}


def paths(
    key: str, against: str, runs: Sequence[tuple[str, Sequence[dict[str, Any]]]], name: str
) -> dict[str, Any]:
    """One key of several runs: by step, or the way each run takes through the plane with another key.

    Args:
        key, against: keys of the records; `against` may be "step".
        runs: name and records of each, at most three.
        name: in front of the drawing's ids.
    Returns: as `curves`, a series a run under the run's name; and key and against.
    Raises: ValueError for more runs than there are lines, or a run without these keys.
    """
    if len(runs) > len(LINES):
        raise ValueError(f"figures: expected at most {len(LINES)} runs on one pair of axes, got {len(runs)}")
    series = [_series(key, records, against, label=run) for run, records in runs]
    if missing := [one["key"] for one in series if not one["x"]]:
        raise ValueError(f"figures: run {missing[0]!r} has no step with {key!r} and {against!r}")

    def plot(axes: Any) -> None:
        for one, style in zip(series, LINES, strict=False):
            _line(axes, one, style)
        if against == "step":
            _steps(axes, min(one["x"][0] for one in series), max(one["x"][-1] for one in series))
        else:
            _ticks(axes.xaxis, "number")
        _scale(axes, series[0]["kind"], least=LEAST)

    ends = {"series": list(map(_ends, series)), "panel": f"{key} by {against}"}
    return {**ends, "key": key, "against": against, "drawing": _drawn(plot, name)}


def calibration(bins: Sequence[dict[str, Any]], name: str) -> Markup:
    """Of each bin of |Δ|: how often the higher score was the better answer's, and how many pairs it has.

    Args:
        bins: from, to (None: without end), pairs, wins and expected (the sum of 1/(1 + e^−|Δ|)), in order.
        name: in front of the drawing's ids.
    Returns: the drawing. Bins are equally wide; a point stands where the curve has the bin's mean promise.
    """
    edges = [bins[0]["from"], *(b["to"] for b in bins[:-1])]
    most = max(1, *(b["pairs"] for b in bins))

    def place(delta: float) -> float:
        i = max(i for i, edge in enumerate(edges) if edge <= delta)
        width = edges[i + 1] - edges[i] if i + 1 < len(edges) else 2.0
        return i + min(1.0, (delta - edges[i]) / width)

    def plot(axes: Any) -> None:
        grid = [edges[-1] * i / 200 for i in range(201)] + [edges[-1] + i / 10 for i in range(1, 21)]
        curve = [1 / (1 + math.exp(-delta)) for delta in grid]
        axes.plot(
            [place(delta) for delta in grid], curve, color=LINES[1][0], linewidth=1.9, linestyle=LINES[1][1]
        )
        full = [b for b in bins if b["pairs"]]
        for b in full:
            at, height = bins.index(b) + 0.5, 0.3 * b["pairs"] / most
            axes.bar(at, height, width=0.86, color="#000002")
            axes.text(at, height + 0.02, f"{b['pairs']:,}", ha="center", color="#000001", fontsize=9.5)
        promised = [min(b["expected"] / b["pairs"], 1 - 1e-12) for b in full]
        x = [place(max(0.0, math.log(p / (1 - p)))) for p in promised]
        y = [b["wins"] / b["pairs"] for b in full]
        axes.plot(x, y, color=LINES[0][0], linewidth=1.9, marker="o", markersize=4.5)
        axes.set(xlim=(-0.05, len(bins) + 0.05), ylim=(-0.02, 1.03), yticks=(0, 0.5, 1))
        axes.set_xticks(range(len(edges)), [f"{edge:g}" for edge in edges])
        axes.yaxis.set_major_formatter(lambda value, _: measure(value, "share"))

    return _drawn(plot, name)


def number(value: float) -> str:
    """Three significant digits, thousands in groups, a real minus; a mere rounding error is ≈0."""
    if 0 < abs(value) < 1e-9:
        return "≈0"
    return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}").replace("-", "−")


def measure(value: float, kind: str) -> str:
    """A number as its kind is read: rate 81.4%, share 81%, seconds 2 min 05 s."""
    if kind in ("rate", "share"):
        return f"{100 * value:.{1 if kind == 'rate' else 0}f}%".replace("-", "−")
    if kind == "seconds" and value >= 10:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes} min {seconds:02d} s" if minutes else f"{round(value)} s"
    return number(value) + (" s" if kind == "seconds" else "")


def _series(key: str, records: Sequence[dict[str, Any]], against: str, *, label: str) -> Series:
    known = [(r.get(against), r.get(key)) for r in records]
    known = [pair for pair in known if all(isinstance(value, int | float) for value in pair)]
    x, y = (_binned(column) for column in zip(*known, strict=True)) if known else ([], [])
    kind = "share" if key in SHARES else "number"
    line = y if key == "lr" else _smoothed(y)
    return {"key": label, "kind": kind, "x": x if against == "step" else _smoothed(x), "y": y, "line": line}


def _ends(one: Series) -> dict[str, Any]:
    """What a page says of a series in words."""
    ends = {"first": one["line"][0], "last": one["line"][-1], "low": min(one["y"]), "high": max(one["y"])}
    return {"key": one["key"], "kind": one["kind"], "points": len(one["x"]), **ends}


def _line(axes: Any, one: Series, style: tuple[str, Any], *, faint: bool = False) -> None:
    colour, dash = style
    if faint:
        axes.plot(one["x"], one["y"], color=colour, linewidth=0.9, alpha=0.4)
    look = {"color": colour, "linewidth": 1.9, "linestyle": dash, "markersize": 4.5}
    axes.plot(one["x"], one["line"], marker="o" if len(one["x"]) <= 12 else None, **look)


def _steps(axes: Any, first: int, last: int) -> None:
    room = 0.02 * (last - first) or 0.5
    axes.set_xlim(first - room, last + room)
    _ticks(axes.xaxis, "step")


def _scale(axes: Any, kind: str, *, least: float) -> None:
    """The y axis; it spans at least so much."""
    _ticks(axes.yaxis, kind)
    if kind == "share":
        axes.set(ylim=(-0.02, 1.03), yticks=(0, 0.5, 1))
    elif max(-axes.dataLim.y0, axes.dataLim.y1) < least:
        axes.set_ylim(min(0.0, axes.dataLim.y0), least)


def _ticks(axis: Any, kind: str) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = {"integer": True} if kind == "step" else {"steps": (1, 2, 5, 10)}
    axis.set_major_locator(MaxNLocator(4, **steps))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if kind == "step" else measure(value, kind))


def _drawn(plot: Callable[[Any], None], name: str, *, width: float = 0.865) -> Markup:
    """What `plot` draws on a pair of axes so wide, for the page."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the curves need matplotlib: pip install "nanopost[report]"') from error
    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the reader's own settings are
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(5, 2.5))  # 360 × 180 units in SVG
        axes = figure.add_axes((0.115, 0.115, width, 0.85))
        axes.tick_params(labelcolor="#000001")
        plot(axes)
        for side in figure.axes:
            side.tick_params(length=0, pad=5)
            side.spines[:].set_visible(False)
        axes.grid(axis="y", color="#000002", linewidth=1)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _themed(buffer.getvalue(), name)


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
