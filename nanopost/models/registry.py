"""Which adapter answers: a store of immutable adapters, a table of tenants, and a record of every answer.

    STORE/<name>/                   an adapter in peft's format; its name is the SHA-256 of its two files
    TABLE                           {"bank_A": {"policy_v3": "<name>"}, …}: small, and under version control
    REQUESTS                        JSONL of {"id": …, "tenant": …, "version": …}

    python -m nanopost.models.registry add STORE FOLDER         put an adapter into the store; prints its name
    python -m nanopost.models.registry replay STORE TABLE REQUESTS [--audit FILE]

The adapter of a request is a lookup of tenant and version (`adapters.route`), and an error that names both
where the table lacks the pair: no default, and never the base. Routing is making the record (`audited`); who
serves writes it down before the answer. A rollback is an older table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nanopost.atomic import named
from nanopost.models.adapters import route
from nanopost.models.config import distinct, read_json
from nanopost.models.peft import CONFIG, WEIGHTS, check_factors
from nanopost.models.weights import content_id

FILES = (CONFIG, WEIGHTS)
Table = dict[tuple[str, str], str]  # (tenant, version) to the name of an adapter


def adapter_name(folder: str | Path) -> str:
    """The name of an adapter: the `content_id` of its two files."""
    return content_id(Path(folder) / name for name in FILES)


def register(store: str | Path, folder: str | Path) -> str:
    """Copy an adapter into the store, in one move; its name. What is there already stays as it is.

    Raises:
        ValueError: what `check_factors` refuses; a stored adapter of this name that has
            changed.
    """
    check_factors(folder)
    name, store = adapter_name(folder), Path(store)
    if (store / name).exists():
        stored(store, name)
        return name
    store.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=store, prefix=".") as work:
        (copy := Path(work) / name).mkdir()
        for file in FILES:
            shutil.copyfile(Path(folder) / file, copy / file)
        if (found := adapter_name(copy)) != name:
            raise ValueError(f"{folder} changed while it was copied, to {found}")
        os.rename(copy, store / name)
    return name


def stored(store: str | Path, name: str) -> Path:
    """The folder of an adapter, whose content is still what its name says.

    Raises:
        ValueError: the store does not have it, or has another one under its name.
    """
    folder = Path(store) / name
    if not all((folder / file).is_file() for file in FILES):
        raise ValueError(f"{store}: no adapter {name}")
    if (found := adapter_name(folder)) != name:
        raise ValueError(f"{folder} has changed: its content is {found}")
    return folder


def read_table(path: str | Path) -> Table:
    """A table of tenants and versions, for `route`.

    Raises:
        ValueError: naming the file, and the tenant or version that stands there twice or names no adapter.
    """
    raw, table = read_json(Path(path)), Table()
    for tenant, versions in raw.items():
        if not isinstance(versions, dict) or not versions:
            raise ValueError(f"{path}: {tenant!r} must have its versions, got {versions!r}")
        for version, name in versions.items():
            if not isinstance(name, str) or len(name) != 64 or set(name) - set("0123456789abcdef"):
                raise ValueError(f"{path}: {tenant!r}, {version!r} must name an adapter, got {name!r}")
            table[tenant, version] = name
    return table


def audited(table: Mapping[tuple[str, str], str], request: Mapping[str, Any], *, time: str) -> dict[str, str]:
    """Route a request: the record that its answer leaves, with the name of its adapter.

    Args:
        request: id, tenant and version, texts.
        time: when it was routed, for the record.

    Raises:
        ValueError: a request without one of the three, by name; what `route` refuses.
    """
    for key in ("id", "tenant", "version"):
        if not isinstance(request.get(key), str):
            raise ValueError(f"a request must have {key!r}, a text, got {request.get(key)!r}")
    told = {key: request[key] for key in ("id", "tenant", "version")}
    return told | {"adapter": route(table, told["tenant"], told["version"]), "time": time}


def write_audit(path: str | Path, records: Iterable[Mapping[str, str]]) -> None:
    """Append records to an audit file, a line each, on disk when this returns."""
    with named(Path(path)), open(path, "a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(dict(record)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_requests(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The requests of a JSONL file with their lines.

    Raises:
        ValueError: naming file and line of what is no JSON object, or has a key twice.
    """
    *lines, last = Path(path).read_text(encoding="utf-8").split("\n")
    for number, line in enumerate([*lines, *([last] if last else [])], start=1):
        try:
            request = json.loads(line, object_pairs_hook=distinct)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        if not isinstance(request, dict):
            raise ValueError(f"{path}:{number}: a request must be an object, got {line[:80]}")
        yield number, request


def replay(store: Path, table: Path, requests: Path) -> tuple[list[dict[str, str]], list[str]]:
    """Route every request of a file: its records, and what was refused, by line."""
    known, records, refused = read_table(table), list[dict[str, str]](), list[str]()
    for name in sorted(set(known.values())):
        stored(store, name)
    for number, request in read_requests(requests):
        try:
            records.append(audited(known, request, time=datetime.now(UTC).isoformat()))
        except ValueError as error:
            refused.append(f"{requests}:{number}: {error}")
    return records, refused


def main(arguments: list[str] | None = None) -> int:
    """Add an adapter, or replay requests: 0, 1 where a request was refused, 2 where nothing could be done."""
    parser = argparse.ArgumentParser(
        prog="python -m nanopost.models.registry", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="put an adapter into the store")
    add.add_argument("store", type=Path)
    add.add_argument("folder", type=Path, help="adapter_config.json and adapter_model.safetensors")
    again = commands.add_parser("replay", help="route the requests of a file and print the audit")
    again.add_argument("store", type=Path)
    again.add_argument("table", type=Path, help="JSON: tenant, version, name of the adapter")
    again.add_argument("requests", type=Path, help="JSONL: id, tenant, version")
    again.add_argument("--audit", type=Path, help="append the records to this file too")
    given = parser.parse_args(arguments)
    try:
        if given.command == "add":
            print(register(given.store, given.folder))
            return 0
        records, refused = replay(given.store, given.table, given.requests)
        if given.audit:
            write_audit(given.audit, records)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for record in records:
        print(json.dumps(record))
    for line in refused:
        print(line, file=sys.stderr)
    print(f"{len(records)} routed, {len(refused)} refused", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
