"""A tensor that lies in parts on several ranks, written and read in parts: none holds the whole.

Each rank writes one safetensors file of its own parts, with their places in the file's header. A reader takes
from all files what covers its own part, whatever number of ranks wrote them.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, Replicate, Shard

from nanopost.atomic import named

Place = tuple[tuple[int, int], ...]  # first and one past the last, a dimension each
Index = dict[str, list[tuple[Path, Place]]]  # where the parts of a tensor lie


def place_of(tensor: torch.Tensor) -> tuple[Place, bool]:
    """Which part of a whole tensor this rank holds, and whether it is the one to write it down.

    Args:
        tensor: a DTensor, replicated or cut along its first dimension as FSDP2 does it (like torch.chunk: the
            last parts are smaller, or empty), or a plain tensor, the same on every rank.
    Returns:
        The place, and whether no other rank before this one holds the same.
    Raises:
        ValueError: it is cut along another dimension.
    """
    ends = [(0, size) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return tuple(ends), not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    first, mesh = True, tensor.device_mesh
    for dim, placement in enumerate(tensor.placements):
        here = mesh.get_local_rank(dim)
        if isinstance(placement, Replicate):
            first = first and here == 0
            continue
        if not isinstance(placement, Shard) or placement.dim != 0:
            raise ValueError(f"tensor: expected parts along the first dimension, got {placement}")
        low, high = ends[0]
        size = -(-(high - low) // mesh.size(dim))
        ends[0] = (min(low + here * size, high), min(low + (here + 1) * size, high))
    return tuple(ends), first


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's own part, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def write_part(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write this rank's parts to a file of its own; what another rank writes, and what is empty, is left out.

    Args:
        path: the file.
        tensors: by name, sharded or not.
    Raises:
        OSError: it cannot be written.
    """
    parts, places = dict[str, torch.Tensor](), dict[str, Place]()
    for name, tensor in tensors.items():
        place, mine = place_of(tensor)
        if mine and all(low < high for low, high in place):
            parts[name], places[name] = local(tensor).detach().cpu().contiguous(), place
    with named(path):
        save_file(parts, path, metadata={"places": json.dumps(places)})


def read_index(paths: Iterable[Path]) -> Index:
    """Where the parts of every tensor lie, from the headers of all ranks' files."""
    index: Index = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()["places"])
        for name, place in places.items():
            index.setdefault(name, []).append((path, tuple((low, high) for low, high in place)))
    return index


def whole_shape(index: Index, name: str) -> list[int]:
    """The shape of the whole tensor."""
    places = [place for _, place in index[name]]
    return [max(high for _, high in ends) for ends in zip(*places, strict=True)]


def read_part(index: Index, name: str, place: Place) -> torch.Tensor:
    """The part of a tensor at a place, put together from what the files hold of it; nothing else is read.

    Args:
        index: from `read_index`.
        name: one of its tensors.
        place: of the part in the whole.
    Returns:
        The part on the CPU.
    Raises:
        ValueError: the files do not hold all of it.
    """
    (low, high), *_ = place or ((0, 1),)  # a number without dimensions is in one file
    rows = [(part[0] if part else (0, 1), path) for path, part in index[name]]
    cuts = [(max(low, start), min(high, end), start, path) for (start, end), path in sorted(rows)]
    parts = []
    for first, last, start, path in [cut for cut in cuts if cut[0] < cut[1]] or [(0, 0, 0, rows[0][1])]:
        with safe_open(path, framework="pt") as file:
            parts.append(
                file.get_slice(name)[first - start : last - start] if place else file.get_tensor(name)
            )
    found = torch.cat(parts) if place else parts[0]
    if list(found.shape) != [end - start for start, end in place]:
        raise ValueError(f"{name}: the files hold {list(found.shape)} of the part {place}")
    return found
