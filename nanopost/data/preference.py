"""Preferences: one JSONL line in, one labelled record out, and back again with nothing lost.

A line says what it is by its keys:

    {"prompt", "chosen", "rejected"}         strings, or lists of messages that continue the prompt
    {"chosen", "rejected"}                   two whole conversations: the messages they share are the prompt;
                                             a prompt string beside them must be one of its user turns
    {"input": {"messages"}, "preferred_output", "non_preferred_output"}    OpenAI's form of a pair
    {"prompt", "completion", "label": true}                unpaired (KTO; the label of an outcome)
    {"prompt", "completions": [...], "labels": [...]}      the steps of one answer, each with its label
    {"prompt", "response", "helpfulness", ...}             HelpSteer2's five ratings, 0 to 4, null: not rated

and a group of candidates

    {"prompt", "candidates": [{"text", "score", "correct", "tokens", "reason", "source", "cut"}, ...],
     "answer"}
    {"question", "ground_truth", MODEL: {"solution", "is_correct"}, ...}   GSM8K's published solutions

A prompt string is one user turn, a completion string one assistant turn. The fields of Provenance are read
where a line has them, every other key goes to its `meta`. What is not exactly one of these is an error.
"""

from pathlib import Path
from typing import Any

from nanopost.data.jsonl import fail, kind_by_keys, kind_of, read_lines
from nanopost.data.provenance import (
    FLAG,
    RATING,
    candidate_lines,
    message_lines,
    parse_candidates,
    parse_field,
    parse_provenance,
    record_line,
)
from nanopost.data.schema import (
    Group,
    Labelled,
    Message,
    Preference,
    PreferenceRecord,
    Ratings,
    Steps,
    parse_messages,
    parse_text,
)

KINDS = {
    "chosen+rejected": ("chosen", "rejected"),
    "preferred_output+non_preferred_output": ("preferred_output", "non_preferred_output"),
    "prompt+completion+label": ("completion",),
    "prompt+completions+labels": ("completions",),
    "prompt+response+ratings": ("response",),
}
GROUPS = {"prompt+candidates": ("candidates",), "question+ground_truth": ("ground_truth",)}
RESERVED = {key for keys in KINDS.values() for key in keys}  # none of them may stand in `meta`
ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")  # HelpSteer2's


def read_preferences(path: str | Path) -> list[PreferenceRecord]:
    """All records of a JSONL file of preferences, in order; the kinds may be mixed.

    Args:
        path: a UTF-8 file with one JSON object a line.
    Returns: at least one record; `record.line` counts from 1.
    Raises: ValueError `file:line: ...` as `read_lines` and `parse_preference`; FileNotFoundError.
    """
    return read_lines(path, parse_preference)


def read_groups(path: str | Path) -> list[Group]:
    """All groups of a JSONL file, in order, each with its own prompt, answer and candidates.

    Args:
        path: our form, or GSM8K's model_solutions.jsonl (a model's name becomes the candidate's `source`).
    Returns: at least one Group; a group has at least one candidate, and a candidate's text may be empty.
    Raises: ValueError `file:line: ...`; FileNotFoundError.
    """
    return read_lines(path, _parse_group)


def parse_preference(obj: Any, *, file: str, line: int) -> PreferenceRecord:
    """The record of one JSON object; `file` and `line` are where it came from and open every error."""
    kind, rest, where = kind_by_keys(obj, KINDS, file, line), dict(obj), (file, line)
    if kind == "prompt+completion+label":
        prompt = _prompt(rest, *where)
        completion = _completion(rest, "completion", prompt, *where)
        label = parse_field(rest.pop("label", None), "label", FLAG, *where)
        return Labelled(prompt, completion, label, parse_provenance(rest, *where), *where)
    if kind == "prompt+completions+labels":
        return _steps(rest, *where)
    if kind == "prompt+response+ratings":
        return _ratings(rest, *where)
    keys = KINDS[kind]
    if missing := [key for key in keys if key not in rest]:
        fail(file, line, f"{missing[0]!r} is missing: {keys[0]} and {keys[1]} come together")
    if kind == "preferred_output+non_preferred_output":
        prompt = _input(rest, *where)
    elif "prompt" not in rest or (isinstance(rest["prompt"], str) and isinstance(rest["chosen"], list)):
        prompt = _shared_prompt(rest, *where)
    else:
        prompt = _prompt(rest, *where)
    chosen, rejected = (_completion(rest, key, prompt, *where) for key in keys)
    if chosen == rejected:
        fail(file, line, f"{keys[0]} and {keys[1]} are identical: nothing is preferred")
    return Preference(prompt, chosen, rejected, parse_provenance(rest, *where), *where)


def common_prefix(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """How many messages two conversations share from their start; the last one of either is never shared."""
    end = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(end) if chosen[i] != rejected[i]), end)


def preference_line(record: PreferenceRecord) -> dict[str, Any]:
    """The JSON object that `parse_preference` reads as this very record, in the form of its kind.

    Args:
        record: its messages are written out, its provenance's fields and `meta` stand beside them.
    Returns: a new object; a pair from two conversations comes out as prompt, chosen and rejected.
    Raises: ValueError where a key of `meta` is one of the form's own.
    """
    body: dict[str, Any] = {"prompt": message_lines(record.prompt)}
    if isinstance(record, Preference):
        body |= {"chosen": message_lines(record.chosen), "rejected": message_lines(record.rejected)}
    elif isinstance(record, Labelled):
        body |= {"completion": message_lines(record.completion), "label": record.label}
    elif isinstance(record, Steps):
        body |= {"completions": list(record.steps), "labels": list(record.labels)}
    else:
        body |= {"response": message_lines(record.completion), **record.ratings}
    return record_line(body, record, RESERVED)


def group_line(group: Group) -> dict[str, Any]:
    """The JSON object that `read_groups` reads as this very group; as `preference_line`."""
    body = {"prompt": message_lines(group.prompt), "candidates": candidate_lines(group.candidates)}
    return record_line(body | {"answer": group.answer}, group, RESERVED)


def _parse_group(obj: Any, *, file: str, line: int) -> Group:
    kind, rest, where = kind_by_keys(obj, GROUPS, file, line), dict(obj), (file, line)
    if stray := sorted(RESERVED & set(rest)):
        fail(file, line, f"a group has no key {stray[0]!r}: it belongs to a record of preferences")
    if kind == "prompt+candidates":
        prompt, answer = _prompt(rest, *where), rest.pop("answer", None)
        candidates = parse_candidates(rest.pop("candidates"), *where)
    else:
        prompt = (Message("user", parse_text(rest, "question", *where)),)
        answer = parse_text(rest, "ground_truth", *where)
        models = [key for key, value in rest.items() if isinstance(value, dict) and "is_correct" in value]
        solutions = [(model, dict(rest.pop(model))) for model in models]
        candidates = parse_candidates(
            [
                {
                    "text": item.pop("solution", None),
                    "correct": item.pop("is_correct"),
                    "source": model,
                    **item,
                }
                for model, item in solutions
            ],
            *where,
        )
    return Group(prompt, candidates, parse_provenance(rest, *where), answer, *where)


def _steps(rest: dict[str, Any], file: str, line: int) -> Steps:
    prompt, steps, labels = _prompt(rest, file, line), rest.pop("completions"), rest.pop("labels", None)
    for name, items in (("completions", steps), ("labels", labels)):
        if not isinstance(items, list) or not items:
            fail(file, line, f"{name} must be a list with one item a step, got {kind_of(items)}")
    if len(steps) != len(labels):
        fail(file, line, f"there are {len(steps)} completions and {len(labels)} labels: a step has one label")
    names = [f"completions[{i}]" for i in range(len(steps))]
    texts = tuple(parse_text({name: text}, name, file, line) for name, text in zip(names, steps, strict=True))
    flags = tuple(parse_field(flag, f"labels[{i}]", FLAG, file, line) for i, flag in enumerate(labels))
    return Steps(prompt, texts, flags, parse_provenance(rest, file, line), file, line)


def _ratings(rest: dict[str, Any], file: str, line: int) -> Ratings:
    prompt = _prompt(rest, file, line)
    response = _completion(rest, "response", prompt, file, line)
    if missing := [key for key in ATTRIBUTES if key not in rest]:
        fail(file, line, f"the rating {missing[0]!r} is missing; null says that nobody rated it")
    found = {key: rest.pop(key) for key in ATTRIBUTES}
    ratings = {k: v if v is None else parse_field(v, k, RATING, file, line) for k, v in found.items()}
    if set(ratings.values()) == {None}:
        fail(file, line, f"none of {list(ATTRIBUTES)} is rated")
    return Ratings(prompt, response, ratings, parse_provenance(rest, file, line), file, line)


def _input(rest: dict[str, Any], file: str, line: int) -> tuple[Message, ...]:
    """The prompt of OpenAI's form; what else is in its `input` (tools, …) stays there, for `meta`."""
    given = rest.pop("input", None)
    if not isinstance(given, dict):
        fail(file, line, f"input must be an object with messages, got {kind_of(given)}")
    if others := {key: value for key, value in given.items() if key != "messages"}:
        rest["input"] = others
    return parse_messages(given.get("messages"), "input.messages", file, line)


def _shared_prompt(rest: dict[str, Any], file: str, line: int) -> tuple[Message, ...]:
    """The messages that two whole conversations share; what follows them stays in `rest`."""
    chosen, rejected = (parse_messages(rest[key], key, file, line) for key in ("chosen", "rejected"))
    shared = common_prefix(chosen, rejected)
    if shared == 0:
        fail(file, line, "chosen and rejected share no message: without a prompt of its own a pair has none")
    turns = [message.content for message in chosen[:shared] if message.role == "user"]
    if "prompt" in rest and parse_text(rest, "prompt", file, line) not in turns:
        fail(file, line, "prompt is no user turn of the messages that chosen and rejected share")
    rest["chosen"], rest["rejected"] = rest["chosen"][shared:], rest["rejected"][shared:]
    return chosen[:shared]


def _prompt(rest: dict[str, Any], file: str, line: int) -> tuple[Message, ...]:
    if isinstance(rest.get("prompt"), list):
        return parse_messages(rest.pop("prompt"), "prompt", file, line)
    return (Message("user", parse_text(rest, "prompt", file, line)),)


def _completion(
    rest: dict[str, Any], key: str, prompt: tuple[Message, ...], file: str, line: int
) -> tuple[Message, ...]:
    if not isinstance(rest[key], list):
        return (Message("assistant", parse_text(rest, key, file, line)),)
    messages = parse_messages(rest.pop(key), key, file, line)
    if messages[-1].role != "assistant":
        fail(file, line, f"{key} must end with an assistant turn, got a {messages[-1].role} turn")
    if messages[: len(prompt)] == prompt:
        fail(file, line, f"{key} repeats the prompt; it must hold what follows the prompt alone")
    return messages
