"""How a model on the meta device, which has shapes and no numbers, gets those of a folder, or random ones.

On one process at once. On several ranks nothing is read until it is known which rows of a parameter a rank
holds: each parameter gets an attribute `read`, and `read(low, high)` are its rows low to high. Who shards the
model (`nanopost/fsdp.py`) calls it, parameter by parameter in their order: so no rank has more than its part
of the model, and the tensor in hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nanopost.models.header import check_entries, read_header, read_headers, shard_files
from nanopost.models.nf4 import NF4Linear

TIED, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
PART = 4096  # rows compared at a time
M = TypeVar("M", bound=nn.Module)
Rows = Callable[[int, int], Tensor]


def several_ranks() -> bool:
    """Whether this process is one of several, none of which shall hold a whole model."""
    return dist.is_initialized() and dist.get_world_size() > 1


def fill(
    model: M,
    folder: str | Path,
    *,
    dtype: torch.dtype,
    tied: bool = False,
    four_bits: Collection[str] = (),
    whole: bool = False,
) -> M:
    """Give a model on the meta device exactly the tensors of a folder, cast to `dtype`.

    The headers are checked before a number is read. Tensors are read one at a time: what is cast or quantised
    never stands in memory twice, but for the one in hand.

    Args:
        tied: the head is the embedding, and need not be in the file.
        four_bits: last names of layers that become `NF4Linear`. Every rank has all of their codes: FSDP cuts
            parameters, and codes are none. They take an eighth of the weights' memory.
        whole: where there are several ranks, read all of it on this one: it will not be sharded.

    Raises:
        ValueError: naming the file or folder, and the tensor that is missing, unknown or of another shape;
            `tied`, and a head of its own in the file that differs from the embedding.
    """
    entries, wanted = read_headers(folder), {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if tied and TIED not in entries:
        del wanted[TIED]
    check_entries(entries, wanted, folder)
    model.to(dtype)
    quantised = {name for name in entries if name.removesuffix(".weight").split(".")[-1] in four_bits}
    later = entries.keys() - quantised if several_ranks() and not whole else set()
    tensors, reads = dict[str, Tensor](), dict[str, Rows]()
    for path in shard_files(Path(folder)):
        for name, tensor in _read(path, dtype, entries.keys() - later):
            if name in quantised:
                layer = name.removesuffix(".weight")
                bias = model.get_submodule(layer).bias
                model.set_submodule(layer, NF4Linear(tensor, bias))  # type: ignore[arg-type]
            else:  # a view of the file would keep all of it mapped
                tensors[name] = tensor.clone() if four_bits else tensor
        reads |= {name: partial(_rows, path, name, dtype) for name in later & read_header(path).keys()}
    if tied and TIED in entries and not _alike(tensors, reads, wanted[TIED][0]):
        raise ValueError(
            f"{folder}: config.json ties the head to the embedding, but {TIED} differs from it: "
            "delete the tensor to keep the embedding, or set tie_word_embeddings to false to keep both"
        )
    for name, read in reads.items():
        model.get_parameter(name).read = read  # type: ignore[attr-defined]
    if not reads:
        tensors |= {TIED: tensors[EMBEDDING]} if tied else {}
        model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(True)


def draw_later(model: nn.Module, tensors: Iterator[Tensor]) -> None:
    """Give parameters numbers that can only be made one tensor after the other, as random ones are.

    Args:
        model: on the meta device.
        tensors: makes them, in the order of the parameters.
    """

    def read(low: int, high: int) -> Tensor:
        return next(tensors)[low:high].clone()

    for parameter in model.parameters():
        parameter.read = read  # type: ignore[attr-defined]


def _read(path: Path, dtype: torch.dtype, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file, one at a time: those of these names."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                if name in names:
                    yield name, file.get_tensor(name).to(dtype)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error


def _rows(path: Path, name: str, dtype: torch.dtype, low: int, high: int) -> Tensor:
    """Rows low to high of a tensor of a file; nothing else is read, and nothing stays mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_slice(name)[low:high].to(dtype, copy=True)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}") from error


def _alike(tensors: dict[str, Tensor], reads: dict[str, Rows], rows: int) -> bool:
    """Whether head and embedding are the same numbers; read a part at a time, neither is ever whole."""
    if tensors:
        return torch.equal(tensors[TIED], tensors[EMBEDDING])
    parts = ((low, min(low + PART, rows)) for low in range(0, rows, PART))
    return all(torch.equal(reads[TIED](*part), reads[EMBEDDING](*part)) for part in parts)
