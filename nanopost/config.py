"""Flat dataclass <-> command-line flags.

A script's configuration is one flat dataclass, one comment a field. The comment is the help text of the flag
and the default is the flag's default, so that neither can drift. Parsing is tyro's; it is imported where it
is used, because the libraries below the scripts never need it. The record is written to args.json in the run
folder by `metrics.open_run`.
"""

from collections.abc import Sequence
from typing import TypeVar

C = TypeVar("C")


def parse(Config: type[C], argv: Sequence[str] | None = None) -> C:
    """Read a configuration from the command line.

    Args:
        Config: flat dataclass; a field's comment is its help, an underscore in its name is a dash in the
            flag.
        argv: the arguments without the program's name; None takes those of the process.
    Returns:
        The configuration. `--help` prints one screen and exits with 0; an unknown flag prints the near one
        and exits with 2. A switch has one flag only: `--x` where the default is off, `--no-x` where it is on.
    """
    import tyro

    fields = Config.__dataclass_fields__  # type: ignore[attr-defined]
    for base in Config.__mro__[1:]:  # what scripts share comes last on the screen
        for name in getattr(base, "__dataclass_fields__", {}):
            fields[name] = fields.pop(name)
    return tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone))
