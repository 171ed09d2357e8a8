"""What adapters cost, beside what they replace and beside peft: in one process, on one thread, in turns.

    python -m bench.adapters          prints the ratios, writes bench/results/adapters-<machine>-<date>.json

    lora         forward and backward of 32 × 128 tokens: all weights, over an adapter on the 7 projections
    mixed        64 prompts of 32 tokens, 64 new ones each: one adapter for all, over eight in turn
    folder       110 million numbers in five files: reading their bytes, over `load_model`, each page touched
    peft-load    an adapter read beside a loaded base and taken out again: peft, over ours
    peft-reads   logits of 64 × 32 tokens, eight adapters in turn: peft's adapter_names, over ours
    peft-draws   as mixed: peft's generate with adapter_names, over ours

Each is a median of paired ratios of CPU time with p10 and p90 (`measure.py`), and a twin that ran the same
program twice; a twin off by more than 5 % is said to be noisy and the command fails. peft runs as it comes,
but for `low_cpu_mem_usage`, which spares it the first values of what it then reads; where it is not installed
its cases are skipped. Adapters have rank 16.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine, measure
from bench.cases import SMALL
from bench.inputs import STOP, token_rows
from bench.memory import CONFIG
from bench.ours import adapter_folder, model_folder, sft_step
from nanopost.models.bank import add_to_bank, open_bank, remove_from_bank, seat
from nanopost.models.header import shard_files
from nanopost.models.llama import Llama
from nanopost.models.peft import load_adapter
from nanopost.models.weights import load_model, random_model, save_model, write_config
from nanopost.rollout.sampler import row_uniforms, sample

RESULTS = Path(__file__).parent / "results"
PASSES = 11
NAMES = [f"tenant{i}" for i in range(8)]
ROWS, PROMPT, NEW, LOADS = 64, 32, 64, 20
OWNERS = [NAMES[i % len(NAMES)] for i in range(ROWS)]
BARS = {"lora": 1 / 1.25, "mixed": 1 / 1.3}  # the least ratio wanted: theirs over ours
Program = Callable[[], Any]


def draws(model: Llama, owners: list[str]) -> Program:
    """A completion of every prompt, each under the adapter of its place."""
    prompts = token_rows(ROWS, PROMPT, SMALL["vocabulary"])
    uniforms = row_uniforms(seed=0, step=0, prompts=range(ROWS), group_size=1, count=NEW)
    options = {"max_new_tokens": NEW, "stop_ids": [STOP], "uniforms": uniforms}
    return lambda: sample(model, prompts, adapters=owners, **options)


def reads(model: Llama, ids: torch.Tensor) -> Program:
    """The logits of rows that have an adapter each."""

    @torch.no_grad()
    def run() -> torch.Tensor:
        seat(model, [owner for owner in OWNERS for _ in range(ids.shape[1])])
        return model(ids)

    return run


def loads(model: Llama, folder: Path) -> Program:
    """An adapter read from its folder and taken out again, so many times."""

    def run() -> None:
        for _ in range(LOADS):
            add_to_bank(model, "guest", folder)
            remove_from_bank(model, "guest")

    return run


def shards(folder: Path) -> tuple[Program, Program]:
    """A folder of several files loaded and touched, and its bytes read."""
    folder.mkdir()
    write_config(CONFIG, folder, dtype=torch.float32, stop_ids=(STOP,))
    weights = random_model(folder, seed=0).state_dict()
    save_model(CONFIG, weights, folder, stop_ids=(STOP,), max_shard_bytes=100 << 20)

    def load() -> float:
        return sum(float(p.detach().view(-1)[::1024].sum()) for p in load_model(folder).parameters())

    return load, lambda: sum(len(path.read_bytes()) for path in shard_files(folder))


def programs(work: Path) -> Iterator[tuple[str, Program, Program]]:
    """Each case: ours, and what it is held against."""
    folder = work / "model"
    model_folder(work, **SMALL)
    adapter_folder(work)
    bank = open_bank(load_model(folder))
    for name in NAMES:
        add_to_bank(bank, name, work / "adapter")
    rows = token_rows(32, 129, SMALL["vocabulary"])
    beside = load_adapter(load_model(folder), work / "adapter")
    yield "lora", sft_step(beside, rows), sft_step(load_model(folder), rows)
    yield "mixed", draws(bank, OWNERS), draws(bank, NAMES[:1] * ROWS)
    yield "folder", *shards(work / "shards")
    if not (machine.version("peft") and machine.version("transformers")):
        print("peft-*: skipped, peft and transformers are not both installed", flush=True)
        return
    from bench import peer_peft

    theirs, ids = peer_peft.beside(work, NAMES), torch.tensor(token_rows(ROWS, PROMPT, SMALL["vocabulary"]))
    options = {"low_cpu_mem_usage": True}
    yield (
        "peft-load",
        loads(bank, work / "adapter"),
        peer_peft.loads(theirs, work / "adapter", LOADS, **options),
    )
    ours, other = reads(bank, ids), peer_peft.reads(theirs, ids, OWNERS)
    if found := measure.differences({"logits": ours()}, {"logits": other()}, 1e-5):
        raise ValueError(f"peft-reads: {found[0]}")
    yield "peft-reads", ours, other
    yield "peft-draws", draws(bank, OWNERS), peer_peft.draws(theirs, ids, OWNERS, NEW)


def timed(run: Program) -> float:
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
        for name, ours, theirs in programs(Path(work)):
            sides = {"ours": ours, "twin": ours, "theirs": theirs}
            taken: dict[str, list[float]] = {side: [] for side in sides}
            for turns in measure.order(list(sides), measure.WARM_UPS + PASSES):
                for side in turns:
                    taken[side].append(timed(sides[side]))
            kept = {side: values[measure.WARM_UPS :] for side, values in taken.items()}
            twin = measure.ratio(kept["ours"], kept["twin"])
            ratio = measure.ratio(kept["ours"], kept["theirs"])
            row = {"bars": {"median": BARS.get(name)}, "median": ratio, "quiet": measure.quiet(twin)}
            said = measure.verdict(row)
            rows[name] = {
                "ratio": ratio,
                "twin": twin,
                "bar": BARS.get(name),
                "verdict": said,
                "seconds": kept,
            }
            spread = f"{ratio['median']:.2f} ({ratio['p10']:.2f}–{ratio['p90']:.2f})"
            wanted = f", wanted ≥ {BARS[name]:.2f}" if name in BARS else ""
            print(f"{name:10} {spread}{wanted}: {said} (A/A {twin['median']:.2f})", flush=True)
    record = {"machine": found, "versions": machine.versions(), "commit": machine.commit(), "cases": rows}
    path = given.results / f"adapters-{machine.slug(found)}-{datetime.date.today()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"results: {path}")
    return 1 if any(row["verdict"] == "noisy" for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
