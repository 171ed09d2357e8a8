"""pytest in forked processes: one server imports the heavy libraries, and each run starts from there."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "numpy", "pytest", "hypothesis", "jinja2", "tokenizers", "safetensors"]
)


def run_pytest(
    folder: Path, arguments: Sequence[str], *, environment: dict[str, str], seconds: float
) -> tuple[int, str]:
    """pytest with these arguments in a folder that holds the project or a patched copy of it.

    Returns: its exit status and all it printed.
    Raises: TimeoutError after so many seconds.
    """
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as printed:
        process = CONTEXT.Process(target=_become_pytest, args=(folder, arguments, environment, printed.name))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"pytest {' '.join(arguments)} did not end in {seconds} s:\n{printed.read()}")
        return int(process.exitcode or 0), printed.read()


def _become_pytest(folder: Path, arguments: Sequence[str], environment: dict[str, str], printed: str) -> None:
    """In the child: output, environment, folder and imports as if pytest had been started there."""
    log = os.open(printed, os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] in ("nanopost", "tests")]:
        del sys.modules[name]
    import pytest

    code = pytest.main([*arguments])
    sys.stdout.flush()
    raise SystemExit(int(code))
