"""pytest and scripts in forked processes: one server imports the heavy libraries, all start from there.

What such a pytest starts is forked from itself: a second server would load once more what it has already.
"""

import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("fork" if multiprocessing.parent_process() else "forkserver")
if CONTEXT.get_start_method() == "forkserver":
    CONTEXT.set_forkserver_preload(
        [
            *("torch", "torch.distributed.fsdp", "numpy", "pytest", "hypothesis", "jinja2", "tokenizers"),
            *("safetensors", "tyro", "tqdm", "matplotlib.pyplot", "torch._dynamo"),  # AdamW loads the last
        ]
    )

# A start looks at every process whether it has ended: of two threads that look at once, one reads no status.
ONE_AT_A_TIME = threading.Lock()


def run_pytest(
    folder: Path, arguments: Sequence[str], *, environment: dict[str, str], seconds: float
) -> tuple[int, str]:
    """pytest with these arguments in a folder that holds the project or a patched copy of it.

    Returns: its exit status and all it printed.
    Raises: TimeoutError after so many seconds.
    """
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as printed:
        process = CONTEXT.Process(target=_become_pytest, args=(folder, arguments, environment, printed.name))
        with ONE_AT_A_TIME:
            process.start()
        if not connection.wait([process.sentinel], seconds):
            process.kill()
            raise TimeoutError(f"pytest {' '.join(arguments)} did not end in {seconds} s:\n{printed.read()}")
        with ONE_AT_A_TIME:
            process.join()
        return int(process.exitcode or 0), printed.read()


def start_python(
    folder: Path, command: Sequence[str], *, environment: dict[str, str], printed: str
) -> BaseProcess:
    """`python SCRIPT …` or `python -c PROGRAM …` in a folder, a warning being an error.

    Args:
        printed: the file to print to.
    """
    process = CONTEXT.Process(target=_become_python, args=(folder, list(command), environment, printed))
    process.start()
    return process


def _become_pytest(folder: Path, arguments: Sequence[str], environment: dict[str, str], printed: str) -> None:
    _enter(folder, environment, printed)
    import pytest

    code = pytest.main([*arguments])
    sys.stdout.flush()
    raise SystemExit(int(code))


def _become_python(folder: Path, command: list[str], environment: dict[str, str], printed: str) -> None:
    import torch

    _enter(folder, environment, printed)
    for name in os.environ.keys() - environment.keys():  # the server's own, from when it was started
        del os.environ[name]
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        if command[0] == "-c":
            sys.argv = ["-c", *command[2:]]
            exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except Exception:  # as the interpreter does; multiprocessing has a way of its own
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def _enter(folder: Path, environment: dict[str, str], printed: str) -> None:
    """In the child: output, environment, folder and imports as if a new Python had been started there."""
    gc.freeze()  # the server's libraries are no garbage, and pytest looks through them ten times
    log = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # not those that a pytest captures
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] in ("nanopost", "tests")]:
        del sys.modules[name]
