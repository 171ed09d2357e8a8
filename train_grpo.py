"""Group relative policy optimisation: sample G answers a prompt, score them, push each against its group.

    A_i = r_i − mean(r₁…r_G)                   baseline: the group (F21; others: F22, F23, F24)
    ρ_t = exp(log π_θ(y_t) − log π_old(y_t))   ratio: how much likelier the token has become (F27, F32)
    L   = (1/N) Σ_i Σ_t −min(ρ_t A_i, clip(ρ_t, 1−ε_low, 1+ε_high) A_i) + β·KL(π_θ ‖ π_ref)   (F27, F29, F30)

π_old is the sampler, under the very distribution it sampled from; r is the answer's score. This is a row of
the table of variants: `python -m nanopost.losses.variants` prints PPO, GRPO, Dr. GRPO, DAPO, GSPO, RLOO, …

    python train_grpo.py --model runs/sft/model --data gsm8k/train.jsonl --verifier gsm8k --out runs/grpo
    torchrun --nproc-per-node 8 …   the same on eight GPUs

Delta to DeepSeekMath (Shao et al. 2024, eq. 3), which is --loss grpo: no division by the group's standard
deviation, a mean over all tokens of the step instead of one per answer, a wider upper clip and no KL term.
--loss dapo --resample 3 --overlong-cache 64 is DAPO with its sampling (Yu et al. 2025).
"""

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from nanopost import checkpoint, config, distributed, export, faults, metrics, optim, plan, runs
from nanopost.data.chat import decode, load_chat, prompt_ids, prompt_messages
from nanopost.data.collate import collate, spread
from nanopost.data.order import step_indices
from nanopost.data.schema import Record, read_jsonl
from nanopost.evals import rollouts
from nanopost.evals.preflight import Sampling, check_run
from nanopost.evals.verifier import check_verdicts, judge_all, rewarded, rewards_of
from nanopost.losses import aggregate, informative_groups, local_denom, overlong_penalty
from nanopost.losses.variants import Variant, choose, policy_values, token_advantages
from nanopost.micro_batches import sum_parts
from nanopost.models.trainable import LoRA, load_policy, load_reference, what_trains
from nanopost.models.weights import load_config
from nanopost.rewards.math import gsm8k, math_reward
from nanopost.rollout.sampler import row_uniforms, sample
from nanopost.worlds import ledger

VERIFIERS = {"gsm8k": gsm8k, "math": math_reward, "ledger": ledger.verify}
Task = tuple[list[int], Record]  # the prompt's tokens, and the record they come from


# ---- 1 Configuration ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(LoRA, config.Machine):
    model: Path  # folder in hub format to start from
    data: Path  # JSONL of prompts with answers
    verifier: Literal["gsm8k", "math", "ledger"]  # what scores a completion against the record's answer
    out: Path = Path("runs/grpo")  # run folder: metrics, rollouts, states, model
    eval_data: Path | None = None  # JSONL of held-out prompts, for greedy evaluation
    ref_model: Path | None = None  # reference of the KL; default: the model started from
    steps: int = 200  # rollout batches; 0: the preflight alone
    prompts_per_step: int = 32  # prompts a rollout batch, over all ranks
    group_size: int = 8  # samples a prompt
    micro_batch: int = 64  # samples a forward pass, on one rank
    minibatches: int = 1  # optimiser steps a rollout batch; above 1 the later ones are off-policy
    max_new_tokens: int = 256  # completions are cut there
    temperature: float = 1.0  # of the sampler, and of the trainer's log-probs
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    slots: int = 256  # rows decoded at a time
    loss: str = "nanopost"  # a row of the variants: grpo, dr_grpo, dapo, gspo, cispo, rloo, reinforce++, …
    clip_low: float | None = None  # ε below: the ratio is clipped at 1 − ε; default: the row's
    clip_high: float | None = None  # ε above: the ratio is clipped at 1 + ε; default: the row's
    beta: float | None = None  # weight of the KL, which enters where the row says; default: the row's
    resample: int = 0  # times that groups of equal rewards give way to other prompts (DAPO)
    overlong_cache: int = 0  # last tokens before the limit that are penalised softly (DAPO); 0: off
    lr: float = 1e-6  # peak learning rate
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # decay after the warm-up
    warmup: int = 0  # rollout batches of linear warm-up
    final_lr: float = 0.1  # where the decay ends, as a share of lr
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    eval_every: int = 20  # rollout batches between evaluations; 0: only at the end
    save_every: int = 0  # rollout batches between states to resume from; 0: only at the end
    rollouts_every: int = 10  # rollout batches between those written (rank 0's share); 0: only the last
    seed: int = 0  # order of the prompts, and the sampler's uniforms


def main(cfg: Config) -> None:
    # ---- 2 Process group, seeds, run directory -------------------------------------------------------------
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    distributed.setup(cfg)
    device, ranks = distributed.device(), distributed.world_size()
    clips = {"clip_low": cfg.clip_low, "clip_high": cfg.clip_high}
    variant = choose(cfg.loss, beta=cfg.beta, **clips)
    least = dict.fromkeys(("prompts_per_step", "micro_batch", "minibatches", "max_new_tokens"), 1)
    least |= {"group_size": 2 - (variant.baseline in ("none", "batch")), "resample": 0, "overlong_cache": 0}
    config.at_least(cfg, f" with loss={variant.name}", steps=0, **least)
    optim.schedule(0, steps=1, warmup=min(cfg.warmup, 1), kind=cfg.schedule, final=cfg.final_lr)
    if cfg.overlong_cache > cfg.max_new_tokens:
        raise ValueError(f"overlong_cache={cfg.overlong_cache} exceeds max_new_tokens={cfg.max_new_tokens}")
    if cfg.prompts_per_step % (ranks * cfg.minibatches):
        shares = f"ranks × minibatches ({ranks} × {cfg.minibatches})"
        raise ValueError(f"prompts_per_step={cfg.prompts_per_step} must be a multiple of {shares}")
    # What only scores reads no more rows at a time than what learns.
    micro_batch = min(cfg.micro_batch, cfg.prompts_per_step * cfg.group_size // (ranks * cfg.minibatches))
    traces = variant.surrogate == "traces"  # the last sample of a group is the record's own answer
    chat, ref_model = load_chat(cfg.model), cfg.ref_model or cfg.model
    if load_chat(ref_model).tokenizer.to_str() != chat.tokenizer.to_str():
        raise ValueError(f"ref_model: {ref_model} has another tokenizer than {cfg.model}")
    run = runs.open_run(cfg.out, cfg, env={"template": chat.version})

    # ---- 3 Task and data -----------------------------------------------------------------------------------
    verify = rewarded(VERIFIERS.get(cfg.verifier))
    longest = min(load_config(folder).max_position_embeddings for folder in (cfg.model, ref_model))

    def task_of(record: Record) -> Task:
        """The prompt's tokens; what cannot be sampled or verified is refused here, before the first step."""
        try:
            verify("", record.answer)
            ids = prompt_ids(chat, prompt_messages(record))
            if len(ids) > (room := longest - cfg.max_new_tokens):
                raise ValueError(f"the prompt has {len(ids)} tokens, {room} leave room for max_new_tokens")
        except ValueError as error:
            raise ValueError(f"{record.file}:{record.line}: {error}") from error
        return ids, record

    train = [task_of(record) for record in read_jsonl(cfg.data)]
    _ = [rollouts.trace(chat, record, ids, longest=longest) for ids, record in train if traces]  # or why not
    held_out = [task_of(record) for record in read_jsonl(cfg.eval_data)] if cfg.eval_data else []
    names = verify("", train[0][1].answer).parts  # of a verdict
    fit = plan.offer(cfg, max(len(ids) for ids, _ in train + held_out), held_out=len(held_out))

    # ---- 4 Models, optimiser, resume -----------------------------------------------------------------------
    policy = distributed.shard(load_policy(cfg.model, cfg, seed=cfg.seed))
    trained = policy  # what the optimiser moves and a state holds
    reference = distributed.shard(load_reference(cfg.ref_model, cfg.model, cfg, seed=cfg.seed))
    optimizer = optim.adamw(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
    first = checkpoint.load_state(run, trained, optimizer) if cfg.resume else 0
    metrics.truncate(run, first)

    # ---- 5 Schedules ---------------------------------------------------------------------------------------
    def learning_rate(step: int) -> float:
        kind, warmup = cfg.schedule, min(cfg.warmup, cfg.steps)
        return cfg.lr * optim.schedule(step, steps=cfg.steps, warmup=warmup, kind=kind, final=cfg.final_lr)

    # ---- 6 Rollout -----------------------------------------------------------------------------------------
    recent: list[tuple[float, float]] = []  # answers, and those without a verdict, of the last steps
    scope, count = {"temperature": cfg.temperature}, cfg.max_new_tokens
    scope |= {"top_k": cfg.top_k, "top_p": cfg.top_p}

    def rollout(step: int, tasks: list[Task], places: list[int], size: int, scope: dict) -> list[tuple]:
        """`size` (record, rollout, text, verdict) a task; `places` number the tasks of a step, over ranks."""
        size -= (given := traces and size > 1)  # the last answer of a group is the record's own
        draws = row_uniforms(seed=cfg.seed, step=step, prompts=places, group_size=size, count=count)
        options = dict(scope, stop_ids=chat.stop_ids, max_new_tokens=count, uniforms=draws, slots=cfg.slots)
        with distributed.gathered(policy), metrics.progress(range(len(draws)), desc="rollout") as bar:
            drawn = sample(policy, [ids for ids, _ in tasks], group_size=size, finished=bar.update, **options)
        start, texts = time.perf_counter(), [decode(chat, r.completion_ids) for r in drawn]
        records = [record for _, record in tasks for _ in range(size)]
        verdicts = judge_all(verify, texts, [record.answer for record in records])
        judged = list(zip(records, drawn, texts, verdicts, strict=True))
        judged = rollouts.with_traces(judged, size, chat, verify, longest=longest) if given else judged
        clock["verify_s"] += time.perf_counter() - start
        return judged

    def draw(step: int, places: list[int]) -> dict[int, list[tuple]]:
        """What the policy answers to the prompts at these places of a step's batch, a group a place."""
        chosen = step_indices(seed=cfg.seed, step=step, batch_size=cfg.prompts_per_step, size=len(train))
        rows = rollout(step, [train[chosen[place]] for place in places], places, size, scope)
        return {place: rows[n * size : (n + 1) * size] for n, place in enumerate(places)}

    # ---- 7 Evaluation --------------------------------------------------------------------------------------
    def evaluate(step: int) -> dict[str, float | None]:
        """Greedy score, length and verdict parts on the held-out prompts."""
        places = distributed.shard_rows(range(len(held_out)))
        judged = rollout(step, [held_out[place] for place in places], places, 1, {"temperature": 0.0})
        check_verdicts([verdict for *_, verdict in judged], recent, some=False)
        judged = [(r, verdict) for _, r, _, verdict in judged if verdict.score is not None]
        scored = distributed.all_sum(len(judged))
        totals = distributed.all_sum(
            {
                "eval_reward": sum(verdict.score for _, verdict in judged),
                "eval_length": sum(len(r.completion_ids) for r, _ in judged),
                **{f"eval_{name}": sum(verdict.parts[name] for _, verdict in judged) for name in names},
            }
        )
        means = {name: total / scored if scored else None for name, total in totals.items()}
        return means | {"eval_unverified": len(held_out) - scored}

    def learn(rows: list[tuple], denom: float, variant: Variant) -> dict[str, float]:
        """Gradients of a micro-batch; neighbours of a group compute their prompt once."""
        samples, old, ref, pull, *more = zip(*rows, strict=True)
        batch = collate(samples, device=device)
        mask, ids = batch.completion_mask, (batch.input_ids, batch.target_ids)
        logps = policy.logps(*ids, mask=mask, spans=batch.spans, **scope)
        old, ref, pull = (spread(x, mask).to(logps) for x in (old, ref, pull))
        mine = torch.stack(*more).to(device)
        values = policy_values(variant, logps, old, ref, pull, mask, traces=~mine)
        loss = aggregate(values, mask, mode=variant.aggregation, denom=denom)
        loss.backward()
        mask = mask & mine[:, None]  # the traces are only in the loss
        return rollouts.update_sums(variant, loss, logps, old, ref, pull, mask)

    # ---- 8 The loop ----------------------------------------------------------------------------------------
    distributed.main_print(f"{len(train)} prompts, {cfg.steps} steps{what_trains(policy)}")
    size, clock, part_size = cfg.group_size, {"verify_s": 0.0}, cfg.prompts_per_step // cfg.minibatches
    updates = [range(i * part_size, (i + 1) * part_size) for i in range(cfg.minibatches)]  # places of each
    own = torch.arange(cfg.prompts_per_step // ranks * size) % size < size - traces  # not the traces
    sampling = Sampling(lambda places: draw(0, places), scope, variant, reference)
    facts = {"sampling": sampling, "verify": VERIFIERS.get(cfg.verifier)}
    check_run(cfg, run, chat, policy, train, first=first, fit=fit, **facts)
    for step in range(first, cfg.steps):
        start, clock["verify_s"] = time.perf_counter(), 0.0
        optim.set_lr(optimizer, learning_rate(step))
        groups = draw(step, [place for update in updates for place in distributed.shard_rows(update)])
        for attempt in range(1 + cfg.resample):  # groups of equal rewards give way to a later epoch's prompts
            scores = rewards_of([row[-1] for rows in groups.values() for row in rows], group_size=size)
            kept = informative_groups(scores, group_size=size)[::size]
            waiting = [place for place, teaches in zip(groups, kept, strict=True) if not teaches]
            if attempt < cfg.resample and distributed.all_sum(len(waiting)):
                groups |= draw(step + (attempt + 1) * cfg.steps, waiting)
        samples = [row for rows in groups.values() for row in rows]
        verdicts = [verdict for *_, verdict in samples]
        check_verdicts(verdicts, recent)
        rewards = rewards_of(verdicts)
        clock["rollout_s"] = time.perf_counter() - start - clock["verify_s"]

        old_logps, completions = zip(*(rollouts.trained_on(r, v) for _, r, _, v in samples), strict=True)
        ref_logps = rollouts.completion_logps(reference, completions, micro_batch=micro_batch, **scope)
        padded = [pad_sequence(logps, batch_first=True) for logps in (old_logps, ref_logps)]
        length = torch.tensor([len(logps) for logps in old_logps])
        if cfg.overlong_cache:
            rewards += overlong_penalty(length * own, max_tokens=cfg.max_new_tokens, cache=cfg.overlong_cache)
        mask = torch.arange(int(length.max())) < length[:, None]
        options = {"group_size": size, "total": distributed.all_sum}
        advantages = token_advantages(variant, rewards, *padded, mask, **options)
        advantages = [row[kept] for row, kept in zip(advantages, mask, strict=True)]

        rows = list(zip(completions, old_logps, ref_logps, advantages, own, strict=True))
        sums, norms, share = Counter(), [], len(rows) // cfg.minibatches
        for update in range(cfg.minibatches):
            part = rows[update * share : (update + 1) * share]
            mask = collate([sample for sample, *_ in part]).completion_mask
            denom = distributed.all_sum(local_denom(mask, mode=variant.aggregation, max_tokens=count))
            if not denom:  # no verdict on any of these answers, on any rank
                continue
            act = partial(learn, denom=denom, variant=variant)
            found = sum_parts(policy, part, act, micro_batch, optimizer)
            seen = {"loss": found["loss"], "samples": [row[0] for row in part], "max_norm": cfg.max_grad_norm}
            norms.append(faults.take_step(run, step, optimizer, policy, **seen))
            sums.update(found)
        clock["train_s"] = time.perf_counter() - start - clock["rollout_s"] - clock["verify_s"]

        ours = [(r, verdict) for _, r, _, verdict in compress(samples, own) if verdict.score is not None]
        totals = distributed.all_sum(
            {
                "rows": len(ours),
                "unverified": sum(verdict.score is None for verdict in verdicts),
                "waiting": len(waiting),
                "reward": sum(verdict.score for _, verdict in ours),
                "stopped": sum(r.finish_reason == "stop" for r, _ in ours),
                "length": sum(len(r.completion_ids) for r, _ in ours),
                "entropy": sum(float(r.entropies.sum()) for r, _ in ours),
                **{f"part {name}": sum(verdict.parts[name] for _, verdict in ours) for name in names},
                **sums,
            }
        )
        line = {
            "reward": totals["reward"] / totals["rows"],
            **{name: totals[f"part {name}"] / totals["rows"] for name in names},
            **{name: totals[name] / totals["rows"] for name in ("stopped", "length")},
            "no_signal": totals["waiting"] / cfg.prompts_per_step,
            "entropy": totals["entropy"] / totals["length"],
            **{name: totals[name] / totals["tokens"] for name in ("clipped", "kl_old", "kl_ref")},
            "loss": totals["loss"] / len(norms),
            "unverified": totals["unverified"],
            "grad_norm": max(norms, key=lambda norm: (norm != norm, norm)),
            **clock,
        }
        last = step + 1 == cfg.steps
        if held_out and (last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)):
            line |= evaluate(step)
        metrics.write_record(run, step, {**line, "lr": learning_rate(step)})
        rest = {*names, "unverified"} - {"verified"}  # what only the records tell
        line = {name: value for name, value in line.items() if name.removeprefix("eval_") not in rest}
        distributed.main_print(metrics.format_line(step, cfg.steps, line))
        if last or (cfg.rollouts_every and step % cfg.rollouts_every == 0):
            pairs = zip(samples, advantages, strict=True)
            told = [rollouts.rollout_record(chat, *row, weights) for row, weights in pairs]
            metrics.write_rollouts(run, step, told)
        faults.save_if_due(run, step + 1, cfg.steps, trained, optimizer, every=cfg.save_every)

    # ---- 9 Teardown ----------------------------------------------------------------------------------------
    weights = checkpoint.full_state(trained)  # every rank helps to gather
    export.write_policy(run, policy, weights, base=cfg.model, stop_ids=chat.stop_ids)
    distributed.teardown()


if __name__ == "__main__":
    main(config.parse(Config))
