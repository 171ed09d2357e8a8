"""Preflight on what will be read: records, samples, the chat they are written in, what a verifier says.

Every check is a function that says what it saw as a `Check`. A fault names the row and what to do about it.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from nanopost.data.chat import Chat, encode, render
from nanopost.data.chat_files import read_json, token_id
from nanopost.data.schema import Message, Record, Sample
from nanopost.evals.verifier import RIGHT_PARTS, Verifier, judge
from nanopost.rewards.verdict import Unverified, Verdict

BUDGET = 1.0  # seconds for a verifier's calls
FORMS = ("{}", r"\boxed{{{}}}", "#### {}")  # of a gold answer
GENERATION = ("generation_config.json", "config.json")  # who names stop ids, the first one first
PROBE = (Message("user", "a"), Message("assistant", "an answer"))
SLOW, ODD = 0.1, 0.2  # seconds a call, and a mean score of other rows' answers, that are worth a word


@dataclass(frozen=True)
class Check:
    """What one check saw; `fix` says what to do where that is a fault or a risk."""

    name: str
    outcome: Literal["pass", "warn", "fail", "n/a"]
    told: str
    fix: str = ""


def rows(path: str | Path, items: Sequence[Any]) -> Check:
    """Every row parses and every role is known: reading refuses what is not so, by file and line."""
    return Check("rows", "pass", f"{path} was read to its end: {len(items)} items, every role is known")


def supervised(samples: Sequence[Sample]) -> Check:
    """At least one token of every sample is trained on; too long samples are left out before, never cut."""
    empty = [sample.place for sample in samples if not any(sample.mask)]
    if empty:
        told = f"{empty[0]}: no token is trained on; so in {len(empty)} of {len(samples)} samples"
        return Check("supervised", "fail", told, "give the record an assistant turn, or leave it out")
    trained, tokens = (sum(n) for n in zip(*((sum(s.mask), len(s.ids)) for s in samples), strict=True))
    return Check("supervised", "pass", f"{trained:,} of {tokens:,} tokens of {len(samples)} samples")


def stop_tokens(chat: Chat, samples: Sequence[Sample]) -> Check:
    """What is trained on in one piece ends with its only stop token; a text, which has no prompt, ends with
    one or with EOS."""
    stops = set(chat.stop_ids)
    ends = stops if chat.eos_token is None else stops | {token_id(chat.tokenizer, chat.eos_token)}
    targets = 0
    for sample in samples:
        for found in re.finditer(rb"\x01+", bytes(sample.mask)):
            target, text = sample.ids[slice(*found.span())], found.start() <= 1
            count, last = sum(map(stops.__contains__, target)), target[-1]
            targets += 1
            if last not in (ends if text else stops) or (count != 1 and not text):
                said = f"{count} stop tokens in what is trained on, its last is"
                told = f"{sample.place}: {said} {chat.tokenizer.id_to_token(last)!r}"
                fix = "the template must end a turn with one stop token, and the mask must have it"
                return Check("stop token", "fail", told, fix)
    if not targets:
        return Check("stop token", "n/a", "no answer has ended by itself")
    return Check("stop token", "pass", f"{targets} targets, each ends with its only one, which is trained on")


def bos(chat: Chat, samples: Sequence[Sample]) -> Check:
    """At most one BOS a sample; two at the beginning are a fault whatever the template does later."""
    if chat.bos_token is None:
        return Check("bos", "n/a", "the tokenizer names no BOS")
    one, told = token_id(chat.tokenizer, chat.bos_token), f"{chat.bos_token!r}"
    several = [sample for sample in samples if sample.ids.count(one) > 1]
    if twice := [sample.place for sample in several if sample.ids[:2] == (one, one)]:
        told = f"{twice[0]}: begins with {told} twice; so do {len(twice)} of {len(samples)} samples"
        return Check("bos", "fail", told, "the template writes BOS: take it out of the text")
    if several and one not in chat.stop_ids and chat.bos_token not in (chat.template or ""):
        told = f"{several[0].place}: {told} more than once; so in {len(several)} of {len(samples)} samples"
        return Check("bos", "warn", told, "fine if the template writes it before every turn")
    return Check("bos", "pass", f"{told} at most once at the beginning of {len(samples)} samples")


def history(samples: Sequence[Sample]) -> Check:
    """What a later turn's sample begins with is the earlier turn's; else each needs a sample of its own."""
    pairs = [(a, b) for a, b in pairwise(samples) if a.place == b.place != ""]
    if not pairs:
        return Check("history", "n/a", "every record has one turn to train on")
    if anew := [b.place for a, b in pairs if b.ids[: len(a.ids)] != a.ids]:
        told = f"{anew[0]}: the template writes earlier turns anew; so in {len(anew)} of {len(pairs)} pairs"
        return Check("history", "warn", told, "nothing to do: here each turn is a sample of its own")
    return Check("history", "pass", f"of {len(pairs)} pairs of turns the later begins with the earlier")


def stop_ids(chat: Chat) -> Check:
    """The sampler stops at what the template ends a turn with, and at what the folder's files name."""
    name, stops, decoder = "stop ids", chat.stop_ids, chat.tokenizer.get_added_tokens_decoder()
    said = {file: read_json(chat.folder / file).get("eos_token_id") for file in GENERATION}
    ids = {file: {*found} if isinstance(found, list) else {found} - {None} for file, found in said.items()}
    told = f"the sampler stops at {', '.join(f'{i} {chat.tokenizer.id_to_token(i)!r}' for i in stops)}"
    if chat.template is not None:
        try:
            text = render(chat, PROBE, add_generation_prompt=False)
        except ValueError as error:
            return Check(name, "n/a", f"{told}; the template refuses two short turns: {error}")
        behind = encode(chat, text.rpartition(PROBE[-1].content)[2])
        end = next((i for i in behind if i in stops or (i in decoder and decoder[i].special)), None)
        if end not in stops:
            turn, fix = "no control token", "let the template end a turn with a stop token"
            if end is not None:
                turn = f"{end} {chat.tokenizer.id_to_token(end)!r}"
                fix = f"add {end} to eos_token_id of {chat.folder / GENERATION[0]}"
            return Check(name, "fail", f"{told}, the template ends a turn with {turn}", fix)
    if all(ids.values()) and (more := ids[GENERATION[1]] - ids[GENERATION[0]]):
        told = f"{told}; {GENERATION[1]} also names {sorted(more)}"
        return Check(name, "warn", told, f"write the same eos_token_id into {' and '.join(GENERATION)}")
    return Check(name, "pass", told)


def verifier(verify: Verifier, records: Sequence[Record]) -> Check:
    """A record's own answer is right, another's is not, none at all is worth nothing; and how long it takes.

    Args:
        verify: looks at as many records, spread evenly, as `BUDGET` seconds allow.
        records: a gold completion is the last assistant turn, else the answer as text, boxed or behind ####.
    """
    name, others, apart, calls, begun = "verifier", list[float](), list[str](), 0, time.perf_counter()
    looked = [records[i] for i in evenly(len(records), 512)]
    for n, record in enumerate(looked):
        place, golds = f"{record.file}:{record.line}", gold_texts(record)
        found = [judge(verify, text, record.answer) for text in ("", *golds)]
        if failed := [verdict.reason for verdict in found if verdict.score is None]:
            told = f"{place}: no verdict on its own answer, or on an empty one: {failed[0]}"
            return Check(name, "fail", told, "mend the verifier: such answers have no reward")
        right = list(map(worth, found[1:]))
        if 1 not in right:
            told = f"{place}: its own answer scores {max(right):g}, not 1 ({golds[0][-60:]!r})"
            return Check(name, "fail", told, "correct the record's answer, or take another verifier")
        if (found[0].score or 0.0) > 0:
            told = f"{place}: an empty answer scores {found[0].score:g}"
            return Check(name, "fail", told, "a verifier that pays for nothing is what the policy will find")
        if right[0] != 1 and len(golds) > len(FORMS):
            apart.append(place)
        if (other := looked[n - 1]).answer != record.answer:
            theirs, form = gold_texts(other), right.index(1) - len(golds)  # in the form that was right here
            others.append(judge(verify, theirs[max(form, -len(theirs))], record.answer).score or 0.0)
        calls += 2 + len(golds)
        if (spent := time.perf_counter() - begun) > BUDGET:
            break
    mean, each = sum(others) / max(1, len(others)), spent / calls
    told = f"gold 1, other rows' gold {mean:.2g}, empty 0 on {n + 1} rows; {each * 1e3:.2g} ms a call"
    if apart:
        told = f"{apart[0]}: its last assistant turn is not right by its own answer; so in {len(apart)} rows"
        return Check(name, "warn", told, "correct the turn or the answer")
    if not others or mean > ODD:
        what = "other rows' answers score" if others else "the answers of all rows are the same"
        return Check(name, "warn", f"{told}: {what}", "see that a policy is not paid for what solves nothing")
    if each > SLOW:
        return Check(name, "warn", told, "a slow verifier holds up every step: make it quicker")
    return Check(name, "pass", told)


def gold_texts(record: Record) -> list[str]:
    """What would be right: the record's own last assistant turn, and its answer in the usual forms."""
    text = record.answer if isinstance(record.answer, str) else json.dumps(record.answer)
    own = [m.content for m in record.messages[-1:] if m.role == "assistant"]
    return [*own, *(form.format(text) for form in FORMS)]


def worth(verdict: Verdict | Unverified) -> float:
    """Whether a verdict says right, by its part of that name; its score where it has none."""
    return next((verdict.parts[part] for part in RIGHT_PARTS if part in verdict.parts), verdict.score or 0.0)


def evenly(count: int, most: int) -> list[int]:
    """At most so many places of a list, spread evenly."""
    return [i * count // min(count, most) for i in range(min(count, most))]


def bracketed(chat: Chat, sample: Sample) -> str:
    """A sample on one line, every token that is trained on in brackets of its own."""
    shown, rest = "", list[int]()

    def text(ids: list[int]) -> str:
        read = chat.tokenizer.decode(ids, skip_special_tokens=False)
        if "\ufffd" in read:  # a part of a character
            read = "".join(chat.tokenizer.id_to_token(i) or "" for i in ids)
        return read.replace("\n", "\\n")

    for token, trained in zip(sample.ids, sample.mask, strict=True):
        if trained:
            shown, rest = f"{shown}{text(rest)}[{text([token])}]", []
        else:
            rest.append(token)
    return shown + text(rest)
