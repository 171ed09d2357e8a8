"""The offline page of a run, or of a demo with several: one HTML file to read, keep and send.

    python -m nanopost.report runs/demo        -> runs/demo/report.html

Stage table, curves, samples coloured by advantage, configuration. The page asks nothing of the network and
needs no JavaScript; what a model wrote is escaped, and the page's own policy forbids scripts. The same folder
gives the same bytes. Numbers are shaped here; the words and the looks are in report.html.jinja. The curves
need the extra `report`.
"""

import itertools
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from nanopost.atomic import replace_file
from nanopost.metrics import read_records, read_rollouts
from nanopost.report_figures import calibration, curves, keys_of, measure, number, paths

# Kinds of run, the first that fits: a key that its records have, and its figures in their order, each with
# the keys of metrics.jsonl that share it (those after a | on a scale of their own). What none names follows.
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ppo": ("value_loss", (
        "reward|verified", "eval_reward|eval_verified", "reward eval_reward", "exact eval_exact",
        "worked eval_worked", "length eval_length", "kl_ref", "beta", "value_loss", "explained_variance",
        "entropy", "kl_old", "grad_norm",
    )),
    "reinforcement": ("reward", (
        "reward eval_reward", "worked eval_worked", "length eval_length", "exact eval_exact", "entropy",
        "kl_ref", "kl_old", "no_signal", "grad_norm",
    )),
    "preference": ("chosen_change", (
        "loss eval_loss", "margin eval_margin", "accuracy eval_accuracy", "chosen_change rejected_change",
        "eval_chosen_change eval_rejected_change", "kl_from_ref eval_kl_from_ref", "sft eval_sft",
        "lr", "grad_norm",
    )),
    "distillation": ("agreement", (
        "loss eval_loss", "kl eval_kl", "agreement eval_agreement", "length", "lr", "grad_norm",
    )),
    "rewards": ("margin", (
        "loss eval_loss", "accuracy eval_accuracy", "margin eval_margin", "lr", "grad_norm",
    )),
    "ratings": ("error", ("loss eval_loss", "error", "lr", "grad_norm")),
    "supervised": ("loss", ("loss eval_loss", "lr", "grad_norm")),
}  # fmt: skip
FURTHER: tuple[str, ...] = ("loss", "clipped", "stopped", "rollout_s verify_s train_s", "seconds", "tokens")
FURTHER += ("eval_accuracy_chosen_shorter eval_accuracy_chosen_longer",)
FURTHER += ("eval_elo", "eval_calibration_error", "eval_length_correlation", "eval_right")
TOLD = ("eval_audit_",)  # keys of a single record, which a table tells instead
RATED = ("eval_error_", "eval_spread_", "eval_length_correlation_")  # the same, once evaluation.json is there
# What names the algorithm of a run, where its args.json has it.
ALGORITHM = {"loss": "Loss", "labels": "Labels", "mode divergence": "Mode", "beta": "β"}
ALGORITHM |= {"teacher": "Teacher", "reward_model": "Reward model", "verifier": "Verifier"}
SECONDS = ("rollout_s", "verify_s", "train_s", "seconds")
GROUPS = 3  # prompts shown of a rollout step
TOKENS = 12_000  # shown of a run's rollouts, so that the file stays small
SUMMARY = ("title", "intro", "machine", "seconds", "stages", "runs")
RATES: tuple[str, ...] = ("strict_json", "exact_greedy", "exact_sampled", "refusal_precision")
RATES += ("refusal_recall", "worked", "verified", "win_rate", "length_controlled_win_rate")
# Control characters have no place in HTML; their pictures have.
CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {127: "␡"}


def offer_report(run: Path | str) -> Path | str:
    """`write_report` at the end of a script: the path of the page, or how to get one without matplotlib."""
    return write_report(run) if find_spec("matplotlib") else 'none without pip install "nanopost[report]"'


def write_report(folder: Path | str) -> Path:
    """Write FOLDER/report.html for a run, or for a demo: a summary.json and the runs it names.

    Args:
        folder: a run folder (args.json, env.json, metrics.jsonl, rollouts/), or one with a summary.json whose
            `stages` give the table, whose `runs` name run folders relative to it and whose `figures`, if it
            has any, lay one key of several of them on one pair of axes.
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
        page["compared"] = []
    loader = FileSystemLoader(Path(__file__).parent)
    house = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    house.filters |= {"number": number, "signed": _signed, "measure": measure}
    house.filters["visible"] = lambda text: text.replace("\n", "↵\n").replace("\t", "→\t")
    text = house.get_template("report.html.jinja").render(page)
    replace_file(folder / "report.html", text.translate(CONTROLS).encode())
    return folder / "report.html"


def _demo(folder: Path) -> dict[str, Any]:
    path, asked = folder / "summary.json", dict[str, list[Any]]()
    summary = _read(path)
    if missing := [key for key in SUMMARY if key not in summary]:
        raise ValueError(f"{path}: no {missing[0]!r}")
    figures = summary.get("figures", [])
    for stage in summary["stages"]:
        for key in RATES:
            if not 0 <= (stage.get(key) or 0) <= 1:
                raise ValueError(f"{path}: {key}: expected a rate between 0 and 1, got {stage[key]}")
        for sample in stage.get("samples") or ():
            asked.setdefault(sample["prompt"], []).append({"stage": stage["stage"], **sample})
    return {
        **summary,
        "about": {"Machine": summary["machine"], "In all": measure(summary["seconds"], "seconds")},
        "asked": asked,
        "compared": [_compared(folder, summary, asked, f"x{i}") for i, asked in enumerate(figures)],
        "runs": [_run(folder / run["folder"], run["name"], i) for i, run in enumerate(summary["runs"])],
    }


def _compared(folder: Path, summary: dict[str, Any], asked: dict[str, Any], name: str) -> dict[str, Any]:
    """A figure across runs: {"key": "reward", "against": "kl_ref", "runs": [names of runs]}."""
    folders = {run["name"]: folder / run["folder"] for run in summary["runs"]}
    if strange := [run for run in asked["runs"] if run not in folders]:
        raise ValueError(f"{folder / 'summary.json'}: figures: no run {strange[0]!r}")
    runs = [(run, read_records(folders[run])) for run in asked["runs"]]
    return paths(asked["key"], asked["against"], runs, name)


def _run(folder: Path, name: str, index: int) -> dict[str, Any]:
    """Everything the page says about one run folder."""
    if not (records := read_records(folder)):
        raise ValueError(f"{folder / 'metrics.jsonl'}: no complete record; expected the metrics of a run")
    args, env = _read(folder / "args.json"), _read(folder / "env.json")
    keys = {k for record in records for k, v in record.items() if isinstance(v, int | float)} - {"step"}
    kind = next((kind for kind, (key, _) in KINDS.items() if key in keys), "supervised")
    evaluation = _evaluation(folder, f"r{index}-c")
    told = TOLD + (RATED if evaluation else ())
    first, left = _panels(KINDS[kind][1], {key for key in keys if not key.startswith(told)})
    further, left = _panels(FURTHER, left)
    pairs = [f"{key} eval_{key}" for key in sorted(left) if f"eval_{key}" in left]
    further += sorted([*pairs, *left.difference(*(pair.split() for pair in pairs))])
    spent = sum(record.get(key) or 0 for record in records for key in SECONDS)
    about = {"Model": args.get("model"), "Data": args.get("data"), "Steps": f"{len(records):,}"}
    for key, word in ALGORITHM.items():
        parts = [str(args[part]) for part in keys_of(key) if args.get(part) is not None]
        about |= {word: ", ".join(parts)} if parts else {}
    return {
        "name": name,
        "id": f"run-{index}",
        "kind": kind,
        "about": about | {"Time in steps": measure(spent, "seconds"), "Device": env.get("device")},
        "figures": [curves(panel, records, f"r{index}-{i}") for i, panel in enumerate(first)],
        "further": [curves(panel, records, f"r{index}-f{i}") for i, panel in enumerate(further)],
        "tables": {"args.json": args, "env.json": env},
        "evaluation": evaluation,
        **_rollouts(folder),
    }


def _panels(panels: tuple[str, ...], keys: set[str]) -> tuple[list[str], set[str]]:
    """Those that show a key no other has shown, and the keys that none of them shows."""
    shown: list[str] = []
    for panel in panels:
        there = keys & {*keys_of(panel)}
        if there and ("|" not in panel or len(there) == 2):
            shown, keys = [*shown, panel], keys - there
    return shown, keys


def _evaluation(folder: Path, name: str) -> dict[str, Any] | None:
    """What a reward model's run measured on held-out labels and on its audit, None for another run."""
    if not (folder / "evaluation.json").exists():
        return None
    found = _read(folder / "evaluation.json")
    audit, bins, names = found.pop("audit", {}), found.pop("calibration", []), []
    for key in [key for key in found if key.startswith("rated_")]:
        names.append(key.removeprefix("rated_"))
    parts = ("rated", "error", "spread", "length_correlation")
    ratings = {name: [found.pop(f"{part}_{name}", None) for part in parts] for name in names}
    note = found.pop("audit_note", "")
    facts = {key: value for key, value in found.items() if key not in ("step", "labels")}
    drawing = calibration(bins, name) if bins else None
    return {
        "facts": facts,
        "bins": bins,
        "drawing": drawing,
        "audit": audit,
        "note": note,
        "ratings": ratings,
    }


def _rollouts(folder: Path) -> dict[str, Any]:
    """Of the first and the last written step the groups that differ most, best sample first."""
    steps = sorted(int(path.name.split(".")[0]) for path in (folder / "rollouts").glob("*.jsonl.gz"))
    written: list[dict[str, Any]] = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        every = read_rollouts(folder, step)
        rows = [row for row in every if row["score"] is not None]  # the verifier failed on the others
        groups = [list(g) for _, g in itertools.groupby(rows, key=lambda row: (row["line"], row["prompt"]))]
        groups = [sorted(group, key=lambda row: -row["advantage"]) for group in groups]
        flat = sum(all(row["advantage"] == 0 for row in group) for group in groups)
        groups.sort(key=lambda group: group[-1]["advantage"] - group[0]["advantage"])
        counts = {"flat": flat, "count": len(groups), "unverified": len(every) - len(rows)}
        written.append({"step": step, **counts, "groups": groups[:GROUPS]})
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


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if value else "0"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m nanopost.report FOLDER")
    print(write_report(sys.argv[1]))
