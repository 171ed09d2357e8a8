"""Distillation: a student learns from a teacher's text, from its distributions, or from them on its own text.

    text       L = −(1/N) Σ_t log π_S(y_t)      y ~ π_T(·|x): the teacher's text, a black box          (F40)
    logits     L = (1/N) Σ_t D(p_T, p_S) at t   y from the data                                   (F38, F39)
    on-policy  L = (1/N) Σ_t D(p_T, p_S) at t   y ~ π_S(·|x), no gradient through the sampling    (F38, F39)

p = softmax(z/τ); D is --divergence: forward KL(p_T‖p_S), reverse KL(p_S‖p_T) or jsd. N counts the tokens of
a step's completions, prompts are masked out. --sft-weight α gives (1 − α) D − α log π_S(y_t), --hidden-weight
adds the distance of the last hidden states under a learnt map that is thrown away in the end.

    python train_distill.py --mode logits --model S --teacher T --data chats.jsonl --out runs/distill
    torchrun --nproc-per-node 8 train_distill.py --mode on-policy --model S --teacher T --data chats.jsonl

Text of a teacher elsewhere needs no --teacher, but records that name theirs (`teacher`, `decoding`). kl is
KL(p_T‖p_S) at τ = 1 whatever D is: a student that is its teacher has loss and kl 0. seconds are without
rollout_s; teacher logits are never stored. Delta to GKD (Agarwal et al. 2024): no mixture with data; τ²·D.
"""

import gc
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanopost import checkpoint, config, distributed, export, faults, losses, metrics, optim, plan, runs
from nanopost.data.chat import load_chat, record_samples
from nanopost.data.collate import collate
from nanopost.data.order import step_indices
from nanopost.data.schema import Record, Sample, read_jsonl
from nanopost.evals.candidates import write_lines
from nanopost.evals.preflight import Sampling, check_run, first_rows
from nanopost.evals.teacher import check_tokenizers, fitting_prompts, name_teachers, text_lines, top_k_kl
from nanopost.micro_batches import sum_parts
from nanopost.models.trainable import LoRA, load_policy, what_trains
from nanopost.models.weights import load_config, load_model
from nanopost.rollout.sampler import row_uniforms, sample

DIVERGENCES = {"forward": losses.forward_kl, "reverse": losses.reverse_kl, "jsd": losses.generalized_jsd}
# What a mode reads besides the flags that all share, and the default there; every other one is refused.
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 256}
SCORING = {"divergence": "forward", "kd_temperature": None, "hidden_weight": 0.0}
READS: dict[str, dict[str, Any]] = {
    "text": {"max_length": 0},
    "text with a teacher": {"max_length": 0, "samples": 1, **SAMPLING},
    "logits": {"max_length": 0, "sft_weight": 0.0, **SCORING},
    "on-policy": {**SAMPLING, **SCORING, "divergence": "reverse"},
    "forward": {"top_k_teacher": 0},
    "jsd": {"jsd_beta": 0.5},
}
RANGES = {  # what a number must be, where it is read; the losses refuse the ends that they cannot have
    "at least 1": ("batch_size micro_batch samples max_new_tokens", lambda x: x >= 1),
    "at least 0": ("steps max_length top_k_teacher temperature hidden_weight lr warmup", lambda x: x >= 0),
    "above 0": ("epochs kd_temperature max_grad_norm", lambda x: x > 0),
    "between 0 and 1": ("top_p jsd_beta sft_weight final_lr", lambda x: 0 <= x <= 1),
}


# ---- 1 Configuration ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(LoRA, config.Machine):
    mode: Literal["text", "logits", "on-policy"]  # what the student learns from
    model: Path  # the student: folder in hub format to start from
    data: Path  # JSONL: chats; with text and a teacher, and with on-policy, their prompts alone
    teacher: Path | None = None  # folder in hub format; the same tokens and stop tokens but for text
    out: Path = Path("runs/distill")  # run folder: metrics, the teacher's texts, states, model
    eval_data: Path | None = None  # JSONL of held-out records
    from_scratch: bool = False  # random weights of DIR's config.json instead of its model.safetensors
    divergence: Literal["forward", "reverse", "jsd"] | None = None  # default: forward; on-policy: reverse
    jsd_beta: float | None = None  # weight of the teacher in jsd's mixture; default: 0.5
    kd_temperature: float | None = None  # τ, of both models; default: 1; on-policy: the sampler's temperature
    top_k_teacher: int | None = None  # of forward: the teacher's K likeliest tokens; default: 0, all
    hidden_weight: float | None = None  # of the hidden states' distance; default: 0, off
    sft_weight: float | None = None  # α of logits, the share of the data's own tokens; default: 0
    samples: int | None = None  # texts a prompt that the teacher writes; default: 1
    temperature: float | None = None  # of the sampler, the teacher's in text, else the student's; default: 1
    top_p: float | None = None  # of the sampler; default: 1, off
    max_new_tokens: int | None = None  # completions are cut there; default: 256
    epochs: float = 1.0  # passes over the data
    steps: int | None = None  # optimiser steps; default: as epochs say; 0: the preflight alone
    batch_size: int = 32  # samples an optimiser step, over all ranks
    micro_batch: int = 32  # samples a forward pass, on one rank
    max_length: int | None = None  # longer samples are left out and counted; default: the models' context
    lr: float = 1e-4  # peak learning rate
    schedule: Literal["constant", "cosine", "linear"] = "cosine"  # decay after the warm-up
    warmup: int = 10  # steps of linear warm-up
    final_lr: float = 0.1  # where the decay ends, as a share of lr
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    eval_every: int = 100  # steps between evaluations; 0: only at the end
    save_every: int = 0  # steps between states to resume from; 0: only at the end
    seed: int = 0  # order of the data, the sampler's uniforms, random weights


def settle(cfg: Config) -> Config:
    """The configuration with the mode's defaults put in; what nothing reads or is out of range is refused."""
    if cfg.mode != "text" and cfg.teacher is None:
        raise ValueError(f"teacher must be given with mode={cfg.mode}")
    mode = "text with a teacher" if cfg.mode == "text" and cfg.teacher else cfg.mode
    divergence = cfg.divergence or READS[mode].get("divergence", "none")
    reads = READS[mode] | READS.get(divergence, {})
    for name in sorted({name for table in READS.values() for name in table} - set(reads)):
        if (value := getattr(cfg, name)) is not None:
            raise ValueError(f"{name} must not be given: {mode}, {divergence} do not read it, got {value}")
    cfg = replace(cfg, **{name: value for name, value in reads.items() if getattr(cfg, name) is None})
    for rule, (names, holds) in RANGES.items():
        for name in names.split():
            if (value := getattr(cfg, name)) is not None and not holds(value):
                raise ValueError(f"{name} must be {rule}, got {value}")
    return cfg


def main(cfg: Config) -> None:
    # ---- 2 Process group, seeds, run directory -------------------------------------------------------------
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    distributed.setup(cfg)
    device, ranks = distributed.device(), distributed.world_size()
    cfg, chat, records = settle(cfg), load_chat(cfg.model), read_jsonl(cfg.data)
    if cfg.batch_size % ranks:
        raise ValueError(f"batch_size={cfg.batch_size} must be a multiple of the number of ranks ({ranks})")
    decoding = {n: getattr(cfg, n) for n in (*SAMPLING, "samples", "seed")} if cfg.samples else {}
    if cfg.mode != "text":
        check_tokenizers(chat, load_chat(cfg.teacher))
        if load_chat(cfg.teacher).template != chat.template:
            distributed.main_print("the teacher reads the student's chat template, which is not its own")
    env = {"template": chat.version, "teachers": name_teachers(cfg.teacher, records, decoding)}
    run = runs.open_run(cfg.out, cfg, env=env)

    # ---- 3 Task and data -----------------------------------------------------------------------------------
    readers = [cfg.model, *([] if cfg.mode == "text" else [cfg.teacher])]
    context = min(load_config(folder).max_position_embeddings for folder in readers)
    longest = min(cfg.max_length or context, context)
    scope = {"temperature": cfg.temperature, "top_p": cfg.top_p}

    def tasks_of(records: list[Record]) -> list:
        """What a step draws from: samples, or on-policy the tokens of prompts."""
        if cfg.mode == "on-policy":
            return fitting_prompts(chat, records, context - cfg.max_new_tokens)
        every = [sample for record in records for sample in record_samples(chat, record)]
        if long := [sample for sample in every if len(sample.ids) > longest + 1]:
            told = f"left out {len(long)} of {len(every)} samples over {longest} tokens"
            distributed.main_print(f"{told} (first: {long[0].place}, {len(long[0].ids)} tokens)")
        if len(long) == len(every):
            raise ValueError(f"{records[0].file}: no sample of at most {longest} tokens")
        return [sample for sample in every if len(sample.ids) <= longest + 1]

    def draw(model: torch.nn.Module, stop_ids: tuple, prompts: list, step: int, size: int) -> list:
        """`size` completions of each prompt of this rank's share."""
        places, count = distributed.shard_rows(range(len(prompts))), cfg.max_new_tokens
        uniforms = row_uniforms(seed=cfg.seed, step=step, prompts=places, group_size=size, count=count)
        options = dict(scope, group_size=size, max_new_tokens=count, stop_ids=stop_ids, uniforms=uniforms)
        with distributed.gathered(model), metrics.progress(range(len(uniforms)), desc="rollout") as bar:
            return sample(model, [prompts[place] for place in places], finished=bar.update, **options)

    def write_texts(path: Path) -> None:
        """The teacher's answers to the data's prompts, each with its origin; then the teacher can go."""
        speaker, room = load_chat(cfg.teacher), load_config(cfg.teacher).max_position_embeddings
        prompts = fitting_prompts(speaker, records, room - cfg.max_new_tokens)
        most = max([max(map(len, prompts)) + cfg.max_new_tokens, *(len(task.ids) for task in held_out)])
        plan.offer(cfg, min(longest, most), held_out=len(held_out), guest=cfg.teacher, written=prompts)
        done = draw(distributed.shard(load_model(cfg.teacher)), speaker.stop_ids, prompts, 0, cfg.samples)
        gc.collect()  # under FSDP only the collector finds a model that is gone
        mine, named = distributed.shard_rows(records), env["teachers"][0]
        lines = distributed.join_rows(text_lines(speaker, chat, mine, done, named))
        if lost := [line for line in lines if isinstance(line, str)]:
            distributed.main_print(f"left out {len(lost)} of {len(lines)} texts (first: {lost[0]})")
        if len(lost) == len(lines):  # said on every rank: none waits for another
            raise ValueError(f"{path}: none of {len(lines)} texts can be learnt from (first: {lost[0]})")
        distributed.together(lambda: write_lines(path, [x for x in lines if isinstance(x, dict)]), main=True)

    held_out = tasks_of(read_jsonl(cfg.eval_data)) if cfg.eval_data else []
    if cfg.mode == "text" and cfg.teacher:
        if not (cfg.resume and (run / "teacher.jsonl").exists()):
            write_texts(run / "teacher.jsonl")
        records = read_jsonl(run / "teacher.jsonl")
    train = tasks_of(records)
    fit = plan.offer(cfg, max(len(getattr(t, "ids", t)) for t in train + held_out), held_out=len(held_out))

    # ---- 4 Models, optimiser, resume -----------------------------------------------------------------------
    policy = load_policy(cfg.model, cfg, seed=cfg.seed, from_scratch=cfg.from_scratch)
    teacher = None if cfg.mode == "text" else load_model(cfg.teacher).requires_grad_(False).eval()
    hidden: dict[str, Tensor] = {}

    def match(_: torch.nn.Module, states: tuple[Tensor]) -> None:
        """Before the head, inside the forward pass: there every rank has the whole projection."""
        if torch.is_grad_enabled():
            hidden["values"] = losses.hidden_state_loss(*states, hidden["teacher"], policy.model.projection)

    if cfg.hidden_weight:
        widths = policy.config.hidden_size, teacher.config.hidden_size
        start = torch.randn(widths, generator=torch.Generator().manual_seed(cfg.seed)) / widths[0] ** 0.5
        policy.model.projection = torch.nn.Parameter(start)  # trained and saved along, not exported
        policy.lm_head.register_forward_pre_hook(match)
        teacher.lm_head.register_forward_pre_hook(lambda _, x: hidden.update(teacher=x[0], values=None))
    policy, teacher = distributed.shard(policy), teacher and distributed.shard(teacher)
    optimizer = optim.adamw(policy, lr=cfg.lr, weight_decay=cfg.weight_decay)
    first = checkpoint.load_state(run, policy, optimizer) if cfg.resume else 0
    metrics.truncate(run, first)

    # ---- 5 Schedules ---------------------------------------------------------------------------------------
    steps = max(1, round(cfg.epochs * len(train) / cfg.batch_size)) if cfg.steps is None else cfg.steps

    def learning_rate(step: int) -> float:
        kind, warmup = cfg.schedule, min(cfg.warmup, steps)
        return cfg.lr * optim.schedule(step, steps=steps, warmup=warmup, kind=kind, final=cfg.final_lr)

    # ---- 6 Rollout -----------------------------------------------------------------------------------------
    def texts(step: int, tasks: list) -> tuple[list[Sample], float]:
        """This rank's samples of a step, on-policy what the student answers now; and all ranks' tokens."""
        mine = distributed.shard_rows(tasks)
        if cfg.mode == "on-policy":
            mine = [rollout.sample for rollout in draw(policy, chat.stop_ids, tasks, step, 1)]
        return mine, distributed.all_sum(tokens_of(mine))

    def tokens_of(samples: list[Sample]) -> float:
        return float(sum(sum(sample.mask) for sample in samples))

    # ---- 7 Evaluation --------------------------------------------------------------------------------------
    # On-policy both are compared at the temperature the student samples at (greedy: 1).
    knobs = {"temperature": cfg.kd_temperature or cfg.temperature or 1.0}
    knobs |= {"beta": cfg.jsd_beta} if cfg.divergence == "jsd" else {}
    knobs |= {"k": cfg.top_k_teacher} if cfg.top_k_teacher else {}
    divergence = top_k_kl if cfg.top_k_teacher else DIVERGENCES.get(cfg.divergence)
    names = ("loss",) if teacher is None else ("loss", "kl", "agreement")

    def measure(samples: list[Sample], denom: float) -> tuple[Tensor, dict[str, float]]:
        """A micro-batch's share of the loss, and of what the line tells of its tokens."""
        batch = collate(samples, device=device)
        mask, spans = batch.completion_mask, batch.spans
        if teacher is None:
            logps = policy.logps(batch.input_ids, batch.target_ids, mask=mask, spans=spans, alike=True)
            seen = {"loss": (values := losses.sft_loss(logps)[mask])}
        else:
            with torch.no_grad():
                teacher_logits = teacher(batch.input_ids, mask, spans)
            logits = policy(batch.input_ids, mask, spans)
            values = divergence(logits, teacher_logits, **knobs)
            if cfg.sft_weight:
                nll = losses.sft_loss(losses.token_logps(logits, batch.target_ids[mask]))
                values = (1 - cfg.sft_weight) * values + cfg.sft_weight * nll
            if cfg.hidden_weight and torch.is_grad_enabled():
                values = values + cfg.hidden_weight * hidden["values"]
            seen = {"loss": values, "kl": losses.forward_kl(logits.detach(), teacher_logits)}
            seen["agreement"] = (logits.argmax(-1) == teacher_logits.argmax(-1)).float()
        told = {name: float(seen[name].detach().double().sum()) / denom for name in names}
        return losses.aggregate(values[None], mask[mask][None], mode="token_mean", denom=denom), told

    def learn(samples: list[Sample], denom: float) -> dict[str, float]:
        """What the line tells of them, and their gradient."""
        loss, told = measure(samples, denom)
        loss.backward()
        return told

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        """The line's means on held-out records, without the hidden states; on-policy on its answers."""
        mine, denom = texts(steps, held_out)
        with distributed.gathered(torch.nn.ModuleList(filter(None, (policy, teacher)))):
            look = partial(measure, denom=denom)
            sums = sum_parts(policy, mine, lambda part: look(part)[1], cfg.micro_batch, desc="evaluate")
        return {f"eval_{n}": value for n, value in distributed.all_sum({n: sums[n] for n in names}).items()}

    # ---- 8 The loop ----------------------------------------------------------------------------------------
    distributed.main_print(f"{len(train)} samples, {steps} steps of {cfg.batch_size}{what_trains(policy)}")
    sampling = Sampling(lambda _: draw(policy, chat.stop_ids, first_rows(cfg, train), 0, 1), scope)
    facts = {"loss": lambda part, whole: measure(part, tokens_of(whole))[0], "nll": teacher is None}
    facts |= {"sampling": sampling if cfg.mode == "on-policy" else None}
    check_run(cfg, run, chat, policy, train, first=first, fit=fit, **facts)
    for step in range(first, steps):
        start = time.perf_counter()
        optim.set_lr(optimizer, learning_rate(step))
        indices = step_indices(seed=cfg.seed, step=step, batch_size=cfg.batch_size, size=len(train))
        mine, denom = texts(step, [train[i] for i in indices])
        rollout_s, start = time.perf_counter() - start, time.perf_counter()
        sums = sum_parts(policy, mine, partial(learn, denom=denom), cfg.micro_batch, optimizer)
        seen = {"loss": sums["loss"], "samples": mine}
        grad_norm = faults.take_step(run, step, optimizer, policy, max_norm=cfg.max_grad_norm, **seen)

        last = step + 1 == steps
        line = distributed.all_sum({name: sums[name] for name in names}) | {"lr": learning_rate(step)}
        line |= {"grad_norm": grad_norm, "tokens": int(denom), "seconds": time.perf_counter() - start}
        line |= {"length": denom / cfg.batch_size, "rollout_s": rollout_s} if cfg.mode == "on-policy" else {}
        if held_out and (last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)):
            line |= evaluate()
        metrics.write_record(run, step, line)
        distributed.main_print(metrics.format_line(step, steps, line))
        faults.save_if_due(run, step + 1, steps, policy, optimizer, every=cfg.save_every)

    # ---- 9 Teardown ----------------------------------------------------------------------------------------
    weights = checkpoint.full_state(policy)  # every rank helps to gather
    weights.pop("model.projection", None)
    export.write_policy(run, policy, weights, base=cfg.model, stop_ids=chat.stop_ids)
    distributed.teardown()


if __name__ == "__main__":
    main(config.parse(Config))
