"""Records: one JSONL line in, one normal form out.

A line says what it is by its keys, and everything that is a conversation becomes `messages`:

    {"messages": [{"role": "user", "content": ...}, ...]}    a chat; "answer" may stand beside it
    {"prompt": ..., "completion": ...}                       two strings, or two lists of messages
    {"question": ..., "answer": ...}                         a user turn and an assistant turn (GSM8K)
    {"text": ...}                                            plain text, for pre-training

Whatever else a line carries goes to `meta`. A line that is not exactly one of these raises ValueError with
`file:line`: a record that was half understood would train on something nobody wrote down.

The records of preferences, labels and groups of candidates are here too; nanopost.data.preference reads them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanopost.data.jsonl import fail, kind_by_keys, kind_of, read_lines

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
    place: str = field(default="", compare=False)  # file:line of its record, for errors


@dataclass(frozen=True)
class Candidate:
    """One completion of a group; what is not known of it is None."""

    text: str
    score: float | None = None  # the verifier's or the judge's
    correct: bool | None = None
    tokens: int | None = None  # its length, stop token included
    reason: str | None = None
    source: str | None = None  # the model it is from, where a group has several
    cut: bool | None = None  # at the sampler's limit, without a stop token; None counts as not cut


@dataclass(frozen=True)
class Provenance:
    """Where a label comes from; what a record does not say is None."""

    preference_reason: str | None = None
    error_type: str | None = None
    safety_label: str | None = None
    factuality_label: str | None = None
    style_label: str | None = None
    annotator_id_hash: str | None = None
    review_round: int | None = None
    disagreement: float | None = None
    verifier_name: str | None = None
    verifier_version: str | None = None
    test_case_hash: str | None = None
    pass_rate: float | None = None
    failure_reason: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)  # temperature, top_p, seed, model, … as recorded
    candidates: tuple[Candidate, ...] = ()  # the whole group, in order
    meta: dict[str, Any] = field(default_factory=dict)  # every other key of the line


@dataclass(frozen=True)
class Preference:
    """A prompt and two completions of it, of which `chosen` is preferred; each ends in an assistant turn."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    provenance: Provenance
    file: str
    line: int


@dataclass(frozen=True)
class Labelled:
    """A completion that is good or is not, with no other beside it (KTO; the label of an outcome)."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    label: bool
    provenance: Provenance
    file: str
    line: int


@dataclass(frozen=True)
class Steps:
    """One answer in steps, each of which is right or is not (the labels of a process)."""

    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    labels: tuple[bool, ...]
    provenance: Provenance
    file: str
    line: int


@dataclass(frozen=True)
class Ratings:
    """A completion and its attributes (HelpSteer2's five, 0 to 4); None: not rated."""

    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    ratings: dict[str, float | None]
    provenance: Provenance
    file: str
    line: int


@dataclass(frozen=True)
class Group:
    """A prompt and several completions of it, sampled or collected, and the prompt's own answer, if any."""

    prompt: tuple[Message, ...]
    candidates: tuple[Candidate, ...]
    provenance: Provenance
    answer: Any
    file: str
    line: int


PreferenceRecord = Preference | Labelled | Steps | Ratings


def read_jsonl(path: str | Path) -> list[Record]:
    """All records of a JSONL file, in order.

    Args:
        path: a UTF-8 file with one JSON object a line.
    Returns: at least one Record; `record.line` counts from 1.
    Raises: ValueError `file:line: ...` for bytes that are not UTF-8, text that is not JSON, duplicate keys,
        NaN or Infinity, and every record that is not exactly one kind; FileNotFoundError.
    """
    return read_lines(path, parse_record)


def parse_record(obj: Any, *, file: str, line: int) -> Record:
    """The normal form of one JSON object; `file` and `line` are where it came from and open every error."""
    kind = kind_by_keys(obj, KINDS, file, line)
    rest = dict(obj)
    answer, text, context = rest.pop("answer", None), None, 0
    if kind == "messages":
        messages = parse_messages(rest.pop("messages"), "messages", file, line)
    elif kind == "text":
        messages, text = (), parse_text(rest, "text", file, line)
    elif kind == "question+answer":
        question = parse_text(rest, "question", file, line)
        answer = parse_text({"answer": answer} if "answer" in obj else {}, "answer", file, line)
        messages = (Message("user", question), Message("assistant", answer))
    else:
        messages, context = _prompt_completion(rest, file, line)
    return Record(messages, text, answer, rest, file, line, context)


def _prompt_completion(rest: dict[str, Any], file: str, line: int) -> tuple[tuple[Message, ...], int]:
    if missing := [key for key in ("prompt", "completion") if key not in rest]:
        hint = "; a prompt alone is written as messages with a user turn" if missing == ["completion"] else ""
        fail(file, line, f"{missing[0]!r} is missing: prompt and completion come together{hint}")
    if isinstance(rest["prompt"], str) and isinstance(rest["completion"], str):
        texts = [parse_text(rest, key, file, line) for key in ("prompt", "completion")]
        return (Message("user", texts[0]), Message("assistant", texts[1])), 1
    prompt = parse_messages(rest.pop("prompt"), "prompt", file, line)
    completion = parse_messages(rest.pop("completion"), "completion", file, line)
    if all(message.role != "assistant" for message in completion):
        fail(file, line, "completion has no assistant turn")
    return prompt + completion, len(prompt)


def parse_messages(value: Any, key: str, file: str, line: int) -> tuple[Message, ...]:
    """A list of messages, at least one; `key` is what the record calls it."""
    if not isinstance(value, list) or not value:
        fail(file, line, f"{key} must be a list of at least one message, got {kind_of(value)}")
    return tuple(_message(item, f"{key}[{i}]", file, line) for i, item in enumerate(value))


def _message(item: Any, where: str, file: str, line: int) -> Message:
    if not isinstance(item, dict):
        fail(file, line, f"{where} must be an object, got {kind_of(item)}")
    if unknown := sorted(set(item) - {"role", "content", "tool_calls", "name", "tool_call_id"}):
        fail(file, line, f"{where} has the unknown key {unknown[0]!r}")
    role, content, calls = item.get("role"), item.get("content"), item.get("tool_calls") or []
    if role not in ROLES:
        fail(file, line, f"{where} has the unknown role {role!r}; a role is one of {list(ROLES)}")
    if content is None and calls:  # the usual form of a turn that only calls tools
        content = ""
    if not isinstance(content, str):
        fail(file, line, f"{where}.content must be a string, got {kind_of(content)}")
    if not isinstance(calls, list) or not all(_is_call(call) for call in calls):
        fail(file, line, f"{where}.tool_calls must be a list of objects with a function name, got {calls!r}")
    if calls and role != "assistant":
        fail(file, line, f"{where} is a {role} turn with tool calls; only the assistant calls tools")
    if role == "assistant" and not content.strip() and not calls:
        fail(file, line, f"{where} is an empty assistant turn")
    for key in ("name", "tool_call_id"):
        if not isinstance(item.get(key), str | None):
            fail(file, line, f"{where}.{key} must be a string, got {kind_of(item[key])}")
    return Message(role, content, tuple(calls), item.get("name"), item.get("tool_call_id"))


def _is_call(call: Any) -> bool:
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def parse_text(obj: dict[str, Any], key: str, file: str, line: int) -> str:
    """A string that is not blank; the key is taken out of `obj`."""
    value = obj.pop(key, None)
    if not isinstance(value, str):
        fail(file, line, f"{key} must be a string, got {kind_of(value)}")
    if not value.strip():
        fail(file, line, f"{key} is empty")
    return value
