"""Group relative policy optimisation: sample G answers a prompt, score them, push each against its group.

    A_i = r_i − mean(r₁…r_G)                   baseline: the group (F21; std: F22, leave-one-out: F23)
    ρ_t = exp(log π_θ(y_t) − log π_old(y_t))   ratio: one a token
    L   = (1/N) Σ_i Σ_t −min(ρ_t A_i, clip(ρ_t, 1−ε_low, 1+ε_high) A_i) + β·KL(π_θ ‖ π_ref)   (F27, F29, F30)

π_old is the sampler, under the very distribution it sampled from; a verifier gives r. The variants of the
field are choices of four knobs: --baseline, --clip-low and --clip-high, --aggregation, --beta and --kl.

    python train_grpo.py --model runs/sft/model --data gsm8k/train.jsonl --verifier gsm8k --out runs/grpo
    torchrun --nproc-per-node 8 train_grpo.py --model runs/sft/model --data gsm8k/train.jsonl --verifier gsm8k

Delta to DeepSeekMath (Shao et al. 2024, eq. 3): by default no division by the group's standard deviation, a
mean over all tokens of the step instead of one per answer, a wider upper clip (DAPO, Yu et al. 2025) and no
KL term; --baseline group_std --aggregation sequence_mean --clip-high 0.2 --beta 0.04 gives theirs.
"""

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from nanopost import checkpoint, config, distributed, metrics, optim
from nanopost.data.chat import copy_chat, decode, load_chat, prompt_ids, prompt_messages
from nanopost.data.collate import collate, spread
from nanopost.data.order import step_indices
from nanopost.data.schema import Record, read_jsonl
from nanopost.losses import (
    aggregate,
    clipped_surrogate_loss,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    local_denom,
    policy_ratio,
)
from nanopost.models.weights import load_config, load_model, save_model
from nanopost.report import write_report
from nanopost.rewards.math import gsm8k, math_reward
from nanopost.rollout.sampler import row_uniforms, sample
from nanopost.rollout.types import Rollout
from nanopost.worlds import ledger

VERIFIERS = {"gsm8k": gsm8k, "math": math_reward, "ledger": ledger.verify}
Task = tuple[list[int], Record]  # the prompt's tokens, and the record they come from
BASELINES = {
    "group_mean": lambda rewards, size: group_advantages(rewards, group_size=size, scale="none"),
    "group_std": lambda rewards, size: group_advantages(
        rewards, group_size=size, scale="std", ddof=1, eps=1e-4
    ),
    "leave_one_out": lambda rewards, size: leave_one_out_advantages(rewards, group_size=size),
}


# ---- 1 Configuration ---------------------------------------------------------------------------------------
@dataclass
class Config:
    model: Path  # folder in hub format to start from
    data: Path  # JSONL of prompts with answers
    verifier: Literal["gsm8k", "math", "ledger"]  # what scores a completion against the record's answer
    out: Path = Path("runs/grpo")  # run folder: metrics, rollouts, states, model
    eval_data: Path | None = None  # JSONL of held-out prompts, for greedy evaluation
    ref_model: Path | None = None  # reference of the KL; default: the model started from
    steps: int = 200  # rollout batches
    prompts_per_step: int = 32  # prompts a rollout batch, over all ranks
    group_size: int = 8  # samples a prompt
    micro_batch: int = 64  # samples a forward pass, on one rank
    minibatches: int = 1  # optimiser steps a rollout batch; above 1 the later ones are off-policy
    max_new_tokens: int = 256  # completions are cut there
    temperature: float = 1.0  # of the sampler, and of the trainer's log-probs
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    slots: int = 256  # rows decoded at a time
    baseline: Literal["group_mean", "group_std", "leave_one_out"] = "group_mean"  # what a sample must beat
    clip_low: float = 0.2  # ε below: the ratio is clipped at 1 − ε
    clip_high: float = 0.28  # ε above: the ratio is clipped at 1 + ε
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum", "constant"] = "token_mean"  # reduce
    beta: float = 0.0  # weight of the KL to the reference in the loss
    kl: Literal["k1", "k2", "k3"] = "k3"  # its estimator
    lr: float = 1e-6  # peak learning rate
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # decay after the warm-up
    warmup: int = 0  # rollout batches of linear warm-up
    final_lr: float = 0.1  # where the decay ends, as a share of lr
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    eval_every: int = 20  # rollout batches between evaluations; 0: only at the end
    save_every: int = 0  # rollout batches between states to resume from; 0: only at the end
    rollouts_every: int = 10  # rollout batches between those written (rank 0's share); 0: only the last
    resume: bool = False  # go on from the newest state in OUT
    seed: int = 0  # order of the prompts, and the sampler's uniforms
    threads: int = 0  # CPU threads; 0: torch's choice; 1 is fastest for tiny models


def main(cfg: Config) -> None:
    # ---- 2 Process group, seeds, run directory -------------------------------------------------------------
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    distributed.setup()
    device, ranks = distributed.device(), distributed.world_size()
    for name in ("steps", "prompts_per_step", "group_size", "micro_batch", "minibatches", "max_new_tokens"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(cfg, name)}")
    if cfg.prompts_per_step % (ranks * cfg.minibatches):
        shares = f"ranks × minibatches ({ranks} × {cfg.minibatches})"
        raise ValueError(f"prompts_per_step={cfg.prompts_per_step} must be a multiple of {shares}")
    chat = load_chat(cfg.model)
    run = metrics.open_run(cfg.out, cfg, env={"template": chat.version}, resume=cfg.resume)

    # ---- 3 Task and data -----------------------------------------------------------------------------------
    verify = VERIFIERS[cfg.verifier]

    longest = load_config(cfg.model).max_position_embeddings - cfg.max_new_tokens

    def task_of(record: Record) -> Task:
        """The prompt's tokens; what cannot be sampled or verified is refused here, before the first step."""
        try:
            if record.answer is None:
                raise ValueError("no answer to verify against")
            verify("", record.answer)
            ids = prompt_ids(chat, prompt_messages(record))
            if len(ids) > longest:
                raise ValueError(f"the prompt has {len(ids)} tokens, {longest} leave room for max_new_tokens")
        except ValueError as error:
            raise ValueError(f"{record.file}:{record.line}: {error}") from error
        return ids, record

    train = [task_of(record) for record in read_jsonl(cfg.data)]
    held_out = [task_of(record) for record in read_jsonl(cfg.eval_data)] if cfg.eval_data else []

    # ---- 4 Models, optimiser, resume -----------------------------------------------------------------------
    policy = distributed.shard(load_model(cfg.model).to(device))
    reference = distributed.shard(load_model(cfg.ref_model or cfg.model).to(device).requires_grad_(False))
    optimizer = optim.adamw(policy, lr=cfg.lr, weight_decay=cfg.weight_decay)
    first = checkpoint.load_state(run, policy, optimizer) if cfg.resume else 0
    metrics.truncate(run, first)

    # ---- 5 Schedules ---------------------------------------------------------------------------------------
    def learning_rate(step: int) -> float:
        warmup = min(cfg.warmup, cfg.steps)
        return cfg.lr * optim.schedule(
            step, steps=cfg.steps, warmup=warmup, kind=cfg.schedule, final=cfg.final_lr
        )

    # ---- 6 Rollout -----------------------------------------------------------------------------------------
    scope = {"temperature": cfg.temperature, "top_k": cfg.top_k, "top_p": cfg.top_p}

    def rollout(step: int, tasks: list[Task], places: list[int], size: int, scope: dict) -> list[Rollout]:
        """`size` completions of each task; `places` number the tasks in the step, over all ranks."""
        count = cfg.max_new_tokens
        uniforms = row_uniforms(seed=cfg.seed, step=step, prompts=places, group_size=size, count=count)
        options = {"stop_ids": chat.stop_ids, "max_new_tokens": count, "slots": cfg.slots}
        options |= {"group_size": size, "uniforms": uniforms, **scope}
        bar = metrics.progress(range(len(tasks) * size), desc="rollout")
        with distributed.gathered(policy):
            done = sample(policy, [ids for ids, _ in tasks], finished=bar.update, **options)
        bar.close()
        return done

    # ---- 7 Evaluation --------------------------------------------------------------------------------------
    def evaluate(step: int) -> dict[str, float]:
        """Greedy score, length and verdict parts on the held-out prompts."""
        places = distributed.shard_rows(range(len(held_out)))
        mine = [held_out[place] for place in places]
        rollouts = rollout(step, mine, places, 1, {"temperature": 0.0})
        texts = [decode(chat, r.completion_ids) for r in rollouts]
        verdicts = [verify(text, record.answer) for text, (_, record) in zip(texts, mine, strict=True)]
        parts = verify("", held_out[0][1].answer).parts  # their names
        totals = distributed.all_sum(
            {
                "eval_reward": sum(verdict.score for verdict in verdicts),
                "eval_length": sum(len(r.completion_ids) for r in rollouts),
                **{f"eval_{name}": sum(verdict.parts[name] for verdict in verdicts) for name in parts},
            }
        )
        return {name: total / len(held_out) for name, total in totals.items()}

    # ---- 8 The loop ----------------------------------------------------------------------------------------
    distributed.main_print(f"{len(train)} prompts, {cfg.steps} steps")
    distributed.main_print("loss is near 0, its gradient is not: a group's advantages sum to 0; watch reward")
    for step in range(first, cfg.steps):
        start = time.perf_counter()
        optim.set_lr(optimizer, learning_rate(step))
        chosen = step_indices(seed=cfg.seed, step=step, batch_size=cfg.prompts_per_step, size=len(train))
        places = distributed.shard_rows(range(cfg.prompts_per_step))
        mine = [train[chosen[place]] for place in places]
        rollouts = rollout(step, mine, places, cfg.group_size, scope)
        sampled = time.perf_counter()

        rows = [record for _, record in mine for _ in range(cfg.group_size)]
        texts = [decode(chat, r.completion_ids) for r in rollouts]
        judged = metrics.progress(list(zip(texts, rows, strict=True)), desc="verify")
        verdicts = [verify(text, row.answer) for text, row in judged]
        rewards = torch.tensor([verdict.score for verdict in verdicts], dtype=torch.float64)
        advantages = BASELINES[cfg.baseline](rewards, cfg.group_size)
        verified = time.perf_counter()

        sums, norms = dict.fromkeys(("loss", "clipped", "kl_old", "kl_ref", "tokens"), 0.0), []
        per_update = len(rollouts) // cfg.minibatches
        for update in range(cfg.minibatches):
            picked = list(range(update * per_update, (update + 1) * per_update))
            picked.sort(key=lambda i: len(rollouts[i].sample.ids))  # alike in length: less padding
            parts = [picked[i : i + cfg.micro_batch] for i in range(0, per_update, cfg.micro_batch)]
            batches = [collate([rollouts[i].sample for i in part], device=device) for part in parts]
            counts = {"mode": cfg.aggregation, "max_tokens": cfg.max_new_tokens}
            denom = distributed.all_sum(sum(local_denom(b.completion_mask, **counts) for b in batches))
            for part, batch in metrics.progress(list(zip(parts, batches, strict=True)), desc="train"):
                mask, ids = batch.completion_mask, (batch.input_ids, batch.target_ids)
                old_logps = spread([rollouts[i].old_logps for i in part], mask)
                logps = policy.logps(*ids, position_ids=batch.position_ids, **scope)
                with torch.no_grad():
                    ref_logps = reference.logps(*ids, position_ids=batch.position_ids, **scope)
                pull = advantages[part].to(logps)[:, None].expand_as(logps)
                clip = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
                surrogate = clipped_surrogate_loss(logps, old_logps, pull, **clip)
                values = surrogate + cfg.beta * kl_estimate(logps, ref_logps, kind=cfg.kl)
                loss = aggregate(values, mask, mode=cfg.aggregation, denom=denom)
                loss.backward()
                with torch.no_grad():
                    # the minimum took the clipped side
                    clipped = surrogate > -policy_ratio(logps, old_logps) * pull
                    sums["loss"] += float(loss) / cfg.minibatches
                    sums["clipped"] += float(clipped[mask].sum())
                    sums["kl_old"] += float(kl_estimate(logps, old_logps, kind="k3")[mask].sum())
                    sums["kl_ref"] += float(kl_estimate(logps, ref_logps, kind="k3")[mask].sum())
                    sums["tokens"] += float(mask.sum())
            norms.append(optim.clip_grad_norm(policy, cfg.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        trained = time.perf_counter()

        names = verdicts[0].parts
        totals = distributed.all_sum(
            {
                "rows": len(rollouts),
                "groups": len(mine),
                "reward": rewards.sum(),
                "flat": (advantages.view(len(mine), -1) == 0).all(1).sum(),
                "stopped": sum(r.finish_reason == "stop" for r in rollouts),
                "entropy": sum(float(r.entropies.sum()) for r in rollouts),
                **{f"part {name}": sum(verdict.parts[name] for verdict in verdicts) for name in names},
                **sums,
            }
        )
        line = {
            **{name: totals[name] / totals["rows"] for name in ("reward", "stopped")},
            "no_signal": totals["flat"] / totals["groups"],
            "length": totals["tokens"] / totals["rows"],
            **{name: totals[name] / totals["tokens"] for name in ("clipped", "entropy", "kl_old", "kl_ref")},
            "loss": totals["loss"],
            "grad_norm": max(norms),
            "rollout_s": sampled - start,
            "verify_s": verified - sampled,
            "train_s": trained - verified,
        }
        last = step + 1 == cfg.steps
        if held_out and (last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)):
            line |= evaluate(step)
        shares = {name: totals[f"part {name}"] / totals["rows"] for name in names}
        metrics.write_record(run, step, {**shares, **line, "lr": learning_rate(step)})
        line = {name: value for name, value in line.items() if name.removeprefix("eval_") not in names}
        distributed.main_print(metrics.format_line(step, cfg.steps, line))
        if last or (cfg.rollouts_every and step % cfg.rollouts_every == 0):
            every = zip(rows, rollouts, texts, verdicts, advantages.tolist(), strict=True)
            samples = [
                {
                    "line": row.line,
                    "prompt": decode(chat, r.prompt_ids),
                    "completion": text,
                    "tokens": [decode(chat, [token]) for token in r.completion_ids],
                    "old_logps": [round(logp, 5) for logp in r.old_logps.tolist()],
                    "finish": r.finish_reason,
                    "score": verdict.score,
                    "parts": dict(verdict.parts),
                    "reason": verdict.reason,
                    "advantage": advantage,
                }
                for row, r, text, verdict, advantage in every
            ]
            metrics.write_rollouts(run, step, samples)
        if last or (cfg.save_every and (step + 1) % cfg.save_every == 0):
            checkpoint.save_state(run, step + 1, policy, optimizer)

    # ---- 9 Teardown ----------------------------------------------------------------------------------------
    weights = checkpoint.full_state(policy)  # every rank helps to gather
    if distributed.is_main():
        with checkpoint.atomic_folder(run / "model") as folder:
            copy_chat(cfg.model, folder)
            save_model(policy.config, weights, folder, stop_ids=chat.stop_ids)
        page = write_report(run) if find_spec("matplotlib") else 'none without pip install "nanopost[report]"'
        print(f"model: {run / 'model'}\nreport: {page}")
    distributed.teardown()


if __name__ == "__main__":
    main(config.parse(Config))
