"""recipes/demo/tenants.py at the size of a test, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanopost.worlds.tenants import TENANTS, VERSION
from tests.ranks import ROOT

TINY = [str(ROOT / "recipes/demo" / name) for name in ("tiny.json", "tiny-tenants.json")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("tenants") / "run"
    command = [sys.executable, str(ROOT / "recipes/demo/tenants.py"), "--out", str(out), "--settings", *TINY]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, done.stdout


def test_every_answer_has_a_record_and_its_own_tenants_adapter(run):
    out, printed = run
    table = json.loads((out / "table.json").read_text())
    audit = [json.loads(line) for line in (out / "audit.jsonl").read_text().splitlines()]
    assert [row["id"] for row in audit] == [f"{n}-{tenant}" for n in range(4) for tenant in TENANTS]
    assert all(row["adapter"] == table[row["tenant"]][VERSION] for row in audit)
    assert len({row["adapter"] for row in audit}) == 3 == len(list((out / "store").iterdir()))
    assert f"audit: {out / 'audit.jsonl'}" in printed
    for tenant in TENANTS:
        crossed = [
            json.loads(line) for line in (out / f"audit-under-{tenant}.jsonl").read_text().splitlines()
        ]
        assert [row["id"] for row in crossed] == [row["id"] for row in audit]
        assert {row["adapter"] for row in crossed} == {table[tenant][VERSION]}


def test_the_summary_has_every_tenant_under_every_adapter(run):
    out, printed = run
    summary = json.loads((out / "summary.json").read_text())
    columns = {"stage", "routed", *(f"under {tenant}" for tenant in TENANTS)}
    assert [row["stage"] for row in summary["stages"]] == list(TENANTS)
    for row in summary["stages"]:
        assert set(row) == columns and row["routed"] == row[f"under {row['stage']}"]
        assert all(0 <= row[name] <= 1 for name in columns - {"stage"})
    assert (out / "report.html").exists() and "for the SFT model and three adapters" in summary["intro"]
    assert all(word in printed for word in ("tenant", "routed, mixed batch", "under explaining"))


def test_the_base_is_one_and_frozen(run):
    out, _ = run
    base = load_file(out / "sft/model/model.safetensors")
    for tenant in TENANTS:
        trained = load_file(out / tenant / "model/model.safetensors")
        same = {name for name in base if (trained[name] == base[name]).all()}
        assert {"model.embed_tokens.weight", "model.norm.weight"} <= same
        assert not [name for name in same if "proj" in name]


def test_what_is_there_is_not_overwritten(run):
    out, _ = run
    command = [sys.executable, str(ROOT / "recipes/demo/tenants.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "is there already" in done.stderr
    done = subprocess.run(
        [*command[:2], "--out", str(out / "new"), "--sft", str(out / "data")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1 and "has no sft/model" in done.stderr
