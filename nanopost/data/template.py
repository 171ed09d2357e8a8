"""Template: a model's chat template as a compiled jinja program, in an immutable sandbox.

Templates come with a model from somewhere else, so they may read the messages and nothing more. What they may
call is what the hub's templates expect: `tojson`, `raise_exception`, `strftime_now`, `break`, `continue`. The
clock is read once a process: a template that writes the date is a function of its messages as long as one
program runs. A name without a value is undefined, as on the hub; `tools` and `documents` are none.
"""

import json
import re
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.now()


@lru_cache(maxsize=16)
def compile_template(template: str, where: str) -> jinja2.Template:
    """The program of a template text; `where` opens the ValueError for one that does not parse."""
    room = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    room.filters["tojson"] = _to_json
    room.globals.update(raise_exception=_raise_exception, strftime_now=NOW.strftime)
    # {% generation %} marks what another library trains on; here the stop token decides: the tag is dropped.
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
    try:
        return room.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{where}: the chat template does not parse, line {error.lineno}: {error}"
        ) from error


def read_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template of a model folder: chat_template.jinja, else that of tokenizer_config.json, `config`."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_bytes().decode()  # line ends as they are
    found = config.get("chat_template")
    if isinstance(found, list):  # several by name; tool use and retrieval may have their own
        found = {entry["name"]: entry["template"] for entry in found}.get("default", found)
    if not isinstance(found, str | None):
        where = folder / "tokenizer_config.json"
        raise ValueError(f"{where}: chat_template must be a text or have a 'default', got {found!r}")
    return found


def write_template(folder: Path, template: str) -> None:
    """Write chat_template.jinja, every line end as it is."""
    (folder / "chat_template.jinja").write_bytes(template.encode())


def run_template(template: str, where: str, **names: Any) -> str:
    """The text a template writes for these names; where it fails, a ValueError that opens with `where`."""
    program = compile_template(template, where)
    try:
        return program.render(tools=None, documents=None, **{k: v for k, v in names.items() if v is not None})
    except Exception as error:  # it is a program of somebody else's and may fail in any way
        raise ValueError(f"{where}: the chat template refuses the messages: {error}") from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
