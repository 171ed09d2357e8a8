"""The demo: a financial-operations assistant from random weights, base → SFT → GRPO, on one CPU thread.

    python recipes/demo/recipe.py            base → SFT → GRPO, about five minutes          runs/demo
    python recipes/demo/recipe.py --zero     base → GRPO without demonstrations             runs/demo-zero

It writes the corpora of the ledger world, runs the public scripts as a user would (their commands are
printed), measures every stage on the same held-out prompts, prints the stage table and leaves summary.json
and report.html.
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

from nanopost.data.schema import read_jsonl
from nanopost.evals.stages import stage_row
from nanopost.worlds import ledger
from nanopost.worlds.ledger_chat import write_base_folder
from nanopost.worlds.ledger_corpora import write_corpora

ROOT = Path(__file__).resolve().parents[2]
SEED = 0

# The decoder: 0.7 M parameters under the hub's names; vocab_size comes from the tokenizer.
MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 200.0,
    "tie_word_embeddings": True,
}
# A JSON file given with --settings replaces entries: tiny.json makes the demo a test of seconds.
SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "vocab_size": 512,
    "corpora": {"base": 24000, "sft": 3000, "rl": 4000, "test": 400, "slip_share": 0.35},
    "max_new_tokens": 48,
    "base": ["--max-length", 96, "--steps", 1150, "--batch-size", 32, "--lr", 3e-3, "--warmup", 60],
    "sft": ["--max-length", 128, "--epochs", 2.5, "--batch-size", 64, "--lr", 1e-3, "--warmup", 10],
    "grpo": ["--steps", 80, "--lr", 4e-4, "--schedule", "linear", "--warmup", 3],
    "zero": ["--steps", 100, "--lr", 4e-4, "--schedule", "linear", "--warmup", 3],
}
COLUMNS = {
    "stage": "stage",
    "strict_json": "strict JSON",
    "exact_greedy": "exact greedy",
    "exact_sampled": "exact sampled",
    "refusal_precision": "refusal precision",
    "refusal_recall": "refusal recall",
    "worked": "worked",
    "mean_length": "tokens",
    "kl": "KL to previous",
    "seconds": "seconds",
}


def run_script(script: str, *arguments: object) -> None:
    """Run one of the project's scripts as its own process, its command printed first."""
    command = [script, *map(str, arguments)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    env = os.environ | {
        "CUDA_VISIBLE_DEVICES": ""
    }  # the demo shows what a CPU can do, also where there is a GPU
    subprocess.run([sys.executable, str(ROOT / script), *command[1:]], check=True, env=env)


def write_world(out: Path, settings: dict[str, Any]) -> Path:
    """Corpora, tokenizer, template and config.json: what the base stage starts from."""
    counts = settings["corpora"]
    write_corpora(out / "data", SEED, **counts)
    folder = out / "world"
    write_base_folder(folder, out / "data", vocab_size=settings["vocab_size"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    size = 1 + max(
        [*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])]
    )
    config = {**settings["model"], "vocab_size": size}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def cell(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return (
        f"{value:.1f}"
        if name in ("mean_length", "seconds")
        else f"{value:.2f}"
        if name == "kl"
        else f"{value:.1%}"
    )


def table(stages: list[dict[str, Any]]) -> str:
    """The stage table, one line a stage."""
    rows = [list(COLUMNS.values()), *([cell(name, stage[name]) for name in COLUMNS] for stage in stages)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
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
    parser.add_argument("--zero", action="store_true", help="GRPO straight from the base, no demonstrations")
    parser.add_argument("--out", type=Path, help="run folder; must not exist [runs/demo or runs/demo-zero]")
    parser.add_argument("--settings", type=Path, help="JSON file whose entries replace the settings above")
    arguments = parser.parse_args()
    out: Path = arguments.out or Path("runs/demo-zero" if arguments.zero else "runs/demo")
    if out.exists():
        sys.exit(f"{out} is there already: move it away, or choose another folder with --out")
    settings = dict(SETTINGS)
    if arguments.settings:
        settings |= json.loads(arguments.settings.read_text(encoding="utf-8"))
    torch.set_num_threads(1)  # the model is tiny: a second thread costs more than it brings
    begun = time.perf_counter()
    model, data = write_world(out, settings), out / "data"
    tests = read_jsonl(data / "test.jsonl")
    stages: list[dict[str, Any]] = []

    def measure(stage: str, folder: Path, previous: Path | None, seconds: float) -> None:
        row = stage_row(
            folder,
            tests,
            ledger.verify,
            previous=previous,
            max_new_tokens=settings["max_new_tokens"],
            seed=SEED,
        )
        stages.append({"stage": stage, **row, "seconds": round(seconds, 1)})

    text = ["--pack", "--threads", 1, "--seed", SEED]
    plan: list[tuple[str, str, list[object]]] = [
        ("base", "train_sft.py", ["--data", data / "base.jsonl", "--from-scratch", *text, *settings["base"]]),
    ]
    if not arguments.zero:
        plan.append(("sft", "train_sft.py", ["--data", data / "sft.jsonl", *text, *settings["sft"]]))
    grpo = ["--data", data / "rl.jsonl", "--verifier", "ledger", "--eval-data", data / "test.jsonl"]
    grpo += ["--prompts-per-step", 32, "--group-size", 8, "--micro-batch", 32, "--threads", 1, "--seed", SEED]
    grpo += ["--max-new-tokens", settings["max_new_tokens"]]
    plan.append(("grpo", "train_grpo.py", [*grpo, *settings["zero" if arguments.zero else "grpo"]]))

    previous = None
    for stage, script, options in plan:
        start = time.perf_counter()
        run_script(script, "--model", model, "--out", out / stage, *options)
        model = out / stage / "model"
        measure(stage, model, previous, time.perf_counter() - start)
        previous = model

    summary = {
        "title": "From a base model to an assistant"
        if not arguments.zero
        else "Reinforcement learning from the base",
        "intro": "The same decoder after one more stage each, measured on the same held-out prompts.",
        "machine": machine(),
        "seconds": round(time.perf_counter() - begun, 1),
        "stages": stages,
        "runs": [{"name": stage, "folder": stage} for stage, _, _ in plan],
    }
    (out / "summary.json").write_text(
        json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(f"\n{len(tests)} held-out prompts, {machine()}, {summary['seconds']:.0f} seconds in all\n")
    print(f"{table(stages)}\n", flush=True)
    subprocess.run([sys.executable, "-m", "nanopost.report", str(out)], check=True)


if __name__ == "__main__":
    main()
