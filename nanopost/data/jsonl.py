"""JSONL: lines in, parsed objects out, each with the file and the line it came from.

Every error is a ValueError that opens with `file:line`, so that a reader of a million lines can go there.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Parsed = TypeVar("Parsed")


def read_lines(path: str | Path, parse: Callable[..., Parsed]) -> list[Parsed]:
    """What `parse(obj, file=..., line=...)` makes of each line of a JSONL file, in order.

    Args:
        path: a UTF-8 file with one JSON value a line.
        parse: takes the value and where it stands; `file` is the path as given, `line` counts from 1.
    Returns: at least one result; no line is left out.
    Raises: ValueError `file:line: ...` for bytes that are not UTF-8, text that is not JSON, duplicate keys,
        NaN or Infinity, an empty line or file; what `parse` raises; FileNotFoundError.
    """
    lines = Path(path).read_bytes().split(b"\n")
    if lines[-1] == b"":  # the newline that ends the last line
        lines.pop()
    if not lines:
        fail(str(path), 1, "the file is empty")
    return [
        parse(_parse_line(raw, str(path), number), file=str(path), line=number)
        for number, raw in enumerate(lines, start=1)
    ]


def kind_by_keys(obj: Any, kinds: Mapping[str, tuple[str, ...]], file: str, line: int) -> str:
    """The one kind of an object: that with at least one of its keys in it.

    Args:
        obj: a JSON value.
        kinds: the name of each kind, and the keys that no other kind has.
        file, line: where it stands; they open the error.
    Raises: ValueError for what is no object, of two kinds at once or of none.
    """
    if not isinstance(obj, dict):
        fail(file, line, f"a record is a JSON object, got {kind_of(obj)}")
    found = [kind for kind, keys in kinds.items() if any(key in obj for key in keys)]
    if len(found) != 1:
        problem = f"is of two kinds at once ({' and '.join(found)})" if found else "is of no known kind"
        keys = f"it has the keys {sorted(obj)}, a kind is one of {list(kinds)}"
        fail(file, line, f"the record {problem}; {keys}")
    return found[0]


def kind_of(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        type(None): "null or nothing",
    }
    name = names.get(type(value), "a number")
    return f"an empty {name.split()[-1]}" if value in ([], {}, "") else name


def fail(file: str, line: int, problem: str) -> NoReturn:
    """Raise the ValueError of a line."""
    raise ValueError(f"{file}:{line}: {problem}")


def _parse_line(raw: bytes, file: str, line: int) -> Any:
    try:
        text = raw.decode("utf-8")
        if "\\ud" in text.lower():  # half a surrogate pair is legal JSON and no text
            json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8")
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except UnicodeDecodeError as error:
        fail(file, line, f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}")
    except UnicodeEncodeError:
        fail(file, line, "half a surrogate pair (\\ud8xx without its partner) is not text")
    except RecursionError:
        fail(file, line, "not JSON that can be read: nested too deeply")
    except ValueError as error:
        fail(file, line, f"not JSON: {error}" if text.strip() else "the line is empty")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    obj = dict(pairs)
    if len(obj) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return obj


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
