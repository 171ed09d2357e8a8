"""Verdicts: finite, frozen, and nothing else."""

from dataclasses import FrozenInstanceError

import pytest

from nanopost.rewards.verdict import Verdict


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_verdict_is_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="score must be finite"):
        Verdict(bad, {}, "")
    with pytest.raises(ValueError, match="exact must be finite"):
        Verdict(0.0, {"json": 1.0, "exact": bad}, "")


def test_a_verdict_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Verdict(1.0, {}, "").score = 0.0  # type: ignore[misc]
