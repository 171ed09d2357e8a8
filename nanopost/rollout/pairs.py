"""Preference pairs and outcome labels from groups of judged candidates, by rules with names.

A rule says which candidate of a group is chosen over which; nothing is drawn at random. Every record keeps
the whole group it comes from in `provenance.candidates`, the rule in `preference_reason`, and all that the
group says of itself: verifier, version, pass rate, sampling parameters. So a pair can be judged again, or
built anew by another rule. Two fields of the group's own make room for the record's: they go on in `meta`,
as `group_preference_reason` and `group_failure_reason`.

Texts count once: of candidates with the same text the first that was not cut stands for all, the first if
all were. A blank text is in no record, because an empty assistant turn cannot be trained on; a cut one may
be rejected and is never chosen, because the model did not stop there. Both stay in the group.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, zip_longest

from nanopost.data.schema import Candidate, Group, Labelled, Message, Preference, Provenance
from nanopost.rollout.select import lengths, named, rights, scores

Places = list[tuple[int, int]]  # (chosen, rejected), places in the group


def right_over_wrong(group: Group, texts: list[int], margin: float) -> Places:
    """The k-th right candidate over the k-th wrong one, in the order they were sampled.

    No completion is used twice, so a group gives min(right, wrong) pairs. Lengths play no part, and the
    margin has no meaning: it must be 0.
    """
    if margin != 0:
        raise ValueError(f"margin must be 0 with right_over_wrong, got {margin}")
    right = rights(group)
    return list(zip([i for i in texts if right[i]], [i for i in texts if not right[i]], strict=False))


def right_and_concise(group: Group, texts: list[int], margin: float) -> Places:
    """Right and concise > right and padded > wrong: the shortest right candidate over the others.

    Chosen is always the shortest right one (the first of equals). A right one is padded when it is longer by
    more than `margin` tokens; right ones within the margin are in no pair. Rejected are, by turns, the
    padded ones from the longest down and the wrong ones in the order they were sampled: the first pair is
    over the longest padded one, the second over the first wrong one. A group without a right one gives none.
    """
    right = rights(group)
    kept = [i for i in texts if right[i]]
    length = lengths(group, kept)
    if not kept:
        return []
    best = min(kept, key=length.__getitem__)
    padded = [i for i in kept if length[i] - length[best] > margin]
    padded.sort(key=length.__getitem__, reverse=True)
    turns = zip_longest(padded, [i for i in texts if not right[i]])
    return [(best, i) for i in chain.from_iterable(turns) if i is not None]


def score(group: Group, texts: list[int], margin: float) -> Places:
    """The k-th highest score that was not cut over the k-th lowest, while they differ by more than `margin`.

    Of equal scores the first sampled counts as the higher. No completion is used twice: the higher go down
    and the lower go up, so where the two would meet nothing is left of the difference.
    """
    value = scores(group)
    ranked = sorted(texts, key=lambda i: -value[i])
    ended = [i for i in ranked if not group.candidates[i].cut]
    return [(a, b) for a, b in zip(ended, reversed(ranked), strict=False) if value[a] - value[b] > margin]


RULES: dict[str, Callable[[Group, list[int], float], Places]] = {
    "right_over_wrong": right_over_wrong,
    "right_and_concise": right_and_concise,
    "score": score,
}


def build_pairs(
    group: Group, *, rule: str, margin: float = 0.0, pairs_per_group: int | None = None
) -> list[Preference]:
    """The preference pairs of a group.

    Args:
        group: candidates with `correct` (the first two rules), `tokens` (right_and_concise), `score` (score).
        rule: a name of `RULES`; each says which pairs come out, and in which order.
        margin: what a difference must exceed: tokens for right_and_concise, score for score.
        pairs_per_group: at most so many, the first ones; None: all of them.
    Returns: pairs, none where the group has no such difference. `provenance` is the group's, with the rule
        as `preference_reason`, the rejected candidate's reason as `failure_reason`, the share of right
        candidates as `pass_rate` where all are judged and the group names none. In its `meta` stand, where
        there are any, the group's answer as `answer` and the group's own two reasons as
        `group_preference_reason` and `group_failure_reason`.
    Raises: ValueError: an unknown rule, a margin below 0, less than one pair a group; `file:line: ...` for a
        candidate that lacks what the rule reads, or a group whose `meta` has such a name already.
    """
    build = named("rule", rule, RULES)
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be finite and at least 0, got {margin}")
    if pairs_per_group is not None and pairs_per_group < 1:
        raise ValueError(f"pairs_per_group must be at least 1, got {pairs_per_group}")
    texts = sorted(i for text, i in _first(group.candidates).items() if text.strip())
    return [
        Preference(
            prompt=group.prompt,
            chosen=_turn(group.candidates[chosen]),
            rejected=_turn(group.candidates[rejected]),
            provenance=_provenance(group, rule, group.candidates[rejected].reason),
            file=group.file,
            line=group.line,
        )
        for chosen, rejected in build(group, texts, margin)[:pairs_per_group]
    ]


def build_labels(group: Group) -> list[Labelled]:
    """One outcome label a candidate, right or wrong, in order: for KTO and outcome reward models.

    Args:
        group: every candidate has `correct`.
    Returns: a label for every text that is not blank, false where it was cut; a text that was sampled twice
        has two, as the policy meant it. `provenance` is the group's as in `build_pairs`, with "outcome" as
        `preference_reason` and the candidate's reason as `failure_reason` where it is wrong.
    Raises: ValueError `file:line: ...`: a candidate that was not judged.
    """
    return [
        Labelled(
            prompt=group.prompt,
            completion=_turn(candidate),
            label=right,
            provenance=_provenance(group, "outcome", None if right else candidate.reason),
            file=group.file,
            line=group.line,
        )
        for candidate, right in zip(group.candidates, rights(group), strict=True)
        if candidate.text.strip()
    ]


def describe_pairs(pairs: Sequence[Preference]) -> str:
    """Mean lengths of chosen and rejected, and how often the longer one is chosen: a length bias shows.

    Returns: one line, in tokens if every completion's are known, else in characters; it says which.
    Raises: ValueError for no pairs.
    """
    if not pairs:
        raise ValueError("describe_pairs: no pairs to count")
    groups = [pair.provenance.candidates for pair in pairs]
    known = [{text: own[i].tokens for text, i in _first(own).items()} for own in groups]
    texts = [(pair.chosen[0].content, pair.rejected[0].content) for pair in pairs]
    tokens = [(of.get(a), of.get(b)) for of, (a, b) in zip(known, texts, strict=True)]
    sizes = [(a, b) for a, b in tokens if a is not None and b is not None]
    unit = "tokens" if len(sizes) == len(pairs) else "characters"
    if unit == "characters":
        sizes = [(len(a), len(b)) for a, b in texts]
    chosen, rejected = sum(a for a, _ in sizes) / len(sizes), sum(b for _, b in sizes) / len(sizes)
    longer, same = sum(a > b for a, b in sizes) / len(sizes), sum(a == b for a, b in sizes) / len(sizes)
    return (
        f"mean {unit}: chosen {chosen:.1f}, rejected {rejected:.1f}; "
        f"chosen is longer in {longer:.1%} of the pairs, as long in {same:.1%}"
    )


def _turn(candidate: Candidate) -> tuple[Message, ...]:
    return (Message("assistant", candidate.text),)


def _first(candidates: Sequence[Candidate]) -> dict[str, int]:
    """For every text the place of the candidate that stands for it: the first, before all cut ones."""
    places = sorted(range(len(candidates)), key=lambda i: bool(candidates[i].cut))
    return {candidates[i].text: i for i in reversed(places)}


def _provenance(group: Group, reason: str, failure: str | None) -> Provenance:
    own, candidates, share = group.provenance, group.candidates, group.provenance.pass_rate
    if share is None and all(candidate.correct is not None for candidate in candidates):
        share = sum(rights(group)) / len(candidates)
    replaced = {"preference_reason": own.preference_reason, "failure_reason": own.failure_reason}
    kept = {"answer": group.answer} | {f"group_{name}": value for name, value in replaced.items()}
    kept = {name: value for name, value in kept.items() if value is not None}
    if clash := sorted(kept.keys() & own.meta.keys()):
        raise ValueError(
            f"{group.file}:{group.line}: meta has {clash[0]!r}, a name that is kept for the group's"
        )
    return replace(
        own,
        preference_reason=reason,
        failure_reason=failure,
        pass_rate=share,
        candidates=candidates,
        meta=own.meta | kept,
    )
