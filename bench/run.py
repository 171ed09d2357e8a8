"""Run benchmarks: ours against its peers, in fresh processes that take turns.

    python -m bench.run sft sampler-32      these cases
    python -m bench.run all                 every case that needs no GPU (make bench)
    python -m bench.run --list              what there is

A case is run in four parts. Ours starts, runs once and gives its digest: losses, gradients, tokens, counts.
Every setting of every peer does the same; a digest that differs is an error and there is no number. The
fastest setting is the peer's best. Then ours, its twin, each peer at its default and at its best and the
floor take turns, one iteration each, forwards and backwards. Last, where memory is compared, one fresh
process a side runs one iteration. Ratios are of CPU time. If ours against its twin is off by more than 5 %
the case is noisy and the command fails.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import inputs, machine, measure, table
from bench.cases import CASES, Case, Peer
from bench.floor import flops
from bench.processes import Failed, Process, quit_all

RESULTS = machine.ROOT / "bench" / "results"
TRIES = 3  # timed iterations of a setting before the fastest is chosen
HOPELESS = 1.5  # times as long as the fastest so far: not tried again
FLOOR = "floor"


class Mismatch(Exception):
    """Two sides that do not compute the same: a mistake in one of them, and no number."""


def check(case: Case, side: str, ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Refuse to time a side that gives something else than ours."""
    tolerances = {"loss": case.loss_tolerance}
    if found := measure.differences(ours, theirs, case.tolerance, tolerances):
        raise Mismatch(f"{case.name}: {side} differs from ours: {'; '.join(found[:5])}")


def start(case: Case, build: str, options: dict[str, Any], work: Path) -> Process:
    """A process that is ready for its first iteration."""
    return Process({"build": build, "work": str(work), "options": case.shape | options})


def prepare(case: Case, work: Path) -> None:
    """Write what the processes load: the model through our own export, prompts, pairs."""
    if "model" in case.files:
        importlib.import_module("bench.ours").model_folder(work, **case.shape)
    if "adapter" in case.files:
        importlib.import_module("bench.ours").adapter_folder(work)
    if "prompts" in case.files:
        inputs.write_prompts(work / "prompts.jsonl", **case.shape)
    if "pairs" in case.files:
        inputs.write_pairs(work / "pairs.jsonl", **case.shape)


def search(
    case: Case, build: str, settings: dict[str, dict[str, Any]], work: Path, reference: dict | None
) -> tuple[dict[str, Process], dict[str, Any]]:
    """Try every setting: the processes of the default and of the fastest, and what each setting took.

    `reference` is our digest; None for the floor, which computes nothing that could be compared.
    """
    kept: dict[str, Process] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    default = next(iter(settings))
    for name, options in settings.items():
        try:
            process = start(case, build, options, work)
            process.iterate()
            if reference is not None:
                check(case, f"{build} ({name})", reference, process.digest())
            taken = [process.iterate()["cpu"]]
            while len(taken) < TRIES and min(taken) < HOPELESS * min([*seconds.values(), math.inf]):
                taken.append(process.iterate()["cpu"])
            seconds[name] = min(taken)
        except Failed as error:
            if name == default:
                raise
            failed[name] = str(error).strip().splitlines()[-1][:200]
            print(f"    {name}: does not run here: {failed[name]}", flush=True)
            continue
        print(f"    {name}: {seconds[name]:.3f} s", flush=True)
        kept[name] = process
        fastest = min(seconds, key=lambda key: seconds[key])
        for other in [other for other in kept if other not in (default, fastest)]:
            kept.pop(other).quit()
    return kept, {"default": default, "best": fastest, "seconds": seconds, "failed": failed}


def peak_memory(case: Case, build: str, options: dict[str, Any], work: Path, outputs: int) -> int:
    """Bytes that one iteration of a fresh process needs besides what it must return: the median of three."""
    marks = []
    for _ in range(3):
        process = start(case, build, options, work)
        marks.append(process.iterate()["memory"])
        process.quit()
    return max(0, sorted(marks)[1] - outputs)


def run_case(case: Case, pairs: int, work: Path) -> dict[str, Any]:
    """All of a case; its record for the results file."""
    print(f"{case.name}: {case.title}", flush=True)
    prepare(case, work)
    sides = {"ours": start(case, case.ours, case.own, work)}
    sides["ours"].iterate()
    reference = sides["ours"].digest()
    skipped, found, rows = {}, {}, {}
    for peer in case.peers:
        if machine.version(peer.package) is None:
            skipped[peer.name] = f"{peer.package} is not installed"
            print(f"  {peer.name}: skipped, {skipped[peer.name]}", flush=True)
            continue
        print(f"  {peer.name}", flush=True)
        kept, found[peer.name] = search(case, peer.build, peer.settings, work, reference)
        sides |= {f"{peer.name}: {name}": process for name, process in kept.items()}
    print("  floor", flush=True)
    ways = {way: {"passes": case.passes, "way": way} for way in case.ways}
    kept, found[FLOOR] = search(case, "bench.floor:products", ways, work, None)
    sides[FLOOR] = kept.pop(found[FLOOR]["best"])
    copy = float(sides[FLOOR].digest()["copy"])
    for process in kept.values():
        process.quit()
    sides["twin"] = start(case, case.ours, case.own, work)
    sides["ours"].iterate()
    for _ in range(measure.WARM_UPS):
        sides["twin"].iterate()
    check(case, "our twin", reference, sides["twin"].digest())

    samples: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turns in measure.order(list(sides), pairs):
        for name in turns:
            samples[name].append(sides[name].iterate())
    for process in sides.values():
        process.quit()
    cpu = {name: [sample["cpu"] for sample in taken] for name, taken in samples.items()}
    twin, floor = measure.ratio(cpu["ours"], cpu["twin"]), measure.ratio(cpu["ours"], cpu[FLOOR])
    for peer in case.peers:
        rows[peer.name] = (
            {"skipped": skipped[peer.name]}
            if peer.name in skipped
            else peer_row(case, peer, cpu, found[peer.name]) | {"quiet": measure.quiet(twin)}
        )
    if case.memory:
        add_memory(case, rows, found, work, sum(t.nbytes for t in reference.values()))
    work_done = flops(case.passes, **case.shape)
    return {
        "title": case.title,
        "shape": case.shape,
        "ours_seconds": measure.quantile(cpu["ours"], 0.5),
        "twin": twin,
        "quiet": measure.quiet(twin),
        "floor": floor | {"bar": case.floor_bar, "way": found[FLOOR]["best"], "quiet": measure.quiet(twin)},
        "gemm_gflops": work_done / measure.quantile(cpu[FLOOR], 0.5) / 1e9,
        "copy_gb_s": copy / 1e9,
        "peers": rows,
        "samples": samples,
        "commit": machine.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def peer_row(case: Case, peer: Peer, cpu: dict[str, list[float]], found: dict[str, Any]) -> dict[str, Any]:
    """What a peer's times come to."""
    against = {
        name: measure.ratio(cpu["ours"], cpu[f"{peer.name}: {found[name]}"]) for name in ("default", "best")
    }
    bars = {"default": peer.default_bar, "best": peer.best_bar}
    return against | {"bars": bars, "settings": found, "version": machine.version(peer.package)}


def add_memory(case: Case, rows: dict[str, Any], found: dict[str, Any], work: Path, outputs: int) -> None:
    """One fresh process a side: its high-water mark less what it must return, and our share of theirs."""
    ours = peak_memory(case, case.ours, case.own, work, outputs)
    print(f"  memory beside {outputs / 1e6:.1f} MB of outputs: ours {ours / 1e6:.1f} MB", flush=True)
    for peer in case.peers:
        if peer.name not in found:
            continue
        theirs = peak_memory(case, peer.build, peer.settings[found[peer.name]["best"]], work, outputs)
        print(f"    {peer.name}: {theirs / 1e6:.1f} MB", flush=True)
        rows[peer.name] |= {"memory_bytes": [ours, theirs], "output_bytes": outputs}
        rows[peer.name] |= {"memory_share": ours / max(1, theirs), "memory_bar": peer.memory_bar}


def write(results: dict[str, Any], path: Path) -> None:
    """Add these cases to the day's file of this machine."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}
    results["cases"] = old["cases"] | results["cases"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"all, or of: {', '.join(CASES)}")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument(
        "--pairs", type=int, default=9, help=f"iterations of each side, at least {measure.MIN_PAIRS}"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    given = parser.parse_args(arguments)
    if given.list or not given.cases:
        for name, case in CASES.items():
            print(f"{name:20} {case.title}")
        return 0
    names = list(CASES) if given.cases == ["all"] else given.cases
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"there is no case {unknown[0]}; --list prints those there are")
    if given.pairs < measure.MIN_PAIRS:
        parser.error(f"--pairs must be at least {measure.MIN_PAIRS}, got {given.pairs}")
    found = machine.machine()
    path = given.results / f"{machine.slug(found)}-{datetime.date.today()}.json"
    code, results = 0, {"machine": found, "versions": machine.versions()}
    for name in names:
        work = Path(tempfile.mkdtemp(prefix=f"bench-{name}-"))
        try:
            record = run_case(CASES[name], given.pairs, work)
        except (Mismatch, Failed) as error:
            print(f"  ERROR {error}", flush=True)
            code = 2
            continue
        finally:
            quit_all()
            shutil.rmtree(work, ignore_errors=True)
        write(results | {"cases": {name: record}}, path)
        print(table.case_text(name, record), flush=True)
        code = max(code, 0 if record["quiet"] else 1)
    print(f"results: {os.path.relpath(path)}")
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes and the folder go too
    sys.exit(main(sys.argv[1:]))
