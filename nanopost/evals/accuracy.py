"""Accuracy: the numbers of a stage's row, counted from verdicts and rollouts.

A world's verifier says in `Verdict.parts` what each completion is (0 or 1 a part); these functions only
count. A rate over nothing is no number: an empty denominator is an error that names it, not 0 and not 1.
"""

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
