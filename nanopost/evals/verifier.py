"""A verifier by its name, what its verdict says of right and wrong, and what is done where it fails."""

import math
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopost import distributed, metrics
from nanopost.rewards.verdict import Unverified, Verdict

Verifier = Callable[[str, Any], Verdict]  # completion, the record's answer
SECONDS = 10.0  # a call that takes longer hangs
LATE = "no verdict after"
SHARE, LEAST = 0.05, 100  # how many may fail, of the last ones; and of how many at least
SHORT = {  # by the names that --verifier of the scripts has
    "gsm8k": "nanopost.rewards.math:gsm8k",
    "math": "nanopost.rewards.math:math_reward",
    "ledger": "nanopost.worlds.ledger:verify",
}
RIGHT_PARTS = ("correct", "exact")  # the part of a verdict that says whether a completion is right


def load_verifier(name: str) -> tuple[Verifier, str | None]:
    """The function that MODULE:FUNCTION or a short name says, and its package's version, if that has one.

    Raises: ValueError for another form, a module that is not there, a name in it that is no function.
    """
    module, _, function = SHORT.get(name, name).partition(":")
    if not (module and function):
        raise ValueError(f"verifier must be one of {', '.join(SHORT)} or MODULE:FUNCTION, got {name!r}")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"verifier={name!r}: {error}") from error
    verify = getattr(found, function, None)
    if not callable(verify):
        raise ValueError(f"verifier={name!r}: the module {module} has no function {function!r}")
    return verify, getattr(import_module(module.split(".")[0]), "__version__", None)


def is_right(verdict: Verdict) -> bool:
    """Whether a verdict says right: its part `correct`, else its part `exact`, is 1.

    Raises: ValueError when it has neither, or one that is neither 0 nor 1.
    """
    value = next((verdict.parts[part] for part in RIGHT_PARTS if part in verdict.parts), None)
    if value not in (0, 1):
        raise ValueError(
            f"a verdict says whether it is right by a part {' or '.join(RIGHT_PARTS)} of 0 or 1, "
            f"this one has {dict(verdict.parts)}"
        )
    return value == 1


def rewarded(verify: Verifier | None, *, reward_model: Path | None = None) -> Verifier:
    """The verifier of a run whose reward a reward model may give: its own score then is a part, `verified`.

    Args:
        verify: None where there is none; a verdict has no parts then and its score is the reward model's.
        reward_model: None where there is none.

    Raises:
        ValueError: neither is given. The verifier returned raises it for an answer that is None.
    """
    if verify is None and reward_model is None:
        raise ValueError("verifier or reward_model must be given: nothing else tells a good answer")

    def reward(completion: str, answer: Any) -> Verdict:
        if verify is None:
            return Verdict(0.0, {}, "no verifier: the score is the reward model's")
        if answer is None:
            raise ValueError("no answer to verify against")
        verdict = verify(completion, answer)
        if reward_model is None:
            return verdict
        return replace(verdict, parts={"verified": verdict.score, **verdict.parts})

    return reward


def judge(verify: Verifier, completion: str, answer: Any) -> Verdict | Unverified:
    """A verdict, or why there is none: the verifier raised, or hung. That is no reward, also none of 0.

    Python code is interrupted after `SECONDS`, by SIGALRM; a call that hangs in C is not. A timer of the
    caller's own begins anew behind it.

    Raises:
        ValueError: this is not the main thread, which alone gets the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("judge: a verifier's time is limited by SIGALRM, which only the main thread gets")
    told, rung = f"{LATE} {SECONDS:g} s", list[int]()

    def ring(number: int, _: Any) -> None:
        rung.append(number)
        raise TimeoutError(told)

    before, timer = signal.signal(signal.SIGALRM, ring), (0.0, 0.0)
    try:
        timer = signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
        verdict = verify(completion, answer)
        if rung:  # it caught the exception, and made something of it
            return Unverified(told)
        return verdict if isinstance(verdict, Verdict) else Unverified(f"it returned {verdict!r}, no Verdict")
    except Exception as error:
        return Unverified(told if rung else f"{type(error).__name__}: {error}")
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def judge_all(
    verify: Verifier, completions: Sequence[str], answers: Sequence[Any]
) -> list[Verdict | Unverified]:
    """What `judge` says to each completion, in their order.

    A verifier that has hung more often than may be is not asked again: ten seconds an answer, and the other
    ranks would take this one for dead.
    """
    found, hung = list[Verdict | Unverified](), 0
    most = SHARE * max(LEAST, len(completions) * distributed.world_size())
    for completion, answer in metrics.progress(list(zip(completions, answers, strict=True)), desc="verify"):
        if hung > most:
            found.append(Unverified(f"not asked: it hung {hung} times"))
            continue
        found.append(judge(verify, completion, answer))
        hung += found[-1].score is None and found[-1].reason.startswith(LATE)
    return found


def failures(verdicts: Sequence[Verdict | Unverified]) -> tuple[float, float, str]:
    """How many verdicts there are on all ranks, how many are none, and the first reason. Every rank calls."""
    reasons = [verdict.reason for verdict in verdicts if verdict.score is None]
    asked, failed = distributed.all_sum([len(verdicts), len(reasons)])
    return asked, failed, next(iter(distributed.join_rows(reasons[:1])), "")


def check_verdicts(
    verdicts: Sequence[Verdict | Unverified], recent: list[tuple[float, float]], *, some: bool = True
) -> None:
    """Tell how many have none, and end the run where these are too many. Every rank calls.

    Args:
        verdicts: this rank's new ones.
        recent: how many earlier calls were given and how many of them failed; it is kept here.
        some: at least one of these must be there, on any rank: else there is nothing to learn from.
    Raises:
        RuntimeError: of the last calls, as many as hold `LEAST` verdicts, more than 5 % have failed; or all
            of this one.
    """
    asked, failed, first = failures(verdicts)
    recent.append((asked, failed))
    while sum(count for count, _ in recent[1:]) >= LEAST:
        recent.pop(0)
    all_asked, all_failed = (sum(column) for column in zip(*recent, strict=True))
    if failed:
        told = f"{failed:.0f} of {asked:.0f} answers have no verdict, and so no reward (first: {first})"
        mend = "mend the verifier and go on with --resume"
        if all_failed > SHARE * max(LEAST, all_asked):
            over = f"{all_failed:.0f} of the last {all_asked:.0f}, more than {SHARE:.0%} must not"
            raise RuntimeError(f"{told}; {over}: {mend}")
        if some and failed == asked:
            raise RuntimeError(f"{told}: nothing can be learnt from; {mend}")
        distributed.main_print(told)


def rewards_of(verdicts: Sequence[Verdict | Unverified], *, group_size: int = 0) -> Tensor:
    """Their scores, (N,), float64.

    Args:
        verdicts: where one is missing, its score is NaN.
        group_size: G, of adjacent rows that are compared: a missing score is then that of the group's first
            row with one, which differs from none; 0 where the group has none. 0: no groups, NaN stays.
    """
    scores = [verdict.score for verdict in verdicts]
    for start in range(0, len(scores), group_size) if group_size else ():
        group = scores[start : start + group_size]
        first = next((score for score in group if score is not None), 0.0)
        scores[start : start + group_size] = [first if score is None else score for score in group]
    return torch.tensor([math.nan if x is None else x for x in scores], dtype=torch.float64)
