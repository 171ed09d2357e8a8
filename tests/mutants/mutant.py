"""A mutant: one historic bug, put back into our code on purpose, and the test that has to notice.

Each room of the project has a file here with a list `MUTANTS`; tests/test_mutants.py patches a copy of the
project with one mutant at a time and runs its killer there.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "runs")


@dataclass(frozen=True)
class Mutant:
    """A text patch, where the bug was seen, and the pytest node that must fail under it."""

    name: str
    source: str  # where it was seen: repository#number or repository commit
    story: str  # one line: what it does to a run
    file: str  # relative to the root of the project
    before: str  # occurs exactly once in the file
    after: str
    killer: str


def patched(mutant: Mutant) -> str:
    """The text of the mutant's file with the bug in it."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.before) != 1:
        raise ValueError(f"{mutant.name}: before occurs {text.count(mutant.before)} times in {mutant.file}")
    return text.replace(mutant.before, mutant.after)


def write_mutant(mutant: Mutant, folder: Path) -> None:
    """A copy of the project with the bug in it: scripts and further processes run the bug too.

    Files are links to ours where the disk is the same, which is five times as quick; the one with the bug is
    not. So what runs there may replace a file of the project, and must not write into one.
    """
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT, copy_function=_link)
    (folder / mutant.file).unlink()
    (folder / mutant.file).write_text(patched(mutant), encoding="utf-8")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
