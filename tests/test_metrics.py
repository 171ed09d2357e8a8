"""The run folder: what is written, what is refused, what a resumed run forgets."""

import doctest
import gzip
import io
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from nanopost import atomic, metrics
from nanopost.models import registry


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_truncate_forgets_from_a_step_on(tmp_path: Path) -> None:
    for step in range(5):
        metrics.write_record(tmp_path, step, {"x": step / 3, "note": "é"})
        metrics.write_rollouts(tmp_path, step, [{"text": f"{step}"}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "x"')  # cut by a crash
    before = metrics.read_records(tmp_path)
    assert [record["step"] for record in before] == [0, 1, 2, 3, 4]
    metrics.truncate(tmp_path, 3)
    metrics.write_record(tmp_path, 3, {"x": 9})
    assert metrics.read_records(tmp_path) == [*before[:3], {"step": 3, "x": 9}]
    names = sorted(path.name for path in (tmp_path / "rollouts").iterdir())
    assert names == ["000000.jsonl.gz", "000001.jsonl.gz", "000002.jsonl.gz"]
    metrics.truncate(tmp_path, 0)
    assert metrics.read_records(tmp_path) == [] and not list((tmp_path / "rollouts").iterdir())
    metrics.truncate(tmp_path / "new", 0)  # a run that has nothing yet


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_a_full_disk_is_told_by_the_file_that_it_is_full_for(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
        metrics.write_record(tmp_path, 0, {"loss": 1.0})
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts/.000000.jsonl.gz.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/rollouts/000000\.jsonl\.gz'"):
        metrics.write_rollouts(tmp_path, 0, [{"text": "a"}])
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        registry.write_audit("/dev/full", [{"id": "1"}])


def test_an_error_that_names_its_file_keeps_its_words(tmp_path: Path) -> None:
    """A library's own error, in a folder that is written in one move: the file is said, not the folder."""
    folder, file = tmp_path / "model", Path("/file.safetensors")
    found = r"^/file\.safetensors: I/O error: No space left on device$"
    with pytest.raises(OSError, match=found), atomic.atomic_folder(folder), atomic.named(file):
        raise SafetensorError("I/O error: No space left on device")
    with pytest.raises(OSError, match=r"^\[Errno 28\] full: '.*/model'$"), atomic.atomic_folder(folder):
        raise OSError(28, "full")


def test_a_broken_line_inside_is_an_error_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not JSON"):
        metrics.read_records(tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, torch.tensor(1.0), [1.0]])
def test_only_finite_numbers_and_text_are_recorded(tmp_path: Path, bad: object) -> None:
    with pytest.raises(ValueError, match="reward: expected"):
        metrics.write_record(tmp_path, 3, {"loss": 1.0, "reward": bad})
    assert metrics.read_records(tmp_path) == []


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": 2**60, "d": None, "e": True, "f": "é"}
    metrics.write_record(tmp_path, 7, values)
    assert metrics.read_records(tmp_path) == [{"step": 7, **values}]


def test_rollouts_round_trip_and_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    rows = [{"prompt": "a\nb", "reward": 0.5, "parts": {"exact": 1.0}}, {"prompt": "é", "reward": 0.0}]
    metrics.write_rollouts(tmp_path, 12, rows)
    assert metrics.read_rollouts(tmp_path, 12) == rows
    path = tmp_path / "rollouts" / "000012.jsonl.gz"
    first = path.read_bytes()
    assert gzip.decompress(first).decode().count("\n") == 2
    metrics.write_rollouts(tmp_path, 12, rows)
    assert path.read_bytes() == first
    for bad in (math.nan, {1, 2}):
        with pytest.raises(ValueError, match="rows: step 12"):
            metrics.write_rollouts(tmp_path, 12, [{"x": bad}])
    assert path.read_bytes() == first


def test_lines_align_whatever_the_numbers() -> None:
    rows = [
        {"reward": 0.5, "kl": 0.0, "tokens": 12, "lr": 1e-4},
        {"reward": -123456.789, "kl": 1.23456e-9, "tokens": 1234567, "lr": 0.1},
        {"reward": -1.23456e-10, "kl": 3.0, "tokens": 0, "lr": 12345.678},
    ]
    lines = [metrics.format_line(step, 1000, row) for step, row in zip((0, 99, 999), rows, strict=True)]
    for name in ("/1000", "reward", "kl", "tokens", "lr"):
        assert len({line.index(name) for line in lines}) == 1
    assert len({len(line) for line in lines}) == 1
    assert lines[0].startswith("   1/1000") and lines[2].startswith("1000/1000")
    assert "-1.23e+05" in lines[1] and "1.235e-09" in lines[1] and "1234567" in lines[1]


def test_the_docstring_tells_the_truth() -> None:
    assert doctest.testmod(metrics).failed == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "speaks"), [(io.StringIO, False), (Terminal, True)])
def test_progress_speaks_to_terminals_only(
    stream: type[io.StringIO], speaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = stream()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(metrics.progress(range(3), desc="quick")) == [0, 1, 2] and not screen.getvalue()
    monkeypatch.setattr(metrics, "DELAY", 0.0)
    assert list(metrics.progress(iter("abc"), desc="rollout", total=3)) == ["a", "b", "c"]
    assert ("rollout" in screen.getvalue()) == speaks
    bar = metrics.progress(range(3), desc="by hand")
    bar.update(2)
    bar.close()
    assert ("by hand" in screen.getvalue()) == speaks
