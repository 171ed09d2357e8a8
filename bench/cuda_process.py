"""The two sides of the CUDA table's command: a process that has the GPU, and one that waits for its rows.

The first says a line of JSON when a row begins and another when it has come to something. The second ends it
when a row takes too long, and starts another one for the rows that are left: an illegal address breaks a
process's GPU context for good, and would otherwise take all later rows with it.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from threading import Timer
from typing import Any

import torch

from bench.cuda_measure import Ceilings, Left, Mark, Wrong, first_line
from bench.machine import ROOT

CEILINGS = "ceilings"
STARTING = 90.0  # seconds for a process to import torch, and for the ceilings
Record = dict[str, Any]
Say = Callable[[Record], None]


@dataclass(frozen=True)
class Row:
    """One row; it is not begun when fewer than `seconds` are left, and takes fewer samples beyond them."""

    name: str
    title: str
    seconds: float
    run: Callable[[Ceilings, Left], list[Mark]]


# ---- the process that has the GPU --------------------------------------------------------------------------
def attempt(name: str, run: Callable[[], Any], say: Say) -> bool:
    """Say that something begins and what it came to; whether the GPU is still sound afterwards."""
    say({"begins": name})
    start = time.monotonic()
    try:
        record: Record = {"found": run()}
    except Wrong as error:
        record = {"wrong": str(error)}
    except Exception as error:
        record = {"error": first_line(error)}
    say({"row": name, "took": time.monotonic() - start, **record})
    return sound()


def sound() -> bool:
    """Whether the GPU answers; after an illegal address it never does again in this process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def until(deadline: float) -> float:
    """Seconds from now."""
    return deadline - time.monotonic()


def run_rows(rows: list[Row], ceilings: Ceilings, left: Left, say: Say) -> bool:
    """Run rows in their order; False where the GPU broke and another process must go on."""
    for row in rows:
        if left() < row.seconds:
            say({"row": row.name, "not_reached": f"needs {row.seconds:.0f} s, {left():.0f} s were left"})
            continue
        rest = partial(until, time.monotonic() + row.seconds)
        if not attempt(row.name, partial(row.run, ceilings, rest), say):
            return False
        gc.collect()  # an exception has held the frames of its row, and they its tensors
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


# ---- the one that waits ------------------------------------------------------------------------------------
@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen]:
    """A process in a group of its own; whatever happens, none of the group outlives the block."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    try:
        yield process
    finally:
        end(process)
        process.communicate()


def end(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def listen(process: subprocess.Popen, limits: dict[str, float], left: Left) -> Iterator[Record]:
    """What a process says until it ends; it is ended when what it does takes longer than it may."""
    doing = CEILINGS
    while True:
        limit = max(1.0, min(limits.get(doing, STARTING), left()))
        watch = Timer(limit, end, [process])
        watch.start()
        line = process.stdout.readline() if process.stdout else ""
        late = not watch.is_alive()
        watch.cancel()
        if not line:
            code = process.wait()
            yield {"ended": f"it took longer than {limit:.0f} s" if late else f"exit code {code}"}
            return
        if not line.startswith("{"):  # a library that prints while it is imported
            print(line, end="", file=sys.stderr)
            continue
        record = json.loads(line)
        doing = record.get("begins", doing)
        yield record


def supervise(
    names: list[str],
    limits: dict[str, float],
    left: Left,
    command: Callable[[list[str], Any, float], list[str]],
) -> tuple[Any, dict[str, Record]]:
    """The ceilings (None if there are none) and every row's record, from as many processes as it takes.

    Args:
        names: the rows, in their order.
        limits: seconds after which a row's process is ended.
        left: seconds of the budget.
        command: of a process for some rows, given the ceilings if they are known and the seconds left.
    """
    ceilings, records = None, dict[str, Record]()
    while waiting := [name for name in names if name not in records]:
        if left() <= 0:
            records |= {name: {"not_reached": "the time was up"} for name in waiting}
            break
        doing = failure = None
        with started(command(waiting, ceilings, left())) as process:
            for record in listen(process, limits, left):
                if "begins" in record:
                    doing = record["begins"]
                    print(f"{doing} …", file=sys.stderr, flush=True)
                elif record.get("row") == CEILINGS:
                    doing, ceilings, failure = None, record.get("found"), record.get("error")
                elif "row" in record:
                    records[record.pop("row")] = record
                    doing = None
                elif doing in waiting:  # it ended in the middle of a row
                    records[doing] = {"error": f"its process ended: {record['ended']}"}
        if ceilings is None or not records.keys() & set(waiting):  # nothing was gained: nor will be
            why = {"error": f"no ceilings: {failure}" if failure else f"its process ended: {record['ended']}"}
            records |= {name: why for name in waiting if name not in records}
    return ceilings, {name: records[name] for name in names}
