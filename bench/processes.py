"""The parent's end of a worker: start it, let it run an iteration, fetch its digest, end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.machine import ROOT

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONHASHSEED": "0",
}


class Failed(Exception):
    """A worker that ended by itself; the message is the end of its log."""


ALIVE: list[Process] = []


class Process:
    """One side of a comparison, alive from its build to `quit`; `bench.worker` says what it understands."""

    def __init__(self, spec: dict[str, Any]):
        self.folder = tempfile.TemporaryDirectory(dir=spec["work"])
        self.log = Path(self.folder.name) / "log"
        cache = {"HF_HOME": self.folder.name, "HF_DATASETS_CACHE": self.folder.name}
        with self.log.open("wb") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", json.dumps(spec)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | ONE_THREAD | OFFLINE | cache,
            )
        ALIVE.append(self)
        self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line it says; Failed when it has ended instead."""
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            self.child.wait()
            log = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
            self.quit()
            raise Failed(log or "it said nothing")
        return json.loads(line)

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.child.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `answer` says how
            self.child.stdin.write(json.dumps(command) + "\n")
            self.child.stdin.flush()
        return self.answer()

    def iterate(self) -> dict[str, float]:
        """Run one iteration: its CPU and wall seconds, and the bytes by which its memory grew."""
        return self.ask(do="iterate")

    def digest(self) -> dict[str, torch.Tensor]:
        """Tensors by name, of the last iteration."""
        path = Path(self.folder.name) / "digest.pt"
        self.ask(do="digest", path=str(path))
        found = torch.load(path)
        path.unlink()
        return found

    def quit(self) -> None:
        """Let it go: the end of its input is the end of its work. Twice does no harm."""
        assert self.child.stdin is not None and self.child.stdout is not None
        with suppress(BrokenPipeError):
            self.child.stdin.close()
        self.child.wait()
        self.child.stdout.close()
        self.folder.cleanup()
        if self in ALIVE:
            ALIVE.remove(self)


def quit_all() -> None:
    """Let all go that are still there, after an error too."""
    for process in list(ALIVE):
        process.quit()
