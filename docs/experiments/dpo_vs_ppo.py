"""Reward against KL for DPO and PPO at several β on the ledger world: figure 2 of the DPO paper, made small.

    python docs/experiments/dpo_vs_ppo.py           run what the results lack, write it, draw the figure
    python docs/experiments/dpo_vs_ppo.py --plot    draw the figure and print the page's table, run nothing

A small decoder is trained on the world's reports (two amounts, added in columns): the reference. For each
seed its own samples make pairs, labelled by the verifier's score, and DPO learns from them; PPO maximises the
same score as it samples. Every run is a public script in a process of its own; what the results have is not
run again.
docs/experiments/dpo-vs-ppo.md says what came out.
"""

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from nanopost.data.chat import decode, load_chat
from nanopost.data.schema import Record, read_jsonl
from nanopost.evals.accuracy import mean_length, rate
from nanopost.evals.candidates import sample_groups
from nanopost.evals.stages import complete, sequence_kl
from nanopost.models.weights import load_model
from nanopost.worlds import ledger
from nanopost.worlds.ledger_chat import write_base_folder
from nanopost.worlds.ledger_corpora import write_corpora

ROOT, HERE = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent
VERIFIER = "nanopost.worlds.ledger:verify"

MODEL = {  # 0.12 M parameters; vocab_size comes from the tokenizer
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 200.0,
    "tie_word_embeddings": True,
}
CORPORA: dict[str, float] = {  # records of all kinds; the base text is for the tokenizer alone
    "base": 100,
    "sft": 20000,
    "rl": 12000,
    "test": 1200,
    "slip_share": 0.25,
    "padded_share": 0.0,
    "tool_share": 0.0,
    "turns_share": 0.0,
}
SFT = ["--max-length", 128, "--steps", 500, "--batch-size", 64, "--lr", 4e-3, "--warmup", 30]
DPO = ["--epochs", 2, "--batch-size", 64, "--micro-batch", 32, "--lr", 2e-4, "--warmup", 3]
PPO = ["--steps", 40, "--prompts-per-step", 128, "--group-size", 1, "--minibatches", 2, "--lr", 5e-4]
SETTINGS: dict[str, Any] = {  # --settings FILE replaces entries
    "model": MODEL,
    "vocab_size": 400,
    "corpora": CORPORA,
    "kind": "report",  # of the world's four kinds of task
    "sft": [*SFT, "--schedule", "cosine"],
    "seeds": [0, 1, 2, 3, 4],
    "betas": {"dpo": [0.3, 1.0, 3.0, 10.0], "ppo": [0.02, 0.1, 0.3, 1.0]},
    "max_new_tokens": 40,
    "pairs": {"prompts": 640, "group_size": 8},  # a seed's; as many completions are scored as by PPO
    "dpo": [*DPO, "--schedule", "linear"],
    "ppo": [*PPO, "--micro-batch", 64, "--warmup", 5, "--schedule", "linear"],
    "completions": 2,  # a held-out prompt, when a run is measured
    "optimum": {"samples": 32, "betas": [0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0]},
}
Results = dict[str, Any]


def python(*arguments: object) -> None:
    """One of the project's programs as a process of its own on the CPU, its command printed first."""
    command = list(map(str, arguments))
    print(f"\n$ python {shlex.join(command)}", flush=True)
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = command if command[0] == "-m" else [str(ROOT / command[0]), *command[1:]]
    subprocess.run([sys.executable, *program], check=True, env=env)


@contextmanager
def timed(entry: dict[str, Any]) -> Iterator[None]:
    """Adds wall-clock seconds and CPU seconds, those of the processes started included, to the entry."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    yield
    entry["seconds"] = round(time.perf_counter() - start, 1)
    entry["cpu_seconds"] = round(sum(os.times()[:4]) - before, 1)


def make_reference(work: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The corpora of one kind of task and the model that imitates them, in WORK; returns what it took."""
    entry: dict[str, Any] = {"stage": "reference"}
    if (work / "sft").exists():
        sys.exit(f"{work} holds a model already: move it away, or choose another folder with --work")
    with timed(entry):
        write_corpora(work / "all", 0, **settings["corpora"])
        for name in ("base", "sft", "rl", "test"):
            lines = (work / f"all/{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [x for x in lines if name == "base" or json.loads(x)["kind"] == settings["kind"]]
            (work / "data").mkdir(exist_ok=True)
            (work / f"data/{name}.jsonl").write_text("".join(kept), encoding="utf-8")
        world = work / "world"
        write_base_folder(world, work / "data", vocab_size=settings["vocab_size"])
        config = {**settings["model"], "vocab_size": load_chat(world).tokenizer.get_vocab_size()}
        (world / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        source = ["--model", world, "--from-scratch", "--data", work / "data/sft.jsonl"]
        python("train_sft.py", *source, "--out", work / "sft", "--threads", 1, "--seed", 0, *settings["sft"])
    return entry


def optimum(reference: Path, tests: Sequence[Record], settings: dict[str, Any]) -> list[dict[str, float]]:
    """The frontier that F13 allows, estimated from K samples of the reference a prompt.

    reward(β) = Σ_k w_k r_k,  KL(β) = Σ_k w_k log(K w_k),  w ∝ e^{r/β}, means over the prompts
    """
    groups = sample_groups(
        reference,
        tests,
        ledger.verify,
        verifier_name=VERIFIER,
        group_size=settings["optimum"]["samples"],
        max_new_tokens=settings["max_new_tokens"],
        seed=1000,
    )
    scores = torch.tensor([[c.score for c in group.candidates] for group in groups], dtype=torch.float64)
    points = []
    for beta in [math.inf, *settings["optimum"]["betas"]]:
        log_weights = (scores / beta).log_softmax(dim=1)
        weights = log_weights.exp()
        divergence = (weights * (log_weights + math.log(scores.shape[1]))).sum(dim=1)
        points.append({"reward": float((weights * scores).sum(1).mean()), "kl": float(divergence.mean())})
        points[-1] |= {"beta": beta} if beta < math.inf else {}
    return points


def measure(
    folder: Path, reference: Path, tests: Sequence[Record], settings: dict[str, Any]
) -> dict[str, float]:
    """Mean reward and KL to the reference of completions sampled at temperature 1 on held-out prompts."""
    model, chat = load_model(folder), load_chat(folder)
    records = [record for record in tests for _ in range(settings["completions"])]
    limits = {"max_new_tokens": settings["max_new_tokens"], "seed": 2000}
    rollouts = complete(model, chat, records, temperature=1.0, **limits)
    texts = [decode(chat, rollout.completion_ids) for rollout in rollouts]
    verdicts = [ledger.verify(text, record.answer) for text, record in zip(texts, records, strict=True)]
    return {
        "reward": mean(verdict.score for verdict in verdicts),
        "kl": sequence_kl(load_model(reference), rollouts),
        "exact": rate(verdicts, "exact"),
        "length": mean_length(rollouts),
    }


def run_one(method: str, beta: float, seed: int, work: Path, settings: dict[str, Any]) -> Path:
    """One DPO or PPO run from the reference; the model's folder."""
    out = work / f"{method}-{beta:g}-{seed}"
    shutil.rmtree(out, ignore_errors=True)  # of a run that was broken off
    source = ["--model", work / "sft/model", "--out", out, "--beta", beta, "--seed", seed, "--threads", 1]
    if method == "dpo":
        python("train_dpo.py", *source, "--data", work / f"pairs-{seed}.jsonl", *settings["dpo"])
    else:
        source += ["--data", work / "data/rl.jsonl", "--verifier", "ledger"]
        python("train_ppo.py", *source, "--max-new-tokens", settings["max_new_tokens"], *settings["ppo"])
    return out / "model"


def make_pairs(seed: int, work: Path, settings: dict[str, Any]) -> None:
    """Pairs of the reference's own samples, the better by the verifier chosen; each seed its own prompts."""
    each, out = settings["pairs"], work / f"pairs-{seed}.jsonl"
    lines = (work / "data/rl.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    prompts, first = work / f"prompts-{seed}.jsonl", seed * each["prompts"]
    prompts.write_text("".join(lines[first : first + each["prompts"]]), encoding="utf-8")
    source = ["--model", work / "sft/model", "--data", prompts, "--verifier", VERIFIER, "--seed", seed]
    rule = ["--rule", "score", "--out", out]
    sampling = ["--group-size", each["group_size"], "--max-new-tokens", settings["max_new_tokens"]]
    out.unlink(missing_ok=True)  # of a run that was broken off
    python("-m", "nanopost.evals.candidates", *source, *sampling, *rule, "--threads", 1)


def save(results: Results, path: Path) -> None:
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.with_suffix(".part").write_text(text, encoding="utf-8")
    path.with_suffix(".part").replace(path)


def experiment(work: Path, path: Path, settings: dict[str, Any], seeds: Sequence[int]) -> Results:
    """Everything that results.json lacks, one entry after the other."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if results and results["settings"] != (given := json.loads(json.dumps(settings))):
        changed = [name for name in given if given[name] != results["settings"].get(name)]
        sys.exit(f"{path} was made with other settings ({', '.join(changed)}): move it away to start anew")
    if not results:
        results = {"machine": machine(), "settings": settings, "stages": [make_reference(work, settings)]}
        results |= {"optimum": [], "runs": []}
        save(results, path)
    reference, betas = work / "sft/model", settings["betas"]
    done = {(run["method"], run["beta"], run["seed"]) for run in results["runs"]}
    wanted = [(method, beta, seed) for seed in seeds for method in betas for beta in betas[method]]
    missing = [run for run in wanted if run not in done]
    if not missing and results["optimum"]:
        return results
    if not reference.exists():
        sys.exit(f"{path} is there but {reference} is not: give the --work it was made in, or move it away")
    tests = read_jsonl(work / "data/test.jsonl")
    if not results["optimum"]:
        entry = {"stage": "optimum"}
        with timed(entry):
            results["optimum"] = optimum(reference, tests, settings)
        results["stages"].append(entry)
        save(results, path)
    for seed in dict.fromkeys(seed for _, _, seed in missing):
        if not (work / f"pairs-{seed}.jsonl").exists():
            entry = {"stage": f"pairs of seed {seed}"}
            with timed(entry):
                make_pairs(seed, work, settings)
            results["stages"].append(entry)
            save(results, path)
        for method, beta in [(method, beta) for method, beta, other in missing if other == seed]:
            run: dict[str, Any] = {"method": method, "beta": beta, "seed": seed}
            with timed(run):
                run |= measure(run_one(method, beta, seed, work, settings), reference, tests, settings)
            results["runs"].append(run)
            print(f"{method} β = {beta:g}: reward {run['reward']:.3f}, KL {run['kl']:.3f}", flush=True)
            save(results, path)
    return results


def machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores, {platform.machine()}, {versions}"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def table(results: Results) -> str:
    """The page's table: a row a method and β, means and standard deviations over the seeds."""
    start = results["optimum"][0]
    lines = [
        "| method | β | seeds | reward | KL to the reference | exact | tokens | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
        f"| reference | – | – | {start['reward']:.3f} | 0 | – | – | – |",
    ]
    for method, betas in results["settings"]["betas"].items():
        for beta in betas:
            runs = [run for run in results["runs"] if (run["method"], run["beta"]) == (method, beta)]
            if runs:
                columns = {name: [run[name] for run in runs] for name in runs[0] if name != "method"}
                lines.append(
                    f"| {method.upper()} | {beta:g} | {len(runs)} | {spread(columns['reward'])} "
                    f"| {spread(columns['kl'])} | {mean(columns['exact']):.1%} "
                    f"| {mean(columns['length']):.1f} | {mean(columns['cpu_seconds']):.0f} |"
                )
    return "\n".join(lines)


def plot(results: Results, path: Path) -> None:
    """Reward against KL: every run a dot, the mean of each β a mark, the optimum a line."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nanopost"  # the same numbers draw the same bytes
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.0, 5.0), layout="constrained")
    line = sorted((point["kl"], point["reward"]) for point in results["optimum"])
    axes.plot(*zip(*line, strict=True), "--", color="0.4", label="optimum, from the reference's samples")
    axes.plot(0.0, results["optimum"][0]["reward"], "*", color="black", markersize=12, label="reference")
    for method, colour, mark in (("dpo", "tab:blue", "o"), ("ppo", "tab:orange", "s")):
        runs = [run for run in results["runs"] if run["method"] == method]
        if not runs:
            continue
        axes.plot(
            [r["kl"] for r in runs], [r["reward"] for r in runs], mark, color=colour, markersize=3, alpha=0.5
        )
        means = [
            (mean(r["kl"] for r in some), mean(r["reward"] for r in some), beta)
            for beta in results["settings"]["betas"][method]
            if (some := [r for r in runs if r["beta"] == beta])
        ]
        x, y, betas = zip(*means, strict=True)
        axes.plot(x, y, f"{mark}-", color=colour, markersize=8, label=f"{method.upper()}, mean of the seeds")
        for place in zip(x, y, betas, strict=True):
            axes.annotate(
                f"β {place[2]:g}", place[:2], textcoords="offset points", xytext=(6, -12), color=colour
            )
    axes.set_xlabel("KL(π ‖ π_ref) of a completion, nats")
    axes.set_ylabel("reward (the verifier's score)")
    axes.grid(alpha=0.3)
    axes.margins(x=0.08)
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=HERE / "dpo-vs-ppo.json", help="[%(default)s]")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/dpo-vs-ppo"), help="run folders [%(default)s]"
    )
    parser.add_argument("--settings", type=Path, help="JSON file whose entries replace the settings")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the settings' seeds only these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.plot:
        results = json.loads(arguments.results.read_text(encoding="utf-8"))
    else:
        settings = dict(SETTINGS)
        if arguments.settings:
            settings |= json.loads(arguments.settings.read_text(encoding="utf-8"))
        seeds = arguments.seeds or settings["seeds"]
        results = experiment(arguments.work, arguments.results, settings, seeds)
    print(f"\n{table(results)}")
    plot(results, arguments.results.with_suffix(".svg"))


if __name__ == "__main__":
    main()
