"""What training a model of 100 million parameters takes: all weights, LoRA, QLoRA. Measured, not estimated.

    python -m bench.memory            writes bench/results/memory-<machine>.json, prints the table

Each row is a fresh process on one thread that loads the same folder (float32) and takes two steps of
supervised fine-tuning, 4 rows of 128 tokens, AdamW. Loading is the peak of anonymous memory: the pages of the
file itself can be dropped at any time; a thread looks every two milliseconds. A step is the peak of all
resident memory. Both are above what the process held after its imports. glibc is told to give large blocks
back when they are freed (MALLOC_MMAP_THRESHOLD_): what it would hoard is not what training takes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.inputs import token_rows
from bench.ours import sft_step
from bench.worker import forget_high_water, high_water
from nanopost import optim
from nanopost.models.config import LlamaConfig
from nanopost.models.trainable import LoRA, load_policy
from nanopost.models.weights import random_model, save_model, write_config

RESULTS = Path(__file__).parent / "results"
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
WAYS = {
    "all weights": LoRA(),
    "LoRA, rank 16": LoRA(lora_rank=16),
    "QLoRA, rank 16": LoRA(lora_rank=16, lora_nf4=True),
}
ROWS, TOKENS = 4, 128
HEAD = "| what trains | parameters | of them trained | loading | a step |\n|---|---|---|---|---|"


class Peak:
    """The most anonymous memory that this process has held since the start, above what it held then."""

    def __init__(self) -> None:
        self.running = True
        self.start = self.most = self.now()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

    def look(self) -> None:
        while self.running:
            self.most = max(self.most, self.now())
            time.sleep(0.002)

    def end(self) -> int:
        self.running = False
        self.thread.join()
        return self.most - self.start


def child(way: str, folder: Path) -> dict[str, int]:
    """Load, and take two steps."""
    torch.set_num_threads(1)
    forget_high_water()
    start, loading = high_water(), Peak()
    model = load_policy(folder, WAYS[way], seed=0)
    loaded = loading.end()
    forget_high_water()
    iterate = sft_step(model, token_rows(ROWS, TOKENS + 1, CONFIG.vocab_size))
    optimizer = optim.adamw(model, lr=1e-5, weight_decay=0.0)
    for _ in range(2):
        iterate()
        optimizer.step()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": trained, "loading": loaded, "step": high_water() - start}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(child(given.child[0], Path(given.child[1]))))
        return 0
    found, rows = machine.machine(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        write_config(CONFIG, Path(folder), dtype=torch.float32, stop_ids=(0,))
        model = random_model(folder, seed=0)
        total = sum(p.numel() for p in model.parameters())
        save_model(CONFIG, model.state_dict(), folder, stop_ids=(0,))
        del model
        for way in WAYS:
            command = [sys.executable, "-m", "bench.memory", "--child", way, folder]
            env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
            rows[way] = json.loads(done.stdout)
    record = {"machine": found, "versions": machine.versions(), "commit": machine.commit()}
    record |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
    path = given.results / f"memory-{machine.slug(found)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(record | {"parameters": total, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    print(HEAD)
    for way, row in rows.items():
        memory = [f"{row[name] / 2**20:,.0f} MiB" for name in ("loading", "step")]
        print(f"| {way} | {total:,} | {row['trained']:,} | {' | '.join(memory)} |")
    print(f"results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
