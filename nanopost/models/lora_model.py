"""LoRA on a whole decoder: which layers have factors, what trains, and the plain weights it stands for.

    model = add_adapter(load_model(folder), Adapter(rank=16, alpha=32.0), seed=0)
    merged_state(full_state(model), model.adapter)               the bare model's names and shapes again

What an adapter means for one layer is in `lora.py`, its files in `peft.py`. Reference: Hu et al. 2021.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nanopost.losses.checks import check_count, check_positive, check_unit
from nanopost.models.lora import LoRALinear, lora_weight
from nanopost.models.nf4 import NF4Linear

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {"attention": ATTENTION, "mlp": MLP, "all": (*ATTENTION, *MLP)}
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Adapter:
    """What an adapter is: the factors' size and scale, and the layers that have them."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS["all"]  # last names of layers
    rank_stabilised: bool = False  # α/√r in the place of α/r
    dropout: float = 0.0  # kept for the file; `add_adapter`'s layers drop nothing
    ranks: Mapping[str, int] = field(default_factory=dict)  # regular expression of names to another rank
    alphas: Mapping[str, float] = field(default_factory=dict)  # and to another α

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.ranks.values()):
            check_count("rank", rank, 1)
        for alpha in (self.alpha, *self.alphas.values()):
            check_positive("alpha", alpha)
        check_unit("dropout", self.dropout)
        for pattern in (*self.ranks, *self.alphas):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern} is no regular expression: {error}") from error
        if not self.targets:
            raise ValueError("targets names no layer: nothing would train")
        if "lm_head" in self.targets:
            raise ValueError("targets: lm_head has no adapter here, the head's kernels read its weight")


def layers_of(model: nn.Module, adapter: Adapter) -> dict[str, Any]:
    """The layers that an adapter names, by their full names.

    Raises:
        ValueError: naming a target that no layer has, or an expression that matches none of its layers.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and name.split(".")[-1] in adapter.targets
    }
    if missing := set(adapter.targets) - {name.split(".")[-1] for name in found}:
        raise ValueError(f"targets: no layer is called {sorted(missing)[0]!r}")
    for pattern in (*adapter.ranks, *adapter.alphas):
        if not any(matches(pattern, name) for name in found):
            raise ValueError(f"the pattern {pattern} matches none of the adapter's layers")
    return found


def add_adapter(model: M, adapter: Adapter, *, seed: int) -> M:
    """Freeze a model and give the layers that an adapter names their factors.

    lora_B is 0, so the model says what it said. Each lora_A has a generator of its own, seeded by seed and
    name: it does not depend on which other layers there are. A score head (`heads.py`) trains whole: it has
    nothing to be frozen at.

    Returns:
        The same model; those layers are `LoRALinear` now, and `adapter_of` tells the adapter.

    Raises:
        ValueError: as `layers_of`; the model has an adapter.
    """
    if adapter_of(model):
        raise ValueError("the model has an adapter: merge it first, or load the base")
    model.requires_grad_(False)
    for name, layer in layers_of(model, adapter).items():
        digest = sha256(f"{seed} {name}".encode()).digest()
        rank, alpha = rank_and_alpha(adapter, name)
        added = LoRALinear(
            layer,
            rank=rank,
            alpha=alpha,
            rank_stabilised=adapter.rank_stabilised,
            generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")),
        )
        model.set_submodule(name, added)
    if (head := getattr(model, "score", None)) is not None:
        head.requires_grad_(True)
    model.adapter = adapter  # type: ignore[assignment]
    return model


def adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter that `add_adapter` gave a model, or None."""
    return getattr(model, "adapter", None)


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The full state of a model with its adapter merged in: names and shapes are the bare model's again.

    Args:
        model: with or without an adapter; what stands in four bits is told as the numbers it stands for.
        state: its state dict (`checkpoint.full_state` gathers it from all ranks).
    """
    adapter = adapter_of(model)
    if adapter is None:
        return dict(state)
    quantised = {name: x for name, x in model.named_modules() if isinstance(x, NF4Linear)}
    found: dict[str, Tensor] = {}
    for name, tensor in (*state.items(), *((f"{name}.weight", x.weight) for name, x in quantised.items())):
        layer, _, last = name.rpartition(".base.")
        if not layer:
            found |= {} if name.endswith((".lora_A", ".lora_B")) else {name: tensor}
        elif last == "weight":
            factors = state[f"{layer}.lora_A"], state[f"{layer}.lora_B"]
            alpha, stable = rank_and_alpha(adapter, layer)[1], adapter.rank_stabilised
            merged = lora_weight(tensor.to(factors[0].device), *factors, alpha=alpha, rank_stabilised=stable)
            found[f"{layer}.weight"] = merged
        else:
            found[f"{layer}.{last}"] = tensor
    return found


def rank_and_alpha(adapter: Adapter, name: str) -> tuple[int, float]:
    """Rank and α of a layer: those of the first expression that matches its name, else the adapter's."""
    ranks = (rank for pattern, rank in adapter.ranks.items() if matches(pattern, name))
    alphas = (alpha for pattern, alpha in adapter.alphas.items() if matches(pattern, name))
    return next(ranks, adapter.rank), next(alphas, adapter.alpha)


def matches(pattern: str, name: str) -> bool:
    """As peft: the whole name, or its end behind a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
