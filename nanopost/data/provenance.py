"""Provenance: where a label comes from, out of a line and back into one.

The names are those of the dataclasses in nanopost.data.schema. A field that a line lacks, or has as null, is
None in the record and is not written back; one of the wrong type is an error, never a guess.
"""

import sys
from dataclasses import fields
from typing import Any

from nanopost.data.jsonl import fail, kind_of
from nanopost.data.schema import Candidate, Group, Message, PreferenceRecord, Provenance

STRING, FLAG, COUNT, OBJECT = "a string", "true or false", "a whole number from 0", "an object"
NUMBER, RATE, RATING = "a finite number", "a number from 0 to 1", "a number from 0 to 4"
ENDS = {NUMBER: (-sys.float_info.max, sys.float_info.max), RATE: (0, 1), RATING: (0, 4)}
NAMED = [field.name for field in fields(Provenance) if field.name not in ("candidates", "meta")]
KIND_OF_FIELD = dict.fromkeys([*NAMED, *(field.name for field in fields(Candidate))], STRING) | {
    "review_round": COUNT,
    "disagreement": NUMBER,
    "pass_rate": RATE,
    "sampling": OBJECT,
    "score": NUMBER,
    "correct": FLAG,
    "cut": FLAG,
    "tokens": COUNT,
}


def parse_field(value: Any, name: str, kind: str, file: str, line: int) -> Any:
    """The value, if it is what `kind` says; `name` is what the error calls it."""
    if kind in ENDS:
        low, high = ENDS[kind]
        fits = type(value) in (int, float) and low <= value <= high
    elif kind == COUNT:
        fits = type(value) is int and value >= 0
    else:
        fits = isinstance(value, {STRING: str, FLAG: bool, OBJECT: dict}[kind])
    if not fits:
        fail(file, line, f"{name} must be {kind}, got {value!r}")
    return value


def parse_candidates(items: Any, file: str, line: int) -> tuple[Candidate, ...]:
    """A list of candidates, at least one; a text may be empty, as a sampled completion may be."""
    if not isinstance(items, list) or not items:
        fail(file, line, f"candidates must be a list of at least one object, got {kind_of(items)}")
    found = []
    for i, item in enumerate(items):
        where = f"candidates[{i}]"
        if not isinstance(item, dict):
            fail(file, line, f"{where} must be an object, got {kind_of(item)}")
        if unknown := sorted(set(item) - {field.name for field in fields(Candidate)}):
            fail(file, line, f"{where} has the unknown key {unknown[0]!r}")
        given = {"text": item.get("text")} | _known(item)
        found.append(
            Candidate(
                **{k: parse_field(v, f"{where}.{k}", KIND_OF_FIELD[k], file, line) for k, v in given.items()}
            )
        )
    return tuple(found)


def parse_provenance(rest: dict[str, Any], file: str, line: int) -> Provenance:
    """The provenance of what is left of a line: the fields that have a name, and all other keys as `meta`."""
    known = _known({name: rest.get(name) for name in NAMED})
    known = {k: parse_field(v, k, KIND_OF_FIELD[k], file, line) for k, v in known.items()}
    if rest.get("candidates") is not None:
        known["candidates"] = parse_candidates(rest["candidates"], file, line)
    meta = {key: value for key, value in rest.items() if key not in (*NAMED, "candidates")}
    return Provenance(**known, meta=meta)


def message_lines(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    """The JSON of messages; a field without a value is left out."""
    return [_known(vars(m) | {"tool_calls": list(m.tool_calls) or None}) for m in messages]


def candidate_lines(candidates: tuple[Candidate, ...]) -> list[dict[str, Any]]:
    """The JSON of candidates; what is not known is left out."""
    return [_known(vars(candidate)) for candidate in candidates]


def record_line(body: dict[str, Any], record: PreferenceRecord | Group, reserved: set[str]) -> dict[str, Any]:
    """The JSON object of a record: its body, the fields of its provenance, the keys of its `meta`.

    Args:
        body: the record's own keys.
        record: for its provenance, and for the place that opens the error.
        reserved: further keys that may not stand in `meta`: those by which a line says its kind.
    Raises: ValueError where two of the three have a key in common, or `meta` a reserved one.
    """
    source = record.provenance
    known = _known({name: getattr(source, name) for name in NAMED} | {"sampling": source.sampling or None})
    if source.candidates:
        known["candidates"] = candidate_lines(source.candidates)
    taken = {*reserved, *body, *NAMED, "candidates"}
    if clash := sorted(taken & set(source.meta)) or sorted(set(body) & set(known)):
        raise ValueError(
            f"{record.file}:{record.line}: {clash[0]!r} is a key of the form's own, not of its meta"
        )
    return body | known | source.meta


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
