"""A verifier by its name, and what its verdict says of right and wrong."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from nanopost.rewards.verdict import Verdict

Verifier = Callable[[str, Any], Verdict]  # completion, the record's answer
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
