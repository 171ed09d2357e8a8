"""Supervised fine-tuning: imitate the assistant's tokens, and nothing else.

    L(θ) = −(1/N) Σ_b Σ_t m_bt log π_θ(y_bt | x_b, y_b,<t),   N = Σ m over the whole optimiser step  (F1, F3)

m is 1 on the tokens an assistant must emit, stop token included, and 0 on prompts, tool results and padding.
A record of plain text has no prompt: every token is trained on, so this script pre-trains too.

    python train_sft.py --model DIR --data chats.jsonl --out runs/sft
    torchrun --nproc-per-node 8 train_sft.py --model DIR --data chats.jsonl --out runs/sft

DIR is a folder in hub format (config.json, model.safetensors, tokenizer, chat template); so is runs/sft/model
in the end. Delta to InstructGPT (Ouyang et al. 2022, §3.5): the loss is a mean over tokens, not over
conversations, and N counts all micro-batches and ranks, so neither can change the gradient.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from nanopost import checkpoint, config, distributed, export, faults, metrics, optim, plan, runs
from nanopost.data.chat import load_chat, record_samples
from nanopost.data.collate import collate
from nanopost.data.order import step_indices
from nanopost.data.schema import Sample, read_jsonl
from nanopost.evals.preflight import check_run
from nanopost.losses import aggregate, sft_loss
from nanopost.micro_batches import in_parts
from nanopost.models.trainable import LoRA, load_policy, what_trains
from nanopost.models.weights import load_config


# ---- 1 Configuration ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(LoRA, config.Machine):
    model: Path  # folder in hub format to start from
    data: Path  # JSONL: messages, prompt + completion, question + answer, or text
    out: Path = Path("runs/sft")  # run folder: metrics, states, model
    eval_data: Path | None = None  # JSONL of held-out records, for the evaluation loss
    from_scratch: bool = False  # random weights of DIR's config.json instead of its model.safetensors
    epochs: float = 1.0  # passes over the data
    steps: int | None = None  # optimiser steps; default: as epochs say; 0: the preflight alone
    batch_size: int = 32  # samples an optimiser step, over all ranks
    micro_batch: int = 32  # samples a forward pass, on one rank
    max_length: int = 0  # longer samples are left out and counted; 0: the model's context
    lr: float = 1e-4  # peak learning rate
    schedule: Literal["constant", "cosine", "linear"] = "cosine"  # decay after the warm-up
    warmup: int = 10  # steps of linear warm-up
    final_lr: float = 0.1  # where the decay ends, as a share of lr
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    eval_every: int = 100  # steps between evaluations; 0: only at the end
    save_every: int = 0  # steps between states to resume from; 0: only at the end
    seed: int = 0  # order of the data, and random weights


def main(cfg: Config) -> None:
    # ---- 2 Process group, seeds, run directory -------------------------------------------------------------
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    distributed.setup(cfg)
    device, ranks = distributed.device(), distributed.world_size()
    config.at_least(cfg, batch_size=1, micro_batch=1, steps=0)
    if not cfg.epochs > 0:
        raise ValueError(f"epochs must be above 0, got {cfg.epochs}")
    if cfg.batch_size % ranks:
        raise ValueError(f"batch_size={cfg.batch_size} must be a multiple of the number of ranks ({ranks})")
    chat = load_chat(cfg.model)
    run = runs.open_run(cfg.out, cfg, env={"template": chat.version})

    # ---- 3 Task and data -----------------------------------------------------------------------------------
    context = load_config(cfg.model).max_position_embeddings
    longest = min(cfg.max_length or context, context)

    def samples_of(path: Path) -> list[Sample]:
        every = [sample for record in read_jsonl(path) for sample in record_samples(chat, record)]
        if long := [sample for sample in every if len(sample.ids) > longest + 1]:
            told = f"left out {len(long)} of {len(every)} samples over {longest} tokens"
            distributed.main_print(f"{told} (first: {long[0].place}, {len(long[0].ids)} tokens)")
        if len(long) == len(every):
            raise ValueError(f"{path}: no sample of at most {longest} tokens")
        return [sample for sample in every if len(sample.ids) <= longest + 1]

    train = samples_of(cfg.data)
    held_out = samples_of(cfg.eval_data) if cfg.eval_data else []
    fit = plan.offer(cfg, max(len(sample.ids) for sample in train + held_out), held_out=len(held_out))

    # ---- 4 Models, optimiser, resume -----------------------------------------------------------------------
    policy = load_policy(cfg.model, cfg, seed=cfg.seed, from_scratch=cfg.from_scratch)
    policy = distributed.shard(policy)
    optimizer = optim.adamw(policy, lr=cfg.lr, weight_decay=cfg.weight_decay)
    first = checkpoint.load_state(run, policy, optimizer) if cfg.resume else 0
    metrics.truncate(run, first)

    # ---- 5 Schedules ---------------------------------------------------------------------------------------
    steps = max(1, round(cfg.epochs * len(train) / cfg.batch_size)) if cfg.steps is None else cfg.steps

    def learning_rate(step: int) -> float:
        kind, warmup = cfg.schedule, min(cfg.warmup, steps)
        return cfg.lr * optim.schedule(step, steps=steps, warmup=warmup, kind=kind, final=cfg.final_lr)

    # ---- 6 Rollout -----------------------------------------------------------------------------------------
    # None: the completions are the data's.

    # ---- 7 Evaluation --------------------------------------------------------------------------------------
    def tokens_of(samples: list[Sample]) -> float:
        return float(sum(sum(sample.mask) for sample in samples))

    def share(samples: list[Sample], denom: float) -> torch.Tensor:
        """A micro-batch's share of a step's loss."""
        batch = collate(samples, device=device)
        mask, ids = batch.completion_mask, (batch.input_ids, batch.target_ids)
        values = sft_loss(policy.logps(*ids, mask=mask, spans=batch.spans, alike=True))
        return aggregate(values, mask, mode="token_mean", denom=denom)

    def learn(samples: list[Sample], denom: float) -> float:
        """The same as a number, and its gradient."""
        (loss := share(samples, denom)).backward()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate() -> float:
        """Mean loss per supervised token of the held-out records, in nats."""
        mine, denom = distributed.shard_rows(held_out), tokens_of(held_out)
        with distributed.gathered(policy):
            look = partial(share, denom=denom)
            parts = in_parts(policy, mine, look, cfg.micro_batch, desc="evaluate")
        return distributed.all_sum(float(sum(parts)))

    # ---- 8 The loop ----------------------------------------------------------------------------------------
    distributed.main_print(f"{len(train)} samples, {steps} steps of {cfg.batch_size}{what_trains(policy)}")
    facts = {"loss": lambda part, whole: share(part, tokens_of(whole)), "nll": True}
    check_run(cfg, run, chat, policy, train, first=first, fit=fit, **facts)
    for step in range(first, steps):
        start = time.perf_counter()
        optim.set_lr(optimizer, learning_rate(step))
        indices = step_indices(seed=cfg.seed, step=step, batch_size=cfg.batch_size, size=len(train))
        samples = [train[i] for i in indices]
        mine, denom = distributed.shard_rows(samples), tokens_of(samples)  # the whole step's, on every rank
        loss = sum(in_parts(policy, mine, partial(learn, denom=denom), cfg.micro_batch, optimizer))
        seen = {"loss": loss, "samples": mine}
        grad_norm = faults.take_step(run, step, optimizer, policy, max_norm=cfg.max_grad_norm, **seen)

        last = step + 1 == steps
        line = {
            "loss": distributed.all_sum(loss),
            "lr": learning_rate(step),
            "grad_norm": grad_norm,
            "tokens": int(denom),
            "seconds": time.perf_counter() - start,
        }
        if held_out and (last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)):
            line["eval_loss"] = evaluate()
        metrics.write_record(run, step, line)
        distributed.main_print(metrics.format_line(step, steps, line))
        faults.save_if_due(run, step + 1, steps, policy, optimizer, every=cfg.save_every)

    # ---- 9 Teardown ----------------------------------------------------------------------------------------
    weights = checkpoint.full_state(policy)  # every rank helps to gather
    export.write_policy(run, policy, weights, base=cfg.model, stop_ids=chat.stop_ids)
    distributed.teardown()


if __name__ == "__main__":
    main(config.parse(Config))
