"""Three tenants, three policies, one base: an adapter each, routed by a table and sampled in one batch.

    python recipes/demo/tenants.py                    starts from runs/demo, or makes an SFT model first
    python recipes/demo/tenants.py --sft runs/demo    starts from the SFT model of that demo run

Each tenant of the ledger world (nanopost/worlds/tenants.py) has its own policy for the same requests. LoRA
teaches each one's to an adapter beside the same frozen SFT model. The adapters go into a store under the hash
of their content, a table says whose is whose, and held-out requests of all tenants are answered in one mixed
batch with an audit record each. The table printed in the end has each tenant's accuracy under its own adapter
and under the others', and what three adapters cost against three models.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from plan import PLANS, SEED, SETTINGS, Step
from recipe import machine, run_step, started, table, write_world

from nanopost.evals.tenants import answers, costs, deploy
from nanopost.worlds import ledger
from nanopost.worlds.tenants import TENANTS, VERSION, draw_request, policy_answer, tenant_record

TENANT_SETTINGS: dict[str, Any] = {
    "base": "--max-length 96 --steps 500 --batch-size 32 --lr 3e-3 --warmup 40",
    "sft": "--max-length 128 --epochs 1 --batch-size 32 --lr 1e-3 --warmup 10",
    "demonstrations": 1000,
    "requests": 150,
    "strict": "--steps 60",
    "efficient": "--steps 60",
    "explaining": "--steps 280",  # it must learn to copy the amount
}
SFT = (
    "train_sft.py --model {out}/sft/model --data {out}/data/{name}.jsonl --out {out}/{name}"
    " --lora-rank 8 --batch-size 32 --lr 3e-3 --warmup 5"
)
INTRO = (
    "Each row is a tenant, each column an adapter: the share of held-out requests that get exactly the "
    "answer of that tenant's policy. Everything off the diagonal is fluent, and wrong for the tenant."
)


def prepare(out: Path, sft: Path | None, settings: dict[str, Any]) -> None:
    """An SFT model under OUT, copied or made, and each tenant's demonstrations."""
    if sft:
        (out / "data").mkdir(parents=True)
        shutil.copytree(sft / "sft", out / "sft", ignore=shutil.ignore_patterns("state"))
    else:
        write_world(out, settings)
        for step in (step for step in PLANS["demo"] if step.name in ("base", "sft")):
            run_step(step, out, settings)
    for tenant in TENANTS:
        rng = random.Random(f"{SEED} {tenant}")
        drawn = [draw_request(rng, test=False) for _ in range(settings["demonstrations"])]
        lines = [json.dumps(tenant_record(tenant, *request)) + "\n" for request in drawn]
        (out / "data" / f"{tenant}.jsonl").write_text("".join(lines), encoding="utf-8")


def measured(out: Path, drawn: list[tuple[str, int]], tokens: int) -> list[dict[str, Any]]:
    """The tenants' rows: right answers as they are routed, and under each of the adapters."""
    asked = [
        {"id": f"{number}-{tenant}", "tenant": tenant, "version": VERSION, "text": text}
        for number, (text, _) in enumerate(drawn)
        for tenant in TENANTS
    ]
    (out / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    wanted = [policy_answer(tenant, amount) for _, amount in drawn for tenant in TENANTS]
    where = (out / "sft" / "model", out / "store", out / "table.json")

    def shares(requests: list[dict[str, str]], audit: Path) -> dict[str, float]:
        said = answers(*where, requests, max_new_tokens=tokens, audit=audit)
        right = [ledger.verify(text, want).parts["exact"] for text, want in zip(said, wanted, strict=True)]
        return {tenant: sum(right[i :: len(TENANTS)]) / len(drawn) for i, tenant in enumerate(TENANTS)}

    routed = shares(asked, out / "audit.jsonl")
    under = {
        other: shares([row | {"tenant": other} for row in asked], out / f"audit-under-{other}.jsonl")
        for other in TENANTS
    }
    return [
        {"stage": tenant, "routed": routed[tenant]}
        | {f"under {other}": under[other][tenant] for other in TENANTS}
        for tenant in TENANTS
    ]


def main() -> None:
    out, sft, settings = started(__doc__, Path("runs/demo-tenants"), SETTINGS | TENANT_SETTINGS)
    torch.set_num_threads(1)  # the model is tiny: a second thread costs more than it brings
    begun = time.perf_counter()
    prepare(out, sft, settings)
    for tenant in TENANTS:
        run_step(Step(tenant, SFT, tenant), out, settings)
    folders = {tenant: out / tenant / "model" / "adapter" for tenant in TENANTS}
    deploy(out / "store", folders, VERSION, out / "table.json")
    rng = random.Random(f"{SEED} test")
    drawn = [draw_request(rng, test=True) for _ in range(settings["requests"])]
    rows = measured(out, drawn, settings["max_new_tokens"])

    columns = {"stage": "tenant", "routed": "routed, mixed batch"}
    columns |= {f"under {tenant}": f"under {tenant}" for tenant in TENANTS}
    told = [
        f"{name}: {ours / 1e6:.2f} MB for the SFT model and three adapters, {theirs / 1e6:.2f} MB for three "
        f"models ({ours / theirs:.0%})."
        for name, (ours, theirs) in costs(out / "sft" / "model", out / "store", out / "table.json").items()
    ]
    summary = {
        "title": "Three tenants' policies beside one base",
        "intro": "\n".join([INTRO, *told]),
        "machine": machine(),
        "seconds": round(time.perf_counter() - begun, 1),
        "stages": rows,
        "runs": [{"name": tenant, "folder": tenant} for tenant in TENANTS],
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    (out / "summary.json").write_text(text, encoding="utf-8")
    in_all = f"{machine()}, {summary['seconds']:.0f} seconds in all"
    print(f"\n{len(drawn)} held-out requests a tenant, {in_all}\n")
    print(f"{table(rows, columns)}\n")
    print("\n".join(told) + f"\naudit: {out / 'audit.jsonl'}\n", flush=True)
    subprocess.run([sys.executable, "-m", "nanopost.report", str(out)], check=True)


if __name__ == "__main__":
    main()
