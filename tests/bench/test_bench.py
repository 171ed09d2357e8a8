"""The benchmarks' harness, on processes with invented times; its tables; one real process."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import measure, run, table
from bench.cases import CASES, Case, Peer
from bench.processes import Failed, Process, quit_all

ROOT = Path(__file__).resolve().parent.parent.parent


# ---- the judgement, on invented processes


Times = dict[str, list[float]]


class Pretended:
    """A process that takes the times it is told, over and over, and gives the digest it is told."""

    times: Times
    digests: dict[str, dict[str, Tensor]]
    started: list[str]

    def __init__(self, spec: dict[str, Any]):
        name = spec["options"].get("name") or spec["build"]
        if self.times[name] == []:
            raise Failed(f"Traceback\n{name} does not work")
        self.name = f"{name} again" if name in self.started and f"{name} again" in self.times else name
        self.started.append(name)
        self.count = -1

    def iterate(self) -> dict[str, float]:
        self.count += 1
        taken = self.times[self.name]
        return {"cpu": taken[self.count % len(taken)], "wall": 0.0, "memory": 1000.0 * len(self.name)}

    def digest(self) -> dict[str, Tensor]:
        return self.digests.get(self.name, {"loss": torch.tensor(3.0), "copy": torch.tensor(8e9)})

    def quit(self) -> None:
        pass


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run a made-up case with made-up times; the exit code and what the results file then holds."""

    def go(
        times: Times, digests: dict[str, dict[str, Tensor]] | None = None, **more: Any
    ) -> tuple[int, dict[str, Any]]:
        settings = {name: {"name": name} for name in times if name.startswith("peer")}
        peers = [
            Peer("known", "torch", "peers:any", settings, default_bar=2.0, best_bar=1.5, memory_bar=0.3),
            Peer("unknown", "no-such-package-anywhere", "peers:any", {"default": {}}, best_bar=1.0),
        ]
        shape = {"width": 4, "layers": 1, "vocabulary": 8}
        case = Case(
            "small", "A small case", "ours", shape, peers, [(8, 8, True)], floor_bar=0.7, files=(), **more
        )
        monkeypatch.setitem(CASES, "small", case)
        monkeypatch.setattr(run, "Process", Pretended)
        Pretended.times = {"bench.floor:products": [0.8]} | times
        Pretended.digests, Pretended.started = digests or {}, []
        code = run.main(["small", "--pairs", "7", "--results", str(tmp_path)])
        written = list(tmp_path.glob("*.json"))
        return code, json.loads(written[0].read_text(encoding="utf-8")) if written else {}

    return go


Go = Callable[..., tuple[int, dict[str, Any]]]


def test_a_quiet_case(pretend: Go, capsys: pytest.CaptureFixture[str]) -> None:
    code, results = pretend({"ours": [1.0], "peer default": [3.0], "peer slow": [4.0], "peer best": [2.0]})
    record = results["cases"]["small"]
    known = record["peers"]["known"]
    assert code == 0 and record["quiet"] and record["twin"]["median"] == 1.0
    assert (known["default"]["median"], known["best"]["median"]) == (3.0, 2.0)
    assert known["settings"]["best"] == "peer best" and known["settings"]["default"] == "peer default"
    assert known["default"]["pairs"] == 7 and len(record["samples"]["ours"]) == 7
    assert record["floor"]["median"] == 0.8 and record["copy_gb_s"] == 8.0
    assert record["peers"]["unknown"] == {"skipped": "no-such-package-anywhere is not installed"}
    assert "unknown: skipped, no-such-package-anywhere is not installed" in capsys.readouterr().out
    assert results["machine"]["cores"] and results["versions"]["torch"]


def test_memory_is_a_share_of_the_peers_best_without_the_outputs(pretend: Go) -> None:
    _, results = pretend({"ours": [1.0], "peer default": [3.0], "peer best": [2.0]}, memory=True)
    row = results["cases"]["small"]["peers"]["known"]
    assert row["output_bytes"] == 8 and row["memory_bytes"] == [4000 - 8, 9000 - 8]  # "ours", "peer best"
    assert row["memory_share"] == 3992 / 8992 and measure.verdict(row) == "not met"


def test_a_twin_that_differs_by_more_than_five_percent_is_noise(
    pretend: Go, capsys: pytest.CaptureFixture[str]
) -> None:
    code, results = pretend({"ours": [1.0], "ours again": [1.2], "peer default": [9.0]})
    assert code == 1 and not results["cases"]["small"]["quiet"]
    assert "noisy" in capsys.readouterr().out
    assert measure.verdict(results["cases"]["small"]["peers"]["known"]) == "noisy"


def test_noise_that_comes_and_goes_is_judged_by_the_median(pretend: Go) -> None:
    code, results = pretend({"ours": [1.0], "ours again": [1.0, 1.0, 1.0, 1.0, 1.5], "peer default": [2.0]})
    assert code == 0 and results["cases"]["small"]["twin"]["p90"] > 1.0


@pytest.mark.parametrize("liar", ["peer default", "peer best", "ours again"])
def test_a_digest_that_differs_is_an_error_and_no_number(
    liar: str, pretend: Go, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {liar: {"loss": torch.tensor(3.001), "copy": torch.tensor(8e9)}}
    times = {"ours": [1.0], "ours again": [1.0], "peer default": [3.0], "peer best": [2.0]}
    code, results = pretend(times, wrong)
    assert code == 2 and "small" not in results.get("cases", {})
    assert "ERROR" in (told := capsys.readouterr().out) and "differs from ours: loss: off by" in told


def test_a_setting_that_does_not_run_is_told_and_left_out(pretend: Go) -> None:
    code, results = pretend({"ours": [1.0], "peer default": [3.0], "peer broken": []})
    settings = results["cases"]["small"]["peers"]["known"]["settings"]
    assert code == 0 and settings["best"] == "peer default"
    assert settings["failed"] == {"peer broken": "peer broken does not work"}


def test_a_peer_whose_default_does_not_run_is_an_error(pretend: Go) -> None:
    assert pretend({"ours": [1.0], "peer default": []})[0] == 2


@pytest.mark.parametrize("arguments", [["nothing"], ["sft", "--pairs", "3"]])
def test_what_cannot_be_run_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert arguments[-1] in capsys.readouterr().err


# ---- table and picture


def some_results() -> dict[str, Any]:
    row = {"median": 2.345, "p10": 2.3, "p90": 2.4, "pairs": 9}
    known = {
        "default": row,
        "best": row | {"median": 1.5, "p10": 1.4, "p90": 1.6},
        "bars": {"default": 2.0, "best": 1.5},
        "quiet": True,
    }
    known |= {"settings": {"best": "sorted"}, "version": "5.0", "memory_share": 0.0011, "memory_bar": 0.002}
    floor_row = {"median": 0.654, "p10": 0.61, "p90": 0.7, "pairs": 9, "bar": 0.7, "way": "default"}
    record = {
        "title": "A case",
        "peers": {"known": known, "lost": {"skipped": "lost is not installed"}},
        "floor": floor_row,
        "quiet": True,
        "twin": row | {"median": 1.01},
        "gemm_gflops": 123.4,
        "copy_gb_s": 9.87,
        "ours_seconds": 0.5,
        "commit": "0123456789abcdef",
        "date": "2026-01-02T03:04:05+00:00",
    }
    found = {"cpu": "A CPU", "model": "family 6 model 1", "flags": ["avx2"], "missing_flags": ["amx_tile"]}
    return {
        "machine": found | {"cores": 2, "python": "3.11"},
        "versions": {"torch": "2.13.0", "trl": None},
        "cases": {"a-case": record},
    }


def test_the_table() -> None:
    lines = table.markdown(some_results()).splitlines()
    assert lines[2] == (
        "| A case | known 5.0 | ≥ 2× / 1.5×, ≤ 0.20 % memory | 2.35× (2.30–2.40) "
        "| 1.50× (1.40–1.60): sorted |  | 0.11 % | met |"
    )
    assert lines[3] == "|  | lost | – | – | – | – | – | skipped: lost is not installed |"
    assert lines[4] == "|  | hardware | ≥ 70 % |  |  | 65 % (61 %–70 %) of 123 GFLOP/s |  | not met |"
    assert {line.count("|") for line in lines[:5]} == {9}
    foot = lines[-1]
    for told in ("A CPU", "avx2", "without amx_tile", "torch 2.13.0", "9.9 GB/s", "2026-01-02", "012345678"):
        assert told in foot
    assert "trl" not in foot
    assert "A/A 1.01×" in table.case_text("a-case", some_results()["cases"]["a-case"])


def test_the_picture_is_drawn_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for path in paths:
        table.picture(some_results(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert b"<svg" in paths[0].read_bytes()


# ---- the cases, and one real process


def test_every_builder_of_the_table_exists_and_nothing_is_compared_with_itself() -> None:
    functions = {
        path.stem: {
            node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")
        }
        for path in (ROOT / "bench").glob("*.py")
    }
    for name, case in CASES.items():
        for build in [case.ours, *(peer.build for peer in case.peers)]:
            module, function = build.removeprefix("bench.").split(":")
            assert function in functions[module], build
        assert name == case.name and case.peers and all(peer.settings for peer in case.peers)
        assert not {peer.build for peer in case.peers} & {case.ours}


def test_a_worker_answers_and_a_broken_one_says_why(tmp_path: Path) -> None:
    options = {"passes": [(4, 4, True)], "width": 8, "layers": 1, "vocabulary": 16, "way": "default"}
    process = Process({"build": "bench.floor:products", "work": str(tmp_path), "options": options})
    answer = process.iterate()
    assert answer["cpu"] > 0 and answer["wall"] > 0 and answer["memory"] >= 0
    process.quit()
    with pytest.raises(Failed, match="no attribute 'nothing'"):
        Process({"build": "bench.floor:nothing", "work": str(tmp_path), "options": {}})
    quit_all()
