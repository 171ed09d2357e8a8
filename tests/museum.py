"""The bug museum: docs/bug-museum.md, written from the mutants. `python -m tests.museum` writes it again."""

import importlib
from pathlib import Path

from tests.mutants.mutant import ROOT, Mutant

PAGE = ROOT / "docs" / "bug-museum.md"
WIDTH = 160  # characters of code in an exhibit
OWN = "our own"  # the source of a mutant that no other project is known to have had
ROOMS = sorted(path.stem for path in (ROOT / "tests" / "mutants").glob("*.py") if path.stem != "mutant")
HEAD = """# The bug museum

{theirs} bugs that other projects have had and {ours} of our own making, each put into this one on purpose,
and the test that notices. `tests/test_mutants.py` patches a copy of the project with one of them at a time,
runs the test named here, and asks that it fails. An exhibit has three lines: its name and where the bug was
seen, what it looks like in our code (long lines around the change alone), what it does and which test catches
it. Sources are repository#number; a bare name is a project or an author where the class of bug was seen;
"our own" is a bug of nobody else's that we know of.

Written by `python -m tests.museum` from `tests/mutants/`; a test holds the two together.
"""


def mutants() -> dict[str, list[Mutant]]:
    """Every mutant, by room."""
    return {room: importlib.import_module(f"tests.mutants.{room}").MUTANTS for room in ROOMS}


def code(text: str, start: int = 0) -> str:
    """A piece of code on one line, inside backticks: at most WIDTH characters of it, from start on."""
    line = " ".join(text.split())
    if len(line) > WIDTH:
        line = (
            ("… " if start else "")
            + line[start : start + WIDTH].strip()
            + (" …" if line[start + WIDTH :] else "")
        )
    fence = "``" if "`" in line else "`"
    return f"{fence}{line}{fence}" if line else "nothing"


def exhibit(mutant: Mutant) -> str:
    """A mutant in three lines of Markdown."""
    test = mutant.killer.split("::", 1)
    pairs = zip(" ".join(mutant.before.split()), " ".join(mutant.after.split()), strict=False)
    change = next((place for place, (old, new) in enumerate(pairs) if old != new), 0)
    start = max(0, change - WIDTH // 4)  # a long line is shown where the change is
    return (
        f"**{mutant.name.replace('_', ' ').replace('-', ' ')}** ({mutant.source})  \n"
        f"{code(mutant.before, start)} → {code(mutant.after, start)} in {mutant.file}  \n"
        f"{mutant.story} Caught by {code(test[1])} of {Path(test[0]).name}.\n"
    )


def page() -> str:
    rooms = mutants()
    own = [mutant.source == OWN for found in rooms.values() for mutant in found]
    parts = [HEAD.format(theirs=own.count(False), ours=own.count(True))]
    for room, found in rooms.items():
        parts += [f"## {room.replace('_', ' ').capitalize()}\n", *map(exhibit, found)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
