"""An adapter's files as peft has them: adapter_config.json and adapter_model.safetensors.

    model = add_adapter(load_model(folder), adapter, seed=0)     (`lora_model.py`)
    save_adapter(model, full_state(model), out, base=folder)
    load_adapter(load_model(folder), out)                        the same policy again

A score model's head is part of its adapter, as peft has it for sequence classification.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nanopost.models.config import read_json
from nanopost.models.header import Entry, check_entries, read_header
from nanopost.models.lora_model import TARGETS, Adapter, M, adapter_of, add_adapter, layers_of, rank_and_alpha
from nanopost.models.nf4 import NF4Linear
from nanopost.models.weights import weights_id, write_safetensors

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
HEAD = "score.weight"
NEUTRAL = {  # keys of peft that say nothing here, whatever they are
    "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "qalora_group_size", "auto_mapping",
}  # fmt: skip
ONLY = {  # keys with few values that are read, the first ours
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "SEQ_CLS"),
    "bias": ("none",),
    "modules_to_save": (None, ["score"], ["classifier", "score"]),  # peft names both; a decoder has the last
    "use_rslora": (False, True),
    "init_lora_weights": (True, False, "gaussian"),  # pissa, olora, loftq, … change the base as well
}
READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern"}


def save_adapter(
    model: nn.Module, state: Mapping[str, Tensor], folder: str | Path, *, base: str | Path
) -> None:
    """Write a model's adapter as peft does.

    Args:
        model: it must have one.
        state: its full state dict; only lora_A, lora_B and a score head are written.
        folder: made if it is not there.
        base: the folder of the model that it belongs to; the file has its path and its `weights_id`.

    Raises:
        ValueError: the model has no adapter.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError(f"{folder}: the model has no adapter to write")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trained = {f"{name}.weight": x for name, x in state.items() if name.endswith((".lora_A", ".lora_B"))}
    trained |= {HEAD: state[HEAD]} if HEAD in state else {}
    tensors = {f"{PREFIX}{name}": x.detach().contiguous() for name, x in trained.items()}
    nf4 = any(isinstance(module, NF4Linear) for module in model.modules())
    write_safetensors(tensors, folder / WEIGHTS, metadata={"base": weights_id(base), "nf4": str(nf4)})
    raw = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if HEAD in state else "CAUSAL_LM",
        "bias": "none",
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
        "modules_to_save": ["score"] if HEAD in state else None,
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
    for name, values in ONLY.items():
        if raw.get(name, values[0]) not in (*values, None):
            told = " or ".join(repr(value) for value in values)
            raise ValueError(f"{path}: {name} is {raw[name]!r}; nanopost reads {told} only")
    for name in sorted(raw.keys() - ONLY.keys() - NEUTRAL - READ):
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
            targets=tuple(
                sorted({target.split(".")[-1] for target in targets})
            ),  # a layer that has none is told
            rank_stabilised=raw.get("use_rslora") or False,
            dropout=float(raw.get("lora_dropout", 0.0)),
            ranks=raw.get("rank_pattern") or {},
            alphas=raw.get("alpha_pattern") or {},
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def origin(folder: str | Path) -> dict[str, str]:
    """What an adapter stood beside: `base`, a `weights_id`, and `nf4`, "True" or not; peft tells neither."""
    with safe_open(Path(folder) / WEIGHTS, framework="pt") as file:
        return file.metadata() or {}


def check_origin(folder: str | Path, base: str | Path, *, nf4: bool) -> None:
    """Refuse an adapter that belongs beside another model; one that does not say what it is from is taken.

    Raises:
        ValueError: it stood beside other weights than those of `base`, or beside them in another format.
    """
    told = origin(folder)
    if told.get("base", known := weights_id(base)) != known:
        raise ValueError(f"{folder} belongs beside the weights {told['base']}, {base} has {known}")
    if told.get("nf4", str(nf4)) != str(nf4):
        beside = "in four bits" if told["nf4"] == "True" else "as they are, not in four bits"
        raise ValueError(f"{folder} belongs beside weights {beside}")


def check_factors(folder: str | Path, model: nn.Module | None = None) -> Adapter:
    """What an adapter is whose file has the factors of its layers, each of its shape; no number is read.

    Args:
        folder: of the adapter.
        model: whose layers it must fit; None: any, as long as factors are in pairs.

    Raises:
        ValueError: naming file and tensor: one that is missing, unknown or of another shape.
    """
    adapter, path = read_adapter(folder), Path(folder) / WEIGHTS
    entries, wanted = read_header(path), dict[str, tuple[int, ...]]()
    sizes = layers_told(entries, adapter) if model is None else layer_sizes(model, adapter)
    if not sizes:
        raise ValueError(f"{path}: no tensor is a factor of {', '.join(adapter.targets)}")
    for name, (rows, columns) in sizes.items():
        rank = rank_and_alpha(adapter, name)[0]
        wanted[f"{PREFIX}{name}.lora_A.weight"] = rank, columns
        wanted[f"{PREFIX}{name}.lora_B.weight"] = rows, rank
    if (head := entries.get(PREFIX + HEAD)) and (model is None or hasattr(model, "score")):
        wanted[PREFIX + HEAD] = head.shape if model is None else tuple(model.score.weight.shape)  # type: ignore[union-attr, arg-type]
    check_entries(entries, wanted, path)
    return adapter


def layer_sizes(model: nn.Module, adapter: Adapter) -> dict[str, tuple[int, int]]:
    """(out, in) of a model's layers that an adapter names."""
    found = layers_of(model, adapter)
    return {name: (layer.out_features, layer.in_features) for name, layer in found.items()}


def layers_told(entries: Mapping[str, Entry], adapter: Adapter) -> dict[str, tuple[int, int]]:
    """The same as far as a file tells it: by the factors of layers that the adapter names."""
    found = dict[str, tuple[int, int]]()
    shapes = {name.removeprefix(PREFIX): entry.shape for name, entry in entries.items()}
    for name in (name.split(".lora_")[0] for name in shapes if ".lora_" in name):
        lora_B, lora_A = (shapes.get(f"{name}.lora_{x}.weight", (0, 0)) for x in "BA")
        if name.split(".")[-1] in adapter.targets:
            found[name] = lora_B[0] if lora_B else 0, lora_A[-1] if lora_A else 0
    return found


def read_factors(model: nn.Module, folder: str | Path) -> tuple[Adapter, dict[str, Tensor]]:
    """An adapter of a folder, and its tensors by the names that `add_adapter` gives them.

    Args:
        model: whose layers it must fit; it is not changed.

    Raises:
        ValueError: as `check_factors`.
    """
    adapter = check_factors(folder, model)
    tensors = {name.removeprefix(PREFIX): x for name, x in load_file(Path(folder) / WEIGHTS).items()}
    return adapter, {n if n == HEAD else n.removesuffix(".weight"): x for n, x in tensors.items()}


def load_adapter(model: M, folder: str | Path) -> M:
    """Give a model the adapter of a folder; it must not have one.

    Returns:
        The same model, frozen but for the adapter (`add_adapter`). A score head that the file has replaces
        its own.

    Raises:
        ValueError: as `read_factors`.
    """
    adapter, factors = read_factors(model, folder)
    named = dict(add_adapter(model, adapter, seed=0).named_parameters())
    with torch.no_grad():
        for name, tensor in factors.items():
            if named[name].is_meta:  # a score head, not read yet (`fill.py`): it is the adapter's
                named[name].read = lambda low, high, head=tensor: head[low:high]  # type: ignore[attr-defined]
            else:
                named[name].copy_(tensor)
    return model
