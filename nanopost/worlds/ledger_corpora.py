"""The ledger world's corpora on disk: base text, demonstrations, prompts to learn from, test.

The demonstrations are clean in shape and imperfect in two ways: their teachers slip in a share of the
columns, and pad a share of the completions with chatter, right and wrong ones alike. The test shares no
operands with any other file, by construction, and `check_disjoint` proves it on the written text. One seed
gives one set of bytes.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nanopost.worlds.ledger import Task, demonstrate, draw_padding, draw_slips, draw_task, held_out, verify
from nanopost.worlds.ledger_base import base_document, line_pairs, weighted_task
from nanopost.worlds.ledger_words import DEPARTMENTS


def check_disjoint(texts: Iterable[str], tests: Sequence[Task]) -> None:
    """Raise if a training text holds a test's operands on one line, or a test's are on the training side."""
    wanted = {}
    for task in tests:
        if not held_out(*task.operands):
            raise ValueError(f"tests: {task.request!r} has the operands {task.operands} of the training side")
        wanted[frozenset(task.operands)] = task
    for text in texts:
        for pair in line_pairs(text):
            if frozenset(pair) in wanted:
                task = wanted[frozenset(pair)]
                raise ValueError(f"texts: {text!r} holds the operands of the test {task.request!r}")


def user(text: str) -> dict[str, Any]:
    """A user's turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    """An assistant's turn."""
    return {"role": "assistant", "content": text}


def tool_trace(rng: random.Random, slips: Sequence[int], padding: tuple[str, str]) -> list[dict[str, Any]]:
    """A report whose amounts stand in the ledger: call, result, answer."""
    task = draw_task(rng, "report")
    first, second = rng.sample(DEPARTMENTS, 2)
    quarter = f"Q{rng.randint(1, 4)}"
    call = {"name": "spend", "arguments": {"departments": [first, second], "quarter": quarter}}
    return [
        user(f"total of the {quarter} spend of {first} and {second}."),
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": f"{first} {task.operands[0]}, {second} {task.operands[1]}."},
        assistant(demonstrate(task, slips, padding)),
    ]


def demonstration(
    rng: random.Random, slip_share: float, padded_share: float, tool_share: float, turns_share: float
) -> dict[str, Any]:
    """One record of the demonstrations: a tool trace, a conversation of two tasks, or one task."""
    shape = rng.random()
    if shape < tool_share:
        slips, padding = draw_slips(rng, slip_share), draw_padding(rng, padded_share)
        return {"messages": tool_trace(rng, slips, padding), "kind": "tool"}
    messages, kinds = [], []
    for _ in range(2 if shape < tool_share + turns_share else 1):
        task = weighted_task(rng)
        slips, padding = draw_slips(rng, slip_share), draw_padding(rng, padded_share)
        messages += [user(task.request), assistant(demonstrate(task, slips, padding))]
        kinds.append(task.kind)
    return {"messages": messages, "kind": "+".join(kinds)}


def prompt_record(task: Task) -> dict[str, Any]:
    """A prompt with its gold answer, for a verifier."""
    return {"messages": [user(task.request)], "answer": task.answer, "kind": task.kind}


def unique_tasks(rng: random.Random, count: int, *, test: bool) -> list[Task]:
    """`count` tasks of different requests."""
    tasks: dict[str, Task] = {}
    while len(tasks) < count:
        task = weighted_task(rng, test=test)
        tasks.setdefault(task.request, task)
    return list(tasks.values())


def write_corpora(
    folder: str | Path,
    seed: int,
    *,
    base: int = 24000,
    sft: int = 3000,
    preference: int = 500,
    rl: int = 4000,
    test: int = 400,
    slip_share: float = 0.25,
    padded_share: float = 0.4,
    tool_share: float = 0.04,
    turns_share: float = 0.06,
) -> dict[str, Any]:
    """Write base, sft, preference, rl and test.jsonl and manifest.json; same arguments, same bytes.

    Args:
        folder: made if it is not there.
        seed: of everything; each file has its own generator, so that one size does not move another file.
        base, sft, preference, rl, test: records in each file; those of the last three are prompts with their
            answers, to sample pairs from, to train on and to measure on.
        slip_share: chance that a column of a demonstration slips: (1 − share)³ of three-digit sums are right.
        padded_share: chance that a demonstration is padded, whatever it answers and whether it slips or not.
        tool_share, turns_share: shares of the demonstrations that are tool traces and two-task conversations.
    Returns: the manifest: counts, the seed and the share of strict JSON among the base text's answers.
    Raises: ValueError if a training text holds a test problem's operands.
    """
    rng = {name: random.Random(f"{seed} {name}") for name in ("base", "sft", "preference", "rl", "test")}
    tests = unique_tasks(rng["test"], test, test=True)
    files = {
        "base": [{"text": base_document(rng["base"])} for _ in range(base)],
        "sft": [
            demonstration(rng["sft"], slip_share, padded_share, tool_share, turns_share) for _ in range(sft)
        ],
        "preference": [
            prompt_record(task) for task in unique_tasks(rng["preference"], preference, test=False)
        ],
        "rl": [prompt_record(task) for task in unique_tasks(rng["rl"], rl, test=False)],
        "test": [prompt_record(task) for task in tests],
    }
    training = [record for name in files if name != "test" for record in files[name]]
    check_disjoint((text for record in training for text in texts_of(record)), tests)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        Path(folder, f"{name}.jsonl").write_text(lines, encoding="utf-8")
    manifest = {
        "seed": seed,
        "records": {name: len(records) for name, records in files.items()},
        "kinds": {name: count(record["kind"] for record in files[name]) for name in files if name != "base"},
        "slip_share": slip_share,
        "padded_share": padded_share,
        "base_strict_json": strict_share(record["text"] for record in files["base"]),
    }
    Path(folder, "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def texts_of(record: dict[str, Any]) -> list[str]:
    """Everything a record says, tool calls apart."""
    return [record["text"]] if "text" in record else [message["content"] for message in record["messages"]]


def strict_share(texts: Iterable[str]) -> float:
    """The share of strict JSON among the answers of the base text's dialogues."""
    replies = [text.split("\nAssistant: ")[1] for text in texts if "\nAssistant: " in text]
    return sum(verify(text, {"total": 0}).parts["json"] for text in replies) / max(1, len(replies))


def count(names: Iterable[str]) -> dict[str, int]:
    """How often each name comes, by the alphabet."""
    return dict(sorted(Counter(names).items()))
