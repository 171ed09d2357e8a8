"""The run folder: what is about to run is written down, and a resumed start is held to it.

    run/args.json   the configuration of the last start
    run/env.json    python, torch, platform, package versions, commit: what a number needs to be believed;
                    and the SHA-256 of every file that the configuration names
    run/.lock       held while a process is at work in the folder
    run/metrics.jsonl  run/rollouts/  run/model/  run/state/  run/micro_batch-rank<r>.json
                    see `metrics`, `checkpoint` and `micro_batches`

Only rank 0 reads and writes; every rank may call, and all raise what it finds.
"""

import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nanopost import atomic, distributed, micro_batches
from nanopost import config as flags

_LOCKS = set[Path]()  # the run folders that this process holds
PACKAGES = ("nanopost", "torch", "numpy", "safetensors", "tokenizers", "jinja2", "tyro")
# Fields that may change while a run goes on: its numbers stay the same, up to the rounding of other products.
FREE = {"out", "eval_every", "save_every", "rollouts_every", "micro_batch", "slots"}
BEGUN = ("metrics.jsonl", "state", "teacher.jsonl", "logps")  # what steps have left, or start from
LOADED = {".json", ".safetensors", ".jinja"}  # of a model's folder


def open_run(run: Path | str, config: Any, *, env: Mapping[str, Any]) -> Path:
    """Make the run folder and write down what is about to run.

    Args:
        run: the folder; parents are made.
        config: instance of a flat dataclass with the flags of `config.Machine`, written to args.json. With
            `plan` nothing runs, and nothing is written.
        env: JSON values to add to env.json, such as a template's version.
    Returns:
        The folder as a path. A resumed run that was begun with other flags, other values of `env` or other
        contents of its files is another run: it goes on only where `config.accept` names what has changed,
        and env.json keeps that under "changes", oldest first. FREE fields need no such word.
    Raises:
        ValueError: the folder has metrics or a state and `config.resume` is off, something has changed that
            was not accepted (all of it is named), `config.accept` has a name that is none, or another process
            is at work in the folder.
    """
    if config.plan:
        return Path(run)
    added = json.loads(json.dumps(dict(env)))
    rows, *_ = distributed.together(lambda: _open(Path(run), config, added), main=True)
    micro_batches.begin(Path(run), rows)
    return Path(run)


def _open(run: Path, config: Any, env: dict[str, Any]) -> int | None:
    """Returns the rows a pass that the run has come down to, where it goes on (`micro_batches`)."""
    arguments = json.loads(json.dumps(asdict(config), default=str))
    begun = [name for name in BEGUN if (run / name).exists()]
    if {*begun} & {*BEGUN[:2]} and not config.resume:
        raise ValueError(f"run: {run} holds a run already; pass --resume to go on or choose another folder")
    known = begun and config.resume
    rows = micro_batches.read_limit(run) if config.resume else None
    old = _read(run / "env.json") if known else {}
    before = _read(run / "args.json") if known else {}
    env |= {"bf16": torch.is_autocast_enabled("cuda" if torch.cuda.is_available() else "cpu")}
    env |= {"files": {name: _contents(path) for name, path in vars(config).items() if _is_input(name, path)}}
    changed = {name: [before[name], x] for name, x in arguments.items() if before.get(name, x) != x}
    files, found = old.get("files", {}), env["files"]
    both = files.keys() & found.keys()  # a file is what it holds, wherever it lies
    drift = {name: pair for name, pair in changed.items() if name not in _free() | both}
    drift |= {name: [old[name], x] for name, x in env.items() if name != "files" and old.get(name, x) != x}
    for name in sorted(name for name in both if files[name] != found[name]):
        parts = sorted(files[name].items() ^ found[name].items())
        drift[name] = [
            dict(part for part in parts if part in side.items()) for side in (files[name], found[name])
        ]
    accepted = {name for name in config.accept.split(",") if name}
    if strange := accepted - arguments.keys() - env.keys():
        raise ValueError(f"accept: nothing is called {', '.join(sorted(strange))}")
    if refused := {name: pair for name, pair in drift.items() if name not in accepted}:
        told = [
            f"{name}: {run} was started with {a!r}, this start has {b!r}" for name, (a, b) in refused.items()
        ]
        raise ValueError("\n".join([*told, f"put it back, or go on with --accept {','.join(refused)}"]))
    run.mkdir(parents=True, exist_ok=True)
    _lock(run)
    record: dict[str, Any] = _environment() | env
    if known:
        record["changes"] = old.get("changes", []) + ([now] if (now := changed | drift) else [])
    for name, value in (("args", arguments), ("env", record)):
        atomic.write_json(run / f"{name}.json", value)
    if not config.resume:
        for left in run.glob(micro_batches.FILES):
            left.unlink()
    return rows


def _free() -> set[str]:
    return FREE | flags.Machine.__dataclass_fields__.keys()


def _is_input(name: str, value: Any) -> bool:
    return isinstance(value, Path) and name != "out" and value.exists()


def _contents(path: Path) -> dict[str, str]:
    """The SHA-256 of a file, or of each file of a folder that a model is read from, by name."""
    folder = path.is_dir()
    files = sorted(file for file in path.iterdir() if file.suffix in LOADED) if folder else [path]
    return {file.name if folder else "content": atomic.sha256(file) for file in files}


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not there: nothing says what the run was started with") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    return found


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
        "ranks": distributed.world_size(),
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
