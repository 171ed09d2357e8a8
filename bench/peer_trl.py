"""TRL's side: GRPOTrainer and DPOTrainer, whole steps, on the CPU in float32.

The trainers log nothing while they are timed and wait for their turn at the end of a step, as our scripts do.
In its first step GRPOTrainer trains on the rollout that our script sampled in its first step, handed over
through its own `rollout_func`: equal rewards, loss and gradient norm show that both run the same algorithm.
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from bench.inputs import STOP, ragged_lengths
from bench.ours import reward
from bench.worker import Turn

SAME = {  # what train_grpo.py and train_dpo.py do by default, and nothing that costs time besides
    "use_cpu": True,
    "bf16": False,
    "learning_rate": 1e-6,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_steps": 10**6,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class Wait(TrainerCallback):
    """Keeps the first step's loss and gradient norm; waits for its turn at the end of every later step."""

    def __init__(self, turn: Turn, digest: Any):
        self.turn, self.digest, self.first = turn, digest, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step > 1:
            self.turn(lambda: self.digest(self.first))


def run(trainer: Any, turn: Turn, digest: Any) -> None:
    """Train; the first step's loss and gradient norm are caught where the trainer itself computes them."""
    wait = Wait(turn, digest)
    step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

    def training_step(*arguments: Any, **options: Any) -> Tensor:
        loss = step(*arguments, **options)
        wait.first.setdefault("loss", float(loss))
        return loss

    def clip_grad_norm_(*arguments: Any, **options: Any) -> Tensor:
        norm = clip(*arguments, **options)
        wait.first.setdefault("grad_norm", float(norm))
        return norm

    trainer.training_step, trainer.accelerator.clip_grad_norm_ = training_step, clip_grad_norm_
    trainer.add_callback(wait)
    trainer.train()


def load(work: Path, attention: str, precision: str) -> tuple[Any, Any]:
    torch.set_float32_matmul_precision(precision)
    model = LlamaForCausalLM.from_pretrained(
        work / "model", attn_implementation=attention, dtype=torch.float32
    )
    return model, AutoTokenizer.from_pretrained(work / "model")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Stop(LogitsProcessor):
    """Row r can only stop when it reaches its length: raggedness that both sides share."""

    def __init__(self, prompt: int, lengths: list[int]):
        self.ends = torch.tensor(lengths) + prompt - 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ending = (self.ends == input_ids.shape[1]).nonzero().flatten()
        if len(ending):
            scores = scores.index_fill(0, ending, -torch.inf)
            scores[ending, STOP] = 0.0
        return scores


def grpo(
    work: Path,
    turn: Turn,
    *,
    prompts: int,
    group: int,
    prompt: int,
    new: int,
    mean: float = 0,
    attention: str = "sdpa",
    precision: str = "highest",
    config: dict[str, Any] | None = None,
    **_: Any,
) -> None:
    """The default row of train_grpo.py: group mean, no division, ε = .2 and .28, mean over tokens, no KL."""
    model, tokenizer = load(work, attention, precision)
    records = lines(work / "prompts.jsonl")
    data = Dataset.from_list([{"prompt": r["messages"], "answer": r["answer"]} for r in records])
    last: dict[str, int] = {}

    def rewards(completions: list, completion_ids: list, answer: list, **_: Any) -> list[float]:
        found = [reward(c[0]["content"], a) for c, a in zip(completions, answer, strict=True)]
        last["tokens"] = sum(map(len, completion_ids))
        last.setdefault("reward", round(sum(found)))
        return found

    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "beta": 0.0, "epsilon_high": 0.28}
    options |= {
        "scale_rewards": "none",
        "loss_type": "dapo",
        "shuffle_dataset": False,
        "mask_truncated_completions": False,
    }
    options |= {
        "per_device_train_batch_size": prompts * group,
        "num_generations": group,
        "max_completion_length": new,
    }
    arguments = GRPOConfig(output_dir=tempfile.mkdtemp(dir=work), **SAME | options | (config or {}))
    trainer = GRPOTrainer(model, rewards, args=arguments, train_dataset=data, processing_class=tokenizer)
    if mean:
        stop = Stop(prompt, ragged_lengths(prompts * group, mean, new))
        model.generate = partial(model.generate, logits_processor=LogitsProcessorList([stop]))
    replay = json.loads((work / "rollout.json").read_text(encoding="utf-8"))

    def rollout_func(asked: list, trainer: Any) -> dict[str, Any]:
        """Our script's first rollout; from the second step on the trainer samples by itself."""
        trainer.rollout_func = None
        texts = [messages[-1]["content"] for messages in asked]
        completions = [replay[text].pop(0) for text in texts]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    trainer.rollout_func = rollout_func

    def digest(first: dict[str, float]) -> dict[str, Tensor]:
        return {
            "useful tokens": torch.tensor(last["tokens"]),
            "first reward": torch.tensor(last["reward"]),
            "first loss and gradient norm": torch.tensor([first["loss"], first["grad_norm"]]),
        }

    run(trainer, turn, digest)


def dpo(
    work: Path,
    turn: Turn,
    *,
    pairs: int,
    attention: str = "sdpa",
    precision: str = "highest",
    config: dict[str, Any] | None = None,
    **_: Any,
) -> None:
    """DPO with β = .1 and the reference's log-probs computed once, as train_dpo.py does."""
    model, tokenizer = load(work, attention, precision)
    options = {"beta": 0.1, "precompute_ref_log_probs": True, "per_device_train_batch_size": pairs}
    arguments = DPOConfig(output_dir=tempfile.mkdtemp(dir=work), **SAME | options | (config or {}))
    data = Dataset.from_list(lines(work / "pairs.jsonl"))
    trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)

    def digest(first: dict[str, float]) -> dict[str, Tensor]:
        return {"first loss and gradient norm": torch.tensor([first["loss"], first["grad_norm"]])}

    run(trainer, turn, digest)
