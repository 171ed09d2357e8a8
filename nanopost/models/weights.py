"""A hub-format folder in and out: `config.json` and `model.safetensors` (or shards with their index).

Because the module names of `llama.py` are the hub's tensor names, reading is `load_state_dict` and writing
is `state_dict`; what stands here is the checking: a folder we cannot read exactly is refused by name, never
read approximately.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanopost.models.llama import Llama, LlamaConfig

REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
TIED = "lm_head.weight"
M = TypeVar("M", bound=nn.Module)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file; errors name the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def load_config(folder: str | Path) -> LlamaConfig:
    """Read `config.json` of a Llama-family folder.

    Raises:
        ValueError: another architecture, activation, rope scaling or bias than Llama's plain ones, or a
            missing key: by name.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = raw.get("rope_theta", rope.get("rope_theta", 10000.0))
    must = {
        "model_type": (raw.get("model_type"), "llama"),
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "attention_bias": (raw.get("attention_bias", False), False),
        "mlp_bias": (raw.get("mlp_bias", False), False),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1)), 1),
        "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    for name, (value, expected) in must.items():
        if value != expected:
            raise ValueError(f"{path}: {name} is {value!r}; nanopost reads {expected!r} only")
    if "rope_theta" in rope and rope["rope_theta"] != theta:
        raise ValueError(
            f"{path}: rope_theta is {theta} at the top and {rope['rope_theta']} in the rope parameters"
        )
    if missing := [key for key in REQUIRED if raw.get(key) is None]:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    heads = raw["num_attention_heads"]
    try:
        return LlamaConfig(
            **{key: raw[key] for key in REQUIRED},
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def write_config(
    config: LlamaConfig, folder: str | Path, *, dtype: torch.dtype, stop_ids: tuple[int, ...], **more: Any
) -> None:
    """Write `config.json` in both spellings: rope_theta, torch_dtype and rope_parameters, dtype.

    `more` are keys to add or to write otherwise, such as another model's `architectures`.
    """
    name = str(dtype).removeprefix("torch.")
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        **vars(config),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "eos_token_id": list(stop_ids) if len(stop_ids) != 1 else stop_ids[0],
        "torch_dtype": name,
        "dtype": name,
        **more,
    }
    (Path(folder) / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def shard_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the one, or those its index names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder}: neither {single.name} nor {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: no weight_map")
    names = sorted(set(weight_map.values()))
    if bad := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ValueError(f"{index}: a shard must be a file name in the same folder, got {bad[0]!r}")
    return [folder / name for name in names]


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files; an unreadable file or a name twice is refused."""
    tensors: dict[str, Tensor] = {}
    for path in shard_files(Path(folder)):
        try:
            shard = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: {error}") from error
        if twice := sorted(set(shard) & set(tensors)):
            raise ValueError(f"{path}: {twice[0]} stands in another shard too")
        tensors |= shard
    return tensors


def fill(model: M, tensors: dict[str, Tensor], folder: str | Path, *, dtype: torch.dtype) -> M:
    """Give a model on the meta device exactly the tensors it names, cast to `dtype`.

    Raises:
        ValueError: naming the folder and a tensor that is missing, unknown or of another shape.
    """
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(tensors)):
        raise ValueError(f"{folder}: missing tensor {missing[0]} ({len(missing)} in all)")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise ValueError(f"{folder}: unknown tensor {unknown[0]} ({len(unknown)} in all)")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, config.json says {tuple(wanted[name].shape)}"
            raise ValueError(f"{folder}: {name} has shape {shapes}")
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(True)


def load_model(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, tensors: dict[str, Tensor] | None = None
) -> Llama:
    """Read a Llama-family folder into a `Llama`, cast to `dtype`; `tensors`: what `read_tensors` gave.

    Raises:
        ValueError: an unreadable file, a tensor twice, missing, unknown or of another shape than the config
            says; tied embeddings with a head of its own in the file that differs.
    """
    config, tensors = load_config(folder), read_tensors(folder) if tensors is None else tensors
    embedding = tensors.get("model.embed_tokens.weight") if config.tie_word_embeddings else None
    if embedding is not None and not torch.equal(tensors.setdefault(TIED, embedding), embedding):
        raise ValueError(f"{folder}: config.json ties the head to the embedding, but {TIED} differs from it")
    with torch.device("meta"):
        model = Llama(config)
    model = fill(model, tensors, folder, dtype=dtype)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@torch.no_grad()
def random_model(folder: str | Path, *, seed: int, dtype: torch.dtype = torch.float32) -> Llama:
    """A `Llama` of the folder's `config.json` with seeded random weights.

    Embeddings N(0, 0.02²); other matrices N(0, 1/fan-in), so that narrow models start as lively as wide
    ones; the projections into the residual stream divided by √(2 · layers) (Radford et al. 2019, §2.3);
    norms 1.
    """
    config = load_config(folder)
    model, generator = Llama(config).to(dtype), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        std = 0.02 if name == "model.embed_tokens.weight" else parameter.shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_hidden_layers)
        parameter.normal_(0.0, std, generator=generator)
    return model


def save_model(
    config: LlamaConfig,
    tensors: dict[str, Tensor],
    folder: str | Path,
    *,
    stop_ids: tuple[int, ...],
    max_shard_bytes: int = 4 << 30,
) -> None:
    """Write `config.json`, the weights (a tied head once) and a `generation_config.json` where there is none.

    Args:
        config: of the model.
        tensors: its full state dict (`checkpoint.full_state` gathers it from all ranks).
        folder: may hold tokenizer files already; made if it is not there.
        stop_ids: the tokens that end a turn, for those who sample from the folder.
        max_shard_bytes: above it, several files and their index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if name != TIED}
    write_config(config, folder, dtype=next(iter(tensors.values())).dtype, stop_ids=stop_ids)
    if not (folder / "generation_config.json").exists():
        generation = {"eos_token_id": list(stop_ids)}
        (folder / "generation_config.json").write_text(
            json.dumps(generation, indent=2) + "\n", encoding="utf-8"
        )
    write_tensors(tensors, folder, max_shard_bytes=max_shard_bytes)


def write_tensors(tensors: dict[str, Tensor], folder: Path, *, max_shard_bytes: int = 4 << 30) -> None:
    """Write `model.safetensors`, or above `max_shard_bytes` several files and their index."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
