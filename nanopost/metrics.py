"""One line and one JSON record a step.

    run/metrics.jsonl             one record a step
    run/rollouts/000012.jsonl.gz  the samples of step 12

Plain files that `head`, `jq` and a spreadsheet read. Only rank 0 writes; every rank may call.
"""

import gzip
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from nanopost.atomic import named, replace_file

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
DELAY = 0.5  # seconds before a bar is shown


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
        replace_file(run / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept).encode())
    for path in [*(run / "rollouts").glob("*.jsonl.gz"), *(run / "skipped").glob("*.jsonl")]:
        if int(re.split(r"\D", path.name)[0]) >= step:
            path.unlink()


def write_record(run: Path | str, step: int, values: Mapping[str, Any]) -> None:
    """Append one step to metrics.jsonl.

    Args:
        run: the run folder.
        step: counted from 0.
        values: JSON numbers, strings, booleans or None by name. A "grad_norm" of NaN says that the step was
            not taken (`faults.take_step`): what is not finite in its record is null, the norm among them.
    Raises:
        ValueError: a value is NaN, infinite or nothing JSON can hold; the name is told.
        OSError: the line cannot be written, as on a full disk; a resumed run takes the step again.
    """
    values, taken = dict(values), not _lost(values.get("grad_norm"))
    for name, value in values.items():
        if _lost(value) and taken:
            raise ValueError(f"{name}: expected a finite number at step {step}, got {value}")
        values[name] = None if _lost(value) else value
        if not isinstance(value, (int, float, str, type(None))):
            raise ValueError(f"{name}: expected a number or text at step {step}, got {type(value).__name__}")
    if _is_main():
        path = Path(run) / "metrics.jsonl"
        with named(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _lost(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


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
    replace_file(folder / f"{step:06d}.jsonl.gz", gzip.compress(text.encode(), mtime=0))


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
    """A tqdm bar on stderr: iterate, or `.update(n)` and `.close()`; none off rank 0 or a terminal.

    It comes after `DELAY` seconds: what is quick does not flicker.
    """
    from tqdm import tqdm

    silent = not (_is_main() and sys.stderr.isatty())
    return tqdm(iterable, desc=desc, total=total, leave=False, disable=silent, delay=DELAY)


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.4g}"
    return text if len(text) <= 9 else f"{value:.2e}"  # -1.23e-10 is the widest


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
