"""Accuracy: the numbers of a stage's row, counted from verdicts and rollouts.

A world's verifier says in `Verdict.parts` what each completion is (0 or 1 a part); these functions only
count. A rate over nothing is no number: an empty denominator is an error that names it, not 0 and not 1.
"""

import math
from collections.abc import Sequence

from nanopost.rewards.verdict import Verdict
from nanopost.rollout.types import Rollout


def rate(verdicts: Sequence[Verdict], part: str) -> float:
    """The share of the verdicts in which a part holds: `json`, `exact`, `worked`, …

    Returns: a number in [0, 1].
    Raises: ValueError when there are no verdicts, one lacks the part, or its value is neither 0 nor 1.
    """
    return ratio(sum(flags(verdicts, part)), len(verdicts), f"{part}: no verdicts to count")


def refusal_precision(verdicts: Sequence[Verdict]) -> float:
    """Of the refusals made, the share that was due; what is missing to 1 is over-refusal.

    Returns: a number in [0, 1] from the parts `refused` and `due`: 3 refusals made, 2 of them due give 2/3.
    Raises: ValueError when no refusal was made: precision is then undefined, whatever was due.
    """
    made, due = flags(verdicts, "refused"), flags(verdicts, "due")
    right = sum(a and b for a, b in zip(made, due, strict=True))
    return ratio(right, sum(made), f"refusal_precision: no refusal was made in {len(verdicts)} completions")


def refusal_recall(verdicts: Sequence[Verdict]) -> float:
    """Of the refusals due, the share that was made; what is missing to 1 is under-refusal.

    Returns: a number in [0, 1] from the parts `refused` and `due`: 4 refusals due, 2 of them made give 1/2.
    Raises: ValueError when no refusal was due.
    """
    made, due = flags(verdicts, "refused"), flags(verdicts, "due")
    right = sum(a and b for a, b in zip(made, due, strict=True))
    return ratio(right, sum(due), f"refusal_recall: no refusal was due in {len(verdicts)} completions")


def mean_length(rollouts: Sequence[Rollout]) -> float:
    """Mean tokens of a completion, a sampled stop token included."""
    tokens = sum(len(rollout.completion_ids) for rollout in rollouts)
    return ratio(tokens, len(rollouts), "mean_length: no rollouts to count")


def pass_at_k(samples: int, correct: int, *, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a correct one.

        pass@k = 1 − C(n − c, k) / C(n, k)

    n are the samples of one prompt and c the correct ones among them. When each sample is right with chance
    p, the mean of this number is exactly `best_of_k(p)`; 1 − (1 − c/n)^k is on average too low.

    Returns: a number in [0, 1], c/n for k = 1; whole numbers until one division, so right to the last bit.
    Raises: ValueError unless 0 ≤ c ≤ n and 1 ≤ k ≤ n: nobody knows the pass@8 of 4 samples.
    Reference: Chen et al. 2021, eq. 1.
    Page: docs/losses/pass_at_k.md
    """
    for name, value, low, high in (("correct", correct, 0, samples), ("k", k, 1, samples)):
        if not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}] with {samples} samples, got {value}")
    ways = math.comb(samples, k)
    return (ways - math.comb(samples - correct, k)) / ways


def best_of_k(p: float, *, k: int) -> float:
    """The chance that the best of k independent samples is correct, each being so with chance p.

        1 − (1 − p)^k

    Returns: a number in [0, 1], accurate also for the smallest p: p = .2 and k = 5 give .67232.
    Raises: ValueError unless 0 ≤ p ≤ 1 and k ≥ 1.
    Page: docs/losses/pass_at_k.md
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return 1.0 if p == 1.0 else -math.expm1(k * math.log1p(-p))


def flags(verdicts: Sequence[Verdict], part: str) -> list[bool]:
    """A part of every verdict, as truth values."""
    for i, verdict in enumerate(verdicts):
        if verdict.parts.get(part) not in (0, 1):
            found = verdict.parts.get(part, f"not among {sorted(verdict.parts)}")
            raise ValueError(f"verdicts[{i}]: the part {part!r} must be 0 or 1, it is {found}")
    return [verdict.parts[part] == 1 for verdict in verdicts]


def ratio(count: float, total: int, problem: str) -> float:
    """count / total; `problem` is the error when there is nothing to divide by."""
    if total == 0:
        raise ValueError(problem)
    return count / total
