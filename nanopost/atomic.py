"""Folders and files that are there whole or not at all, whatever ends the process that writes them."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Fill a folder out of sight, then put it in place with a rename.

    Args:
        path: where the folder shall stand; an older one there is replaced once the new one is on disk.
    Yields:
        A temporary sibling to write to. If the block raises, it is removed and the older folder stays as it
        was; after a power cut the leftovers are hidden siblings that the next call for this path cleans up.
    """
    path = Path(path)
    temporary = begin(path)
    try:
        with named(path):
            yield temporary
            finish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin(path: Path) -> Path:
    """An empty hidden sibling of a folder; what cuts have left of the folder is put right first."""
    temporary, old = hidden(path), path.with_name(f".{path.name}.old")
    for parent in reversed([path.parent, *path.parent.parents]):
        if not parent.exists():
            parent.mkdir()
            _fsync(parent.parent)
    if old.exists() and not path.exists():  # cut between the two renames of `finish`
        os.rename(old, path)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    return temporary


def finish(temporary: Path, path: Path) -> None:
    """Put a filled folder in place of an older one, once all of it is on disk."""
    old = path.with_name(f".{path.name}.old")
    for item in [*temporary.rglob("*"), temporary]:
        _fsync(item)
    if path.exists():
        os.rename(path, old)
    os.rename(temporary, path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def hidden(path: Path) -> Path:
    """Where a folder or a file is written until it is whole."""
    return path.with_name(f".{path.name}.tmp")


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one move: a reader sees the old one or the new one."""
    temporary = hidden(path)
    with named(path):
        temporary.write_bytes(data)
        _fsync(temporary)
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one move, for people to read."""
    replace_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Give an error of writing the name of the file: a disk that is full does not say it."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sha256(path: Path) -> str:
    """The name of a file by its content: 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
