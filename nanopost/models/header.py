"""The header of a safetensors file, checked before any of its numbers is read.

    8 bytes, little-endian: n · n bytes: {NAME: {"dtype", "shape", "data_offsets": [begin, end]}, …} · numbers

A file from somewhere else is input like any other. It is refused, by the name of the tensor, where the header
is no such object, a name has a strange character, a size is not that of its shape, tensors overlap or leave a
gap, or the file ends elsewhere. Reference: the format's own description (huggingface/safetensors, README).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanopost.models.config import read_json

SIZES = {  # bytes a number; the dtypes that weights of a decoder have
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
}  # fmt: skip
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,255}")
LONGEST, MOST = 100_000_000, 1_000_000  # bytes of a header (the format's own limit), tensors of a file


@dataclass(frozen=True)
class Entry:
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # bytes from the end of the header
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Raises:
        ValueError: naming the file, and the tensor where it is one's fault.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size - 8 - length
            if not 2 <= length <= LONGEST or size < 0:
                raise ValueError(
                    f"no safetensors file: its header would have {length} bytes of {8 + length + size}"
                )
            raw = json.loads(file.read(length).decode(), object_pairs_hook=_once)
        return _entries(raw, size)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


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


def read_headers(folder: str | Path) -> dict[str, Entry]:
    """What the headers of a folder's files say, no number read.

    Raises:
        ValueError: what `read_header` refuses; a tensor in two files, or not where the index has it.
    """
    folder, entries = Path(folder), dict[str, Entry]()
    files, index = shard_files(folder), folder / "model.safetensors.index.json"
    places = {} if files == [folder / "model.safetensors"] else read_json(index)["weight_map"]
    for path in files:
        found = read_header(path)
        if twice := sorted(set(found) & set(entries)):
            raise ValueError(f"{path}: {twice[0]} stands in another shard too")
        if places and (strange := sorted(name for name in found if places.get(name) != path.name)):
            raise ValueError(f"{path}: {strange[0]} is not where {index.name} has it")
        entries |= found
    if places and (gone := sorted(set(places) - set(entries))):
        raise ValueError(f"{index}: {gone[0]} is in no shard")
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are different ones."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"{next(name for name in names if names.count(name) > 1)!r} stands in the header twice"
        )
    return found


def _entries(raw: Any, size: int) -> dict[str, Entry]:
    """The checked entries of a header whose file has `size` bytes of numbers."""
    if not isinstance(raw, dict):
        raise ValueError(f"the header is a {type(raw).__name__}, not an object")
    told = raw.pop("__metadata__", {})
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise ValueError("__metadata__ is no object of texts")
    if len(raw) > MOST:
        raise ValueError(f"{len(raw)} tensors, more than {MOST}")
    entries = {name: _entry(name, said) for name, said in raw.items()}
    reached = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            kind = "overlaps what stands before it" if entry.begin < reached else "leaves a gap before it"
            raise ValueError(f"{name} begins at byte {entry.begin}, not {reached}: it {kind}")
        if entry.end > size:
            raise ValueError(
                f"{name} ends at byte {entry.end}, the file has {size} for its tensors: it is cut"
            )
        reached = entry.end
    if reached != size:
        raise ValueError(f"the file has {size - reached} bytes behind its last tensor")
    return entries


def _entry(name: str, said: Any) -> Entry:
    """One entry; whatever is wrong with it names the tensor."""
    if not NAME.fullmatch(name):
        raise ValueError(f"the tensor name {name[:80]!r} has characters that no weight has, or too many")
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} must say dtype, shape and data_offsets and no more")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"{name} has dtype {dtype!r}; nanopost reads {', '.join(SIZES)}")
    for key, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name} has {key} {str(numbers)[:80]}, no list of whole numbers")
    if len(shape) > 8:
        raise ValueError(f"{name} has {len(shape)} dimensions, more than 8")
    needed = math.prod(shape) * SIZES[dtype]
    if len(offsets) != 2 or offsets[1] - offsets[0] != needed:
        raise ValueError(f"{name} has data_offsets {offsets}: {shape} of {dtype} takes {needed} bytes")
    return Entry(DTYPES[dtype], tuple(shape), *offsets)


def check_entries(
    entries: Mapping[str, Entry], wanted: Mapping[str, tuple[int, ...]], folder: str | Path
) -> None:
    """Refuse a folder whose tensors are not exactly those of the config, each of its shape.

    Raises:
        ValueError: naming the folder and a tensor that is missing, unknown or of another shape.
    """
    if missing := sorted(set(wanted) - set(entries)):
        raise ValueError(f"{folder}: missing tensor {missing[0]} ({len(missing)} in all)")
    if unknown := sorted(set(entries) - set(wanted)):
        raise ValueError(f"{folder}: unknown tensor {unknown[0]} ({len(unknown)} in all)")
    for name, entry in entries.items():
        if entry.shape != wanted[name]:
            raise ValueError(f"{folder}: {name} has shape {entry.shape}, config.json says {wanted[name]}")
