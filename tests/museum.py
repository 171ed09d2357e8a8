"""The bug museum: docs/bug-museum.md, written from the mutants. `python -m tests.museum` writes it again."""

import importlib
from pathlib import Path

from tests.mutants.mutant import ROOT, Mutant

PAGE = ROOT / "docs" / "bug-museum.md"
ROOMS = sorted(path.stem for path in (ROOT / "tests" / "mutants").glob("*.py") if path.stem != "mutant")
HEAD = """# The bug museum

{count} bugs that other projects have had, each put back into this one on purpose, and the test that notices.
`tests/test_mutants.py` patches a copy of the project with one of them at a time, runs the test named here,
and asks that it fails. The first line of an exhibit is what the bug looked like in our code, the second what
it did and what catches it. Sources are repository#number; a bare name is a project or an author where the
class of bug was seen.

Written by `python -m tests.museum` from `tests/mutants/`; a test holds the two together.
"""


def mutants() -> dict[str, list[Mutant]]:
    """Every mutant, by room."""
    return {room: importlib.import_module(f"tests.mutants.{room}").MUTANTS for room in ROOMS}


def code(text: str) -> str:
    """A piece of code on one line, inside backticks."""
    line = " ".join(text.split())
    fence = "``" if "`" in line else "`"
    return f"{fence}{line}{fence}" if line else "nothing"


def exhibit(mutant: Mutant) -> str:
    test = mutant.killer.split("::", 1)
    return (
        f"**{mutant.name.replace('_', ' ')}** ({mutant.source})  \n"
        f"{code(mutant.before)} → {code(mutant.after)} in {mutant.file}  \n"
        f"{mutant.story} Caught by {code(test[1])} of {Path(test[0]).name}.\n"
    )


def page() -> str:
    rooms = mutants()
    parts = [HEAD.format(count=sum(map(len, rooms.values())))]
    for room, found in rooms.items():
        parts += [f"## {room.replace('_', ' ').capitalize()}\n", *map(exhibit, found)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
