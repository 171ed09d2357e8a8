"""What `nanopost.plan` says of memory beside what a fresh process takes at its highest moment.

    python -m bench.plan            prints the table of docs/scale.md

Each row is a fresh process on one thread. It takes a step for the optimiser's moments to be there, and then
one that is measured: the high-water mark of its resident memory, above what it held after the same two steps
of a model of next to no size. GRPO's step has two marks, one while it samples and one while it trains; its
completions stop at ragged lengths where the row says so, from 7/8 of the most. glibc is told to give large
blocks back when they are freed (MALLOC_MMAP_THRESHOLD_): what it would hoard is not what training takes.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.inputs import token_rows
from bench.worker import forget_high_water, high_water
from nanopost import optim, plan
from nanopost.data.collate import collate
from nanopost.data.schema import Sample
from nanopost.losses import aggregate, sft_loss
from nanopost.models.config import LlamaConfig
from nanopost.models.footprint import Job
from nanopost.models.lora_model import TARGETS
from nanopost.models.trainable import LoRA, load_policy
from nanopost.models.weights import random_model, save_model, write_config
from nanopost.rollout.sampler import row_uniforms, sample

CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
SMALL = replace(CONFIG, hidden_size=32, intermediate_size=32, num_hidden_layers=1)
PLAIN, SCORE = LoRA(), {"sft": "alike", "grpo": "logps"}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    script: str  # "sft" or "grpo"
    micro_batch: int
    rows: int  # of an optimiser step
    length: int = 128  # of a row, or of a prompt
    lora: LoRA = PLAIN
    group: int = 1
    new: int = 0
    ragged: bool = False


CASES = {
    "SFT, 4 of 4 rows": Case("sft", 4, 4),
    "SFT, 8 of 8 rows": Case("sft", 8, 8),
    "SFT, 4 of 16 rows": Case("sft", 4, 16),
    "SFT, 16 of 32 rows": Case("sft", 16, 32),
    "SFT, LoRA, 8 of 16 rows": Case("sft", 8, 16, lora=LoRA(lora_rank=16)),
    "SFT, LoRA, 24 of 24 rows": Case("sft", 24, 24, lora=LoRA(lora_rank=16)),
    "SFT, QLoRA, 8 of 16 rows": Case("sft", 8, 16, lora=LoRA(lora_rank=16, lora_nf4=True)),
    "GRPO, 8 of 32 rows": Case("grpo", 8, 32, group=4, new=128),
    "GRPO, 32 of 32 rows, ragged": Case("grpo", 32, 32, group=4, new=128, ragged=True),
    "GRPO, LoRA, 16 of 64 rows": Case("grpo", 16, 64, group=8, new=96, lora=LoRA(lora_rank=16)),
}


def job(case: Case) -> Job:
    """The case as the plan sees it."""
    return Job(
        config=CONFIG,
        head=SCORE[case.script],
        micro_batch=case.micro_batch,
        rows=case.rows,
        length=case.length,
        group=case.group,
        new=case.new,
        sampled=case.rows if case.new else 0,
        rank=case.lora.lora_rank,
        targets=TARGETS["all"] if case.lora.lora_rank else (),
        nf4=case.lora.lora_nf4,
        copies=int(case.script == "grpo"),
    )


def planned(case: Case) -> dict[str, int]:
    """Bytes that the plan gives the two marks."""
    sums = {name: sum(terms.values()) for name, terms in plan.moments(job(case)).items()}
    found = {"training": max(sums["backward begins"], sums["backward ends"])}
    return found | ({"sampling": sums["sampling"]} if case.new else {})


def child(case: Case, folder: Path) -> dict[str, int]:
    """The marks of the case above those of a process that has loaded all it needs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as small:
        write(Path(small), SMALL)
        steps(case, Path(small), 0)
    gc.collect()
    forget_high_water()
    return steps(case, folder, high_water())


def steps(case: Case, folder: Path, start: int) -> dict[str, int]:
    """Two steps of the case; the marks of the second, less what was held at the start."""
    marks = dict[str, int]()
    model = load_policy(folder, case.lora, seed=0)
    reference = load_policy(folder, case.lora, seed=0).requires_grad_(False) if case.new else None
    optimizer = optim.adamw(model, lr=1e-5, weight_decay=0.0)
    for step in range(2):
        samples = data(case) if reference is None else None
        if samples is None:
            forget_high_water()
            samples = drawn(case, model, step)
            marks["sampling"] = high_water() - start
        forget_high_water()
        for i in range(0, case.rows, case.micro_batch):
            batch = collate(samples[i : i + case.micro_batch])
            ids, scope = (
                (batch.input_ids, batch.target_ids),
                {"mask": batch.completion_mask, "spans": batch.spans},
            )
            if reference is not None:
                with torch.no_grad():
                    reference.logps(*ids, **scope)
            logps = model.logps(*ids, **scope, alike=case.script == "sft")
            aggregate(sft_loss(logps), batch.completion_mask, mode="token_mean", denom=1e3).backward()
        optim.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        marks["training"] = high_water() - start
    return marks


def data(case: Case) -> list[Sample]:
    """Rows of one length, all of it trained on."""
    rows = token_rows(case.rows, case.length + 1, CONFIG.vocab_size)
    return [Sample(tuple(row), (False, *[True] * case.length)) for row in rows]


def drawn(case: Case, model: torch.nn.Module, step: int) -> list[Sample]:
    """What the model answers, as samples."""
    prompts = token_rows(case.rows // case.group, case.length, CONFIG.vocab_size)
    size = {"group_size": case.group}
    uniforms = row_uniforms(seed=0, step=step, prompts=range(len(prompts)), count=case.new, **size)
    if case.ragged:  # a draw of 0 is the first token of all, which stops
        ends = torch.randint(
            case.new * 7 // 8, case.new, (case.rows,), generator=torch.Generator().manual_seed(step)
        )
        uniforms[torch.arange(case.rows), ends] = 0.0
    options = {"max_new_tokens": case.new, "stop_ids": [0], "uniforms": uniforms, **size}
    return [rollout.sample for rollout in sample(model, prompts, **options)]


def measure(name: str, folder: Path) -> dict[str, int]:
    """The marks of a case's fresh process; the folder has the model (`write`)."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
    command = [sys.executable, "-m", "bench.plan", name, str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout)


def write(folder: Path, config: LlamaConfig = CONFIG) -> None:
    """A random model in a folder."""
    write_config(config, folder, dtype=torch.float32, stop_ids=(0,))
    save_model(config, random_model(folder, seed=0).state_dict(), folder, stop_ids=(0,))


def main(arguments: list[str]) -> int:
    if arguments:
        print(json.dumps(child(CASES[arguments[0]], Path(arguments[1]))))
        return 0
    print("| | moment | planned | measured | planned / measured |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for name, case in CASES.items():
            marks = measure(name, Path(folder))
            for moment, bytes_ in planned(case).items():
                both = f"{bytes_ / 2**20:,.0f} MiB | {marks[moment] / 2**20:,.0f} MiB"
                print(f"| {name} | {moment} | {both} | {bytes_ / marks[moment]:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
