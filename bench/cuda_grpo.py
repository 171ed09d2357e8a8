"""The row of the CUDA table about whole GRPO steps: train_grpo.py as it stands, TRL's trainer with generate.

Both run in fresh processes (`bench.worker`), one after the other, on the same random 0.5 B model and prompts:
rollout, verification, loss, gradient, AdamW, and what each does besides by default. Completions are as long
as they may be, for a random model's stop token is as rare as any other. Weights are float32, products
bfloat16.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from bench.cuda_measure import Ceilings, Left, Mark, Wrong, against, mark
from bench.cuda_models import HALF_B, random_llama
from bench.inputs import word, write_prompts
from bench.machine import version
from bench.ours import TEMPLATE, reward, script
from bench.processes import Failed, Process
from bench.worker import Turn
from nanopost import config, metrics
from nanopost.data.chat import write_chat
from nanopost.models.config import LlamaConfig
from nanopost.models.weights import save_model

SHAPE = {"prompts": 8, "group": 8, "prompt": 128, "new": 128}
STEPS, LEAST, BAR = 20, 3, 6.0
OURS, AGAINST = "a step of ours", "against TRL with generate"


def write_model(work: Path, model: LlamaConfig) -> None:
    """Random weights with a tokenizer and a template, in work/model."""
    words = {word(n): n for n in range(model.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<stop>"])
    chat = write_chat(work / "model", tokenizer, TEMPLATE, eos_token="<stop>")
    weights = random_llama(model, torch.float32).state_dict()
    save_model(model, weights, work / "model", stop_ids=chat.stop_ids)


def steps(build: str, work: Path, shape: dict[str, int], left: Left) -> tuple[list[float], int]:
    """Wall seconds of steps in a process of its own, and the tokens that the last of them sampled."""
    try:
        process = Process({"build": build, "work": str(work), "options": shape})
        taken = list[float]()
        while len(taken) < STEPS and (len(taken) < LEAST or left() > 0):
            taken.append(process.iterate()["wall"])
        tokens = int(process.digest()["useful tokens"])
        process.quit()
    except Failed as error:
        raise RuntimeError(f"{build}: {str(error).strip().splitlines()[-1]}") from error
    return taken, tokens


def compare(model: LlamaConfig, shape: dict[str, int], left: Left) -> list[Mark]:
    """Seconds of our steps, and how many times as fast as TRL's they are."""
    work = Path(tempfile.mkdtemp(prefix="bench-cuda-grpo-"))
    try:
        write_model(work, model)
        torch.cuda.empty_cache()
        write_prompts(work / "prompts.jsonl", **shape, vocabulary=model.vocab_size)
        ours, tokens = steps("bench.cuda_grpo:ours", work, shape, left)
        middle = statistics.median(ours)
        row = mark(OURS, ours, "s", note=f"{tokens / middle:,.0f} tokens/s, sampled and trained on")

        def peer() -> Mark:
            theirs, sampled = steps("bench.cuda_grpo:trl", work, shape, left)
            if abs(sampled - tokens) > 0.02 * tokens:
                raise Wrong(f"our step sampled {tokens} tokens, TRL's {sampled}")
            note = f"TRL {version('trl')}, no checkpointing"
            return mark(AGAINST, [taken / middle for taken in theirs], "×", bar=BAR, note=note)

        return [row, against(AGAINST, "trl", BAR, peer)]
    finally:
        shutil.rmtree(work, ignore_errors=True)


def grpo(ceilings: Ceilings, left: Left) -> list[Mark]:
    return compare(HALF_B, SHAPE, left)


# ---- the two processes -------------------------------------------------------------------------------------
def synced(turn: Turn) -> Turn:
    """A turn that ends when the GPU is done."""

    def after(digest: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        turn(digest)

    return after


def ours(work: Path, turn: Turn, *, prompts: int, group: int, new: int, **_: Any) -> None:
    """train_grpo.py with its default loss; its flags are set here, so what parses them need not be there."""
    rows, run = prompts * group, Path(tempfile.mkdtemp(dir=work))
    options = {"model": work / "model", "data": work / "prompts.jsonl", "verifier": "gsm8k", "out": run}
    options |= {"prompts_per_step": prompts, "group_size": group, "micro_batch": rows, "max_new_tokens": new}
    options |= {"steps": 10**6, "eval_every": 0, "rollouts_every": 10**6, "threads": 1}
    config.parse = lambda flags: flags(**options)

    def digest(run: Path) -> dict[str, Tensor]:
        *_, last = metrics.read_records(run)
        return {"useful tokens": torch.tensor(round(last["length"] * rows))}

    script("train_grpo.py", {}, synced(turn), digest)


def trl(work: Path, turn: Turn, *, prompts: int, group: int, new: int, **_: Any) -> None:
    """GRPOTrainer with the same loss: group mean, no division, ε = .2 and .28, mean over tokens, no KL."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from bench.peer_trl import SAME, run

    model = LlamaForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    records = map(json.loads, (work / "prompts.jsonl").read_text(encoding="utf-8").splitlines())
    data = Dataset.from_list([{"prompt": r["messages"], "answer": r["answer"]} for r in records])
    last = dict[str, int]()

    def rewards(completions: list, completion_ids: list, answer: list, **_: Any) -> list[float]:
        last["tokens"] = sum(map(len, completion_ids))
        return [reward(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]

    options = {"use_cpu": not torch.cuda.is_available(), "bf16": True, "gradient_checkpointing": False}
    options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "beta": 0.0, "epsilon_high": 0.28}
    options |= {"scale_rewards": "none", "loss_type": "dapo", "mask_truncated_completions": False}
    options |= {"per_device_train_batch_size": prompts * group, "num_generations": group}
    options |= {"max_completion_length": new, "shuffle_dataset": False}
    arguments = GRPOConfig(output_dir=tempfile.mkdtemp(dir=work), **SAME | options)
    trainer = GRPOTrainer(model, rewards, args=arguments, train_dataset=data, processing_class=tokenizer)
    run(trainer, synced(turn), lambda _: {"useful tokens": torch.tensor(last["tokens"])})
