"""One line and one JSON record a step, and the run folder they live in.

    run/args.json                 the configuration of the last start
    run/env.json                  python, torch, platform, package versions, commit:
                                  what a number needs to be believed
    run/metrics.jsonl             one record a step
    run/rollouts/000012.jsonl.gz  the samples of step 12
    run/model/  run/state/        written by `checkpoint`

Plain files that `head`, `jq` and a spreadsheet read. Only rank 0 writes; every rank may call.
"""

import dataclasses
import fcntl
import gzip
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
_LOCKS = set[Path]()  # the run folders that this process holds
PACKAGES = ("nanopost", "torch", "numpy", "safetensors", "tokenizers", "jinja2", "tyro")


def open_run(run: Path | str, config: Any, *, env: Mapping[str, Any], resume: bool) -> Path:
    """Make the run folder and write down what is about to run.

    Args:
        run: the folder; parents are made.
        config: instance of a flat dataclass, written to args.json.
        env: JSON values to add to env.json, such as a template's version. A resumed start may not change
            them: with another template it is not the same run.
        resume: go on in a folder that holds a run already. Fields that differ from the last start are kept in
            env.json under "changes", oldest first.
    Returns:
        The folder as a path.
    Raises:
        ValueError: the folder has metrics or a state and `resume` is off, a value of `env` is not the one the
            run was started with, or another process is at work in the folder.
    """
    run, arguments = Path(run), json.loads(json.dumps(dataclasses.asdict(config), default=str))
    added = json.loads(json.dumps(dict(env)))
    begun = (run / "metrics.jsonl").exists() or (run / "state").exists()
    if begun and not resume:
        raise ValueError(f"run: {run} holds a run already; pass --resume to go on or choose another folder")
    known = resume and (run / "args.json").exists() and (run / "env.json").exists()
    old = json.loads((run / "env.json").read_text(encoding="utf-8")) if known else {}
    for key, new in added.items():
        if key in old and old[key] != new:
            raise ValueError(f"{key}: {run} was started with {old[key]!r}, this start has {new!r}")
    if not _is_main():
        return run
    run.mkdir(parents=True, exist_ok=True)
    _lock(run)
    record: dict[str, Any] = _environment() | added
    if known:
        before = json.loads((run / "args.json").read_text(encoding="utf-8"))
        changed = {k: [before.get(k), v] for k, v in arguments.items() if before.get(k) != v}
        record["changes"] = old.get("changes", []) + ([changed] if changed else [])
    _replace(run / "args.json", (json.dumps(arguments, indent=2, ensure_ascii=False) + "\n").encode())
    _replace(run / "env.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return run


def _lock(run: Path) -> None:
    """Hold the run folder as long as this process lives; the system lets go of it, whatever ends it."""
    if (path := (run / ".lock").resolve()) in _LOCKS:
        return
    lock = os.open(path, os.O_CREAT | os.O_RDWR)  # held until the end
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ValueError(f"run: another process is at work in {run}") from error
    _LOCKS.add(path)


def truncate(run: Path | str, step: int) -> None:
    """Forget everything recorded from `step` on, so that a resumed run tells each step once.

    Args:
        run: the run folder.
        step: first step to forget: the one about to be taken again. A last line cut by a crash goes too.
    """
    run = Path(run)
    if not _is_main():
        return
    if (run / "metrics.jsonl").exists():
        kept = [record for record in read_records(run) if record["step"] < step]
        _replace(run / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept).encode())
    for path in (run / "rollouts").glob("*.jsonl.gz"):
        if int(path.name.split(".")[0]) >= step:
            path.unlink()


def write_record(run: Path | str, step: int, values: Mapping[str, Any]) -> None:
    """Append one step to metrics.jsonl.

    Args:
        run: the run folder.
        step: counted from 0.
        values: JSON numbers, strings, booleans or None by name.
    Raises:
        ValueError: a value is NaN, infinite or nothing JSON can hold; the name is told.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number at step {step}, got {value}")
        if not isinstance(value, (int, float, str, type(None))):
            raise ValueError(f"{name}: expected a number or text at step {step}, got {type(value).__name__}")
    if _is_main():
        with open(Path(run) / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_records(run: Path | str) -> list[dict[str, Any]]:
    """All records of metrics.jsonl in order; a last line without its end (a crash while writing) is left out.

    Args:
        run: the run folder; one without metrics gives an empty list.
    Raises:
        ValueError: a complete line is not JSON; file and line are named.
    """
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg}") from error
    return records


def write_rollouts(run: Path | str, step: int, rows: list[dict[str, Any]]) -> None:
    """Write the samples of one step to rollouts/<step>.jsonl.gz, one JSON object a line.

    Args:
        run: the run folder.
        step: counted from 0.
        rows: what a reader needs to judge a sample: prompt, completion, reward and its parts, advantage, …
            The same rows give the same bytes.
    Raises:
        ValueError: a row holds NaN, infinity or something JSON cannot hold.
    """
    if not _is_main():
        return
    folder = Path(run) / "rollouts"
    folder.mkdir(exist_ok=True)
    try:
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rows: step {step} holds what JSON cannot: {error}") from error
    _replace(folder / f"{step:06d}.jsonl.gz", gzip.compress(text.encode(), mtime=0))


def read_rollouts(run: Path | str, step: int) -> list[dict[str, Any]]:
    """The rows that `write_rollouts` wrote for a step."""
    path = Path(run) / "rollouts" / f"{step:06d}.jsonl.gz"
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().split("\n")[:-1]]


def format_line(step: int, steps: int, values: Mapping[str, Any]) -> str:
    """One aligned line for a step: the same names give the same columns, whatever the numbers.

    Args:
        step: counted from 0; printed from 1.
        steps: length of the run.
        values: numbers to four significant digits, integers whole, text as it is.

    >>> format_line(4, 80, {"loss": 1.23456, "lr": 0.0003, "tokens": 512})
    ' 5/80  loss     1.235  lr    0.0003  tokens       512'
    """
    cells = [f"{name} {_number(value):>9}" for name, value in values.items()]
    return "  ".join([f"{step + 1:>{len(str(steps))}}/{steps}", *cells])


def progress(iterable: Iterable[T], *, desc: str, total: int | None = None) -> "tqdm[T]":
    """A tqdm bar on stderr: iterate, or `.update(n)` and `.close()`; none off rank 0 or a terminal."""
    from tqdm import tqdm

    silent = not (_is_main() and sys.stderr.isatty())
    return tqdm(iterable, desc=desc, total=total, leave=False, disable=silent)


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.4g}"
    return text if len(text) <= 9 else f"{value:.2e}"  # -1.23e-10 is the widest


def _environment() -> dict[str, Any]:
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)  # None: a checkout, or an extra not here
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16": torch.is_autocast_enabled("cuda" if torch.cuda.is_available() else "cpu"),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "packages": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout this code is in, "-dirty" where files differ from it; None outside one."""
    code = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(code), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except FileNotFoundError:  # no git on this machine
        return None


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _replace(path: Path, data: bytes) -> None:
    """Write a file in one move: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
