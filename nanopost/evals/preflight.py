"""Preflight: what would go wrong at step 1,000, said before step 1. Sixteen checks, a line each.

A script calls `check_run` once, before its loop. A check ends as

    pass   what was looked at is as it must be
    warn   a risk and no error: the run goes on
    fail   the run would learn something else than it says: it ends here, with exit status 1
    n/a    this run has nothing of the kind; the line says why

and run/preflight.json keeps the lines. `--steps 0` is the preflight alone. Nothing of it is left in the run
that follows, which takes the same steps with and without. Page: docs/preflight.md
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nanopost import distributed
from nanopost.atomic import write_json
from nanopost.data.chat import Chat
from nanopost.data.order import step_indices
from nanopost.data.schema import Sample
from nanopost.evals import preflight_data as data
from nanopost.evals import preflight_model as models
from nanopost.evals.preflight_data import Check
from nanopost.evals.preflight_overlap import overlap
from nanopost.evals.preflight_sampling import Row, Sampling, answer_checks, first_answers, rollout_loss
from nanopost.evals.preflight_sentences import sentences
from nanopost.evals.verifier import Verifier
from nanopost.models.heads import ScoreModel
from nanopost.plan import Fit

ROWS = 4  # a rank, of the first batch: what gradients are compared on
OUTCOMES = ("n/a", "pass", "warn", "fail")  # of several ranks the last counts
CHECKS = {  # in the order of their lines, and why one has nothing to say
    "rows": "",
    "supervised": "nothing is there yet to train on",
    "stop token": "no answer has ended by itself",
    "bos": "",
    "history": "a sample has all turns here; reading refuses what a template writes anew",
    "stop ids": "",
    "stop row": "",
    "tied and rope": "",
    "verifier": "this run has none",
    "rewards": "nothing is rewarded",
    "log-probs": "nothing is drawn at random",
    "groups": "nothing is sampled in groups",
    "micro-batch": "",
    "step-0 card": "",
    "memory": "",
    "overlap": "",
}


def check_run(
    cfg: Any,
    run: Path,
    chat: Chat,
    model: Any,
    items: Sequence[Any],
    *,
    first: int,
    fit: Fit,
    samples: Sequence[Sample] = (),
    loss: models.Loss | None = None,
    starts: float = math.nan,
    nll: bool = False,
    line: Callable[[list[Any], list[Any]], Mapping[str, float | None]] | None = None,
    sampling: Sampling | None = None,
    verify: Verifier | None = None,
) -> None:
    """Check a fresh run before its first step. Every rank calls.

    Args:
        cfg: the script's flags; with `steps` 0 the process ends here.
        run: its folder, for preflight.json.
        chat: tokenizer and template.
        model: what trains, sharded.
        items: what a step draws from: samples, examples, prompts, or (prompt, record).
        first: the step that the run begins with; above 0 it goes on from a state, and nothing is checked.
        fit: what the plan of its memory says.
        samples: all there is to train on; the items, where they are samples; none where a policy writes it.
        loss: the script's own (`preflight_model.Loss`), of items or of drawn samples; a variant has its own.
        starts: what the loss must be before the first update; NaN: any finite number.
        nll: the loss is −log π, a mean over tokens: whoever guesses has log W.
        line: the numbers of preferences that the first line tells, where policy and reference start as one.
        sampling: None where the data's completions are trained on.
        verify: the verifier, where there is one.
    Raises:
        ValueError: neither a loss nor a variant that has one.
        SystemExit: 1 on every rank where a check fails on any; 0 with `steps` 0 where none does.
    """
    if first:
        distributed.main_print(f"preflight: left out, the run goes on from step {first}")
    else:
        samples = items if isinstance(items[0], Sample) else samples
        begun, shown, due = time.perf_counter(), list(samples), math.nan
        found = agree(
            data_checks(cfg, chat, items, samples, fit, sampled=sampling is not None, verify=verify)
        )
        if not faults(found):  # else there is nothing that a model should read
            answers = first_answers(cfg, sampling, ROWS) if sampling else []
            shown = [rollout.sample for _, rollout, *_ in answers] or shown
            more, due = model_checks(cfg, chat, model, items, answers, loss, starts, nll, line, sampling)
            found += agree(more)
        tell(run, found, seconds=time.perf_counter() - begun)
        variant = sampling.variant if sampling else None
        packed, sampled = samples is items, sampling is not None
        for sentence in sentences(cfg, chat, variant=variant, starts=due, packed=packed, sampled=sampled):
            distributed.main_print(sentence)
        for sample in shown[: cfg.show]:
            distributed.main_print(f"{sample.place or 'sampled'}: {data.bracketed(chat, sample)}")
        if failed := faults(found):
            leave(f"preflight: {', '.join(failed)} failed, nothing was trained: {run / 'preflight.json'}")
    if cfg.steps == 0:
        leave("")


def data_checks(
    cfg: Any,
    chat: Chat,
    items: Sequence[Any],
    samples: Sequence[Sample],
    fit: Fit,
    *,
    sampled: bool,
    verify: Verifier | None,
) -> list[Check]:
    """What rows, template, verifier and plan say before a model is asked."""
    prompts = [prompt_sample(item) for item in items] if sampled else samples
    found = [data.rows(cfg.data, items), data.bos(chat, prompts), data.stop_ids(chat)]
    found += [overlap(cfg.data, cfg.eval_data), models.memory(fit, slots="slots" in vars(cfg))]
    if not sampled:
        found += [data.supervised(samples), data.stop_tokens(chat, samples)]
    if samples is items:
        found.append(data.history(samples))
    return [*found, data.verifier(verify, [record for _, record in items])] if verify else found


def prompt_sample(item: Any) -> Sample:
    """A prompt's tokens, or those beside its record, as a sample that trains on none."""
    ids, record = item if isinstance(item, tuple) else (item, None)
    return Sample(tuple(ids), (False,) * len(ids), f"{record.file}:{record.line}" if record else "")


def model_checks(
    cfg: Any,
    chat: Chat,
    model: Any,
    items: Sequence[Any],
    answers: Sequence[Row],
    loss: models.Loss | None,
    starts: float,
    nll: bool,
    line: Callable[[list[Any], list[Any]], Mapping[str, float | None]] | None,
    sampling: Sampling | None,
) -> tuple[list[Check], float]:
    """What a model says of its head, its answers and the loss of the first rows; and what that must be."""
    with distributed.gathered(model):
        found = [models.stop_row(model, chat), models.tied_and_rope(model, cfg.model)]
        trained_head = isinstance(model, ScoreModel) and bool(model.score.weight.any())
    said, variant = dict[str, tuple[float, float]](), sampling.variant if sampling else None
    if sampling:
        more, said = answer_checks(cfg, chat, model, sampling, answers)
        found += more
    if sampling and variant:
        mine: list[Any] = [(i, rollout) for i, (_, rollout, *_) in enumerate(answers[:ROWS])]
        whole, loss = mine, rollout_loss(model, variant, sampling.scope)
    else:
        mine = [r.sample for _, r, *_ in answers[:ROWS]] or distributed.shard_rows(first_rows(cfg, items))
        whole = distributed.join_rows(mine)
    if loss is None:
        raise ValueError("loss must be given where no variant has one, got None")
    size = min(len(mine), cfg.micro_batch)
    one = models.gradient(model, loss, mine, whole, size=size)
    alone = models.gradient(model, loss, mine, whole, size=1) if size > 1 else None
    if line:
        with torch.no_grad():
            said |= models.preference_numbers(line(mine, whole), starts, cfg.sft_weight)
    elif not variant:
        said["loss"] = distributed.all_sum(one.loss), math.nan if trained_head else starts
    guess = math.log(model.words) if nll else None
    found += [models.micro_batches(one, alone, rows=len(whole)), models.card(said, guess=guess)]
    return found, said.get("loss", (0.0, math.nan))[1]


def first_rows(cfg: Any, items: Sequence[Any]) -> list[Any]:
    """The first ones of step 0 on all ranks, `ROWS` each."""
    places = step_indices(seed=cfg.seed, step=0, batch_size=cfg.batch_size, size=len(items))
    return [items[place] for place in places[: ROWS * distributed.world_size()]]


def agree(found: list[Check]) -> list[Check]:
    """The worst of all ranks, check by check; of equals the first rank's."""
    every = distributed.join_rows([found])
    return [max(same, key=lambda check: OUTCOMES.index(check.outcome)) for same in zip(*every, strict=True)]


def faults(found: Sequence[Check]) -> list[str]:
    """The names of what failed."""
    return [check.name for check in found if check.outcome == "fail"]


def tell(run: Path, found: Sequence[Check], *, seconds: float) -> None:
    """Print a line a check, in their order, and keep them in preflight.json."""
    known = {check.name: check for check in found}
    late = "not asked: the faults come first"
    every = [known.get(name, Check(name, "n/a", why or late)) for name, why in CHECKS.items()]
    for check in every:
        fix = f"; {check.fix}" if check.fix else ""
        distributed.main_print(f"{check.outcome:>4}  {check.name:<13}  {check.told}{fix}")
    if distributed.is_main():
        page = {"passed": not faults(found), "seconds": round(seconds, 3), "checks": list(map(asdict, every))}
        write_json(run / "preflight.json", page)


def leave(why: str) -> None:
    """End the process on every rank: with 1 and the reason, told once, or with 0 where there is none."""
    main = distributed.is_main()
    distributed.teardown()
    raise SystemExit((why if main else 1) if why else 0)
