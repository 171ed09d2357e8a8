"""The formula pages: a page's one Python block, executed with 120 digits in the place of `math`."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpmath import mp

PAGES = Path(__file__).resolve().parent.parent / "docs" / "losses"
mp.dps = 120


def path(name: str) -> Path:
    """A function's page lies with the losses; the page of the whole table of variants stands above them."""
    return PAGES / f"{name}.md" if name != "variants" else PAGES.parent / "variants.md"


@functools.cache
def text(name: str) -> str:
    return path(name).read_text(encoding="utf-8")


def formulas(name: str) -> list[str]:
    """The formula ids above the page's first section, by their number."""
    head = text(name).split("\n## ")[0]
    return sorted(set(re.findall(r"\bF\d+\b", head)), key=lambda formula: int(formula[1:]))


def module(name: str) -> str:
    """The module that the page names: nanopost.losses, or where the function lives instead."""
    (found,) = set(re.findall(rf"`(nanopost(?:\.\w+)+)\.{name}`", text(name)))
    return found


@functools.cache
def scalar(name: str) -> Callable[..., Any]:
    """The page's function, with mpmath's functions behind `math`: exp, log and sqrt give 120 digits."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", text(name), flags=re.MULTILINE | re.DOTALL)
    block = re.sub(r"^import math$", "", block, flags=re.MULTILINE)
    names: dict[str, Any] = {"math": mp}
    exec(compile(block, str(path(name)), "exec"), names)
    return names[name]
