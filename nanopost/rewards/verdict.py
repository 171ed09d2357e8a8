"""Verdict: what a verifier says of one completion.

A malformed completion is a verdict like any other: one score, with a reason. A malformed task, such as a gold
answer that is no number, is an error: it must stop the run and not become a zero reward.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Verdict:
    """`score` is the reward, `parts` what it is made of, `reason` one line for the reader of a rollout."""

    score: float
    parts: Mapping[str, float]
    reason: str

    def __post_init__(self) -> None:
        for name, value in (("score", self.score), *self.parts.items()):
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")


@dataclass(frozen=True)
class Unverified:
    """No verdict, because the verifier failed: its score is None and never 0, it has no parts."""

    reason: str
    score: None = None
    parts: Mapping[str, float] = field(default_factory=dict)
