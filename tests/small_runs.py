"""All six scripts as commands on models that train in a second, and what a run leaves as hashes."""

import hashlib
import json
from pathlib import Path

from nanopost import metrics
from tests.digits import digit_policy, write_lines
from tests.tiny import hub_folder

TIMES = ("rollout_s", "verify_s", "train_s", "seconds")
SAMPLING = ["--max-new-tokens", "4"]
BATCH = ["--batch-size", "4", "--warmup", "0"]
RL = [*SAMPLING, "--prompts-per-step", "4", "--group-size", "2"]
FLAGS = {  # what each script needs besides model, data and out
    "sft": BATCH,
    "dpo": [*BATCH, "--beta", "0.3"],
    "reward": [*BATCH, "--labels", "pairs"],
    "grpo": [*RL, "--verifier", "math"],
    "ppo": [*RL, "--verifier", "math"],
    "distill": [*BATCH, "--mode", "logits"],
}
DATA = {"dpo": "pairs", "reward": "pairs", "grpo": "prompts", "ppo": "prompts"}  # the others: chats
# Where a script's runs differ in what they draw or write, a flag more: more than one update, an adaptive KL,
# an evaluation, texts of a teacher that are written down, prompts that are sampled on policy.
LIVELY = {
    "sft": ["sft"],
    "dpo": ["dpo", "--sft-weight", "0.1"],
    "reward": ["reward", "--eval-data", "{pairs}", "--eval-every", "2"],
    "grpo": ["grpo", "--minibatches", "2", "--loss", "grpo", "--beta", "0.05", "--rollouts-every", "1"],
    "ppo": ["ppo", "--epochs", "2", "--beta", "0.1", "--kl-target", "0.01", "--rollouts-every", "1"],
    "distill": ["distill", "--mode", "on-policy", *SAMPLING],
    "distill-text": ["distill", "--mode", "text", "--teacher", "{model}", *SAMPLING, "--samples", "2"],
}
# Paths, times and what the machine is stand in these.
LEFT_OUT = {"args.json", "env.json", "MANIFEST.json", "metrics.jsonl", "preflight.json", "report.html"}
Start = dict[str, Path]


def begin(folder: Path, **changes: int) -> Start:
    """A model that says 3 or 7, prompts whose answer is 7, chats that say it, pairs that prefer it."""
    model, prompts = digit_policy(folder, **changes)
    asked = [json.loads(line)["messages"] for line in prompts.read_text().splitlines()]
    pairs = [{"prompt": ask[0]["content"], "chosen": "7", "rejected": "3"} for ask in asked]
    chats = [{"messages": [*ask, {"role": "assistant", "content": "7"}]} for ask in asked]
    files = {"pairs": write_lines(folder / "pairs.jsonl", pairs), "prompts": prompts}
    files |= {"chats": write_lines(folder / "chats.jsonl", chats), "teacher": hub_folder(folder / "teacher")}
    return {"model": model, **files}


def command(start: Start, name: str, out: Path | str, *flags: str) -> list[str]:
    """`train_NAME.py --model … --out OUT FLAGS`; of a flag that is given twice the last one counts."""
    data = start[DATA.get(name, "chats")]
    fixed = ["--model", start["model"], "--data", data, "--out", out, "--lr", "3e-3", "--threads", "1"]
    fixed += ["--teacher", start["teacher"]] if name == "distill" else []
    return [f"train_{name}.py", *map(str, fixed), *FLAGS[name], *flags]


def lively(start: Start, name: str, out: Path | str, *flags: str) -> list[str]:
    """The command of a row of LIVELY."""
    script, *own = LIVELY[name]
    return command(start, script, out, *(flag.format(**start) for flag in own), *flags)


def told(run: Path) -> list[dict]:
    """The records of a run's steps, without the times."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics.read_records(run)]


def hashes(run: Path) -> dict[str, str]:
    """SHA-256 by name of what a run leaves: models, newest state, rollouts, texts, evaluations, records."""
    older = {path.name for path in sorted((run / "state").glob("step_*"))[:-1]}
    found = {"metrics": json.dumps(told(run)).encode()}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        place = path.relative_to(run).parts
        if not {*place} & (older | LEFT_OUT) and not any(name.startswith(".") for name in place):
            found["/".join(place)] = path.read_bytes()
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}
