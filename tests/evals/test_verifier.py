"""A verifier by its name, what its verdict says of right and wrong, and what is done where it fails."""

import math
import runpy
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nanopost import __version__
from nanopost.evals import verifier
from nanopost.evals.verifier import (
    SHORT,
    check_verdicts,
    is_right,
    judge,
    judge_all,
    load_verifier,
    rewarded,
    rewards_of,
)
from nanopost.losses import informative_groups
from nanopost.rewards.math import gsm8k
from nanopost.rewards.verdict import Unverified, Verdict
from tests.ranks import ROOT


def test_right_is_a_part_of_the_verdict() -> None:
    assert is_right(Verdict(0.1, {"correct": 1.0}, "")) and not is_right(Verdict(1.0, {"exact": 0.0}, ""))
    assert not is_right(Verdict(1.0, {"exact": 1.0, "correct": 0.0}, ""))
    for parts in ({"json": 1.0}, {"correct": 0.5}):
        with pytest.raises(ValueError, match="by a part correct or exact of 0 or 1, this one has"):
            is_right(Verdict(1.0, parts, ""))


def test_a_verifier_is_found_by_its_name() -> None:
    assert load_verifier("nanopost.rewards.math:gsm8k") == (gsm8k, __version__)
    assert load_verifier("math:sqrt") == (math.sqrt, None)  # a module without a version


def test_short_names_are_those_of_the_scripts() -> None:
    for script in ("train_grpo.py", "train_ppo.py"):
        names = runpy.run_path(str(ROOT / script), run_name="read")["VERIFIERS"]
        assert {*names} == {*SHORT}
        for name, function in names.items():
            assert load_verifier(name) == (function, __version__)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "verifier must be one of gsm8k, math, ledger or MODULE:FUNCTION, got 'maths'"),
        ("nanopost.rewards.math:", "verifier must be one of .* got 'nanopost.rewards.math:'"),
        ("nanopost.rewards.nothing:gsm8k", "verifier='nanopost.rewards.nothing:gsm8k': No module named"),
        ("nanopost.rewards.math:nothing", "the module nanopost.rewards.math has no function 'nothing'"),
        ("nanopost.rewards.math:TOLERANCE", "has no function 'TOLERANCE'"),
    ],
)
def test_a_verifier_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_verifier(name)


def exact(completion: str, answer: str) -> Verdict:
    return Verdict(float(completion == answer), {"right": float(completion == answer)}, "compared")


def test_the_verifiers_score_is_a_part_where_a_reward_model_scores(tmp_path):
    assert rewarded(exact, reward_model=None)("a", "a") == exact("a", "a")
    verdict = rewarded(exact, reward_model=tmp_path)("a", "b")
    assert verdict.parts == {"verified": 0.0, "right": 0.0}
    alone = rewarded(None, reward_model=tmp_path)("a", None)
    assert not alone.parts and "no verifier" in alone.reason
    with pytest.raises(ValueError, match="no answer to verify against"):
        rewarded(exact, reward_model=tmp_path)("a", None)
    assert rewarded(exact, reward_model=None)("0", 0).score == 0.0  # an answer of 0 is an answer
    with pytest.raises(ValueError, match="verifier or reward_model must be given"):
        rewarded(None, reward_model=None)


def only(step: list[str | float]):
    """A verifier that does what a list says, a word a call: a score, an error, or a loop without end."""
    steps = iter(step)

    def verify(completion: str, answer: str) -> Verdict:
        match next(steps):
            case "raises":
                raise ZeroDivisionError("by zero")
            case "hangs":
                while True:
                    pass
            case "hangs and hides it":
                try:
                    while True:
                        pass
                except Exception:
                    return Verdict(0.0, {}, "wrong")
            case score:
                return Verdict(score, {}, "")

    return verify


def test_what_raises_or_hangs_has_no_verdict_and_never_a_zero(monkeypatch):
    monkeypatch.setattr(verifier, "SECONDS", 0.02)
    before = signal.getsignal(signal.SIGALRM)
    verify = only([1.0, "raises", "hangs", "hangs and hides it", math.nan, 0.0])
    found = [judge(verify, "", "") for _ in range(6)]
    assert [verdict.score for verdict in found] == [1.0, None, None, None, None, 0.0]
    assert [verdict.reason for verdict in found[1:5]] == [
        "ZeroDivisionError: by zero",
        "no verdict after 0.02 s",
        "no verdict after 0.02 s",
        "ValueError: score must be finite, got nan",
    ]
    assert not found[1].parts and isinstance(found[1], Unverified)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before
    with pytest.raises(KeyboardInterrupt):  # who wants to leave, leaves
        judge(interrupted, "", "")


def test_a_verifier_that_hangs_is_not_asked_for_ever(monkeypatch):
    """Six of what is less than a hundred: the run ends anyway, and no rank waits for the rest."""
    monkeypatch.setattr(verifier, "SECONDS", 0.01)
    asked = []

    def verify(completion: str, answer: str) -> Verdict:
        asked.append(completion)
        while completion != "a":
            pass
        return Verdict(1.0, {}, "")

    found = judge_all(verify, ["a", *"bcdefgh", "a"], [""] * 9)
    assert [verdict.score for verdict in found] == [1.0, *[None] * 8] and asked == [*"abcdefg"]
    assert found[6].reason == "no verdict after 0.01 s" and found[7].reason == "not asked: it hung 6 times"


def test_what_is_no_verdict_is_none():
    found = judge(lambda completion, answer: 1.0, "", "")
    assert found == Unverified("it returned 1.0, no Verdict")


def test_a_timer_of_ones_own_goes_on_behind_a_verdict():
    signal.setitimer(signal.ITIMER_REAL, 50.0)
    try:
        judge(only([1.0]), "", "")
        assert 40.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def test_another_thread_gets_no_signal_and_is_told():
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="which only the main thread gets"):
        pool.submit(judge, only([1.0]), "", "").result()


def interrupted(completion: str, answer: str) -> Verdict:
    raise KeyboardInterrupt


def verdicts(good: int, bad: int) -> list[Verdict | Unverified]:
    return [*[Unverified("gone")] * bad, *[Verdict(0.0, {}, "")] * good]


def test_a_few_failures_are_told_and_more_end_the_run(capsys):
    recent: list[tuple[float, float]] = []
    check_verdicts(verdicts(8, 0), recent)
    assert not capsys.readouterr().out
    for _ in range(5):  # five of what is less than a hundred may fail
        check_verdicts(verdicts(7, 1), recent)
    told = capsys.readouterr().out.splitlines()
    assert told == ["1 of 8 answers have no verdict, and so no reward (first: gone)"] * 5
    with pytest.raises(RuntimeError, match=r"1 of 8 .*gone.*; 6 of the last 56, more than 5% must not"):
        check_verdicts(verdicts(7, 1), recent)


def test_old_answers_do_not_hide_a_verifier_that_broke():
    recent: list[tuple[float, float]] = []
    check_verdicts(verdicts(10_000, 0), recent)
    check_verdicts(verdicts(90, 5), recent)
    check_verdicts(verdicts(95, 5), recent)  # 5 of 100, the older calls are forgotten
    with pytest.raises(RuntimeError, match="6 of the last 100"):
        check_verdicts(verdicts(94, 6), recent)
    check_verdicts(verdicts(1000, 50), recent := [])
    with pytest.raises(RuntimeError, match="51 of the last 1000"):
        check_verdicts(verdicts(949, 51), recent)


def test_a_batch_without_any_verdict_teaches_nothing():
    with pytest.raises(RuntimeError, match=r"2 of 2 answers have no verdict.*: nothing can be learnt from"):
        check_verdicts(verdicts(0, 2), [])
    check_verdicts(verdicts(0, 2), [], some=False)  # an evaluation of two rows is no more than that


def test_rewards_are_scores_and_a_missing_one_differs_from_none():
    found = [Verdict(0.0, {}, ""), Unverified(""), Unverified(""), Verdict(1.0, {}, ""), *verdicts(0, 2)]
    rewards = rewards_of(found)
    assert rewards.dtype == torch.float64 and rewards.isnan().tolist() == [
        False,
        True,
        True,
        False,
        True,
        True,
    ]
    assert rewards_of(found, group_size=2).tolist() == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert not informative_groups(rewards_of(found, group_size=2), group_size=2).any()
    wide = rewards_of(found[:4], group_size=4)
    assert informative_groups(wide, group_size=4).all() and wide.tolist() == [0.0, 0.0, 0.0, 1.0]
