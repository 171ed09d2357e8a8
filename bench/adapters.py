"""What adapters cost, beside what they replace: one process, one thread, in turns, as ratios of CPU time.

    python -m bench.adapters          prints the ratios, writes bench/results/adapters-<machine>-<date>.json

    lora    forward and backward of 32 × 128 tokens: all weights, over an adapter of rank 16 on 7 projections
    mixed   64 prompts of 32 tokens, 64 new tokens each: one adapter for all, over eight, a row each in turn

Each is a median of paired ratios with p10 and p90 (`measure.py`), and a twin that ran the same program twice;
a twin off by more than 5 % is said to be noisy and the command fails.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import machine, measure
from bench.cases import SMALL
from bench.inputs import STOP, token_rows
from bench.ours import adapter_folder, model_folder, sft_step
from nanopost.models.bank import add_to_bank, open_bank
from nanopost.models.llama import Llama
from nanopost.models.peft import load_adapter
from nanopost.models.weights import load_model
from nanopost.rollout.sampler import row_uniforms, sample

RESULTS = Path(__file__).parent / "results"
PASSES = 11
BARS = {"lora": 1 / 1.25, "mixed": 1 / 1.3}  # the least ratio wanted: theirs over ours


def drawn(model: Llama, names: list[str]) -> Callable[[], None]:
    """64 completions, each under the adapter of its place."""
    prompts = token_rows(64, 32, SMALL["vocabulary"])
    uniforms = row_uniforms(seed=0, step=0, prompts=range(64), group_size=1, count=64)
    owners = [names[i % len(names)] for i in range(64)]

    def run() -> None:
        sample(model, prompts, adapters=owners, max_new_tokens=64, stop_ids=[STOP], uniforms=uniforms)

    return run


def programs(work: Path) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Ours, and what it is held against."""
    folder = work / "model"
    model_folder(work, **SMALL)
    adapter_folder(work)
    bank, names = open_bank(load_model(folder)), [f"tenant{i}" for i in range(8)]
    for name in names:
        add_to_bank(bank, name, work / "adapter")
    beside = load_adapter(load_model(folder), work / "adapter")
    rows = token_rows(32, 129, SMALL["vocabulary"])
    return {
        "lora": (sft_step(beside, rows), sft_step(load_model(folder), rows)),
        "mixed": (drawn(bank, names), drawn(bank, names[:1])),
    }


def timed(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.adapters", description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found, rows = machine.machine(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as work:
        for name, (ours, theirs) in programs(Path(work)).items():
            sides = {"ours": ours, "twin": ours, "theirs": theirs}
            taken: dict[str, list[float]] = {side: [] for side in sides}
            for turns in measure.order(list(sides), measure.WARM_UPS + PASSES):
                for side in turns:
                    taken[side].append(timed(sides[side]))
            kept = {side: values[measure.WARM_UPS :] for side, values in taken.items()}
            twin, ratio = (
                measure.ratio(kept["ours"], kept["twin"]),
                measure.ratio(kept["ours"], kept["theirs"]),
            )
            bar, noisy = BARS[name], not measure.quiet(twin)
            said = "noisy" if noisy else "met" if ratio["median"] >= bar else "not met"
            rows[name] = {"ratio": ratio, "twin": twin, "bar": bar, "verdict": said, "seconds": kept}
            spread = f"{ratio['median']:.2f} ({ratio['p10']:.2f}–{ratio['p90']:.2f})"
            print(f"{name:6} {spread}, wanted ≥ {bar:.2f}: {said} (A/A {twin['median']:.2f})", flush=True)
    record = {"machine": found, "versions": machine.versions(), "commit": machine.commit(), "cases": rows}
    path = given.results / f"adapters-{machine.slug(found)}-{datetime.date.today()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"results: {path}")
    return 1 if any(row["verdict"] == "noisy" for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
