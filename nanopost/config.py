"""Flat dataclass <-> command-line flags.

A script's configuration is one flat dataclass, one comment a field. The comment is the help text of the flag
and the default is the flag's default, so that neither can drift. Parsing is tyro's; it is imported where it
is used, because the libraries below the scripts never need it. The record is written to args.json in the run
folder by `runs.open_run`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The flags of every script that are not about what is trained; they come behind its own."""

    show: int = 0  # samples to print before the first step, what is trained on in brackets
    resume: bool = False  # go on from the newest state in OUT
    accept: str = ""  # what may have changed since the run began, names with commas: data,lr
    plan: bool = False  # tell what memory this takes and whether it fits, and end
    threads: int = 0  # CPU threads; 0: torch's choice; 1 is fastest for tiny models
    recompute: bool = False  # blocks' activations are computed again in backward, and not kept
    offload: bool = False  # weights, gradients and moments wait in host memory
    replicas: int = 1  # groups of ranks that each hold a whole model: as many as there are nodes


def at_least(cfg: Any, why: str = "", /, **least: float) -> None:
    """Refuse fields that are below what makes sense.

    Args:
        cfg: the configuration.
        why: what the bounds hold for, for the message.
        least: the smallest value by the field's name.
    Raises:
        ValueError: a field is smaller, or NaN; it is named with its value. None is a default's, not a number.
    """
    for name, low in least.items():
        if (value := getattr(cfg, name)) is not None and not value >= low:
            raise ValueError(f"{name} must be at least {low}{why}, got {value}")


def parse(Config: type[C], argv: Sequence[str] | None = None) -> C:
    """Read a configuration from the command line.

    Args:
        Config: flat dataclass; a field's comment is its help, an underscore in its name is a dash in the
            flag.
        argv: the arguments without the program's name; None takes those of the process.
    Returns:
        The configuration. `--help` prints every flag and exits with 0; an unknown flag prints the near one
        and exits with 2. A switch has one flag only: `--x` where the default is off, `--no-x` where it is on.
    """
    import tyro

    fields = Config.__dataclass_fields__  # type: ignore[attr-defined]
    for base in Config.__mro__[1:]:  # what scripts share comes last on the screen
        for name in getattr(base, "__dataclass_fields__", {}):
            fields[name] = fields.pop(name)
    return tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone))
