"""Formula ↔ function ↔ page ↔ test ↔ mutant ↔ vectors: F1 to F40, none left out."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from nanopost import losses
from tests import pages
from tests.museum import mutants
from tests.pages import ELSEWHERE

ROOT = Path(__file__).parents[1]
FUNCTIONS = sorted([*losses.__all__, *ELSEWHERE])
INDEX = {row["function"]: row for row in pages.table(pages.page_text("README")) if "function" in row}
FORMULAS = {
    row["formula"]: row
    for row in pages.table((ROOT / "docs" / "formulas.md").read_text(encoding="utf-8"))
    if "vectors" in row
}


def named(cell: str) -> list[str]:
    return re.findall(r"\[`?(\w+)`?\]\(losses/\1\.md\)", cell)


def mutated() -> set[str]:
    """Every function with a mutant inside its body."""
    found = set()
    for mutant in (mutant for room in mutants().values() for mutant in room):
        text = (ROOT / mutant.file).read_text(encoding="utf-8")
        first = text[: text.index(mutant.before)].count("\n") + 1
        last = first + mutant.before.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.lineno <= last and first <= (node.end_lineno or 0):
                found.add(node.name)
    return found


def called(path: Path) -> set[str]:
    """The names that a file calls, or hands to a call."""
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    handed = [x for call in calls for x in [call.func, *call.args, *(k.value for k in call.keywords)]]
    return {node.id for node in handed if isinstance(node, ast.Name)}


def test_every_formula_has_a_row() -> None:
    assert list(FORMULAS) == [f"F{number}" for number in range(1, 41)]
    assert all(named(row["functions and their pages"]) for row in FORMULAS.values())


@pytest.mark.parametrize("formula", FORMULAS)
def test_formula_and_index_name_the_same_functions(formula: str) -> None:
    here = named(FORMULAS[formula]["functions and their pages"])
    there = [name for name, row in INDEX.items() if formula in re.findall(r"F\d+", row["formula"])]
    assert here == there
    vectors = re.findall(r"\(\.\./vectors/(\w+)\.json\)", FORMULAS[formula]["vectors"])
    assert vectors == here


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_check_of_a_row_runs_the_tests_of_its_pages(formula: str) -> None:
    files, wanted = FORMULAS[formula]["check"].split(" -k ")
    text = "".join((ROOT / file).read_text(encoding="utf-8") for file in files.split())
    names = named(FORMULAS[formula]["functions and their pages"])
    assert set(files.split()) == {INDEX[name]["test"] for name in names}
    prefixes = [f"test_{pages.invariants(name)[0].removesuffix('1')}" for name in names]
    assert wanted.strip('"').split(" or ") == prefixes
    assert all(re.search(rf"def {prefix}\d+_", text) for prefix in prefixes)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_has_page_test_and_vectors(name: str) -> None:
    assert callable(getattr(importlib.import_module(ELSEWHERE.get(name, "nanopost.losses")), name))
    assert f"`{name}`" in (ROOT / "docs" / "losses" / "README.md").read_text(encoding="utf-8")
    assert pages.invariants(name)
    test = ROOT / INDEX[name]["test"]
    assert name in called(test), f"{test} does not call {name}"
    vectors = json.loads((ROOT / "vectors" / f"{name}.json").read_text(encoding="utf-8"))
    assert vectors["function"] == name and len(vectors["cases"]) >= 8


def test_every_function_has_a_mutant() -> None:
    assert set(FUNCTIONS) - mutated() == set()


def test_there_are_sixty_mutants_of_losses_masks_and_advantages() -> None:
    found = [m for room in mutants().values() for m in room if m.file.startswith("nanopost/losses/")]
    assert len({(m.file, m.before, m.after) for m in found}) >= 60
