"""What both sides of a comparison are given: token ids, lengths, texts, hidden states. All of it seeded."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
from torch import Tensor

STOP = 0  # the stop token's id; no prompt and no target holds it
Problem = tuple[Tensor, Tensor, Tensor, Tensor]  # hidden, weight, target ids, upstream gradient


def token_rows(rows: int, length: int, vocabulary: int, *, seed: int = 0) -> list[list[int]]:
    """Rows of `length` random tokens, none of them the stop token."""
    rng = random.Random(seed)
    return [[rng.randrange(1, vocabulary) for _ in range(length)] for _ in range(rows)]


def ragged_lengths(rows: int, mean: float, longest: int, *, seed: int = 0) -> list[int]:
    """The quantiles of a geometric law, cut at `longest` and shuffled: a tail as completions have it.

    Every row stops at the next token with the same chance, so many are short and a few very long.
    """
    quantiles = [math.ceil(-mean * math.log1p(-(i + 0.5) / rows)) for i in range(rows)]
    lengths = [min(longest, max(1, length)) for length in quantiles]
    random.Random(seed).shuffle(lengths)
    return lengths


def ragged_rows(rows: int, mean: float, longest: int, vocabulary: int, *, seed: int = 0) -> list[list[int]]:
    """Rows whose inputs have those lengths, the longest `longest`; one token more, as a target."""
    lengths = ragged_lengths(rows, mean, longest, seed=seed)
    lengths[lengths.index(max(lengths))] = longest
    return [row[: n + 1] for row, n in zip(token_rows(rows, longest + 1, vocabulary), lengths, strict=True)]


def linear_problem(count: int, width: int, vocabulary: int, *, seed: int = 0) -> Problem:
    """Hidden states and a head whose logits are about N(0, 1); upstream gradients that differ by token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) / math.sqrt(width)
    target_ids = torch.randint(vocabulary, (count,), generator=generator)
    return hidden, weight, target_ids, torch.randn(count, generator=generator) / count


# ---- the same as texts, for whole scripts and trainers
def word(token: int) -> str:
    """The text of a token: wn=0 or wn=1.

    GSM8K's verifier reads the last number of a text, so a random answer is right half of the time and a group
    has something to learn from.
    """
    return f"w{token}={token % 2}" if token != STOP else "<stop>"


def turn_of(role: str, ids: list[int]) -> dict[str, str]:
    """A message of these tokens."""
    return {"role": role, "content": " ".join(map(word, ids))}


def write_prompts(path: Path, *, prompts: int, prompt: int, vocabulary: int, **_: object) -> None:
    """Chats of `prompt` tokens whose right answer is 1."""
    rows = token_rows(prompts, prompt, vocabulary)
    write_lines(path, [{"messages": [turn_of("user", row)], "answer": "1"} for row in rows])


def write_pairs(
    path: Path, *, pairs: int, prompt: int, mean: float, longest: int, vocabulary: int, **_: object
) -> None:
    """Preferences: a prompt, then two completions of ragged length, the stop token counted."""
    rows = token_rows(2 * pairs, prompt + longest, vocabulary)
    lengths, records = ragged_lengths(2 * pairs, mean, longest), []
    for i in range(0, 2 * pairs, 2):
        chosen, rejected = (rows[j][prompt : prompt + max(1, lengths[j] - 1)] for j in (i, i + 1))
        sides = {"chosen": [turn_of("assistant", chosen)], "rejected": [turn_of("assistant", rejected)]}
        records.append({"prompt": [turn_of("user", rows[i][:prompt])], **sides})
    write_lines(path, records)


def write_lines(path: Path, records: list[dict]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
