"""A hub-format folder in and out: `config.json` and `model.safetensors` (or shards with their index).

Because the module names of `llama.py` are the hub's tensor names, reading is `load_state_dict` and writing
is `state_dict`; what stands here is the checking: a folder we cannot read exactly is refused by name, never
read approximately. `python -m nanopost.models.weights check DIR` says what a folder is (`describe.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nanopost.atomic import named, sha256
from nanopost.models.config import LlamaConfig, load_config, read_json, write_config
from nanopost.models.fill import EMBEDDING, TIED, draw_later, fill, several_ranks
from nanopost.models.header import shard_files
from nanopost.models.llama import Llama


def content_id(paths: Iterable[Path]) -> str:
    """The name of files by their content: 64 hex digits, a SHA-256 over the SHA-256 of each."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def weights_id(folder: str | Path) -> str:
    """The name of a hub folder's model by its content, weights and the numbers of its config: 32 digits."""
    numbers = json.dumps(asdict(load_config(folder)), sort_keys=True)
    return hashlib.sha256((content_id(shard_files(Path(folder))) + numbers).encode()).hexdigest()[:32]


def load_model(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    four_bits: Collection[str] = (),
    whole: bool = False,
) -> Llama:
    """Read a folder of one of the families into a `Llama`, cast to `dtype`.

    On several ranks its parameters have no numbers before it is sharded (`fill.py`), unless `whole`.

    Args:
        four_bits: last names of layers whose weights are kept in NF4, frozen (`nf4.py`).
        whole: as for `fill`.

    Raises:
        ValueError: what `load_config`, `read_headers`, `fill` and `words` refuse.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model = Llama(config)
    tied = config.tie_word_embeddings
    model = fill(model, folder, dtype=dtype, tied=tied, four_bits=four_bits, whole=whole)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.words = words(folder, config)
    return model


def words(folder: str | Path, config: LlamaConfig) -> int:
    """How many of a vocabulary's rows are tokens of the folder's tokenizer; those behind them are padding.

    Raises:
        ValueError: a tokenizer with more tokens than the embedding has rows.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return config.vocab_size
    raw = read_json(path)
    try:
        vocabulary = raw["model"]["vocab"]
        own = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        count = 1 + max([*own, *(token["id"] for token in raw.get("added_tokens") or [])])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no vocabulary with ids ({type(error).__name__}: {error})") from error
    if count > config.vocab_size:
        raise ValueError(f"{path} has {count} tokens, the embedding {config.vocab_size} rows")
    return count


@torch.no_grad()
def random_model(folder: str | Path, *, seed: int, dtype: torch.dtype = torch.float32) -> Llama:
    """A `Llama` of the folder's `config.json` with seeded random weights; on several ranks, see `fill.py`.

    Embeddings N(0, 0.02²); other matrices N(0, 1/fan-in), so that narrow models start as lively as wide
    ones; the projections into the residual stream divided by √(2 · layers) (Radford et al. 2019, §2.3);
    norms 1, biases 0.
    """
    config = load_config(folder)
    with torch.device("meta" if several_ranks() else "cpu"):
        model = Llama(config).to(dtype)
    shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]

    generator = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype)
        std = 0.02 if name == EMBEDDING else shape[1] ** -0.5
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * config.num_hidden_layers)
        return torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=generator)

    tensors = (drawn(*each) for each in shapes)  # in this order, and none is kept while the next is made

    if several_ranks():
        draw_later(model, tensors)
    else:
        for parameter, tensor in zip(model.parameters(), tensors, strict=True):
            parameter.copy_(tensor)
    model.words = words(folder, config)
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
        text = json.dumps({"eos_token_id": list(stop_ids)}, indent=2) + "\n"
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
    write_tensors(tensors, folder, max_shard_bytes=max_shard_bytes)


def write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file, which whoever may read its folder's other files may read too.

    The library makes it the owner's alone (0600): a server under another name could not open it.
    """
    with named(path):
        save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    os.umask(mask := os.umask(0))  # there is no way to ask for it without setting it
    path.chmod(0o666 & ~mask)


def write_tensors(tensors: dict[str, Tensor], folder: Path, *, max_shard_bytes: int = 4 << 30) -> None:
    """Write `model.safetensors`, or above `max_shard_bytes` several files and their index."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(shards[0], folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(shard, folder / name)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from nanopost.models.describe import main

    main()
