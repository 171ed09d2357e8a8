"""LoRA on a whole decoder, and its files as peft has them, adapter_config.json and adapter_model.safetensors.

    model = load_model(folder)
    add_adapter(model, Adapter(rank=16, alpha=32.0), seed=0)     all frozen but lora_A and lora_B
    save_adapter(adapter, full_state(model), out, base=folder)
    load_adapter(load_model(folder), out)                        the same policy again

What an adapter means is in `lora.py`. Reference: Hu et al. 2021; the files are those of huggingface/peft.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanopost.losses.checks import check_count, check_positive, check_unit
from nanopost.models.config import read_json
from nanopost.models.header import check_entries, read_header
from nanopost.models.llama import Llama
from nanopost.models.lora import LoRALinear, lora_weight

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"attention": ATTENTION, "all": (*ATTENTION, "gate_proj", "up_proj", "down_proj")}
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
NEUTRAL = {  # keys of peft that say nothing here, whatever they are
    "peft_version", "base_model_name_or_path", "revision", "inference_mode", "init_lora_weights",
    "megatron_core", "qalora_group_size", "auto_mapping", "loftq_config",
}  # fmt: skip
ONLY = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}  # keys with one value that is read


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


def layers_of(model: nn.Module, adapter: Adapter) -> dict[str, nn.Linear]:
    """The layers that an adapter names, by their full names.

    Raises:
        ValueError: naming a target that no layer has, or an expression that matches none of its layers.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: module for name, module in linear.items() if name.split(".")[-1] in adapter.targets}
    if missing := set(adapter.targets) - {name.split(".")[-1] for name in found}:
        raise ValueError(f"targets: no layer is called {sorted(missing)[0]!r}")
    for pattern in (*adapter.ranks, *adapter.alphas):
        if not any(_matches(pattern, name) for name in found):
            raise ValueError(f"the pattern {pattern} matches none of the adapter's layers")
    return found


def add_adapter(model: Llama, adapter: Adapter, *, seed: int) -> Llama:
    """Freeze a model and give the layers that an adapter names their factors.

    lora_B is 0, so the model says what it said. Each lora_A has a generator of its own, seeded by seed and
    name: it does not depend on which other layers there are.

    Returns:
        The same model; those layers are `LoRALinear` now.

    Raises:
        ValueError: as `layers_of`.
    """
    model.requires_grad_(False)
    for name, layer in layers_of(model, adapter).items():
        digest = sha256(f"{seed} {name}".encode()).digest()
        rank, alpha = _size(adapter, name)
        added = LoRALinear(
            layer,
            rank=rank,
            alpha=alpha,
            rank_stabilised=adapter.rank_stabilised,
            generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")),
        )
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, added)
    return model


def merged_state(state: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The state dict of a model with its adapter merged in: names and shapes are the bare model's again."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, last = name.rpartition(".base.")
        if not layer:
            found |= {} if name.endswith((".lora_A", ".lora_B")) else {name: tensor}
        elif last == "weight":
            lora_A, lora_B = (state[f"{layer}.lora_{x}"] for x in "AB")
            alpha = _size(adapter, layer)[1]
            stable = adapter.rank_stabilised
            found[f"{layer}.weight"] = lora_weight(
                tensor, lora_A, lora_B, alpha=alpha, rank_stabilised=stable
            )
        else:
            found[f"{layer}.{last}"] = tensor
    return found


def save_adapter(
    adapter: Adapter, state: Mapping[str, Tensor], folder: str | Path, *, base: str | Path
) -> None:
    """Write an adapter as peft does.

    Args:
        adapter: what it is.
        state: the model's full state dict; only lora_A and lora_B are written.
        folder: made if it is not there.
        base: the folder of the model that it belongs to, for the file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    factors = {name: x.contiguous() for name, x in state.items() if name.endswith((".lora_A", ".lora_B"))}
    save_file(
        {f"{PREFIX}{k}.weight": x for k, x in factors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )
    raw = {
        **ONLY,
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilised,
        "target_modules": list(adapter.targets),
        "rank_pattern": dict(adapter.ranks),
        "alpha_pattern": dict(adapter.alphas),
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    (folder / CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def read_adapter(folder: str | Path) -> Adapter:
    """What `adapter_config.json` says, ours or peft's.

    Raises:
        ValueError: another kind of adapter, a target given as an expression, a field that is not read here
            and not at peft's default: by name.
    """
    path = Path(folder) / CONFIG
    raw = read_json(path)
    for name, value in ONLY.items():
        if raw.get(name, value) not in (value, None):
            raise ValueError(f"{path}: {name} is {raw[name]!r}; nanopost reads {value!r} only")
    read = {
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "rank_pattern",
        "alpha_pattern",
    }
    for name in sorted(raw.keys() - ONLY.keys() - NEUTRAL - read):
        if raw[name] not in (None, False, {}, []):
            raise ValueError(f"{path}: {name} is {raw[name]!r}, which nanopost does not know how to follow")
    targets = raw.get("target_modules")
    if targets == "all-linear":
        targets = TARGETS["all"]
    if not isinstance(targets, list | tuple) or not all(isinstance(target, str) for target in targets):
        raise ValueError(
            f"{path}: target_modules is {targets!r}; nanopost reads a list of names, or all-linear"
        )
    try:
        return Adapter(
            rank=raw.get("r", 8),
            alpha=float(raw.get("lora_alpha", 8)),
            targets=tuple(sorted(targets)),
            rank_stabilised=bool(raw.get("use_rslora", False)),
            dropout=float(raw.get("lora_dropout", 0.0)),
            ranks=raw.get("rank_pattern") or {},
            alphas=raw.get("alpha_pattern") or {},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def load_adapter(model: Llama, folder: str | Path) -> Adapter:
    """Give a model the adapter of a folder; it must not have one.

    Returns: what the adapter is, for `save_adapter` and `merged_state`.
    Raises: ValueError that names file and tensor: one that is missing, unknown or of another shape.
    """
    adapter, path = read_adapter(folder), Path(folder) / WEIGHTS
    entries = read_header(path)
    wanted = {f"{PREFIX}{name}.weight": shape for name, shape in _factors(model, adapter)}
    check_entries(entries, wanted, path)
    add_adapter(model, adapter, seed=0)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in load_file(path).items():
            named[name.removeprefix(PREFIX).removesuffix(".weight")].copy_(tensor)
    return adapter


def _factors(model: Llama, adapter: Adapter) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of an adapter's factors."""
    for name, layer in layers_of(model, adapter).items():
        rank = _size(adapter, name)[0]
        yield f"{name}.lora_A", (rank, layer.in_features)
        yield f"{name}.lora_B", (layer.out_features, rank)


def _size(adapter: Adapter, name: str) -> tuple[int, float]:
    """Rank and α of a layer: those of the first expression that matches its name, else the adapter's."""
    ranks = (rank for pattern, rank in adapter.ranks.items() if _matches(pattern, name))
    alphas = (alpha for pattern, alpha in adapter.alphas.items() if _matches(pattern, name))
    return next(ranks, adapter.rank), next(alphas, adapter.alpha)


def _matches(pattern: str, name: str) -> bool:
    """As peft: the whole name, or its end behind a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
