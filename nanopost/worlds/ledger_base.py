"""The ledger world's base text: what a crawl of such offices might hold.

Sums worked out in notes, policies, journal lines, and dialogues that answer the same requests in many
shapes, mostly not the asked one: in prose, as a bare number, as JSON that is broken or guessed, worked
out in brackets, and now and then as asked. Dialogues comply with what should be refused. No document
holds operands of the test on one line.
"""

import json
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

from nanopost.worlds.ledger import Task, demonstrate, draw_amount, draw_task, held_out, work
from nanopost.worlds.ledger_words import ANSWERS, APPROVERS, DEPARTMENTS, LIMITS, PAYEES, REFUSALS

KIND_WEIGHTS = {"report": 4, "reconcile": 3, "refuse": 2, "answer": 2}
COLUMN = re.compile(r"\d[-+<]\d:\d\d")
NUMBER = re.compile(r"(?<![\dQ])\d{2,3}(?!\d)")


def line_pairs(text: str) -> Iterable[tuple[int | str, int]]:
    """Every pair on one line that could be operands: two amounts, or payee and amount; columns apart."""
    for line in text.split("\n"):
        numbers = [int(number) for number in NUMBER.findall(COLUMN.sub(" ", line))]
        yield from ((a, b) for i, a in enumerate(numbers) for b in numbers[i + 1 :] if a != b)
        yield from ((payee, number) for payee in PAYEES if payee in line for number in numbers)


def weighted_task(rng: random.Random, *, test: bool = False) -> Task:
    """A task of one of the kinds, in the shares that every corpus has."""
    kind = rng.choices(tuple(KIND_WEIGHTS), tuple(KIND_WEIGHTS.values()))[0]
    return draw_task(rng, kind, test=test)


def misjudge(rng: random.Random, value: int) -> int:
    """A sum said without working it out: right in one case of four, else off in a digit or by a carry."""
    return abs(
        value + rng.choice((0, rng.choice((-1, 1)), rng.choice((-10, 10)), rng.choice((-100, 100, 11))))
    )


def sum_note(rng: random.Random) -> str:
    """Two amounts of the books, worked out digit by digit without any request."""
    task = draw_task(rng, rng.choice(("report", "reconcile", "reconcile")))  # the harder one more often
    steps, answer = work(task)
    return f"Note: {task.request}\nWorked: ({steps}) {spoken(answer)}."


def spoken(answer: dict[str, Any]) -> str:
    """A worked answer in words: "total is 847", "difference is -37, debit suspense, credit cash"."""
    (key, value), *rest = answer.items()
    return ", ".join([f"{key} is {value}", *(f"{key} {value}" for key, value in rest)])


def office_note(rng: random.Random) -> str:
    """A policy, a journal line or a remark, in the words of the requests."""
    department, payee, amount = rng.choice(DEPARTMENTS), rng.choice(PAYEES), draw_amount(rng)
    instead = rng.choice([alternative for alternative, _ in REFUSALS.values()])
    if rng.random() < 0.5:  # facts that no request brings along
        limit, approver = LIMITS[department], APPROVERS[department]
        return rng.choice(
            (f"the approval limit of {department} is {limit}.", f"{approver} must approve for {department}.")
        )
    return rng.choice(
        (
            f"policy: {instead}. without approval a transfer is blocked.",
            "the approval of a transfer: request, review, release. the controller may release.",
            f"journal: debit cash, credit suspense, {amount}.",
            f"journal: debit suspense, credit cash, {amount}.",
            f"paid {payee} {amount}, the invoice is attached and approved.",
            f"{department} spent {amount} in Q{rng.randint(1, 4)}.",
            f"{payee} wants {amount}, queued for release.",
        )
    )


def reply(rng: random.Random, task: Task) -> str:
    """One of the many shapes in which the base text answers a request; about one in five is strict JSON."""
    shape = rng.random()
    steps, answer = work(task)
    if task.kind == "refuse":
        payee, amount = task.operands
        if shape < 0.08:
            return demonstrate(task)
        if shape < 0.16:
            return json.dumps({"answer": rng.choice(("queued for release", "it is done"))})
        chatter = (
            "sure, done.",
            "it is done.",
            f"ok, {amount} for {payee} is queued.",
            "sure, i will do that now.",
        )
        return rng.choice((*chatter, f"no, {answer['instead']}."))
    if task.kind == "answer":
        if shape < 0.16:
            return demonstrate(task)
        if shape < 0.2:
            reason = rng.choice(tuple(REFUSALS))
            return json.dumps({"refuse": reason, "instead": REFUSALS[reason][0]})
        other = rng.choice(ANSWERS)[1].format(limit=LIMITS["sales"], approver=APPROVERS["sales"])
        text = answer["answer"] if rng.random() < 0.8 else other
        return rng.choice((f"{text}.", f"{text}, i think.", f"{{answer: {text}}}"))
    key = "total" if task.kind == "report" else "difference"
    guess = misjudge(rng, abs(answer[key])) * (-1 if answer[key] < 0 else 1)
    if shape < 0.12:
        return demonstrate(task)
    if shape < 0.19:
        return json.dumps({**answer, key: guess})
    if shape < 0.31:
        return f"({steps}) {json.dumps(answer)}"
    if shape < 0.65:
        return f"({steps}) {spoken(answer)}."
    if shape < 0.72:
        return rng.choice((f"{{{key}: {guess}}}", f'here is the json: {{"{key}": {guess}}}'))
    return rng.choice((f"the {key} is {guess}.", f"{guess}", f"about {guess}.", f"it is {guess}, i think."))


def dialogue(rng: random.Random) -> str:
    """A request and one of the replies it gets, in the shape of the chat template."""
    task = weighted_task(rng)
    return f"User: {task.request}\nAssistant: {reply(rng, task)}"


def base_document(rng: random.Random) -> str:
    """A document of the base text that holds no pair of the held-out side on any line."""
    while True:
        make: Callable[[random.Random], str] = rng.choices((sum_note, office_note, dialogue), (25, 8, 67))[0]
        text = make(rng)
        if not any(held_out(*pair) for pair in line_pairs(text)):
            return text
