"""The CUDA table's command without a GPU: its arithmetic by hand, its rows and its processes with fakes."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cuda, cuda_measure, cuda_process, cuda_table
from bench.cuda_measure import Wrong
from bench.cuda_models import HALF_B, ONE_B
from bench.cuda_process import Row, run_rows, supervise
from nanopost.models.config import LlamaConfig
from nanopost.models.llama import Llama

TINY = LlamaConfig(10, 4, 6, 2, 2, 1, 2, 32, tie_word_embeddings=True)
CEILINGS = {"gpu": "NVIDIA X", "copy": 4e12, "gemm": 8e14, "gemm_shape": "8 × 8 × 8"}


# ---- no GPU
def test_without_a_gpu_one_line_is_printed_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert cuda.main([]) == 0
    assert capsys.readouterr().out == "no GPU here: nothing was measured, nothing is claimed\n"
    assert list(tmp_path.iterdir()) == []


def test_it_needs_no_triton_to_say_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("bench", "nanopost", "triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert importlib.import_module("bench.cuda").main([]) == 0
    assert capsys.readouterr().out.startswith("no GPU here")


def test_the_list_names_every_row_and_every_row_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [r.name for r in cuda.TABLE]
    for row in cuda.TABLE:
        module, name = row.run.args[0].split(":")  # type: ignore[attr-defined]
        text = (cuda.machine.ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert f"def {name}(" in text, row.name
    assert sum(row.seconds for row in cuda.TABLE) + cuda_process.STARTING <= 600


# ---- arithmetic
def test_bytes_that_no_kernel_can_do_without() -> None:
    assert cuda_measure.logps_bytes(2, 10) == 2 * (10 * 2 + 8 + 12) == 80
    assert cuda_measure.in_place_bytes(2, 10) == 2 * (10 * 2 + 10 * 2 + 8 + 4 + 4) == 112
    assert cuda_measure.norm_bytes(3, 8) == (3 * (16 + 16 + 4) + 16, 3 * (16 + 16 + 16 + 4) + 16 + 16)
    assert cuda_measure.gate_bytes(5) == (30, 50)
    assert cuda_measure.rope_bytes(3, 2, 4) == (3 * (16 + 16 + 4 + 4), 120)


def test_operations() -> None:
    assert cuda_measure.linear_flops(2, 3, 4, products=3) == 144
    weights = 2 * (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 6) + 10 * 4
    assert cuda_measure.multiplied(TINY) == weights == 280
    assert weights == sum(p.numel() for p in Llama(TINY).parameters() if p.dim() == 2)
    assert [round(cuda_measure.multiplied(c) / 1e9, 2) for c in (HALF_B, ONE_B)] == [0.49, 1.24]
    # a causal row of 3 has 6 pairs, one of 1 has 1; a pair costs 2 · 2E in each of 2 layers × 2 heads, E = 2
    assert cuda_measure.training_flops(TINY, [3, 1]) == 6 * 280 * 4 + 3 * (2 * 2) * (4 * 2) * 7


def test_bytes_of_a_decode_step() -> None:
    # 2 prompts of 7 and 3 rows of 5: 29 tokens, of which 2 layers keep a key and a value of one head of 2
    assert (
        cuda_measure.decode_bytes(TINY, rows=3, said=5, prompts=2, prompt=7) == 2 * 280 + 2 * 29 * 2 * 2 * 2
    )


def test_shares_and_verdicts() -> None:
    mark = cuda_measure.share("x", 90.0, [2.0, 1.0, 4.0], 50.0, "of copy", bar=0.9)
    assert (mark["value"], mark["seconds"], mark["samples"]) == (0.9, 2.0, 3)
    assert mark["p10"] == pytest.approx(0.45 + 0.2 * 0.45) and mark["p90"] == pytest.approx(0.9 + 0.8 * 0.9)
    assert cuda_table.verdict(mark) == "met"
    assert cuda_table.verdict(mark | {"bar": 0.91}) == "not met"
    assert cuda_table.verdict(mark | {"bar": None}) == "no bar"
    most = cuda_measure.mark("x", [47.0], "ms", bar=46.0, most=True)
    assert (cuda_table.verdict(most), cuda_table.bar_text(most)) == ("not met", "≤ 46 ms")
    assert cuda_table.found_text(mark) == "90.0 % (54.0–162.0, n 3) of copy"


def test_what_differs_from_the_slow_path_is_wrong() -> None:
    exact = torch.tensor([1.0, 100.0])
    cuda_measure.close("x", torch.tensor([1.01, 101.0]), exact, rtol=0.01, atol=1e-5)
    for bad in ([1.1, 100.0], [1.0, 102.0], [float("nan"), 100.0]):
        with pytest.raises(Wrong, match="x: an entry is off"):
            cuda_measure.close("x", torch.tensor(bad), exact, rtol=0.01, atol=1e-5)
    naive = torch.tensor([1.0, 101.0])  # 1 % of the largest entry: 2 % are ours, and a little
    cuda_measure.no_worse("x", torch.tensor([1.0, 98.0]), naive, exact)
    for bad in ([1.0, 97.0], [1.0, float("nan")]):
        with pytest.raises(Wrong, match=r"the naive program by 1.0e-02"):
            cuda_measure.no_worse("x", torch.tensor(bad), naive, exact)


def test_a_peer_that_is_missing_or_fails_costs_one_mark() -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("no kernel\nfor this GPU")

    missing = cuda_measure.against("x", "no-such-package", 8.0, fails)
    assert (missing["skipped"], cuda_table.verdict(missing)) == (
        "no-such-package is not installed",
        "skipped",
    )
    broken = cuda_measure.against("x", "torch", 8.0, fails)
    assert broken["skipped"] == "torch failed: RuntimeError: no kernel"


# ---- rows
def fake(name: str, run: Callable[..., list], seconds: float = 1.0) -> Row:
    return Row(name, name, seconds, run)


def raises(error: Exception) -> Callable[..., list]:
    def run(ceilings: Any, left: Any) -> list:
        raise error

    return run


def said(rows: list[Row], left: Callable[[], float]) -> dict[str, dict]:
    records: list[dict] = []
    assert run_rows(rows, CEILINGS, left, records.append)
    json.dumps(records)
    return {record["row"]: record for record in records if "row" in record}


def test_a_failing_row_does_not_stop_the_others() -> None:
    mark = cuda_measure.share("x", 1.0, [2.0], 1.0, "of copy")
    rows = [
        fake("breaks", raises(RuntimeError("an illegal address\nand where"))),
        fake("differs", raises(Wrong("∂L/∂h: off by 3.0e-01"))),
        fake("works", lambda ceilings, left: [mark, ceilings["copy"], left() <= 1.0]),
    ]
    found = said(rows, lambda: 100.0)
    assert found["breaks"]["error"] == "RuntimeError: an illegal address"
    assert found["differs"]["wrong"] == "∂L/∂h: off by 3.0e-01"
    assert found["works"]["found"] == [mark, 4e12, True]
    assert not {"found", "wrong"} & found["breaks"].keys() and "found" not in found["differs"]


def test_rows_that_do_not_fit_are_not_reached() -> None:
    rows = [
        fake("short", lambda *_: [], 1.0),
        fake("long", lambda *_: [], 9.0),
        fake("last", lambda *_: [], 2.0),
    ]
    found = said(rows, lambda: 4.0)
    assert [name for name, record in found.items() if "found" in record] == ["short", "last"]
    assert found["long"]["not_reached"] == "needs 9 s, 4 s were left"


def test_after_an_error_that_broke_the_gpu_another_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_process, "sound", lambda: False)
    records: list[dict] = []
    rows = [fake("breaks", raises(RuntimeError("illegal"))), fake("waits", lambda *_: [])]
    assert not run_rows(rows, CEILINGS, lambda: 9.0, records.append)
    assert [record.get("row") for record in records] == [None, "breaks"]


# ---- processes
HEAD = f"import os, time; ceilings = {json.dumps({'row': 'ceilings', 'found': CEILINGS})!r}; "


def program(*lines: str, last: str = "") -> list[str]:
    """A process that says these lines and ends as told."""
    return [sys.executable, "-S", "-c", HEAD + f"print({', '.join(lines)}, sep='\\n', flush=True); {last}"]


def begins(name: str) -> str:
    return repr(json.dumps({"begins": name}))


def ends(name: str) -> str:
    return repr(json.dumps({"row": name, "found": []}))


def test_a_process_that_ends_or_hangs_costs_its_row_alone(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[list[str], Any]] = []
    programs = [
        program(begins("ceilings"), "ceilings", begins("a"), ends("a"), begins("b"), last="os._exit(3)"),
        program(begins("c"), last="time.sleep(60)"),
        program("'a library says hello'", begins("d"), ends("d")),
    ]

    def command(rows: list[str], ceilings: Any, seconds: float) -> list[str]:
        asked.append((rows, ceilings))
        return programs[len(asked) - 1]

    limits = dict.fromkeys("abcd", 30.0) | {"c": 0.1}
    ceilings, records = supervise(list("abcd"), limits, lambda: 60.0, command)
    assert ceilings == CEILINGS and list(records) == list("abcd")
    assert asked == [(list("abcd"), None), (list("cd"), CEILINGS), (["d"], CEILINGS)]
    assert records["a"] == records["d"] == {"found": []}
    assert records["b"]["error"] == "its process ended: exit code 3"
    assert records["c"]["error"] == "its process ended: it took longer than 1 s"


def test_without_ceilings_there_is_no_row() -> None:
    said = repr(json.dumps({"row": "ceilings", "error": "RuntimeError: out of memory"}))
    ceilings, records = supervise(["a", "b"], {}, lambda: 60.0, lambda *_: program(said, last="os._exit(1)"))
    assert ceilings is None
    assert {record["error"] for record in records.values()} == {"no ceilings: RuntimeError: out of memory"}
    _, records = supervise(
        ["a"], {}, lambda: 60.0, lambda *_: [sys.executable, "-S", "-c", "raise SystemExit(7)"]
    )
    assert records == {"a": {"error": "its process ended: exit code 7"}}
    _, records = supervise(["a"], {}, lambda: -1.0, lambda *_: ["never started"])
    assert records == {"a": {"not_reached": "the time was up"}}


# ---- what is written and printed
def test_the_table_comes_last_and_the_file_keeps_what_was_measured_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = cuda_measure.share("forward", 3.6e12, [1.0] * 20, 4e12, "of copy", bar=0.88)
    found = {"rope": {"found": [mark]}, "swiglu": {"not_reached": "the time was up"}}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(
        cuda, "supervise", lambda names, *_: (CEILINGS, {name: found[name] for name in names})
    )
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert cuda.main(["--only", "swiglu", "rope"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("NVIDIA X: copy 4.00 TB/s, bf16 products 800 TFLOP/s (8 × 8 × 8).")
    assert any(line.split()[:1] == ["rope"] and "90.0 % (90.0–90.0) of copy" in line for line in lines)
    assert any(line.startswith("swiglu") and "NOT REACHED: the time was up" in line for line in lines)

    found = {"rope": {"not_reached": "the time was up"}, "swiglu": {"wrong": "forward: off by 0.1"}}
    assert cuda.main(["--only", "swiglu", "rope"]) == 2
    for folder in ("results", "out"):
        (path,) = (tmp_path / folder).iterdir()
        assert path.name.startswith("cuda-nvidia-x-20")
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        assert rows["rope"]["found"][0]["value"] == 0.9 and rows["swiglu"]["wrong"] == "forward: off by 0.1"
        assert rows["rope"]["ceilings"] == CEILINGS and rows["rope"]["date"] and "commit" in rows["rope"]
