"""A hub-format folder in and out: `config.json` and `model.safetensors` (or shards with their index).

Because the module names of `llama.py` are the hub's tensor names, reading is `load_state_dict` and writing
is `state_dict`; what stands here is the checking: a folder we cannot read exactly is refused by name, never
read approximately.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanopost.models.config import LlamaConfig, load_config, read_json, write_config
from nanopost.models.llama import Llama

TIED = "lm_head.weight"
M = TypeVar("M", bound=nn.Module)


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
    norms 1, biases 0.
    """
    config = load_config(folder)
    model, generator = Llama(config).to(dtype), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
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
