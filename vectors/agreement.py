"""docs/agreement.md and what the adapters find: `python vectors/agreement.py` rewrites the page's numbers.

The page has a section for each framework: a table with a row for each function that is offered, whose last
column is prose and stays, and a line with the functions that are not. A test holds the page to the truth.
"""

import json
import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "agreement.md"
ADAPTERS = {  # section of the page: adapter, package that it needs
    "TRL": ("for_trl.py", "trl"),
    "torchtune": ("for_torchtune.py", "torchtune"),
    "Liger-Kernel": ("for_liger.py", "liger-kernel"),
}
OUTCOMES = ("agrees", "differs", "not offered")
ABSENT = "No counterpart: "

Counts = dict[str, tuple[int, ...]]


def counts_of(results: list[dict[str, Any]]) -> Counts:
    """How many cases of each function agree, differ and are not offered; one that crashes is an error."""
    if crashed := [result for result in results if result["outcome"] not in OUTCOMES]:
        raise ValueError(f"the adapter crashed: {crashed[0]}")
    functions = dict.fromkeys(result["function"] for result in results)
    return {
        function: tuple(
            sum(result["function"] == function and result["outcome"] == outcome for result in results)
            for outcome in OUTCOMES
        )
        for function in functions
    }


def measure(framework: str) -> tuple[str, list[dict[str, Any]]]:
    """The framework's version and the result of each case, from check.py in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, HERE / "check.py", "--adapter", HERE / "adapters" / ADAPTERS[framework][0]]
        done = subprocess.run([*command, "--json", found], capture_output=True, text=True)
        if not found.exists():
            raise RuntimeError(f"check.py ended with {done.returncode}: {done.stderr[-2000:]}")
        report = json.loads(found.read_text(encoding="utf-8"))
    return report["version"], report["results"]


def section(text: str, framework: str) -> str:
    """The framework's section, from its header to the next one."""
    (found,) = re.findall(rf"^## {re.escape(framework)} .*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def rows_of(text: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """The counts and the prose of each row."""
    found = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \|(.*)\|$", text, re.MULTILINE)
    return {name: (tuple(map(int, numbers)), prose.strip()) for name, *numbers, prose in found}


def stated(framework: str, text: str) -> tuple[str, Counts, set[str]]:
    """The version, the counts of what is offered and the functions that are not, as the page has them."""
    part = section(text, framework)
    version = part.split(maxsplit=3)[2].rstrip(",")
    absent = re.findall(rf"^{ABSENT}.*?\n\n", part + "\n", re.MULTILINE | re.DOTALL)
    names = {name for line in absent for name in re.findall(r"`(\w+)`", line)}
    return version, {name: numbers for name, (numbers, _) in rows_of(part).items()}, names


def rewritten(framework: str, text: str, version: str, counts: Counts) -> str:
    """The page with this framework's numbers."""
    old = section(text, framework)
    prose = {name: words for name, (_, words) in rows_of(old).items()}
    lines = [
        f"| `{name}` | {' | '.join(map(str, numbers))} | {prose.get(name, '')} |".replace("|  |", "| |")
        for name, numbers in sorted(counts.items())
        if any(numbers[:2])
    ]
    absent = sorted(name for name, numbers in counts.items() if not any(numbers[:2]))
    new = re.sub(
        r"^(\|---.*\|)\n(?:\|.*\n)*", lambda m: "\n".join([m[1], *lines, ""]), old, flags=re.MULTILINE
    )
    names = textwrap.fill(f"{ABSENT}{', '.join(f'`{name}`' for name in absent)}.", 120)
    new = re.sub(rf"^{ABSENT}.*?\n\n", f"{names}\n\n", new, flags=re.MULTILINE | re.DOTALL)
    return text.replace(old, new.replace(old.split(maxsplit=3)[2].rstrip(","), version, 1))


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    for framework in ADAPTERS:
        version, results = measure(framework)
        text = rewritten(framework, text, version, counts_of(results))
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
