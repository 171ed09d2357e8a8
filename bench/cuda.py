"""The CUDA table: every kernel and model against this GPU's own ceilings, in one command of nine minutes.

    python -m bench.cuda                        all rows
    python -m bench.cuda --only rope train-1b   these rows
    python -m bench.cuda --list                 what there is

A row is checked first, against the slow path and on fresh random data; what is wrong has no time. The rows
run in a process beside this one: an exception becomes the row's text, and after one that has broken the
GPU's context, ended the process or taken too long, a new process goes on with the rows that are left. Rows
that do not fit into the budget any more are listed as not reached. Results go to bench/results/, and to the
folder OUT where that variable is set. Without a GPU nothing is measured and nothing written.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.cuda_measure import Ceilings, Mark, ceilings
from bench.cuda_process import CEILINGS, Record, Row, attempt, run_rows, supervise, until
from bench.cuda_table import text

RESULTS = machine.ROOT / "bench" / "results"
SLOW = 2.5  # times its seconds that a row may take before its process is ended


def call(place: str, *arguments: Any) -> list[Mark]:
    """A function by its name, imported when it is called: the kernels' modules need Triton."""
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)(*arguments)


def row(name: str, title: str, seconds: float, place: str, *first: Any) -> Row:
    return Row(name, title, seconds, partial(call, place, *first))


LOGITS, POINTWISE, DECODE = "bench.cuda_kernels", "bench.cuda_pointwise:row", "bench.cuda_decode"
TABLE = [
    row("logps", "log-prob + entropy forward over bf16 logits", 20, f"{LOGITS}:logps"),
    row("backward", "their cross-entropy backward, in place", 20, f"{LOGITS}:in_place"),
    row("rms-norm", "RMSNorm, 16,384 × 4,096", 10, POINTWISE, "rms_norm"),
    row("swiglu", "SwiGLU, 16,384 × 14,336", 10, POINTWISE, "swiglu"),
    row("rope", "RoPE, 16,384 × 32 × 128", 10, POINTWISE, "rope"),
    row("chunked", "linear log-prob (8192, 4096, 128256)", 20, f"{LOGITS}:linear", "chunked", 0.86, 300.0),
    row("single", "the same, single kernel", 20, f"{LOGITS}:linear", "single", 0.75, 16.0),
    row("linear-ce", "linear CE, both passes (8192, 4096, 151936)", 25, f"{LOGITS}:linear_ce"),
    row("train-1b", "training 1 B, T 4,096 packed", 45, "bench.cuda_train:one_b"),
    row("decode-0.5b", "decode 0.5 B, one row", 35, f"{DECODE}:half_b", 1, 1, 0.65),
    row("decode-1b", "decode 1 B, one row", 35, f"{DECODE}:one_b", 1, 1, 0.65),
    row("decode-0.5b-64", "decode 0.5 B, 64 rows of 8 prompts", 60, f"{DECODE}:half_b", 64, 8, 0.55),
    row("decode-1b-64", "decode 1 B, 64 rows of 8 prompts", 60, f"{DECODE}:one_b", 64, 8, 0.55),
    row("grpo-0.5b", "GRPO end to end 0.5 B, G 8", 100, "bench.cuda_grpo:grpo"),
]


def child(spec: dict[str, Any]) -> int:
    """The ceilings, unless they are known, and the rows that are left; a line of JSON for each."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes to the log and not between the answers
    deadline = time.monotonic() + spec["seconds"]
    found: list[Ceilings] = [spec[CEILINGS]] if spec[CEILINGS] else []

    def say(record: Record) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    def measured() -> Ceilings:
        found.append(ceilings())
        return found[0]

    torch.seed()  # fresh data, of the GPU's generator too
    if not found:
        attempt(CEILINGS, measured, say)
    rows = [row for row in TABLE if row.name in spec["rows"]]
    return 0 if found and run_rows(rows, found[0], partial(until, deadline), say) else 1


def command(rows: list[str], known: Ceilings | None, seconds: float) -> list[str]:
    """Of a process for these rows."""
    spec = {"rows": rows, CEILINGS: known, "seconds": seconds}
    return [sys.executable, "-m", "bench.cuda", "--child", json.dumps(spec)]


def write(results: dict[str, Any], path: Path) -> None:
    """Add these rows to the day's file of this GPU; a row that was not reached leaves what is there."""
    old = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    new = {name: row for name, row in results["rows"].items() if not (name in old and "not_reached" in row)}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = json.dumps(results | {"rows": old | new}, indent=1, ensure_ascii=False)
    path.write_text(whole + "\n", encoding="utf-8")


def file_name(gpu: str) -> str:
    """cuda-nvidia-h200-2026-01-31.json."""
    return f"cuda-{'-'.join(re.findall('[a-z0-9]+', gpu.lower()))}-{datetime.date.today()}.json"


def main(arguments: list[str]) -> int:
    names = [row.name for row in TABLE]
    parser = argparse.ArgumentParser(prog="python -m bench.cuda", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="these rows")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--seconds", type=float, default=540.0, help="what the command may take; 540")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join(f"{row.name:14} {row.title}, about {row.seconds:.0f} s" for row in TABLE))
        return 0
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured, nothing is claimed")
        return 0
    if given.child:
        return child(given.child)
    start, asked = time.monotonic(), [name for name in names if name in given.only]
    limits = {row.name: SLOW * row.seconds for row in TABLE}
    found, rows = supervise(asked, limits, partial(until, start + given.seconds), command)
    commit, date = machine.commit(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    more = {CEILINGS: found, "commit": commit, "date": date}
    results = {
        "machine": machine.machine(),
        "versions": machine.versions() | {name: machine.version(name) for name in ("triton", "peft")},
        "rows": {name: record | more for name, record in rows.items()},
        "seconds": time.monotonic() - start,
    } | more
    if found:
        folders = [RESULTS, *([Path(os.environ["OUT"])] if os.environ.get("OUT") else [])]
        for folder in folders:
            write(results, folder / file_name(found["gpu"]))
            print(f"results: {folder / file_name(found['gpu'])}")
    print(text(results))
    return 2 if any("wrong" in record or "error" in record for record in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
