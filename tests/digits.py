"""A task that a tiny policy learns in seconds: say 7. The policy to start from says 3 or 7, at random."""

import json
from pathlib import Path

from tests.ranks import run_script
from tests.tiny import hub_folder

WORDS = ("add", "one", "two", "to", "a", "hello")


def write_lines(path: Path, records: list[dict]) -> Path:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def digit_policy(folder: Path, **changes) -> tuple[Path, Path]:
    """A model that fine-tuning has taught to say 3 or 7, at random, and prompts whose answer is 7."""
    prompts = [{"role": "user", "content": f"{a} {b}"} for a in WORDS for b in WORDS]
    chats = [
        {"messages": [prompt, {"role": "assistant", "content": digit}]}
        for prompt in prompts
        for digit in "37"
    ]
    data = write_lines(folder / "sft.jsonl", chats)
    hub = hub_folder(folder / "hub", **changes)
    command = ["train_sft.py", "--model", hub, "--data", data, "--out", folder / "sft"]
    flags = ["--steps", "60", "--batch-size", "24", "--lr", "1e-2", "--warmup", "5", "--threads", "1"]
    run_script([*map(str, command), *flags], ranks=1)
    tasks = [{"messages": [prompt], "answer": "7"} for prompt in prompts]
    return folder / "sft/model", write_lines(folder / "rl.jsonl", tasks)
