"""Reward models: learn from people's or verifiers' labels which answer is better, or which step is right.

    pairs       L = −log σ(r(x, y⁺) − r(x, y⁻) − m)                    chosen over rejected (Bradley–Terry)
    attributes  L = Σ_a (ŷ_a − y_a)²                                   five ratings from 0 to 4 (HelpSteer2)
    steps       L = −Σ_s [c_s log σ(z_s) + (1 − c_s) log(1 − σ(z_s))]  z read at the end of every step
    outcomes    the same with one label, z read at the end of the answer

Each is a mean over what is labelled in the whole optimiser step: pairs, ratings, steps, answers. A score is
read at the answer's last token, its stop token, found by length: padding may be made of any token. The head
starts at 0, so the first record says log 2 (pairs, steps, outcomes) and an accuracy of ½, all ties.

    python train_reward.py --model runs/sft/model --labels pairs --data pairs.jsonl --out runs/reward
    torchrun --nproc-per-node 8 train_reward.py --model DIR --labels pairs --data FILE --out runs/reward

DIR is a language model or a score model in hub format; runs/reward/model is one that transformers'
AutoModelForSequenceClassification loads. evaluation.json keeps what is measured on held-out labels: accuracy,
calibration against 1/(1 + e^−Δ), Elo, what length decides, and the audit (nanopost/evals/audit.py). Delta to
InstructGPT (Ouyang et al. 2022, eq. 1): every pair stands alone, and rewards are not shifted afterwards.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from nanopost import checkpoint, config, distributed, export, faults, metrics, optim, plan, runs
from nanopost.atomic import write_json
from nanopost.data.chat import load_chat
from nanopost.data.collate import pad_ids
from nanopost.data.order import step_indices
from nanopost.data.preference import ATTRIBUTES, read_preferences
from nanopost.data.preference_samples import completion_sample, preference_samples, steps_sample
from nanopost.data.schema import Labelled, Preference, PreferenceRecord, Ratings, Sample, Steps
from nanopost.evals import audit
from nanopost.evals.preflight import check_run
from nanopost.losses import aggregate, attribute_loss, bradley_terry_loss, process_reward_loss
from nanopost.micro_batches import in_parts, sum_parts
from nanopost.models.heads import load_score_model
from nanopost.models.trainable import LoRA, adapt, nf4_layers, what_trains
from nanopost.models.weights import load_config
from nanopost.report import offer_report

KINDS = {"pairs": Preference, "attributes": Ratings, "steps": Steps, "outcomes": Labelled}
SCORES = dict.fromkeys(KINDS, ("correct",)) | {"pairs": ("reward",), "attributes": ATTRIBUTES}  # their names
Example = tuple[list[Sample], list[list[int]], list[list[float]]]  # sequences, tokens read in each, labels
Losses = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]  # losses, what is labelled, measures


# ---- 1 Configuration ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(LoRA, config.Machine):
    model: Path  # folder in hub format to start from
    data: Path  # JSONL of preference records of the kind that `labels` says
    labels: Literal["pairs", "attributes", "steps", "outcomes"]  # what the records say about answers
    out: Path = Path("runs/reward")  # run folder: metrics, states, evaluation, model
    eval_data: Path | None = None  # JSONL of held-out records of the same kind
    audit: Path | None = None  # JSONL of pairs with a category; default: those that come with nanopost
    margin: float = 0.0  # m: how much the chosen answer should lead by (pairs)
    epochs: float = 1.0  # passes over the data
    steps: int | None = None  # optimiser steps; default: as epochs say; 0: the preflight alone
    batch_size: int = 32  # records an optimiser step, over all ranks
    micro_batch: int = 32  # records a forward pass, on one rank; a pair is two sequences
    max_length: int = 0  # records with a longer sequence are left out and counted; 0: the model's context
    lr: float = 1e-5  # peak learning rate
    schedule: Literal["constant", "cosine", "linear"] = "cosine"  # decay after the warm-up
    warmup: int = 10  # steps of linear warm-up
    final_lr: float = 0.1  # where the decay ends, as a share of lr
    weight_decay: float = 0.0  # on matrices only
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm
    eval_every: int = 100  # steps between evaluations; 0: only at the end
    save_every: int = 0  # steps between states to resume from; 0: only at the end
    seed: int = 0  # order of the data


def main(cfg: Config) -> None:
    # ---- 2 Process group, seeds, run directory -------------------------------------------------------------
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    distributed.setup(cfg)
    device, ranks = distributed.device(), distributed.world_size()
    config.at_least(cfg, batch_size=1, micro_batch=1, steps=0, lr=0, weight_decay=0)
    if not (cfg.epochs > 0 and cfg.max_grad_norm > 0):
        raise ValueError(f"epochs and max_grad_norm must be above 0, got {cfg.epochs}, {cfg.max_grad_norm}")
    optim.schedule(0, steps=1, warmup=min(cfg.warmup, 1), kind=cfg.schedule, final=cfg.final_lr)
    if cfg.batch_size % ranks:
        raise ValueError(f"batch_size={cfg.batch_size} must be a multiple of the number of ranks ({ranks})")
    if cfg.margin and cfg.labels != "pairs":
        raise ValueError(f"margin={cfg.margin} is for labels=pairs, got labels={cfg.labels}")
    audited = cfg.labels in ("pairs", "outcomes")  # those with one score for the whole answer
    if cfg.audit and not audited:
        raise ValueError(f"audit={cfg.audit} compares whole answers, labels={cfg.labels} does not score them")
    chat = load_chat(cfg.model)
    run = runs.open_run(cfg.out, cfg, env={"template": chat.version})

    # ---- 3 Task and data -----------------------------------------------------------------------------------
    context = load_config(cfg.model).max_position_embeddings
    longest = min(cfg.max_length or context, context)

    def example_of(record: PreferenceRecord) -> Example:
        """The sequences of a record, where each is read, and what should be read there (NaN: nobody said)."""
        if isinstance(record, Preference):
            pair = preference_samples(chat, record)
            return list(pair), [[len(sample.ids) - 1] for sample in pair], []
        if isinstance(record, Steps):
            sample, ends = steps_sample(chat, record)
            return [sample], [list(ends)], [[float(label)] for label in record.labels]
        place = {"file": record.file, "line": record.line}
        sample = completion_sample(chat, record.prompt, record.completion, **place)
        labels = [float(record.label)] if isinstance(record, Labelled) else []
        if isinstance(record, Ratings):
            labels = [float("nan") if record.ratings[a] is None else record.ratings[a] for a in ATTRIBUTES]
        return [sample], [[len(sample.ids) - 1]], [labels]

    def tokens_of(example: Example) -> int:
        return max(len(sample.ids) for sample in example[0])

    def examples_of(path: Path) -> list[Example]:
        every, kind = read_preferences(path), KINDS[cfg.labels]
        if strange := [record for record in every if not isinstance(record, kind)]:
            where, found = f"{strange[0].file}:{strange[0].line}", type(strange[0]).__name__
            raise ValueError(f"{where}: labels={cfg.labels} reads {kind.__name__}, this record is {found}")
        found = [(record, example_of(record)) for record in every]
        long = [record for record, example in found if tokens_of(example) > longest]
        if long:
            told = f"left out {len(long)} of {len(every)} records over {longest} tokens"
            distributed.main_print(f"{told} (first: {long[0].file}:{long[0].line})")
        if len(long) == len(every):
            raise ValueError(f"{path}: no record of at most {longest} tokens")
        return [example for _, example in found if tokens_of(example) <= longest]

    train = examples_of(cfg.data)
    held_out = examples_of(cfg.eval_data) if cfg.eval_data else []
    audit_pairs, unread = [], []  # what this model can read; of nanopost's own pairs the others are left out
    for pair in audit.read_audit(cfg.audit) if audited else []:
        try:
            if (size := tokens_of(example_of(pair))) > context:
                place = f"{pair.file}:{pair.line}"
                raise ValueError(f"{place}: the pair has {size} tokens, the model's context {context}")
            audit_pairs.append(pair)
        except ValueError as error:
            if cfg.audit:
                raise ValueError(f"{error}: audit={cfg.audit} must have pairs this model can read") from error
            unread.append(error)
    if unread:
        told = f"left out {len(unread)} of {len(unread) + len(audit_pairs)} audit pairs"
        distributed.main_print(f"{told} (first: {unread[0]}); --audit FILE takes others")
    audit_examples, audited = [example_of(pair) for pair in audit_pairs], bool(audit_pairs)
    fit = plan.offer(cfg, max(map(tokens_of, train + held_out)), held_out=len(held_out))

    # ---- 4 Models, optimiser, resume -----------------------------------------------------------------------
    model = load_score_model(cfg.model, labels=len(SCORES[cfg.labels]), four_bits=nf4_layers(cfg))
    model = distributed.shard(adapt(model, cfg, seed=cfg.seed, base=cfg.model))
    optimizer = optim.adamw(model, lr=cfg.lr, weight_decay=cfg.weight_decay)
    first = checkpoint.load_state(run, model, optimizer) if cfg.resume else 0
    metrics.truncate(run, first)

    # ---- 5 Schedules ---------------------------------------------------------------------------------------
    steps = max(1, round(cfg.epochs * len(train) / cfg.batch_size)) if cfg.steps is None else cfg.steps

    def learning_rate(step: int) -> float:
        kind, warmup = cfg.schedule, min(cfg.warmup, steps)
        return cfg.lr * optim.schedule(step, steps=steps, warmup=warmup, kind=kind, final=cfg.final_lr)

    # ---- 6 Rollout -----------------------------------------------------------------------------------------
    # None: the answers are the data's.

    # ---- 7 Evaluation --------------------------------------------------------------------------------------
    def read(part: list[Example]) -> torch.Tensor:
        """The scores (P, labels) at the P tokens that a micro-batch names, in their order."""
        input_ids, _ = pad_ids([sample.ids for samples, _, _ in part for sample in samples], device=device)
        places = [ends for _, every, _ in part for ends in every]  # of each sequence, found by its length
        rows = [row for row, ends in enumerate(places) for _ in ends]
        return model(input_ids)[rows, [end for ends in places for end in ends]]

    def labels_of(examples: list[Example]) -> torch.Tensor:
        return torch.tensor([row for *_, labels in examples for row in labels], device=device)

    def towards(lead: torch.Tensor) -> dict[str, torch.Tensor]:
        """How far a score stands on the side of its label, and whether it does; a tie is half."""
        return {"accuracy": (1 + lead.sign()) / 2, "margin": lead}

    def pair_losses(scores: torch.Tensor, labels: torch.Tensor) -> Losses:
        chosen, rejected = scores.view(-1, 2).unbind(1)
        values = bradley_terry_loss(chosen, rejected, margin=cfg.margin).unsqueeze(1)
        return values, torch.ones_like(values, dtype=torch.bool), towards((chosen - rejected).unsqueeze(1))

    def rating_losses(predictions: torch.Tensor, ratings: torch.Tensor) -> Losses:
        rated = ~ratings.isnan()
        return attribute_loss(predictions, ratings, rated), rated, {"error": (predictions - ratings).abs()}

    def label_losses(logits: torch.Tensor, labels: torch.Tensor) -> Losses:
        labelled = torch.ones_like(labels, dtype=torch.bool)
        return process_reward_loss(logits, labels, labelled), labelled, towards((2 * labels - 1) * logits)

    losses = {"pairs": pair_losses, "attributes": rating_losses}.get(cfg.labels, label_losses)

    def count_of(examples: list[Example]) -> float:
        """What the loss of these examples is a mean over."""
        said = [x == x for *_, labels in examples for row in labels for x in row]  # NaN: nobody said
        return float(sum(said) if said else len(examples))

    def share(part: list[Example], whole: list[Example]) -> torch.Tensor:
        values, mask, _ = losses(read(part), labels_of(part))
        return aggregate(values, mask, mode="token_mean", denom=count_of(whole))

    def learn(part: list[Example], denom: float) -> dict[str, float]:
        """Their part of a step's numbers, and their gradient."""
        values, mask, measures = losses(read(part), labels_of(part))
        aggregate(values, mask, mode="token_mean", denom=denom).backward()
        told = {"loss": values, **measures}
        return {name: float(measure.detach()[mask].sum()) / denom for name, measure in told.items()}

    @torch.no_grad()
    def read_all(examples: list[Example]) -> torch.Tensor:
        """The scores of all examples, (P, labels), float64, on every rank."""
        mine = distributed.shard_rows(examples)
        with distributed.gathered(model):
            parts = in_parts(model, mine, lambda part: read(part).tolist(), cfg.micro_batch, desc="evaluate")
        rows = distributed.join_rows([row for part in parts for row in part])
        return torch.tensor(rows, dtype=torch.float64)

    def evaluate() -> dict[str, Any]:
        """What the scores of the held-out records are worth, by name."""
        scores, labels = read_all(held_out), labels_of(held_out).double().cpu()
        read_at = [pair for samples, places, _ in held_out for pair in zip(samples, places, strict=True)]
        tokens = torch.tensor([sum(sample.mask[: end + 1]) for sample, ends in read_at for end in ends])
        if cfg.labels == "pairs":
            return audit.pair_evaluation(scores.view(-1, 2), tokens.view(-1, 2), margin=cfg.margin)
        if cfg.labels == "attributes":
            return audit.rating_evaluation(scores, labels, tokens, names=ATTRIBUTES)
        return audit.label_evaluation(scores.flatten(), labels.flatten(), tokens)

    # ---- 8 The loop ----------------------------------------------------------------------------------------
    distributed.main_print(f"{len(train)} records, {steps} steps of {cfg.batch_size}{what_trains(model)}")
    equal_scores = math.nan if cfg.labels == "attributes" else math.log1p(math.exp(cfg.margin))
    facts = {"samples": [sample for samples, *_ in train for sample in samples], "starts": equal_scores}
    check_run(cfg, run, chat, model, train, first=first, fit=fit, loss=share, **facts)
    for step in range(first, steps):
        start = time.perf_counter()
        optim.set_lr(optimizer, learning_rate(step))
        indices = step_indices(seed=cfg.seed, step=step, batch_size=cfg.batch_size, size=len(train))
        examples = [train[i] for i in indices]
        mine, denom = distributed.shard_rows(examples), count_of(examples)  # the whole step's, on every rank
        sums = sum_parts(model, mine, partial(learn, denom=denom), cfg.micro_batch, optimizer)
        seen = {"loss": sums["loss"], "samples": [sample for samples, *_ in mine for sample in samples]}
        grad_norm = faults.take_step(run, step, optimizer, model, max_norm=cfg.max_grad_norm, **seen)

        last = step + 1 == steps
        line = {
            **distributed.all_sum(sums),
            "lr": learning_rate(step),
            "grad_norm": grad_norm,
            "tokens": sum(len(sample.ids) for samples, *_ in examples for sample in samples),
            "seconds": time.perf_counter() - start,
        }
        evaluated = last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)
        found = evaluate() if held_out and evaluated else {}
        told = {f"eval_{name}": x for name, x in found.items() if isinstance(x, float | None)}
        if last and audited:
            found["audit"] = audit.audit_accuracy(audit_pairs, read_all(audit_examples).view(-1, 2))
            told |= {f"eval_audit_{name}": row["accuracy"] for name, row in found["audit"].items()}
        metrics.write_record(run, step, line | told)
        line |= {name: told[name] for name in ("eval_accuracy", "eval_loss", "eval_elo") if name in told}
        distributed.main_print(metrics.format_line(step, steps, line))
        if last and distributed.is_main():
            if audited:
                rates = ", ".join(f"{name} {row['accuracy']:.3f}" for name, row in found["audit"].items())
                print(f"audit: {rates}. {audit.NOTE}")
            page = {"step": steps, "labels": cfg.labels, "audit_note": audit.NOTE, **found}
            write_json(run / "evaluation.json", page)
        faults.save_if_due(run, step + 1, steps, model, optimizer, every=cfg.save_every)

    # ---- 9 Teardown ----------------------------------------------------------------------------------------
    weights = checkpoint.full_state(model)  # every rank helps to gather
    scores = SCORES[cfg.labels]
    export.write_scores(run / "model", model, weights, base=cfg.model, chat=chat, labels=scores)
    if distributed.is_main():
        print(f"report: {offer_report(run)}")
    distributed.teardown()


if __name__ == "__main__":
    main(config.parse(Config))
