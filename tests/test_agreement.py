"""docs/agreement.md says of other frameworks what their adapters find, wherever they are installed."""

import functools
import json
import math
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from vectors import agreement

ROOT = Path(__file__).resolve().parent.parent
TEXT = agreement.PAGE.read_text(encoding="utf-8")
FILES = {
    path.stem: {case["name"]: case for case in json.loads(path.read_text(encoding="utf-8"))["cases"]}
    for path in (ROOT / "vectors").glob("*.json")
    if path.stem != "schema"
}
CASES = {name: len(cases) for name, cases in FILES.items()}

MEND = "install the extra `oracle` and run `python vectors/agreement.py`"

frameworks = pytest.mark.parametrize("framework", agreement.ADAPTERS)


@frameworks
def test_the_page_counts_every_case_of_every_file(framework: str) -> None:
    _, counts, absent = agreement.stated(framework, TEXT)
    assert counts.keys() | absent == CASES.keys(), MEND
    assert not counts.keys() & absent
    cases = {name: sum(numbers) for name, numbers in counts.items()}
    assert cases == {name: CASES[name] for name in counts}, MEND


@frameworks
def test_a_row_with_a_difference_or_a_gap_says_why(framework: str) -> None:
    rows = agreement.rows_of(agreement.section(TEXT, framework))
    assert rows
    assert [name for name, ((_, *rest), prose) in rows.items() if any(rest) and not prose] == []


@functools.cache
def measured(framework: str) -> list[dict[str, Any]]:
    return agreement.measure(framework)[1]


def results_of(framework: str, page_version: str) -> list[dict[str, Any]]:
    """What the adapter finds; the test is skipped where the framework of the page is not installed."""
    try:
        installed = version(agreement.ADAPTERS[framework][1])
    except PackageNotFoundError:
        pytest.skip("the extra `oracle` is not installed")
    if installed != page_version:
        pytest.skip(f"the page is about {framework} {page_version}, {installed} is installed")
    return measured(framework)


@frameworks
def test_the_page_states_what_the_adapter_finds(framework: str) -> None:
    page_version, counts, absent = agreement.stated(framework, TEXT)
    found = agreement.counts_of(results_of(framework, page_version))
    offered = {name: numbers for name, numbers in found.items() if any(numbers[:2])}
    assert offered == counts, MEND
    assert found.keys() - offered.keys() == absent, MEND


# ---- why a case differs

JUNK = ("nan", "inf", "-inf", 1e30)
CAUSES = ("junk", "τ²", "−∞", "held at 60", "float32")  # those that the page gives a name
OWN = {  # other causes: a word of the row's prose, the cases it holds for, the largest error
    ("TRL", "orpo_loss"): ("float32", "", 3e-7),
    ("TRL", "top_k_forward_kl"): ("tail", "1e4|whole vocabulary", math.inf),
    ("TRL", "sequence_logps"): ("0/0", "gives 0", math.inf),
    ("torchtune", "forward_kl"): ("cross-entropy", "", math.inf),
    ("torchtune", "gae"): ("whitened", "", math.inf),
    ("torchtune", "sequence_logps"): ("0/0", "gives 0", math.inf),
    ("torchtune", "sft_loss"): ("float32", "", 2e-5),
    ("torchtune", "whiten"): ("0/0", "one token", math.inf),
    ("Liger-Kernel", "forward_kl"): ("float32", "logits of 1e4", 0.41),
    ("Liger-Kernel", "generalized_jsd"): ("float32", "logits of 1e4", 0.41),
    ("Liger-Kernel", "kl_estimate"): ("float32", "close policies", 0.02),
    ("Liger-Kernel", "orpo_loss"): ("float32", "sure of both", 3e-5),
    ("Liger-Kernel", "reverse_kl"): ("float32", "logits of 1e4", 0.41),
    ("Liger-Kernel", "token_logps"): ("float32", "logits of 1e4", 2e-5),
}


def flat(tree: Any) -> list[Any]:
    return [leaf for branch in tree for leaf in flat(branch)] if isinstance(tree, list) else [tree]


def cause(framework: str, function: str, case: dict[str, Any], one: dict[str, Any]) -> str | None:
    """Why this part of this case differs, if the case's inputs show it or the table above has it."""
    inputs = {name: flat(tree) for name, tree in case["inputs"].items()}
    tau = case["arguments"].get("temperature", 1.0)
    part = case["gradients"].get(one["part"].removeprefix("gradients."), case.get(one["part"]))
    alone = sum(isinstance(leaf, float) and leaf != 0 for leaf in flat(part)) < 2
    seen = one["ratio"] if alone else one["everywhere"]
    if tau != 1 and seen is not None and math.isclose(seen, tau**-2, rel_tol=1e-5):
        return "τ²"
    word, cases, largest = OWN.get((framework, function), ("", "", -1.0))
    if re.search(cases, case["name"]) and one["error"] <= largest:
        return word
    if not math.isfinite(one["theirs"]):
        if any("-inf" in leaves for name, leaves in inputs.items() if name.endswith("logits")):
            return "−∞"
        if any(leaf in JUNK for leaves in inputs.values() for leaf in leaves):
            return "junk"
        pairs = zip(inputs.get("logps", ()), inputs.get("old_logps", ()), strict=True)
        if any(abs(new - old) > 60 for new, old in pairs):
            return "held at 60"
    return None


@frameworks
def test_every_difference_has_a_cause_that_its_row_names(framework: str) -> None:
    page_version = agreement.stated(framework, TEXT)[0]
    found: dict[str, set[str | None]] = {}
    for result in results_of(framework, page_version):
        function, case = result["function"], FILES[result["function"]][result["case"]]
        for one in result["differences"]:
            why = cause(framework, function, case, one)
            assert why is not None, (function, result["case"], one)
            found.setdefault(function, set()).add(why)
    rows = agreement.rows_of(agreement.section(TEXT, framework))
    for function, (_, prose) in rows.items():
        own = OWN.get((framework, function), ("",))[0]
        named = {word for word in {*CAUSES, own} if word and word in prose}
        assert named - {"float32"} <= found.get(function, set()) <= named, function
    assert {function for name, function in OWN if name == framework} <= found.keys()


def test_new_numbers_keep_the_prose() -> None:
    page = (
        "# Page\n\n## TRL 1.0\n\n| function | agree | differ | not offered | |\n|---|---|---|---|---|\n"
        "| `a` | 1 | 0 | 1 | why |\n| `gone` | 1 | 0 | 0 | |\n\nNo counterpart: `c`.\n\n## Next 2\n\ntext\n"
    )
    new = agreement.rewritten("TRL", page, "1.1", {"a": (2, 1, 0), "b": (1, 0, 0), "d": (0, 0, 4)})
    assert agreement.stated("TRL", new) == ("1.1", {"a": (2, 1, 0), "b": (1, 0, 0)}, {"d"})
    assert "| `a` | 2 | 1 | 0 | why |" in new
    assert new.endswith("## Next 2\n\ntext\n")


def test_an_adapter_that_crashes_is_an_error() -> None:
    with pytest.raises(ValueError, match="crashed"):
        agreement.counts_of([{"function": "a", "outcome": "crashed"}])
