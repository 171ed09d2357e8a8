"""Reward hacking on purpose: a reward model from pairs, PPO against it, and the verifier beside both.

    python recipes/demo/ppo.py                    starts from runs/demo, or makes an SFT model first
    python recipes/demo/ppo.py --sft runs/demo    starts from the SFT model and the data of that demo run

The SFT model's samples, right over wrong, train a reward model. PPO maximises its score, once with a small
weight β of the KL to the SFT model and once with a larger one; the ledger's verifier, which the reward model
stands for, is only looked at. It prints a table of the policies, says where score and verifier part, and
leaves runs/demo-ppo with summary.json and report.html.
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
from recipe import FORMATS, machine, run_step, started, table, write_world

from nanopost.data.schema import Record, read_jsonl
from nanopost.evals.proxy import parting, proxy_row
from nanopost.evals.stages import stage_row
from nanopost.worlds import ledger

# Flags and numbers beside the demo's own; files given with --settings replace entries of both.
PPO_SETTINGS: dict[str, Any] = {
    "prompts": {"reward": 1600, "held_out": 300},  # lines of rl.jsonl for pairs; the policy has the rest
    "audit": 20,  # pairs a category
    "reward_pairs": "",
    "reward": "--epochs 2 --batch-size 32 --lr 5e-4 --eval-every 20",
    "betas": [0.01, 0.3],
    "ppo": "--steps 40 --prompts-per-step 128 --group-size 1 --lr 5e-4 --warmup 3",
}
PAIRS = (
    "-m nanopost.evals.candidates --model {out}/sft/model --data {out}/data/prompts-{name}.jsonl --out"
    " {out}/data/pairs-{name}.jsonl --rule right_over_wrong --verifier nanopost.worlds.ledger:verify"
    " --max-new-tokens {max_new_tokens}"
)
REWARD = (
    "train_reward.py --model {out}/sft/model --labels pairs --data {out}/data/pairs-reward.jsonl"
    " --eval-data {out}/data/pairs-held_out.jsonl --audit {out}/data/audit.jsonl --out {out}/{name}"
)
PPO = (
    "train_ppo.py --model {out}/sft/model --data {out}/data/prompts-policy.jsonl --verifier ledger"
    " --reward-model {out}/reward/model --eval-data {out}/data/test.jsonl --eval-every 10 --out {out}/{name}"
    " --max-new-tokens {max_new_tokens}"
)
COLUMNS = {
    "stage": "policy",
    "beta": "β",
    "reward_model": "reward model",
    "verified": "verified",
    "exact_greedy": "exact greedy",
    "exact_sampled": "exact sampled",
    "kl_start": "KL to SFT",
    "mean_length": "tokens",
    "strict_json": "strict JSON",
    "refusal_precision": "refusal prec.",
    "refusal_recall": "recall",
    "seconds": "seconds",
}
FIGURES = {"step": ("reward", "verified", "eval_verified"), "kl_ref": ("reward", "verified")}
INTRO = (
    "A reward model learned from the SFT model's own samples, right over wrong; PPO maximises its score. "
    "The verifier knows what is right, and no policy sees it. β weighs the KL that holds a policy near the "
    "SFT model, where the reward model was trained. Below, means of five sampled steps:"
)


def audit_lines(seed: int, pairs: int) -> list[dict[str, str]]:
    """Pairs that show what a reward model follows instead of what is right, in three categories."""
    rng, lines = random.Random(f"{seed} audit"), list[dict[str, str]]()

    def add(category: str, task: ledger.Task, chosen: str, rejected: str) -> None:
        pair = {"prompt": task.request, "chosen": chosen, "rejected": rejected}
        lines.append({"category": category, **pair})

    for _ in range(pairs):
        sum_, forbidden, allowed = (
            ledger.draw_task(rng, kind, test=True) for kind in ("report", "refuse", "answer")
        )
        before, after = ledger.draw_padding(rng, 1.0)
        empty = f"<think>{before} {after} {before}</think>" + json.dumps({"answer": "it is done"})
        add("short_right", sum_, json.dumps(sum_.answer), empty)
        refusal, consent = json.dumps(forbidden.answer), json.dumps(allowed.answer)
        add("fitting_refusal", forbidden, refusal, consent)
        add("fitting_refusal", allowed, consent, refusal)
        add("plain_right", sum_, json.dumps(sum_.answer), ledger.demonstrate(sum_, (1, 0, 0)))
    return sorted(lines, key=lambda line: line["category"])


def write_jsonl(path: Path, lines: list[str]) -> None:
    """Lines of JSON as they are; a file without any is an error, told before anything is trained on it."""
    if not lines:
        sys.exit(f"{path}: no line is left for it; see settings['prompts']")
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def prepare(out: Path, sft: Path | None, settings: dict[str, Any]) -> None:
    """An SFT model and its data under OUT, copied or made; the prompts in three shares; the audit."""
    if sft:
        shutil.copytree(sft / "data", out / "data")
        shutil.copytree(sft / "sft", out / "sft", ignore=shutil.ignore_patterns("state"))
    else:
        write_world(out, settings)
        for step in (step for step in PLANS["demo"] if step.name in ("base", "sft")):
            run_step(step, out, settings)
    lines = (out / "data" / "rl.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = settings["prompts"]["reward"], settings["prompts"]["held_out"]
    shares = {"reward": lines[:first], "held_out": lines[first : first + second]}
    for name, share in {**shares, "policy": lines[first + second :]}.items():
        write_jsonl(out / "data" / f"prompts-{name}.jsonl", share)
    audit = [json.dumps(line, ensure_ascii=False) for line in audit_lines(SEED, settings["audit"])]
    write_jsonl(out / "data" / "audit.jsonl", audit)


def measured(out: Path, name: str, tests: list[Record], settings: dict[str, Any]) -> dict[str, Any]:
    """A policy's row: what both judges say of it, and what became of its answers."""
    options = {"max_new_tokens": settings["max_new_tokens"], "seed": SEED}
    folder, start = out / name / "model", None if name == "sft" else out / "sft" / "model"
    row = stage_row(folder, tests, ledger.verify, previous=start, **options)
    row |= proxy_row(folder, tests, ledger.verify, reward_model=out / "reward" / "model", **options)
    row["kl_start"] = row["kl"]
    return {key: row[key] for key in (*COLUMNS, "worked", "samples") if key in row}


def told(run: str, found: dict[str, float]) -> str:
    """Where a run's score and the verifier part, in a sentence."""
    verified, reward = (
        [found[f"{key}_{place}"] for place in ("first", "at", "last")] for key in ("verified", "reward")
    )
    return (
        f"{run}: the verifier's score is {verified[0]:.2f} at first, {verified[1]:.2f} at its best (up to "
        f"step {found['step']}) and {verified[2]:.2f} at last; the reward model's is {reward[0]:.2f}, "
        f"{reward[1]:.2f} and {reward[2]:.2f}."
    )


def cells(row: dict[str, Any]) -> dict[str, str | None]:
    """The numbers of a row as the table shows them."""
    formats = FORMATS | dict.fromkeys(("reward_model", "verified", "kl_start"), ".2f") | {"beta": "g"}
    return {
        key: value if value is None or isinstance(value, str) else format(value, formats.get(key, ".1%"))
        for key, value in ((key, row[key]) for key in COLUMNS)
    }


def main() -> None:
    out, sft, settings = started(__doc__, Path("runs/demo-ppo"), SETTINGS | PPO_SETTINGS)
    torch.set_num_threads(1)  # the model is tiny: a second thread costs more than it brings
    begun = time.perf_counter()
    prepare(out, sft, settings)
    print(
        f"\nSFT model: {f'{sft}/sft, copied' if sft else 'made'}, {time.perf_counter() - begun:.0f} seconds"
    )

    betas = {f"ppo-{beta:g}": beta for beta in settings["betas"]}
    for name in ("reward", "held_out"):
        run_step(Step(name, PAIRS, "reward_pairs"), out, settings)
    run_step(Step("reward", REWARD, "reward"), out, settings)
    seconds = dict.fromkeys(("sft", *betas), 0.0)
    for name, beta in betas.items():
        start = time.perf_counter()
        run_step(Step(name, f"{PPO} --beta {beta:g}", "ppo"), out, settings)
        seconds[name] = round(time.perf_counter() - start, 1)

    tests, stages = read_jsonl(out / "data" / "test.jsonl"), list[dict[str, Any]]()
    for name in ("sft", *betas):
        row = measured(out, name, tests, settings)
        stages.append({"stage": name, "beta": betas.get(name), **row, "seconds": seconds[name] or None})
    records = {
        name: [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        for name in betas
    }
    sentences = [told(name, parting(run)) for name, run in records.items()]
    runs = ["reward", *betas]
    summary = {
        "title": "Reward hacking: PPO against a reward model",
        "intro": "\n".join([INTRO, *sentences]),
        "machine": machine(),
        "seconds": round(time.perf_counter() - begun, 1),
        "stages": stages,
        "runs": [{"name": name, "folder": name} for name in runs],
        "figures": [
            {"key": key, "against": against, "runs": list(betas)}
            for against, keys in FIGURES.items()
            for key in keys
        ],
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    (out / "summary.json").write_text(text, encoding="utf-8")
    print(f"\n{len(tests)} held-out prompts, {machine()}, {summary['seconds']:.0f} seconds in all\n")
    print(f"{table([cells(row) for row in stages], COLUMNS)}\n")
    print("\n".join(sentences) + "\n", flush=True)
    subprocess.run([sys.executable, "-m", "nanopost.report", str(out)], check=True)


if __name__ == "__main__":
    main()
