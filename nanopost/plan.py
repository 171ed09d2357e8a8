"""Whether a run fits into memory, told from `config.json` and the flags before a weight is read.

    python train_sft.py --model DIR --data chats.jsonl --plan       the table; status 0 if it fits, 1 if not

The terms are those of `models/footprint.py` and `rollout/footprint.py`, added up for the moments of a run:
while a model that is gone before step 1 writes the data or scores it, while the run samples, where backward
begins (all activations are there) and ends (all gradients are), while it evaluates, and while the model is
written. All rows are taken to be as long as the longest: no step takes more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch

from nanopost import distributed
from nanopost.memory import available
from nanopost.models import footprint as training
from nanopost.models.config import load_config
from nanopost.models.footprint import Job
from nanopost.models.trainable import chosen_adapter
from nanopost.rollout import footprint as sampling

Terms = dict[str, int]  # bytes by name
UNITS = {"GiB": 2**30, "MiB": 2**20}
# What a script reads its hidden states with: the first whose field its flags have.
HEADS = {"group_size": "logps", "mode": "logits", "labels": "score", "loss": "logps", "epochs": "alike"}
# Tensors as large as the logits that a divergence makes, in a step and without a gradient.
STORED, SEEN = {"forward": 10, "reverse": 11, "jsd": 16}, {"forward": 7.5, "reverse": 7.5, "jsd": 12.25}
TERMS = (
    "weights", "frozen models", "Adam", "gathered", "gradients", "activations", "logits", "KV cache",
    "passing", "read again",
)  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """Whether a job fits, and what would."""

    fits: bool
    need: int  # bytes at the highest moment, on one rank
    memory: int  # bytes there are for a rank
    micro_batch: int  # the largest that fits, at most the rows of a step or what is asked for; 0: none
    slots: int  # likewise, at most the rows that are sampled; 0 also where nothing is
    sentence: str  # all of it


def moments(job: Job) -> dict[str, Terms]:
    """The terms of each moment, bytes of one rank; a moment takes their sum."""
    always, grads = training.standing(job), training.gradients(job)
    whole = training.gathered(job)
    head, passing = training.logits(job), training.passing(job)
    begins = {
        "gathered": whole,
        "gradients": grads * training.adds(job),
        "activations": training.activations(job),
    }
    begins |= {"logits": head, "passing": max(0, passing - head)}
    ends = {"gathered": whole, "gradients": grads, "activations": training.kept_by_block(job)}
    ends |= {"passing": training.last_gradients(job)}
    found = {"backward begins": always | begins, "backward ends": always | ends}
    if job.sampled:
        found = {"sampling": always | speaking(job)} | found
    if job.guest:
        found = {purpose(job.guest): visiting(job, job.guest)} | found
    if job.held_out:
        alone = replace(job, sampled=job.held_out, rows=job.held_out * job.pair, group=1)
        parts = [speaking(alone)] * (job.new > 0) + [scoring(alone)] * (job.seen > 0 or not job.new)
        found["evaluation"] = always | max(parts, key=lambda terms: sum(terms.values()))
    if job.device == "cpu":  # of a GPU's run the host does this
        found["writing"] = always | {"read again": training.read_again(job)}
    return found


def purpose(guest: Job) -> str:
    """What a guest is there for."""
    return "teacher writes" if guest.sampled else "reference reads"


def visiting(job: Job, guest: Job) -> Terms:
    """The terms of a run's guest: it writes its texts alone, or reads the data beside the policy."""
    terms = {"frozen models": training.standing(guest)["weights"]}
    if guest.sampled:
        return terms | speaking(guest)
    read = scoring(replace(guest, micro_batch=job.micro_batch // job.pair, rows=job.rows))
    return terms | {"weights": training.standing(job)["weights"]} | read


def scoring(job: Job) -> Terms:
    """The terms of rows without a gradient; where a teacher is compared with, it is gathered as well."""
    logits = round(4 * job.seen * training.tokens(job)[1] * job.config.vocab_size)
    whole = sampling.whole(job)
    if training.gathered(job):
        whole += sum(sampling.whole(replace(job, config=teacher)) for teacher in job.frozen)
    return {"gathered": whole, "logits": logits, "passing": training.reading(job)}


def speaking(job: Job) -> Terms:
    """The terms of the sampler."""
    rest = max(sampling.moving(job), sampling.drawing(job), sampling.reading(job))
    terms = {"gathered": sampling.whole(job), "KV cache": sampling.kv_cache(job)}
    return terms | {"logits": sampling.next_logits(job), "passing": rest}


def need(job: Job) -> int:
    """Bytes of the highest moment."""
    return max(sum(terms.values()) for terms in moments(job).values())


def fits(job: Job, memory: int) -> Fit:
    """Whether a job fits into memory, the largest micro-batch that would, and the most slots.

    Args:
        job: what `job_of` makes of a script's flags.
        memory: bytes for a rank (`available`).
    """
    takes = need(job)
    most = _most(job, "micro_batch", memory)
    slots = _most(replace(job, micro_batch=most or job.pair), "slots", memory)
    if slots and not most:  # not with so many slots as are asked for: with fewer
        most = _most(replace(job, slots=slots), "micro_batch", memory)
    told = f"{_size(takes)} of {_size(memory)} a rank, micro-batches of {job.micro_batch // job.pair}"
    told += f", {job.slots} slots" if job.sampled else ""
    room = f"up to {most // job.pair}" + (f" with {slots} slots" if slots else "")
    told += f"; {room} would fit" if most else "; none would fit"
    return Fit(takes <= memory, takes, memory, most // job.pair, slots, told)


def _most(job: Job, name: Literal["micro_batch", "slots"], memory: int) -> int:
    """The largest value of a field, at most what there is or is asked for, with which a job fits; 0: none."""
    rows = name == "micro_batch"
    step, limit = (job.pair, max(job.rows, job.micro_batch)) if rows else (1, job.sampled)

    def fit(count: int) -> bool:
        changes: dict[str, Any] = {name: count * step}
        return need(replace(job, **changes)) <= memory

    low, high = 0, limit // step
    if fit(high):  # asked first, as the whole step is: there is nothing to accumulate
        return high * step
    if rows and (whole := job.rows // step) < high and fit(whole):
        low = whole
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low * step


def job_of(
    cfg: Any, longest: int, *, held_out: int = 0, guest: Path | None = None, written: Sequence[Any] = ()
) -> Job:
    """The job of a script's flags, on this device, with the ranks that there are.

    Args:
        cfg: the configuration of one of the six scripts.
        longest: tokens of the longest row that is read, or of the longest prompt that is sampled from.
        held_out: records of an evaluation, over all ranks; a pair is one.
        guest: folder of a model that is gone before the first step.
        written: the prompts that it is to answer, as tokens; none: it scores the data.
    """
    has, adapter, device = vars(cfg), chosen_adapter(cfg), "cuda" if torch.cuda.is_available() else "cpu"
    ranks = distributed.world_size()
    head = next(HEADS[name] for name in HEADS if name in has)
    truncated = has.get("top_k", 0) or (has.get("top_p") or 1.0) < 1.0
    if has.get("mode") == "text":
        head = "alike"
    elif truncated:
        head = "logits"
    config, samples = load_config(cfg.model), "group_size" in has or has.get("mode") == "on-policy"
    group, new = has.get("group_size", 1), has.get("max_new_tokens", 0) or 256
    pair = 2 if has.get("labels") == "pairs" or ("loss" in has and "group_size" not in has) else 1
    rows = has.get("batch_size", 0) or has["prompts_per_step"] * group
    rows = rows // ranks
    others = ("ref_model", "teacher", "reward_model") if samples or head == "logits" else ()
    critic = has.get("critic", "shared")
    place: dict[str, Any] = {"ranks": ranks // has.get("replicas", 1), "device": device}
    place |= {"bf16": torch.is_autocast_enabled(device), "offload": has.get("offload", False)}
    alone: dict[str, Any] = {"micro_batch": 1, "rows": 1, "length": longest}  # the guest's
    if written:
        size, most = has["samples"], max(map(len, written))
        alone |= {"length": most, "group": size, "new": new, "head": "logits" if truncated else "alike"}
        alone |= {"sampled": ceil(len(written) / ranks) * size}
    return Job(
        config=config,
        guest=Job(config=load_config(guest), **alone, **place) if guest else None,
        head=head,
        stored=STORED.get(has.get("divergence") or "", 8),
        seen=SEEN.get(has.get("divergence") or "", 0),
        pair=pair,
        micro_batch=cfg.micro_batch * pair,
        rows=rows * pair // has.get("minibatches", 1),
        length=longest,
        group=group,
        new=new * samples,
        slots=has.get("slots", 256),
        sampled=rows * samples,
        held_out=ceil(held_out / ranks),
        rank=adapter.rank if adapter else 0,
        targets=adapter.targets if adapter else (),
        nf4=cfg.lora_nf4,
        copies=int("group_size" in has and cfg.ref_model is None),
        frozen=tuple(load_config(has[name]) for name in others if has.get(name)),
        critic=None if critic == "shared" else load_config(critic or cfg.model),
        recompute=has.get("recompute", False),
        **place,
    )


def table(job: Job) -> str:
    """The terms of each moment, a term a line, and their sums at the end."""
    found = {moment: terms | {"in all": sum(terms.values())} for moment, terms in moments(job).items()}
    unit = "GiB" if need(job) >= 2**30 else "MiB"
    lines = [f"{unit} a rank".ljust(14) + "".join(f"{moment:>17}" for moment in found)]
    for name in (*TERMS, "in all"):
        values = [terms.get(name, 0) for terms in found.values()]
        numbers = [f"{value / UNITS[unit]:17.2f}" if value else " " * 17 for value in values]
        lines += [name.ljust(14) + "".join(numbers)] if any(values) else []
    return "\n".join(lines)


def offer(cfg: Any, longest: int, **more: Any) -> Fit:
    """Whether a script's steps fit. With --plan: print its table and end, with status 0 if all fits, else 1.

    A guest that does not fit is told at once: it comes before the preflight.

    Args:
        cfg, longest, more: as for `job_of`.
    Raises:
        SystemExit: with --plan.
    """
    job = job_of(cfg, longest, **more)
    memory = min(distributed.join_rows([available(job.device)]))
    if not cfg.plan:
        if job.guest and (takes := sum(visiting(job, job.guest).values())) > memory:
            told = f"when a {purpose(job.guest)}, it takes {_size(takes)} a rank, there are {_size(memory)}"
            distributed.main_print(f"memory: before the first step, {told}")
        return fits(replace(job, guest=None), memory)
    found = fits(job, memory)
    distributed.main_print(f"{table(job)}\nit {'fits' if found.fits else 'does not fit'}: {found.sentence}")
    distributed.teardown()
    raise SystemExit(0 if found.fits else 1)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
