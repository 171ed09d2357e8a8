"""Function ↔ page ↔ test: the same names, the same invariants, and every number of a page recomputed."""

import ast
import doctest
import importlib
import inspect
import math
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

from nanopost import losses
from tests import pages
from tests.pages import ELSEWHERE

ROOT = Path(__file__).parents[2]
NO_FORMULAS = ("__init__", "checks", "compare", "variants")
ROOMS = sorted(
    path.stem for path in Path(losses.__file__).parent.glob("*.py") if path.stem not in NO_FORMULAS
)
PUBLIC = sorted(losses.__all__)
PAGES = sorted([*PUBLIC, *ELSEWHERE])
INDEX = {row["function"]: row for row in pages.table(pages.page_text("README")) if "function" in row}
SECTIONS = ["Scalar reference", "Invariants", "Worked numbers", "At step 0", "Elsewhere"]
DOCSTRING = ["Args:", "Returns:", "Raises:", "Reference:", "Page:", ">>>"]
ID_IN_TEST_NAME = re.compile(r"def test_([A-Z]+\d+)_")


def function(name: str) -> types.FunctionType:
    return getattr(losses, name)


def ids_tested_in(path: Path) -> set[str]:
    return set(ID_IN_TEST_NAME.findall(path.read_text(encoding="utf-8")))


def test_functions_pages_and_index_are_the_same_set() -> None:
    assert sorted(path.stem for path in pages.PAGES.glob("*.md") if path.stem != "README") == PAGES
    assert sorted(INDEX) == PAGES
    defined = {
        name
        for room in ROOMS
        for name, item in vars(importlib.import_module(f"nanopost.losses.{room}")).items()
        if inspect.isfunction(item) and item.__module__ == f"nanopost.losses.{room}" and name[0] != "_"
    }
    assert sorted(defined) == PUBLIC


@pytest.mark.parametrize("name", PAGES)
def test_page_has_one_block_with_a_function_of_its_name(name: str) -> None:
    text = pages.page_text(name)
    assert (
        text.startswith(f"# {name}: ")
        and f"`{ELSEWHERE.get(name, 'nanopost.losses')}.{name}`" in text
        and "$$" in text
    )
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == SECTIONS
    assert len(pages.blocks(name)) == 1 and pages.imports(name) <= {"math"}
    assert pages.scalar(name).__name__ == name
    assert re.findall(r"\bF\d+\b", INDEX[name]["formula"]) == sorted(
        set(re.findall(r"\bF\d+\b", text.split("## ")[0])), key=lambda f: int(f[1:])
    )


@pytest.mark.parametrize("name", PAGES)
def test_every_invariant_stands_in_the_name_of_a_test(name: str) -> None:
    ids = pages.invariants(name)
    assert len(ids) >= 4 and ids == [
        f"{ids[0].rstrip('0123456789')}{number}" for number in range(1, len(ids) + 1)
    ]
    assert set(ids) <= ids_tested_in(ROOT / INDEX[name]["test"])


def test_invariant_ids_are_unique_and_every_tested_id_has_a_page() -> None:
    ids = [invariant for name in PAGES for invariant in pages.invariants(name)]
    assert len(ids) == len(set(ids))
    assert set.union(*map(ids_tested_in, (ROOT / "tests").rglob("test_*.py"))) == set(ids)


@pytest.mark.parametrize("name", PAGES)
def test_every_number_of_the_page_is_what_its_block_gives(name: str) -> None:
    names = pages.namespace(name) | {"math": math}
    sums = pages.sums(name)
    assert len(sums) >= 3
    for call, value in sums:
        found, stated = eval(call, names), eval(value, names)
        decimals = max((len(digits) for digits in re.findall(r"\.(\d+)", value)), default=9)
        assert found == pytest.approx(stated, abs=0.501 * 10.0**-decimals), f"{call} is {found}, not {value}"


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_has_its_parts_in_order(name: str) -> None:
    text = inspect.getdoc(function(name)) or ""
    places = [text.index(part) for part in DOCSTRING]
    assert places == sorted(places) and f"Page: docs/losses/{name}.md" in text
    formula = text.split("\n\n")[1]
    assert (
        all(line.startswith("    ") for line in formula.splitlines())
        and "=" in formula + text.split("\n\n")[2]
    )


@pytest.mark.parametrize("name", PUBLIC)
def test_body_is_short_and_numbers_are_keyword_only(name: str) -> None:
    (tree,) = ast.parse(inspect.getsource(function(name))).body
    assert isinstance(tree, ast.FunctionDef)
    first, last = tree.body[1], tree.body[-1]
    assert (last.end_lineno or 0) - first.lineno + 1 <= 15
    for parameter in inspect.signature(function(name)).parameters.values():
        tensor = parameter.annotation is torch.Tensor
        assert tensor == (parameter.kind is parameter.POSITIONAL_OR_KEYWORD) or parameter.name == "keep_ids"
        assert parameter.kind is not parameter.VAR_KEYWORD


@pytest.mark.parametrize("room", ROOMS)
def test_doctests_run(room: str) -> None:
    found = doctest.testmod(importlib.import_module(f"nanopost.losses.{room}"))
    assert found.attempted > 0 and found.failed == 0


def test_the_folder_can_be_copied_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(losses.__file__).parent
    shutil.copytree(source, tmp_path / "borrowed", ignore=shutil.ignore_patterns("__pycache__"))
    for path in source.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        plain = {
            alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        absolute = {
            n.module.split(".")[0]
            for n in nodes
            if isinstance(n, ast.ImportFrom) and n.module and not n.level
        }
        assert (plain | absolute) <= {"torch"} | set(sys.stdlib_module_names), path.name
    monkeypatch.syspath_prepend(tmp_path)
    borrowed = importlib.import_module("borrowed")
    assert borrowed.__all__ == losses.__all__ and borrowed.aggregate.__module__ == "borrowed.reduce"
