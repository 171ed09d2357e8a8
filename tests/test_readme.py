"""The README's commands, extracted and run: a reader who types them gets what the README says."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import hub_folder, write_chats

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [
    line.split("  #")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
LEFT_OUT = {"build", "dist", "runs"} | {path.name for path in ROOT.glob(".*")}
SCRIPTS = [line for line in SHELL if "train_" in line or "candidates" in line]  # what works on one's own data
SAMPLED = "--steps 1 --max-new-tokens 4"
SHORT = {
    "train_grpo.py": f"{SAMPLED} --prompts-per-step 2",
    "train_ppo.py": f"{SAMPLED} --prompts-per-step 2",
    "train_distill.py": f"{SAMPLED} --batch-size 2",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A working folder with what the commands name: scripts, a model DIR, chats.jsonl, two files of GSM8K."""
    folder = tmp_path_factory.mktemp("readme")
    for path in ROOT.glob("train_*.py"):
        (folder / path.name).symlink_to(path)
    hub_folder(folder / "DIR")
    write_chats(folder / "chats.jsonl", 40)
    (folder / "gsm8k").mkdir()
    problem = {"question": "What is 2+2?", "answer": "2+2=4\n#### 4"}
    (folder / "gsm8k/train.jsonl").write_text((json.dumps(problem) + "\n") * 4, encoding="utf-8")
    solved = {
        "6b": {"is_correct": False, "solution": "A: 5"},
        "175b": {"is_correct": True, "solution": "A: 4"},
    }
    solved |= {"question": "What is 2+2?", "ground_truth": "2+2=4\nA: 4"}
    (folder / "gsm8k/model_solutions.jsonl").write_text(json.dumps(solved) + "\n", encoding="utf-8")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_scripts_commands_run_one_after_the_other(checkout):
    assert {path.name for path in ROOT.glob("train_*.py")} == {
        word for line in SCRIPTS for word in line.split() if word.endswith(".py")
    }
    for line in SCRIPTS:
        program, *words = shlex.split(line)
        script = next((word for word in words if word.endswith(".py")), "")
        run = [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else [])]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        env["PET_MASTER_PORT"] = str(free_port())  # torchrun's default is one port for all its runs
        command = [*run, *words, *SHORT.get(script, "").split()]
        done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
        out = checkout / words[words.index("--out") + 1]
        assert (out / "model/model.safetensors" if script else out).is_file(), line


def test_the_other_commands_run_from_the_checkout():
    others = [line for line in SHELL if line.startswith("python ") and line not in SCRIPTS]
    assert len(others) >= 3
    for line in others:
        command = [sys.executable, *shlex.split(line)[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0 and done.stdout, f"{line}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


def test_make_targets_and_the_commands_by_hand_agree():
    targets = [line.split()[1] for line in SHELL if line.startswith("make ")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True, timeout=60)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    by_hand = [line for line in SHELL if line.startswith(".venv/bin/")]
    assert len(by_hand) >= 4
    for line in by_hand:  # what is typed by hand is what make runs
        words = line.replace(".venv/bin/pip", "pip").replace(".venv/bin/python", "python")
        assert words.removeprefix("pip install ").removeprefix("python ").split("  ")[0] in makefile, line


def test_the_python_block_prints_what_it_says(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert [float(number) for number in re.findall(r"-?\d+\.\d+", printed)] == [0.75, -0.25, -0.25, -0.25]


def test_every_link_leads_to_a_file():
    pages = [path for path in ROOT.rglob("*.md") if not LEFT_OUT & set(path.relative_to(ROOT).parts)]
    assert {"README.md", "formulas.md", "dpo_loss.md"} <= {path.name for path in pages}
    for page in pages:
        text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#]+)", text):
            found = target.startswith("https://") or (page.parent / target).exists()
            assert found, f"{page.relative_to(ROOT)}: {target}"
