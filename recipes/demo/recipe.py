"""The demo: a financial-operations assistant from random weights, stage by stage, on one CPU thread.

    python recipes/demo/recipe.py            base → SFT → preference → GRPO → student       runs/demo
    python recipes/demo/recipe.py --zero     base → GRPO without demonstrations             runs/demo-zero

It writes the corpora of the ledger world, runs the public scripts as a user would (their commands are
printed), measures every stage on the same held-out prompts, prints the stage table and leaves summary.json
and report.html. The first takes about six and a half minutes.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from plan import PLANS, SEED, SETTINGS, SHARED, TITLES, Step

from nanopost.data.chat import copy_chat
from nanopost.data.schema import read_jsonl
from nanopost.evals.stages import stage_row
from nanopost.worlds import ledger
from nanopost.worlds.ledger_chat import write_base_folder
from nanopost.worlds.ledger_corpora import write_corpora

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = {
    "stage": "stage",
    "strict_json": "strict JSON",
    "exact_greedy": "exact greedy",
    "exact_sampled": "exact sampled",
    "refusal_precision": "refusal prec.",
    "refusal_recall": "recall",
    "worked": "worked",
    "mean_length": "tokens",
    "win_rate": "win rate",
    "length_controlled_win_rate": "same length",
    "kl": "KL",
    "parameters": "parameters",
    "tokens_per_second": "tokens/s",
    "seconds": "seconds",
}
FORMATS = {
    "mean_length": ".1f",
    "seconds": ".1f",
    "kl": ".2f",
    "parameters": ",",
    "tokens_per_second": ",.0f",
}


def write_world(out: Path, settings: dict[str, Any]) -> None:
    """Corpora, tokenizer and template; and config.json of the model, and of the student beside it."""
    write_corpora(out / "data", SEED, **settings["corpora"])
    folder = out / "world"
    write_base_folder(folder, out / "data", vocab_size=settings["vocab_size"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    size = 1 + max(
        [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    )
    (out / "world-student").mkdir()
    copy_chat(folder, out / "world-student")
    for name, changes in (("world", {}), ("world-student", settings["student_model"])):
        config = {**settings["model"], **changes, "vocab_size": size}
        (out / name / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def started(
    about: str | None, out: Path, settings: dict[str, Any]
) -> tuple[Path, Path | None, dict[str, Any]]:
    """The flags of a recipe on an SFT model: its run folder, the demo run to take that from, its settings.

    Args:
        about: the recipe's docstring, for --help.
        out: the run folder if no other is given; it must not exist.
        settings: what files given with --settings replace entries of.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", type=Path, help="a demo run to start from [runs/demo, if its sft is there]")
    parser.add_argument("--out", type=Path, default=out, help=f"run folder; must not exist [{out}]")
    parser.add_argument(
        "--settings", type=Path, nargs="+", default=[], help="JSON files whose entries replace the settings"
    )
    given = parser.parse_args()
    if given.out.exists():
        sys.exit(f"{given.out} is there already: move it away, or choose another folder with --out")
    sft = given.sft or (Path("runs/demo") if Path("runs/demo/sft/model").is_dir() else None)
    if sft and not (sft / "sft" / "model").is_dir():
        sys.exit(f"{sft} has no sft/model: --sft is the folder of a demo run")
    for path in given.settings:
        settings = settings | json.loads(path.read_text(encoding="utf-8"))
    return given.out, sft, settings


def run_step(step: Step, out: Path, settings: dict[str, Any]) -> None:
    """Run a step's command as its own process, printed first."""
    places = {"out": out, "name": step.name, "seed": SEED, "max_new_tokens": settings["max_new_tokens"]}
    command = " ".join([step.command, SHARED, settings[step.settings]])
    arguments = [argument.format(**places) for argument in command.split()]
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    if arguments[0] != "-m":
        arguments[0] = str(ROOT / arguments[0])
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # what a CPU can do, also where there is a GPU
    subprocess.run([sys.executable, *arguments], check=True, env=env)


def cell(name: str, value: Any) -> str:
    """A number as its column is read; a stage without it has a dash."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else format(value, FORMATS.get(name, ".1%"))


def table(stages: list[dict[str, Any]], columns: dict[str, str] = COLUMNS) -> str:
    """The stage table, one line a stage."""
    rows = [list(columns.values()), *([cell(name, stage[name]) for name in columns] for stage in stages)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows
    )


def machine() -> str:
    system = f"{platform.system()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {platform.machine()}, {system}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--zero",
        dest="plan",
        action="store_const",
        const="demo-zero",
        default="demo",
        help="GRPO straight from the base, no demonstrations",
    )
    parser.add_argument("--out", type=Path, help="run folder; must not exist [runs/demo or runs/demo-zero]")
    parser.add_argument("--settings", type=Path, help="JSON file whose entries replace the settings above")
    arguments = parser.parse_args()
    out: Path = arguments.out or Path("runs", arguments.plan)
    if out.exists():
        sys.exit(f"{out} is there already: move it away, or choose another folder with --out")
    settings = dict(SETTINGS)
    if arguments.settings:
        settings |= json.loads(arguments.settings.read_text(encoding="utf-8"))
    torch.set_num_threads(1)  # the model is tiny: a second thread costs more than it brings
    begun = time.perf_counter()
    write_world(out, settings)
    tests = read_jsonl(out / "data" / "test.jsonl")
    measure = {"max_new_tokens": settings["max_new_tokens"], "seed": SEED}
    plan, previous, stages = PLANS[arguments.plan], None, list[dict[str, Any]]()

    start = time.perf_counter()
    for step in plan:
        run_step(step, out, settings)
        if not step.stage:  # its seconds are those of the stage it belongs to
            continue
        seconds, model = round(time.perf_counter() - start, 1), out / step.name / "model"
        row = stage_row(model, tests, ledger.verify, previous=previous, **measure)
        stages.append({"stage": step.name, **row, "seconds": seconds})
        previous, start = model, time.perf_counter()

    summary = {
        "title": TITLES[arguments.plan],
        "intro": "Each row of the table is one more stage, measured on the same held-out prompts.",
        "machine": machine(),
        "seconds": round(time.perf_counter() - begun, 1),
        "stages": stages,
        "runs": [{"name": step.name, "folder": step.name} for step in plan if step.stage],
    }
    (out / "summary.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"\n{len(tests)} held-out prompts, {machine()}, {summary['seconds']:.0f} seconds in all\n")
    print(f"{table(stages)}\n", flush=True)
    subprocess.run([sys.executable, "-m", "nanopost.report", str(out)], check=True)


if __name__ == "__main__":
    main()
