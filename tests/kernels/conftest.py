"""Triton's kernels on a machine without a GPU: run by its interpreter, or compiled for one and looked at."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOM = Path(__file__).parents[2] / "nanopost" / "kernels"


def triton_modules() -> list[ModuleType]:
    """The modules of the room that hold kernels."""
    files = [path for path in sorted(ROOM.glob("*.py")) if "@triton.jit" in path.read_text(encoding="utf-8")]
    return [importlib.import_module(f"nanopost.kernels.{path.stem}") for path in files]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For the length of a test, kernels are run by Triton's interpreter: numpy, on the CPU.

    `triton.jit` chooses between compiler and interpreter when it decorates a function, by TRITON_INTERPRET.
    To have both in one process, what it decorated is exchanged afterwards: our functions and those of
    Triton's own library. Two traps of the interpreter: it multiplies bfloat16 by its bits in `tl.dot`, and it
    cuts bfloat16 off where it should round. So half precision is float16 in these tests.
    """
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    if triton.__version__ < "3.7" and np.__version__ >= "2.4":
        pytest.skip("the interpreter of triton below 3.7 does not work with numpy 2.4")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for module in (tl, tl.standard, *triton_modules()):
        for name, function in [*vars(module).items()]:
            if isinstance(function, JITFunction):
                monkeypatch.setattr(module, name, InterpretedFunction(function.fn))
    for name, builtin in [*vars(tl.core).items()]:  # the interpreter exchanges these and leaves some behind
        monkeypatch.setattr(tl.core, name, builtin)
    with np.errstate(all="ignore"):  # a GPU says nothing about 0 · ∞ or exp(−1000) either
        yield
