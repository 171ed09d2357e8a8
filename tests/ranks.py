"""Run a function or a script on n Gloo ranks of this machine, with a time limit on every wait.

    results = run_function("tests.test_distributed", "step_on_a_rank", ranks=2, args=(folder,))
    output = run_script(["train_sft.py", "--steps", "2"], ranks=2)

A function is named by module and name, runs under `distributed.setup()` and `teardown()`, and what it returns
comes back as JSON, one value a rank. Ranks are processes of their own (tests/forks.py) with torchrun's
environment variables, one thread each. A rank that fails or hangs fails the test with the tail of every
rank's output; the others are killed.
"""

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.forks import start_python

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 90.0  # seconds

CALL = """
import importlib, json, sys
from nanopost import distributed
module, name, args, out = sys.argv[1:]
distributed.setup()
value = getattr(importlib.import_module(module), name)(*json.loads(args))
with open(out, "w") as file:
    json.dump(value, file)
distributed.teardown()
"""


def run_function(
    module: str, name: str, *, ranks: int, args: Sequence[Any] = (), limit: float = LIMIT
) -> list[Any]:
    """Call `module.name(*args)` on every rank; arguments and results go through JSON. Results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        commands = [["-c", CALL, module, name, json.dumps(list(args)), str(out)] for out in outs]
        _run(commands, limit)
        return [json.loads(out.read_text()) for out in outs]


def run_script(command: Sequence[str], *, ranks: int, limit: float = LIMIT) -> str:
    """Run `python command...` on every rank, as torchrun would; returns what rank 0 printed."""
    return _run([list(command)] * ranks, limit)[0]


def run_until(
    said: str,
    command: Sequence[str],
    *,
    ranks: int,
    then: Callable[[list[int]], object],
    limit: float = LIMIT,
) -> tuple[int | None, str]:
    """Run `python command...` on every rank; once rank 0 has said something, do something to the ranks.

    Args:
        then: gets the ranks' process ids.
    Returns:
        Rank 0's exit status, None if it has not left in the time, and what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, logs = _start([list(command)] * ranks, Path(folder))
        end = time.monotonic() + limit
        while said not in logs[0].read_text(encoding="utf-8") and processes[0].is_alive():
            assert time.monotonic() < end, logs[0].read_text(encoding="utf-8")
            time.sleep(0.02)
        then([process.pid or 0 for process in processes])
        processes[0].join(max(0.0, end - time.monotonic()))
        code = processes[0].exitcode
        _end(processes)
        return code, logs[0].read_text(encoding="utf-8", errors="replace")


def _start(commands: list[list[str]], folder: Path) -> tuple[list[BaseProcess], list[Path]]:
    """A process a rank, and the file that it prints to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes, logs = [], [folder / f"{rank}.log" for rank in range(len(commands))]
    for rank, (command, log) in enumerate(zip(commands, logs, strict=True)):
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(commands))}
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        log.touch()
        environment = {**os.environ, **env}
        processes.append(start_python(ROOT, command, environment=environment, printed=str(log)))
    return processes, logs


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()


def _run(commands: list[list[str]], limit: float) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        processes, logs = _start(commands, Path(folder))
        codes: list[int | None] = []
        end = time.monotonic() + limit
        while time.monotonic() < end:
            codes = [process.exitcode for process in processes]
            if None not in codes or any(codes):
                break
            time.sleep(0.02)
        _end(processes)  # after a failure or the limit the others wait for a rank that is gone
        outputs = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    if any(code != 0 for code in codes):
        tails = "\n".join(
            f"--- rank {rank}: exit {code}\n{out[-3000:]}"
            for rank, (code, out) in enumerate(zip(codes, outputs, strict=True))
        )
        raise AssertionError(f"ranks did not all finish within {limit:.0f} s (None: still running)\n{tails}")
    return outputs
