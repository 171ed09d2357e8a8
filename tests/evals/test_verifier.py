"""A verifier by its name, and what its verdict says of right and wrong."""

import math
import runpy

import pytest

from nanopost import __version__
from nanopost.evals.verifier import SHORT, is_right, load_verifier
from nanopost.rewards.math import gsm8k
from nanopost.rewards.verdict import Verdict
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
