"""The formula pages as test material: their scalar Python, invariants and tables, read from the Markdown.

A page's block is the oracle of the value tests, so it is executed as it stands and nothing here repairs it.
"""

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent.parent / "docs" / "losses"
# Formulas that live elsewhere, because of what they work on; their pages have the same shape.
ELSEWHERE = {
    "dequantize_nf4": "nanopost.models.quant",
    "lora_forward": "nanopost.models.lora",
    "lora_weight": "nanopost.models.lora",
    "mixed_lora_forward": "nanopost.models.adapters",
    "pass_at_k": "nanopost.evals.accuracy",
    "quantize_nf4": "nanopost.models.quant",
    "quantize_scales": "nanopost.models.quant",
    "record_samples": "nanopost.data.chat",
    "render": "nanopost.data.chat",
    "route": "nanopost.models.adapters",
}


def page_text(name: str) -> str:
    """The Markdown of a function's page."""
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    """Every fenced Python block of the page."""
    return re.findall(r"^```python\n(.*?)^```$", page_text(name), flags=re.MULTILINE | re.DOTALL)


@functools.cache
def namespace(name: str) -> dict[str, Any]:
    """What the page's one block defines."""
    (block,) = blocks(name)
    names: dict[str, Any] = {}
    exec(compile(block, f"docs/losses/{name}.md", "exec"), names)
    return names


def scalar(name: str) -> Callable[..., Any]:
    """The page's scalar function, which carries the name of the page."""
    return namespace(name)[name]


def imports(name: str) -> set[str]:
    """The modules that the page's block imports."""
    nodes = [node for block in blocks(name) for node in ast.walk(ast.parse(block))]
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}


def section(name: str, header: str) -> str:
    """The text under a second-level header of the page."""
    parts = re.split(r"^## (.+)$", page_text(name), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[header]


def invariants(name: str) -> list[str]:
    """The ids of the page's numbered invariants."""
    return re.findall(r"^- \*\*([A-Z]+\d+)\*\*", section(name, "Invariants"), flags=re.MULTILINE)


def table(text: str) -> list[dict[str, str]]:
    """The rows of the Markdown tables of a text, as header -> cell; backticks around a cell are dropped."""
    rows: list[dict[str, str]] = []
    header: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif not set(line) <= set("|-: "):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


def sums(name: str) -> list[tuple[str, str]]:
    """Every (call, value) that the page's tables state; the call is Python over the page's own block."""
    return [(row["call"], row["value"]) for row in table(page_text(name)) if row.get("call")]
