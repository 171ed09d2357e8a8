"""Flags and help are views of one dataclass."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from nanopost import config


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of nothing."""

    model: Path  # model folder in hub format
    data: tuple[str, ...]  # JSONL files
    steps: int = 100  # optimiser steps
    lr: float = 3e-4  # peak learning rate
    kind: Literal["constant", "cosine"] = "cosine"  # decay of the rate
    limit: int | None = None  # at most so many records
    pair: tuple[int, float] = (1, 0.5)  # two numbers
    resume: bool = False  # go on where the run stopped
    shuffle: bool = True  # a new order every epoch


REQUIRED = ["--model", "m", "--data", "a.jsonl", "b.jsonl"]


def test_defaults_and_flags() -> None:
    assert config.parse(Config, REQUIRED) == Config(Path("m"), ("a.jsonl", "b.jsonl"))
    flags = ["--steps", "7", "--lr", "1e-5", "--kind", "constant", "--limit", "3", "--pair", "2", "0.1"]
    parsed = config.parse(Config, [*REQUIRED, *flags, "--resume", "--no-shuffle"])
    assert parsed == Config(Path("m"), ("a.jsonl", "b.jsonl"), 7, 1e-5, "constant", 3, (2, 0.1), True, False)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        config.parse(Config, arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize(
    ("wrong", "near"), [("--step", "--steps"), ("--shufle", "--no-shuffle"), ("--lrr", "--lr")]
)
def test_an_unknown_flag_suggests_the_near_one(
    wrong: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = refused([*REQUIRED, wrong, "3"], capsys)
    assert re.search(rf"Perhaps you meant:\W+{near}\b", text)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (REQUIRED[:2], "--data"),
        ([*REQUIRED, "--steps", "many"], "many"),
        ([*REQUIRED, "--kind", "cosin"], "cosin"),
        ([*REQUIRED, "--no-resume"], "--no-resume"),  # one flag a switch
        ([*REQUIRED, "--shuffle"], "--shuffle"),
    ],
)
def test_bad_flags_are_refused(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word in refused(arguments, capsys)


def help_of(program: str, columns: int) -> list[str]:
    env = os.environ | {"COLUMNS": str(columns), "NO_COLOR": "1"}
    command = [sys.executable, "-c", program, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip().split("\n")


def test_help_of_35_fields_fits_one_screen(tmp_path: Path) -> None:
    """The most a script may have, short and long names mixed: 60 lines of 110 columns."""
    comment = "what this field does, in its unit"
    kinds = [
        "rate_{0}: float = {0}.5",
        "a_long_field_name_{0}: int = {0}",
        "x_{0}: Literal['one', 'two'] = 'two'",
    ]
    fields = [f"    {kinds[i % 3].format(i)}  # {comment}, {i}" for i in range(35)]
    head = ["import dataclasses", "from typing import Literal", "@dataclasses.dataclass", "class Config:"]
    (tmp_path / "screen.py").write_text("\n".join([*head, *fields]) + "\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import screen; from nanopost import config"
    lines = help_of(program + "; config.parse(screen.Config)", columns=110)
    assert len(lines) <= 60 and max(map(len, lines)) <= 110
    text = "\n".join(lines)
    for i in range(35):
        assert f"{comment}, {i} (default: " in text  # the comment and the default are told
    assert text.count("--") == 35 + 1
