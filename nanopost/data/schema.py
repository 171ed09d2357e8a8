"""Records: one JSONL line in, one normal form out.

A line says what it is by its keys, and everything that is a conversation becomes `messages`:

    {"messages": [{"role": "user", "content": ...}, ...]}    a chat; "answer" may stand beside it
    {"prompt": ..., "completion": ...}                       two strings, or two lists of messages
    {"question": ..., "answer": ...}                         a user turn and an assistant turn (GSM8K)
    {"text": ...}                                            plain text, for pre-training

Whatever else a line carries goes to `meta`. A line that is not exactly one of these raises ValueError with
`file:line`: a record that was half understood would train on something nobody wrote down.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROLES = ("system", "user", "assistant", "tool")
KINDS = {
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "question+answer": ("question",),
    "text": ("text",),
}


@dataclass(frozen=True)
class Message:
    """One turn; `tool_calls` are JSON as the template wants them, the last two fields name a tool result."""

    role: str
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True)
class Record:
    """One line. Either `messages` or `text`; the first `context` messages are given and never trained on."""

    messages: tuple[Message, ...]
    text: str | None
    answer: Any
    meta: dict[str, Any]
    file: str
    line: int
    context: int = 0


@dataclass(frozen=True)
class Sample:
    """Token ids of one sequence; `mask[i]` says whether token i is trained on."""

    ids: tuple[int, ...]
    mask: tuple[bool, ...]


def read_jsonl(path: str | Path) -> list[Record]:
    """All records of a JSONL file, in order.

    Args:
        path: a UTF-8 file with one JSON object a line.
    Returns: at least one Record; `record.line` counts from 1.
    Raises: ValueError `file:line: ...` for bytes that are not UTF-8, text that is not JSON, duplicate keys,
        NaN or Infinity, and every record that is not exactly one kind; FileNotFoundError.
    """
    lines = Path(path).read_bytes().split(b"\n")
    if lines[-1] == b"":  # the newline that ends the last line
        lines.pop()
    if not lines:
        raise ValueError(f"{path}:1: the file is empty")
    return [_parse_line(raw, str(path), number) for number, raw in enumerate(lines, start=1)]


def parse_record(obj: Any, *, file: str, line: int) -> Record:
    """The normal form of one JSON object; `file` and `line` are where it came from and open every error."""
    if not isinstance(obj, dict):
        _fail(file, line, f"a record is a JSON object, got {_kind_of(obj)}")
    kinds = [kind for kind, keys in KINDS.items() if any(key in obj for key in keys)]
    if len(kinds) != 1:
        problem = f"is of two kinds at once ({' and '.join(kinds)})" if kinds else "is of no known kind"
        _fail(
            file, line, f"the record {problem}; it has the keys {sorted(obj)}, a kind is one of {list(KINDS)}"
        )
    rest = dict(obj)
    answer, text, context = rest.pop("answer", None), None, 0
    if kinds == ["messages"]:
        messages = _messages(rest.pop("messages"), "messages", file, line)
    elif kinds == ["text"]:
        messages, text = (), _text(rest, "text", file, line)
    elif kinds == ["question+answer"]:
        question = _text(rest, "question", file, line)
        answer = _text({"answer": answer} if "answer" in obj else {}, "answer", file, line)
        messages = (Message("user", question), Message("assistant", answer))
    else:
        messages, context = _prompt_completion(rest, file, line)
    return Record(messages, text, answer, rest, file, line, context)


def _parse_line(raw: bytes, file: str, line: int) -> Record:
    try:
        text = raw.decode("utf-8")
        if "\\ud" in text.lower():  # half a surrogate pair is legal JSON and no text
            json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8")
        obj = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)
    except UnicodeDecodeError as error:
        _fail(file, line, f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}")
    except UnicodeEncodeError:
        _fail(file, line, "half a surrogate pair (\\ud8xx without its partner) is not text")
    except RecursionError:
        _fail(file, line, "not JSON that can be read: nested too deeply")
    except ValueError as error:
        _fail(file, line, f"not JSON: {error}" if text.strip() else "the line is empty")
    return parse_record(obj, file=file, line=line)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    obj = dict(pairs)
    if len(obj) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return obj


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _prompt_completion(rest: dict[str, Any], file: str, line: int) -> tuple[tuple[Message, ...], int]:
    if missing := [key for key in ("prompt", "completion") if key not in rest]:
        _fail(file, line, f"{missing[0]!r} is missing: prompt and completion come together")
    if isinstance(rest["prompt"], str) and isinstance(rest["completion"], str):
        texts = [_text(rest, key, file, line) for key in ("prompt", "completion")]
        return (Message("user", texts[0]), Message("assistant", texts[1])), 1
    prompt = _messages(rest.pop("prompt"), "prompt", file, line)
    completion = _messages(rest.pop("completion"), "completion", file, line)
    if all(message.role != "assistant" for message in completion):
        _fail(file, line, "completion has no assistant turn")
    return prompt + completion, len(prompt)


def _messages(value: Any, key: str, file: str, line: int) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        _fail(file, line, f"{key} must be a list of at least one message, got {_kind_of(value)}")
    return tuple(_message(item, f"{key}[{i}]", file, line) for i, item in enumerate(value))


def _message(item: Any, where: str, file: str, line: int) -> Message:
    if not isinstance(item, dict):
        _fail(file, line, f"{where} must be an object, got {_kind_of(item)}")
    if unknown := sorted(set(item) - {"role", "content", "tool_calls", "name", "tool_call_id"}):
        _fail(file, line, f"{where} has the unknown key {unknown[0]!r}")
    role, content, calls = item.get("role"), item.get("content"), item.get("tool_calls") or []
    if role not in ROLES:
        _fail(file, line, f"{where} has the unknown role {role!r}; a role is one of {list(ROLES)}")
    if content is None and calls:  # the usual form of a turn that only calls tools
        content = ""
    if not isinstance(content, str):
        _fail(file, line, f"{where}.content must be a string, got {_kind_of(content)}")
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        _fail(file, line, f"{where}.tool_calls must be a list of objects with a function name, got {calls!r}")
    if calls and role != "assistant":
        _fail(file, line, f"{where} is a {role} turn with tool calls; only the assistant calls tools")
    if role == "assistant" and not content.strip() and not calls:
        _fail(file, line, f"{where} is an empty assistant turn")
    for key in ("name", "tool_call_id"):
        if not isinstance(item.get(key), str | None):
            _fail(file, line, f"{where}.{key} must be a string, got {_kind_of(item[key])}")
    return Message(role, content, tuple(calls), item.get("name"), item.get("tool_call_id"))


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _text(obj: dict[str, Any], key: str, file: str, line: int) -> str:
    value = obj.pop(key, None)
    if not isinstance(value, str):
        _fail(file, line, f"{key} must be a string, got {_kind_of(value)}")
    if not value.strip():
        _fail(file, line, f"{key} is empty")
    return value


def _kind_of(value: Any) -> str:
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


def _fail(file: str, line: int, problem: str) -> NoReturn:
    raise ValueError(f"{file}:{line}: {problem}")
