"""Format: the shape of a completion, read strictly.

    <think>reasoning</think>answer

What is not exactly of the shape has no reading: None, and the caller says what that costs. Leniency here is
what a policy learns to exploit: a second answer behind the first, a key given twice, text around the JSON.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class ThinkAnswer:
    """The two parts of a completion, without the white space around them."""

    think: str
    answer: str


def think_answer(completion: str) -> ThinkAnswer | None:
    """Read one <think>…</think> at the start and the answer behind it.

    Args:
        completion: the text the policy wrote, without its stop token.
    Returns: both parts; None unless each tag comes exactly once, nothing but white space stands before the
        first, and there is an answer.

    >>> think_answer("<think>2 + 2 is 4.</think> 4")
    ThinkAnswer(think='2 + 2 is 4.', answer='4')
    """
    opened, closed = completion.count("<think>"), completion.count("</think>")
    body = completion.lstrip()
    if (opened, closed) != (1, 1) or not body.startswith("<think>"):
        return None
    think, answer = body.removeprefix("<think>").split("</think>")
    return ThinkAnswer(think.strip(), answer.strip()) if answer.strip() else None


def strict_json(text: str) -> Any:
    """Read a text that is one JSON value and nothing else.

    Args:
        text: JSON, with at most white space around it.
    Returns: the value; None (which is also what `null` reads as) for anything that is not JSON, a key twice
        in an object, NaN, Infinity or a number beyond the floats, half a surrogate pair, too deep a nesting.

    >>> strict_json('{"total": 847}'), strict_json('{"total": 847, "total": 1}')
    ({'total': 847}, None)
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constants, parse_float=_finite
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        return None
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _no_constants(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is beyond the floats")
    return float(text)
