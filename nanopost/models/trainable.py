"""What of a model trains: all weights, or an adapter beside frozen ones (LoRA), those in four bits (QLoRA).

The six scripts share these flags and functions. With an adapter the reference is the base *plus the adapter
that training starts from*, in the same number format: whatever else it were, the first step's KL would not be
0. What a script writes is the plain model with the adapter merged into it, which loads everywhere, and the
adapter beside it in the folder `adapter`, as peft has it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from nanopost.models.heads import ActorCritic, ScoreModel, load_either, save_score_model
from nanopost.models.llama import Llama
from nanopost.models.lora_model import TARGETS, Adapter, M, adapter_of, add_adapter, merged_state
from nanopost.models.nf4 import NF4Linear
from nanopost.models.others import HALF, beside, known_ids
from nanopost.models.peft import WEIGHTS, check_origin, load_adapter, read_adapter, save_adapter
from nanopost.models.weights import load_model, random_model, save_model, words


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """The flags: a script's configuration has them behind its own."""

    lora_rank: int = 0  # adapters of this rank train, beside frozen weights; 0: all weights train
    lora_alpha: float | None = None  # α: what an adapter adds is scaled by α/rank; default: 32
    lora_targets: Literal["attention", "mlp", "all"] | None = None  # the layers that get one; default: all
    lora_from: Path | None = None  # adapter to go on with, in peft's format; its own rank and α hold
    lora_nf4: bool = False  # QLoRA: those layers' frozen weights in four bits


def chosen_adapter(flags: LoRA) -> Adapter | None:
    """The adapter that the flags ask for; None where all weights train.

    Raises:
        ValueError: flags that contradict each other, a rank below 0, an adapter with dropout: it would train
            without.
    """
    if flags.lora_rank < 0:
        raise ValueError(f"lora_rank must be at least 0, got {flags.lora_rank}")
    for name in ("lora_alpha", "lora_targets"):
        if (value := getattr(flags, name)) is not None and not flags.lora_rank:
            raise ValueError(f"{name}={value} needs lora_rank: nothing else reads it")
    if flags.lora_from is None:
        if flags.lora_nf4 and not flags.lora_rank:
            raise ValueError("lora_nf4 freezes weights: lora_rank or lora_from must say what trains")
        alpha = 32.0 if flags.lora_alpha is None else flags.lora_alpha
        targets = TARGETS[flags.lora_targets or "all"]
        return Adapter(flags.lora_rank, alpha, targets) if flags.lora_rank else None
    if flags.lora_rank:
        raise ValueError(f"lora_rank={flags.lora_rank} and lora_from={flags.lora_from}: the folder says it")
    adapter = read_adapter(flags.lora_from)
    if adapter.dropout:
        told = f"lora_from={flags.lora_from} has lora_dropout {adapter.dropout}"
        raise ValueError(f"{told}, the scripts train without: set it to 0 in its file")
    return adapter


def nf4_layers(flags: LoRA) -> Collection[str]:
    """The layers that `load_model` is to quantise."""
    adapter = chosen_adapter(flags)
    return adapter.targets if adapter and flags.lora_nf4 else ()


def adapt(model: M, flags: LoRA, *, seed: int, base: str | Path) -> M:
    """Give a model the adapter of the flags; without one it stays as it is, and all of it trains.

    A folder that has the configuration of an adapter and no weights starts a new one: so rsLoRA, and ranks by
    layer, are a file away.

    Raises:
        ValueError: an adapter to go on with that stood beside other weights than the folder `base` has, or
            beside another format of them.
    """
    adapter = chosen_adapter(flags)
    if adapter is None:
        return model
    if flags.lora_from and (flags.lora_from / WEIGHTS).exists():
        check_origin(flags.lora_from, base, nf4=flags.lora_nf4)
        return load_adapter(model, flags.lora_from)
    return add_adapter(model, adapter, seed=seed)


def load_policy(folder: str | Path, flags: LoRA, *, seed: int, from_scratch: bool = False) -> Llama:
    """A language model's folder with the adapter of the flags, or random weights of its configuration.

    Args:
        seed: of the adapter's lora_A, or of the random weights.

    Raises:
        ValueError: `from_scratch` with an adapter, which would leave the random weights frozen.
    """
    if not from_scratch:
        return adapt(load_model(folder, four_bits=nf4_layers(flags)), flags, seed=seed, base=folder)
    if chosen_adapter(flags):
        raise ValueError("from_scratch trains all weights: lora_rank and lora_from must not be given")
    return random_model(folder, seed=seed)


def load_reference(folder: str | Path | None, start: str | Path, flags: LoRA, *, seed: int) -> Llama:
    """The frozen model that a policy is held to: a folder's, or the very one that the policy starts as."""
    model = load_policy(start, flags, seed=seed) if folder is None else load_model(folder)
    return model.requires_grad_(False)


def save_policy(
    model: Llama, weights: dict[str, Tensor], folder: Path, *, base: Path, stop_ids: tuple[int, ...]
) -> str:
    """Write a trained language model: the plain one, and its adapter in folder/adapter where it has one.

    Returns:
        A certificate for a line of print: how far the logits of what is read again are from what was trained.
    """
    plain = plain_weights(model, weights, folder, base=base)
    save_model(model.config, plain, folder, stop_ids=stop_ids)
    with torch.device("meta"):
        trained = Llama(model.config)
    trained.load_state_dict(plain, strict=False, assign=True)  # a tied head is told once, as the embedding
    if model.config.tie_word_embeddings:
        trained.lm_head.weight = trained.model.embed_tokens.weight
    trained.words = words(folder, model.config)
    logits = read_again(trained, folder)
    del plain, trained  # before the base is read
    return f" (read again: the same logits{held_beside(model, logits, folder, base=base)})"


def save_scores(
    model: ScoreModel | ActorCritic,
    weights: dict[str, Tensor],
    folder: Path,
    *,
    base: Path,
    stop_ids: tuple[int, ...],
    labels: Sequence[str],
) -> str:
    """Write a trained score model as `save_policy` does a language model; its certificate.

    Args:
        labels: what each score is.
    """
    plain = plain_weights(model, weights, folder, base=base)
    save_score_model(model.config, plain, folder, stop_ids=stop_ids, labels=labels)
    with torch.device("meta"):
        trained = ScoreModel(model.config, len(labels))
    trained.load_state_dict(plain, assign=True)
    scores = read_again(trained, folder, scores=len(labels))
    del plain, trained
    return (
        f" (read again: the same scores{held_beside(model, scores, folder, base=base, scores=len(labels))})"
    )


@torch.no_grad()
def read_again(trained: Llama | ScoreModel, folder: Path, *, scores: int = 0) -> Tensor:
    """What the model of a folder says, read again, which must be what the weights say that were written.

    Its weights stay in the mapped file, so there is no second copy of them in memory.

    Args:
        trained: the plain model of the weights that were to be written.
        scores: how many it has; 0: a language model.

    Returns:
        Logits, or scores, of some tokens.

    Raises:
        ValueError: they are others.
    """
    ids = known_ids(folder)
    wanted = trained(ids)
    found = load_either(folder, scores, dtype=next(trained.parameters()).dtype)(ids)
    if not torch.equal(found, wanted):
        what = "scores" if scores else "logits"
        raise ValueError(f"{folder}: read again, its {what} are {(found - wanted).abs().max():.2g} away")
    return found


def held_beside(model: nn.Module, said: Tensor, folder: Path, *, base: Path, scores: int = 0) -> str:
    """How far base and adapter are from what the merged model of the folder says; "" without an adapter.

    A base whose folder has another dtype is cast, whole, in memory.

    Raises:
        ValueError: further away than rounding.
    """
    adapter, most = adapter_of(model), float(said.abs().max())
    if adapter is None:
        return ""
    quantised = any(isinstance(module, NF4Linear) for module in model.modules())
    four_bits = adapter.targets if quantised else ()
    dtype = next(model.parameters()).dtype
    found = beside(folder / "adapter", base, scores=scores, four_bits=four_bits, dtype=dtype)
    away = float((found - said).abs().max())
    if not away <= HALF * most:
        raise ValueError(
            f"{folder}: base and adapter are {away:.2g} away from the merged model, of {most:.2g}"
        )
    return f"; base and adapter {away:.1g} away, of {most:.2g}"


def plain_weights(
    model: nn.Module, weights: dict[str, Tensor], folder: Path, *, base: Path
) -> dict[str, Tensor]:
    """The weights of the plain model that a trained one stands for; its adapter goes to folder/adapter.

    Args:
        model: as trained, with an adapter or without.
        weights: its full state dict (`checkpoint.full_state` gathers it from all ranks).
        base: the folder that it started from, named in the adapter's file.
    """
    if adapter_of(model):
        save_adapter(model, weights, folder / "adapter", base=base)
    return merged_state(model, weights)


def what_trains(model: nn.Module) -> str:
    """How much of a model trains, for a line of print; nothing to say where all of it does."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f", {trained:,} numbers train beside frozen weights" if adapter_of(model) else ""
