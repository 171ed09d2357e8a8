"""Preflight on two files: which evaluation prompts stand in the training data."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanopost.evals.preflight_data import Check, evenly

WORDS, SEEN = 8, 0.7  # words of an n-gram, and the share of a prompt's that makes it seen (PaLM, §8)
ROWS = 20_000  # rows of a file that are looked at, spread evenly


def overlap(data: Path, eval_data: Path | None) -> Check:
    """How many evaluation prompts stand in the training file, by n-grams of words.

    A prompt is seen if at least `SEEN` of its n-grams occur in training; one of fewer words is one n-gram.
    System turns are left out: all rows share them.
    """
    if eval_data is None:
        return Check("overlap", "n/a", "nothing is held out (--eval-data)")
    prompts = {place: grams(texts, prompt=True) for place, texts in json_rows(eval_data)}
    wanted, found = set[tuple[str, ...]]().union(*prompts.values()), set[tuple[str, ...]]()
    for _, obj in json_rows(data):
        found |= wanted & grams(obj, prompt=False)
    seen = [place for place, own in prompts.items() if own and len(own & found) >= SEEN * len(own)]
    told = (
        f"{len(seen)} of {len(prompts)} evaluation prompts have {SEEN:.0%} of their {WORDS}-grams in {data}"
    )
    if seen:
        return Check("overlap", "warn", f"{seen[0]}: {told}", "evaluate on what was not trained on")
    return Check("overlap", "pass", told)


def grams(obj: Any, *, prompt: bool) -> set[tuple[str, ...]]:
    """The n-grams of words in the texts of a JSON value, or in its prompt's alone."""
    found = set[tuple[str, ...]]()
    for text in texts_of(obj, prompt):
        words = re.findall(r"\w+", text.lower())
        found |= {tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)) if words}
    return found


def texts_of(obj: Any, prompt: bool) -> Iterator[str]:
    """The strings in a JSON value, without system turns; of a prompt: none of an assistant, no answer."""
    if isinstance(obj, str):
        yield obj
    elif isinstance(obj, list):
        for item in obj:
            yield from texts_of(item, prompt)
    elif isinstance(obj, dict) and "role" in obj:
        if obj["role"] not in (("system", "assistant") if prompt else ("system",)):
            yield from texts_of(obj.get("content"), prompt)
    elif isinstance(obj, dict):
        for key, item in obj.items():
            if not prompt or key in ("messages", "prompt", "question", "text"):
                yield from texts_of(item, prompt)


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and value of at most `ROWS` lines of a JSONL file, spread evenly."""
    lines = Path(path).read_bytes().splitlines()
    for i in evenly(len(lines), ROWS):
        yield f"{path}:{i + 1}", json.loads(lines[i])
