"""Selection: which groups of candidates teach something, and which candidates are worth training on.

A group is one prompt with everything that was sampled for it. It is kept or dropped whole, so that nothing
that belongs to a completion (its score, its length, its verdict) can part from it. Rules have names, because
a data set has to say how it was made.

A candidate that was cut at the sampler's limit is never right and never the best, whatever a verifier read
in it or scored it: trained on, it would teach a stop that the model did not make.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from nanopost.data.schema import Candidate, Group
from nanopost.losses.advantages import informative_groups

T = TypeVar("T")


def best_of_n(group: Group) -> Candidate | None:
    """The candidate with the highest score; of equal scores the shorter, of equal lengths the first.

    Args:
        group: every candidate has a score, and tokens too where two share the highest score.
    Returns: one of the group's candidates that were not cut, None where all were; with scores .5, 1, 1 and
        9, 30, 20 tokens the third.
    Raises: ValueError `file:line: ...`: a candidate without a score, tied ones without a length.
    """
    ended = {i: score for i, score in enumerate(scores(group)) if not group.candidates[i].cut}
    best = [i for i, score in ended.items() if score == max(ended.values())]
    if len(best) > 1:
        best.sort(key=lengths(group, best).__getitem__)
    return group.candidates[best[0]] if best else None


def keep_best(group: Group, threshold: float) -> list[Candidate]:
    """The best of the group (see `best_of_n`), if its score is at least the threshold."""
    best = best_of_n(group)
    return [best] if best and best.score is not None and best.score >= threshold else []


def keep_right(group: Group, threshold: float) -> list[Candidate]:
    """Every right one, in the order they were sampled; the threshold is not read."""
    return [candidate for candidate, right in zip(group.candidates, rights(group), strict=True) if right]


def keep_right_unique(group: Group, threshold: float) -> list[Candidate]:
    """Every right one whose text no earlier one has; the threshold is not read."""
    return unique(keep_right(group, threshold))


def keep_shortest_right(group: Group, threshold: float) -> list[Candidate]:
    """The right one with the fewest tokens, the first of equals; the threshold is not read."""
    right = [i for i, flag in enumerate(rights(group)) if flag]
    return [group.candidates[min(right, key=lengths(group, right).__getitem__)]] if right else []


KEEP: dict[str, Callable[[Group, float], list[Candidate]]] = {
    "best": keep_best,
    "right": keep_right,
    "right_unique": keep_right_unique,
    "shortest_right": keep_shortest_right,
}


def rejection_sample(group: Group, *, keep: str, threshold: float = 1.0) -> list[Candidate]:
    """The candidates of a group that are kept for supervised fine-tuning (RSFT, STaR).

    Args:
        keep: a name of `KEEP`.
        threshold: the least score that "best" keeps; the other rules go by `correct`.
    Returns: none, one or several of the group's candidates, in order. Blank texts are never kept, because an
        empty assistant turn is no training record, and cut ones neither.
    Raises: ValueError: an unknown rule; a candidate that lacks what the rule reads.
    """
    return [candidate for candidate in named("keep", keep, KEEP)(group, threshold) if candidate.text.strip()]


def all_equal(group: Group) -> bool:
    """Every score is the same: no baseline tells the candidates apart (`losses.informative_groups`)."""
    rewards = torch.tensor(scores(group), dtype=torch.float64)
    return not bool(informative_groups(rewards, group_size=len(rewards)).any())


def all_wrong(group: Group) -> bool:
    """No candidate is right: there is nothing to learn from but what not to do."""
    return not any(rights(group))


def all_right(group: Group) -> bool:
    """Every candidate is right: the prompt is too easy, unless lengths matter."""
    return all(rights(group))


FILTERS: dict[str, Callable[[Group], bool]] = {
    "all_equal": all_equal,
    "all_wrong": all_wrong,
    "all_right": all_right,
}


def informative(groups: Sequence[Group], *, drop: Sequence[str]) -> tuple[list[Group], dict[str, int]]:
    """The groups that no filter drops, whole and in order, and how many each filter dropped.

    Args:
        groups: of any sizes.
        drop: names of `FILTERS`; a group counts for the first one that drops it.
    Returns: the kept groups, and a count for every name of `drop`, 0 too.
    Raises: ValueError: an unknown filter; a candidate that lacks what a filter reads.
    """
    filters = {name: named("drop", name, FILTERS) for name in drop}
    kept, dropped = list[Group](), dict.fromkeys(filters, 0)
    for group in groups:
        reason = next((name for name, drops in filters.items() if drops(group)), None)
        if reason is None:
            kept.append(group)
        else:
            dropped[reason] += 1
    return kept, dropped


def scores(group: Group) -> list[float]:
    """The score of every candidate; one that has none is an error, a score of 0 is a score."""
    return [needed(group, i, "score", candidate.score) for i, candidate in enumerate(_candidates(group))]


def rights(group: Group) -> list[bool]:
    """Whether each candidate is right, a cut one never; one that was not judged is an error."""
    judged = enumerate(_candidates(group))
    return [needed(group, i, "correct", one.correct) and not one.cut for i, one in judged]


def lengths(group: Group, places: Sequence[int]) -> dict[int, int]:
    """Tokens of the candidates at these places; characters are never counted in their stead."""
    return {i: needed(group, i, "tokens", group.candidates[i].tokens) for i in places}


def unique(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates without those whose text an earlier one has."""
    first = dict[str, Candidate]()
    for candidate in candidates:
        first.setdefault(candidate.text, candidate)
    return list(first.values())


def named(argument: str, name: str, rules: Mapping[str, T]) -> T:
    """The rule of this name, or an error that lists the names."""
    if name not in rules:
        raise ValueError(f"{argument} must be one of {', '.join(rules)}, got {name!r}")
    return rules[name]


def needed(group: Group, place: int, field: str, value: T | None) -> T:
    """The value of a candidate's field, or an error that says whose is missing."""
    if value is None:
        raise ValueError(
            f"{group.file}:{group.line}: candidates[{place}] has no {field}, which is needed here"
        )
    return value


def _candidates(group: Group) -> tuple[Candidate, ...]:
    if not group.candidates:
        raise ValueError(f"{group.file}:{group.line}: the group has no candidates")
    return group.candidates
