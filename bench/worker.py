"""A fresh process that is one side of a comparison: it builds its model once and runs an iteration when told.

    python -m bench.worker '{"build": "bench.ours:sft", "work": DIR, "options": {...}}'

Started by `bench.run`, one a side. A builder is a function `build(work, turn, **options)`. It prepares, calls
`turn(digest)`, does one iteration, calls `turn(digest)` again, and so on. `turn` stops the clock, answers,
waits for the parent and starts the clock, so only what lies between two turns is measured. `digest()` gives
tensors by name that the parent compares with the other side's. One line of JSON a command comes in on stdin:

    {"do": "iterate"}               run one iteration; answered by its CPU and wall seconds and its memory
    {"do": "digest", "path": FILE}  save what `digest()` gives

The end of its input ends it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Digest = Callable[[], dict[str, Tensor]]
Turn = Callable[[Digest], None]


def high_water() -> int:
    """The most memory this process has held so far, in bytes; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)


def forget_high_water() -> None:
    """Let the mark count from what is held now: what the build held for a moment is not the iteration's."""
    with suppress(OSError):  # where the system refuses, the mark stays, and says less than the truth
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def main(spec: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes to the log and not between the answers
    started: dict[str, float] = {}

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    def turn(digest: Digest) -> None:
        if started:
            cpu, wall = time.process_time() - started["cpu"], time.perf_counter() - started["wall"]
            say(cpu=cpu, wall=wall, memory=high_water() - int(started["memory"]))
        else:
            say(ready=True)
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "iterate":
                gc.collect()
                forget_high_water()
                started.update(memory=high_water(), cpu=time.process_time(), wall=time.perf_counter())
                return
            torch.save({name: value.detach().cpu() for name, value in digest().items()}, command["path"])
            say(saved=command["path"])
        os._exit(0)  # the parent has closed the pipe; a script that waits here is not to finish its run

    module, function = spec["build"].split(":")
    getattr(importlib.import_module(module), function)(Path(spec["work"]), turn, **spec["options"])


def loop(turn: Turn, iterate: Callable[[], Any], digest: Callable[[Any], dict[str, Tensor]]) -> None:
    """Iterate whenever it is our turn; the digest is of what the last iteration gave."""
    value = None
    while True:
        turn(partial(digest, value))
        value = iterate()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
