"""Requests of many tenants beside one base: routed by a table, recorded, answered in one mixed batch."""

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nanopost.atomic import replace_file
from nanopost.data.chat import decode, load_chat, prompt_ids
from nanopost.data.schema import Message, Record
from nanopost.evals.stages import complete
from nanopost.models.bank import add_to_bank, open_bank
from nanopost.models.config import load_config
from nanopost.models.peft import check_origin, origin, read_adapter
from nanopost.models.registry import audited, read_table, register, stored, write_audit
from nanopost.models.weights import load_model


def deploy(store: str | Path, folders: Mapping[str, Path], version: str, table: str | Path) -> None:
    """Put each tenant's adapter into the store, and the table of this version beside it.

    Args:
        store: of adapters (`registry.py`); made if it is not there.
        folders: tenant to adapter, in peft's format.
        version: of every tenant's policy.
        table: the file to write.
    """
    entries = {tenant: {version: register(store, folder)} for tenant, folder in folders.items()}
    replace_file(Path(table), (json.dumps(entries, indent=2) + "\n").encode())  # it may be in use


def answers(
    base: str | Path,
    store: str | Path,
    table: str | Path,
    requests: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int,
    audit: str | Path,
) -> list[str | None]:
    """Greedy answers to requests of any tenants, in one batch whose rows have their own adapters.

    Args:
        base: the folder of the model that all adapters stand beside.
        store, table: as `deploy` leaves them.
        requests: id, tenant, version and text of each.
        max_new_tokens: answers are cut there.
        audit: the file that gets a record of each request before it is answered.

    Returns:
        The answers, in the order of the requests; None where an adapter's logits were not finite, which is no
        other tenant's loss.

    Raises:
        ValueError: a request without a text, with one that leaves no room, or that the table does not know;
            an adapter that is not in the store, has changed or belongs beside another base, or another format
            of it than the others': nothing is answered or recorded then.
    """
    for request in requests:
        if not isinstance(request.get("text"), str):
            raise ValueError(
                f"request {request.get('id')}: text must be a string, got {request.get('text')!r}"
            )
    routes, now = read_table(table), datetime.now(UTC).isoformat()
    records = [audited(routes, request, time=now) for request in requests]
    asked = [Record((Message("user", request["text"]),), None, None, {}, "", 0) for request in requests]
    chat, room = load_chat(base), load_config(base).max_position_embeddings - max_new_tokens
    for request, record in zip(requests, asked, strict=True):
        if (count := len(prompt_ids(chat, record.messages))) > room:
            told = f"the prompt has {count} tokens, {room} leave room for max_new_tokens"
            raise ValueError(f"request {request['id']}: {told}")
    adapters = [record["adapter"] for record in records]
    folders = {name: stored(store, name) for name in sorted(set(adapters))}
    model = open_bank(load_model(base, four_bits=quantised(folders.values())))
    for name, folder in folders.items():
        check_origin(folder, base, nf4=bool(quantised([folder])))
        add_to_bank(model, name, folder)
    write_audit(audit, records)
    settings: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "seed": 0}
    drawn = complete(model, chat, asked, adapters=adapters, **settings)
    return [None if r.finish_reason == "error" else decode(chat, r.completion_ids) for r in drawn]


def quantised(folders: Collection[Path]) -> tuple[str, ...]:
    """The layers of the base that all these adapters stand beside in four bits; none where they were trained
    beside the weights as they are, or do not say.

    Raises:
        ValueError: adapters of a batch that need different bases, by their folders.
    """
    found = dict[tuple[str, ...], Path]()
    for folder in folders:
        layers = read_adapter(folder).targets if origin(folder).get("nf4") == "True" else ()
        found.setdefault(layers, folder)
    if len(found) > 1:
        one, other, *_ = found.values()
        raise ValueError(f"{one} and {other} stand beside one base in different formats: ask them apart")
    return next(iter(found), ())


def costs(base: str | Path, store: str | Path, table: str | Path) -> dict[str, tuple[int, int]]:
    """Bytes for the base with the table's adapters, and for as many whole models: on disk, and in memory."""
    model, names = open_bank(load_model(base)), sorted(set(read_table(table).values()))
    whole, file = sum(p.nbytes for p in model.parameters()), size(Path(base), "*.safetensors")
    for name in names:
        add_to_bank(model, name, stored(store, name))
    return {
        "disk": (file + sum(size(Path(store) / name, "*") for name in names), len(names) * file),
        "memory": (sum(p.nbytes for p in model.parameters()), len(names) * whole),
    }


def size(folder: Path, pattern: str) -> int:
    """Bytes of a folder's files."""
    return sum(file.stat().st_size for file in folder.glob(pattern))
