"""Preference optimisation: the chosen completion shall gain more on a reference than the rejected one.

    h = [log π_θ(y⁺|x) − log π_ref(y⁺|x)] − [log π_θ(y⁻|x) − log π_ref(y⁻|x)]
    L = −log σ(β h), a mean over the pairs of the whole optimiser step                  (F15: --loss dpo)

The other losses are rows of the table below: dpo_norm is per token (F16), ipo has a target for h (F17), kto
single completions, liked or disliked (F18), orpo and simpo no reference (F19, F20), robust flipped labels.

    python train_dpo.py --model runs/sft/model --data pairs.jsonl --out runs/dpo
    torchrun --nproc-per-node 8 train_dpo.py --model runs/sft/model --data pairs.jsonl --out runs/dpo

The reference is scored once, its log-probs are kept by sample in OUT/logps, and it is dropped. The first line
says log 2 (dpo), margin 0, accuracy ½, changes 0, kl 0, up to rounding. margin is β·h; without a reference it
is β(ℓ⁺ − ℓ⁻) (simpo), ℓ⁺ − ℓ⁻ (orpo), and not 0 then; ±β(r − z) a row for kto. kl_from_ref: KL(π_ref ‖ π_θ) a
token by k3, for simpo and orpo from the start; unbiased if π_ref sampled the pairs. Delta to Rafailov et al.
2023: AdamW; to Ethayarajh et al. 2024: kto's z is a mean over the step's mismatched pairs, fixed by the data.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nanopost import checkpoint, config, distributed, export, faults, losses, metrics, optim, plan, runs
from nanopost.data.chat import load_chat
from nanopost.data.collate import collate, spread
from nanopost.data.order import step_indices
from nanopost.data.preference import read_preferences
from nanopost.data.preference_samples import completion_sample, preference_samples
from nanopost.data.schema import Labelled, Preference, PreferenceRecord, Sample
from nanopost.evals.preflight import check_run
from nanopost.evals.reference import Example, fixed_logps, mismatched, sample_id
from nanopost.evals.rollouts import completion_logps
from nanopost.micro_batches import sum_parts
from nanopost.models.trainable import LoRA, load_policy, what_trains
from nanopost.models.weights import load_config, load_model


class Loss(NamedTuple):
    function: Callable[..., Tensor]  # one loss a unit
    numbers: dict[str, float]  # the flags it reads, with its own defaults
    unit: str = "pair"  # chosen and rejected; or "row": one completion, liked or not
    logp: str = "sum"  # log π(y), over the tokens of y; or their "mean"
    reference: bool = True  # whether it compares with a reference


LOSSES = {
    "dpo": Loss(losses.dpo_loss, {"beta": 0.1, "label_smoothing": 0.0}),
    "dpo_norm": Loss(losses.dpo_loss, {"beta": 5.0}, logp="mean"),
    "ipo": Loss(losses.ipo_loss, {"beta": 0.1}),
    "kto": Loss(losses.kto_loss, {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}, "row"),
    "orpo": Loss(losses.orpo_loss, {"odds_weight": 0.1}, logp="mean", reference=False),
    "simpo": Loss(losses.simpo_loss, {"beta": 2.0, "margin": 1.0}, logp="mean", reference=False),
    "robust": Loss(partial(losses.dpo_loss, robust=True), {"beta": 0.1, "label_smoothing": 0.1}),
}
MEANS = {"margin": "units", "accuracy": "units", "chosen_change": "chosen", "rejected_change": "rejected"}
MEANS |= {"kl_from_ref": "tokens", "sft": "chosen_tokens"}  # what the numbers of a line are means over
TIE = 0.1 if distributed.bf16() else 1e-4  # nats a completion: what is nearer to 0 is rounding
FALLING = """chosen_change < 0: the chosen completions are less likely than at the start. The margin may grow
while both sides fall: the mass moves to texts that nobody compared. --sft-weight or --loss ipo hold it."""


# ---- 1 Configuration ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Config(LoRA, config.Machine):
    model: Path  # folder in hub format to start from
    data: Path  # JSONL of pairs (prompt, chosen, rejected, …); kto reads single labelled completions too
    out: Path = Path("runs/dpo")  # run folder: metrics, log-probs, states, model
    eval_data: Path | None = None  # JSONL of held-out records, for the same numbers as in training
    ref_model: Path | None = None  # reference; default: the model started from
    loss: Literal["dpo", "dpo_norm", "ipo", "kto", "orpo", "simpo", "robust"] = "dpo"  # a row of LOSSES
    beta: float | None = None  # weight of the margin; default here and below: the loss's own
    label_smoothing: float | None = None  # dpo, robust: share of labels believed flipped
    margin: float | None = None  # simpo: γ, what the margin must beat
    odds_weight: float | None = None  # orpo: λ of the odds ratio
    desirable_weight: float | None = None  # kto: λ_D of liked completions
    undesirable_weight: float | None = None  # kto: λ_U of the others
    sft_weight: float = 0.0  # weight of the chosen completions' SFT loss, a mean over their tokens
    epochs: float = 1.0  # passes over the data
    steps: int | None = None  # optimiser steps; default: as epochs say; 0: the preflight alone
    batch_size: int = 32  # records an optimiser step, over all ranks; a pair is one
    micro_batch: int = 16  # records a forward pass, on one rank
    max_length: int = 0  # records with a longer sample are left out and counted; 0: the model's context
    lr: float = 1e-6  # peak learning rate
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
    config.at_least(cfg, batch_size=1, micro_batch=1, steps=0, sft_weight=0, lr=0, weight_decay=0)
    if not (cfg.epochs > 0 and cfg.max_grad_norm > 0):
        raise ValueError(f"epochs and max_grad_norm must be above 0, got {cfg.epochs}, {cfg.max_grad_norm}")
    optim.schedule(0, steps=1, warmup=min(cfg.warmup, 1), kind=cfg.schedule, final=cfg.final_lr)
    if cfg.batch_size % ranks:
        raise ValueError(f"batch_size={cfg.batch_size} must be a multiple of the number of ranks ({ranks})")
    loss, flags = LOSSES[cfg.loss], {"ref_model", *(name for row in LOSSES.values() for name in row.numbers)}
    given = {name: getattr(cfg, name) for name in flags if getattr(cfg, name) is not None}
    for name in sorted(given.keys() - {*loss.numbers, "ref_model" if loss.reference else ""}):
        raise ValueError(f"{name} must not be given: {cfg.loss} has no such term, got {given[name]}")
    numbers = {name: given.get(name, default) for name, default in loss.numbers.items()}

    def unit_losses(new: Tensor, old: Tensor, liked: Tensor, z: Tensor) -> Tensor:
        """The losses of rows with log π_θ(y), log π_ref(y) and a label, or of the pairs that they make."""
        pairs = (new[liked], new[~liked], *((old[liked], old[~liked]) if loss.reference else ()))
        return loss.function(*(pairs if loss.unit == "pair" else (new, old, liked, z)), **numbers)

    probe = torch.tensor([-1.0, -1.0])  # a number out of its range is refused here, before the scoring
    starts = float(unit_losses(probe, probe, torch.tensor([True, False]), torch.zeros(())).mean())
    chat, ref_model = load_chat(cfg.model), cfg.ref_model or cfg.model
    if load_chat(ref_model).tokenizer.to_str() != chat.tokenizer.to_str():
        raise ValueError(f"ref_model: {ref_model} has another tokenizer than {cfg.model}")
    run = runs.open_run(cfg.out, cfg, env={"template": chat.version})

    # ---- 3 Task and data -----------------------------------------------------------------------------------
    context = min(load_config(folder).max_position_embeddings for folder in (cfg.model, ref_model))
    longest = min(cfg.max_length or context, context)

    def example_of(record: PreferenceRecord) -> Example:
        place, at = f"{record.file}:{record.line}", {"file": record.file, "line": record.line}
        if isinstance(record, Preference):
            return Example(place, preference_samples(chat, record), (True, False))
        if isinstance(record, Labelled) and loss.unit == "row":
            sample = completion_sample(chat, record.prompt, record.completion, **at)
            return Example(place, (sample,), (record.label,))
        raise ValueError(f"{place}: loss={cfg.loss} cannot use a record of {type(record).__name__.lower()}")

    def examples_of(path: Path) -> list[Example]:
        every = [example_of(record) for record in read_preferences(path)]
        length = {example.place: max(len(sample.ids) for sample in example.samples) for example in every}
        if long := [place for place in length if length[place] > longest + 1]:
            told = f"left out {len(long)} of {len(every)} records over {longest} tokens"
            distributed.main_print(f"{told} (first: {long[0]}, {length[long[0]]} tokens)")
        if len(long) == len(every):
            raise ValueError(f"{path}: no record of at most {longest} tokens")
        kept = [example for example in every if length[example.place] <= longest + 1]
        return kept if loss.unit == "pair" else mismatched(kept, longest=longest)

    train, held_out = examples_of(cfg.data), examples_of(cfg.eval_data) if cfg.eval_data else []
    tokens = [len(sample.ids) for e in train + held_out for sample in e.samples]
    kept = cfg.resume and (run / "logps" / "reference.safetensors").exists()
    read = max(len(held_out), cfg.batch_size)  # scoring gathers the policy too, for a step's rows at most
    fit = plan.offer(cfg, max(tokens), held_out=read, guest=None if kept else cfg.ref_model)

    # ---- 4 Models, optimiser, resume -----------------------------------------------------------------------
    policy = distributed.shard(load_policy(cfg.model, cfg, seed=cfg.seed))
    samples = [sample for e in train + held_out for sample in (*e.samples, *e.others)]
    distributed.main_print(f"{len(samples)} completions, scored once: {run / 'logps'} has their log-probs")

    def scored(model: torch.nn.Module | Path, samples: list[Sample]) -> list[Tensor]:
        """Log-probs under a model, or a folder's; each rank scores its share, all get all of them."""
        most = min(cfg.micro_batch, 2 * cfg.batch_size // ranks)  # as many rows as a step has: 2 a pair
        model = distributed.shard(load_model(model)) if isinstance(model, Path) else model
        with distributed.gathered(model):
            mine = completion_logps(model, distributed.shard_rows(samples), micro_batch=most)
        return distributed.join_rows(mine)

    def fixed(name: str, folder: Path, model: torch.nn.Module | Path) -> dict[str, Tensor]:
        path, main = run / "logps" / f"{name}.safetensors", distributed.is_main()
        return fixed_logps(path, folder, samples, partial(scored, model), resume=cfg.resume, write=main)

    start_logps = fixed("start", cfg.model, policy)  # before a resumed run's state takes the policy's place
    ref_logps = fixed("reference", cfg.ref_model, cfg.ref_model) if cfg.ref_model else start_logps
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
    def counts_of(examples: list[Example]) -> dict[str, int]:
        """What the numbers of a line are means over, on all ranks together."""
        rows = [(sum(s.mask), label) for e in examples for s, label in zip(e.samples, e.liked, strict=True)]
        tokens, chosen = sum(n for n, _ in rows), [n for n, label in rows if label]
        counts = {"units": len(examples if loss.unit == "pair" else rows), "chosen": len(chosen)}
        return counts | {"rejected": len(rows) - len(chosen), "tokens": tokens, "chosen_tokens": sum(chosen)}

    def mismatch_kl(examples: list[Example]) -> Tensor:
        """kto's z: the mean of log π_θ − log π_ref over the mismatched pairs of a step, at least 0."""
        others = [other for e in examples for other in e.others]
        pairs = zip(others, scored(policy, others) if others else [], strict=True)
        gains = [float((logps - ref_logps[sample_id(other)]).sum()) for other, logps in pairs]
        return torch.tensor(max(0.0, sum(gains) / max(1, len(gains))), device=device)

    def measure(
        examples: list[Example], counts: dict[str, int], z: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """These examples' part of a step's loss, and of the sums its line is made of."""
        samples = [sample for e in examples for sample in e.samples]
        liked = torch.tensor([label for e in examples for label in e.liked], device=device)
        batch = collate(samples, device=device)
        mask, keys = batch.completion_mask, [sample_id(sample) for sample in samples]
        logps = policy.logps(batch.input_ids, batch.target_ids, mask=mask, spans=batch.spans)
        start, ref = (spread([known[key] for key in keys], mask) for known in (start_logps, ref_logps))
        new, old = (losses.sequence_logps(x, mask, average=loss.logp == "mean") for x in (logps, ref))
        values = unit_losses(new, old, liked, z)[:, None]
        total = losses.aggregate(values, torch.ones_like(values), mode="sequence_mean", denom=counts["units"])
        nll, chosen, denom = losses.sft_loss(logps), mask & liked[:, None], max(1, counts["chosen_tokens"])
        if cfg.sft_weight:
            total = total + cfg.sft_weight * losses.aggregate(nll, chosen, mode="token_mean", denom=denom)
        with torch.no_grad():
            gain = new - old if loss.reference else new
            wins = gain[liked] - gain[~liked] if loss.unit == "pair" else (gain - z).where(liked, z - gain)
            change = losses.sequence_logps(logps - start, mask)
            sums = {
                "loss": total,
                "margin": numbers.get("beta", 1.0) * wins.sum(),
                "accuracy": (wins > TIE).sum() + 0.5 * (wins.abs() <= TIE).sum(),
                "chosen_change": change[liked].sum(),
                "rejected_change": change[~liked].sum(),
                "kl_from_ref": losses.kl_estimate(ref, logps, kind="k3")[mask].sum(),
                "sft": nll[chosen].sum(),
            }
        return total, {name: float(value.detach()) for name, value in sums.items()}

    def line_of(sums: Counter, counts: dict[str, int]) -> dict[str, float | None]:
        """The numbers of all ranks; None is the mean of nothing."""
        means = {name: n for name, n in MEANS.items() if name != "sft" or cfg.sft_weight}
        totals = distributed.all_sum({name: sums[name] for name in ("loss", *means)})
        line = {name: totals[name] / counts[n] if counts[n] else None for name, n in means.items()}
        return {"loss": totals["loss"], **line}

    def first_line(part: list[Example], whole: list[Example]) -> dict[str, float | None]:
        return line_of(Counter(measure(part, counts_of(whole), zero)[1]), counts_of(whole))

    def learn(part: list[Example], counts: dict[str, int], z: Tensor) -> dict[str, float]:
        """Their part of the sums, and their gradient."""
        part_loss, sums = measure(part, counts, z)
        part_loss.backward()
        return sums

    @torch.no_grad()
    def evaluate() -> dict[str, float | None]:
        """The numbers of a line, on the held-out records."""
        counts, z, mine = counts_of(held_out), mismatch_kl(held_out), distributed.shard_rows(held_out)
        with distributed.gathered(policy):
            look = partial(measure, counts=counts, z=z)
            sums = sum_parts(policy, mine, lambda part: look(part)[1], cfg.micro_batch, desc="evaluate")
        return {f"eval_{name}": value for name, value in line_of(sums, counts).items()}

    # ---- 8 The loop ----------------------------------------------------------------------------------------
    distributed.main_print(f"{len(train)} records, {steps} steps of {cfg.batch_size}{what_trains(policy)}")
    fell = any((record["chosen_change"] or 0.0) < -TIE for record in metrics.read_records(run))
    zero = torch.zeros((), device=device)  # kto's z before the first update
    same = loss.reference and not (cfg.ref_model or cfg.desirable_weight or cfg.undesirable_weight)
    facts = {"first": first, "loss": lambda part, whole: measure(part, counts_of(whole), zero)[0], "fit": fit}
    facts |= {"line": first_line, "starts": starts} if same else {}
    check_run(cfg, run, chat, policy, train, samples=[s for e in train for s in e.samples], **facts)
    for step in range(first, steps):
        start = time.perf_counter()
        optim.set_lr(optimizer, learning_rate(step))
        indices = step_indices(seed=cfg.seed, step=step, batch_size=cfg.batch_size, size=len(train))
        examples = [train[i] for i in indices]
        counts, z, mine = counts_of(examples), mismatch_kl(examples), distributed.shard_rows(examples)
        sums = sum_parts(policy, mine, partial(learn, counts=counts, z=z), cfg.micro_batch, optimizer)
        seen = {"loss": sums["loss"], "samples": [sample for e in mine for sample in e.samples]}
        grad_norm = faults.take_step(run, step, optimizer, policy, max_norm=cfg.max_grad_norm, **seen)

        last = step + 1 == steps
        line = line_of(sums, counts) | {"lr": learning_rate(step), "grad_norm": grad_norm}
        line |= {"tokens": counts["tokens"], "seconds": time.perf_counter() - start}
        if held_out and (last or (cfg.eval_every and (step + 1) % cfg.eval_every == 0)):
            line |= evaluate()
        metrics.write_record(run, step, line)
        distributed.main_print(metrics.format_line(step, steps, line))
        if not fell and (fell := (line["chosen_change"] or 0.0) < -TIE):
            distributed.main_print(FALLING)
        faults.save_if_due(run, step + 1, steps, policy, optimizer, every=cfg.save_every)

    # ---- 9 Teardown ----------------------------------------------------------------------------------------
    weights = checkpoint.full_state(policy)  # every rank helps to gather
    export.write_policy(run, policy, weights, base=cfg.model, stop_ids=chat.stop_ids)
    distributed.teardown()


if __name__ == "__main__":
    main(config.parse(Config))
