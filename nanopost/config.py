"""Flat dataclass <-> command-line flags <-> args.json.

A script's configuration is one flat dataclass, one comment a field. The comment is the help text of the flag,
the default is the flag's default, and the same record is written to args.json in the run folder: three views
of one thing, so that none of them can drift. Parsing is tyro's; it is imported where it is used, because the
libraries below the scripts never need it.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

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

    return tyro.cli(Config, args=argv, config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone))


def save_args(config: Any, path: Path | str) -> None:
    """Write a configuration as JSON, one field a line.

    Args:
        config: instance of a flat dataclass whose values JSON can hold (paths are written as strings).
        path: the file; its folder must exist.
    """
    text = json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False, default=str)
    Path(path).write_text(text + "\n", encoding="utf-8")


def load_args(Config: type[C], path: Path | str) -> C:
    """Read back what `save_args` wrote: `load_args(Config, path) == config`.

    Args:
        Config: the dataclass that was saved.
        path: a file with one JSON object; a field it leaves out takes its default.
    Returns:
        The configuration, lists turned back into tuples and strings into paths where the field says so.
    Raises:
        ValueError: no JSON object, an unknown field (the near one is named), a missing field without a
            default, a value of the wrong type.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected one JSON object, got {type(values).__name__}")
    hints = typing.get_type_hints(Config)
    fields = {field.name: field for field in dataclasses.fields(Config) if field.init}  # type: ignore[arg-type]
    for name in values.keys() - fields.keys():
        near = difflib.get_close_matches(name, fields, n=1)
        raise ValueError(f"{path}: unknown field {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ValueError(f"{path}: field {name!r} is missing and has no default")
    return Config(**{name: _restore(value, hints[name], f"{path}: {name}") for name, value in values.items()})


def _restore(value: Any, hint: Any, where: str) -> Any:
    """A JSON value as the type the field declares; JSON knows neither tuples nor paths."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _restore(value, option, where)
            except ValueError:
                continue
    elif origin is typing.Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, list):
        variadic = len(arguments) == 2 and arguments[1] is Ellipsis
        kinds = [arguments[0]] * len(value) if variadic else list(arguments)
        if len(kinds) == len(value):
            return tuple(_restore(item, kind, where) for item, kind in zip(value, kinds, strict=True))
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
