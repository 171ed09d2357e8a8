"""All six scripts on several ranks: whole steps, sampling and evaluation included, are those of one process.

Every script runs on one process with all rows at once, and on ranks two rows at a time, which leaves an odd
one. Prompts and completions have unequal lengths, and one rank has no share of the evaluation.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanopost import metrics
from nanopost.data.chat import copy_chat, load_chat
from nanopost.micro_batches import read_limit
from nanopost.models.heads import load_score_model, save_score_model
from tests.digits import digit_policy, write_lines
from tests.ranks import ROOT, run_script, run_until
from tests.tiny import hub_folder
from tests.tolerances import within

SCRIPTS = ["sft", "reward", "dpo", "grpo", "ppo", "distill"]
TIMES = ("rollout_s", "verify_s", "train_s", "seconds")
IN_A_ROW = """
import inspect, json, runpy, sys
import torch
from nanopost import distributed
from nanopost.models import heads, weights
sys.modules["matplotlib"] = None  # no report
dtype, commands = json.loads(sys.argv[1])
torch.set_default_dtype(getattr(torch, dtype))
for load in (weights.load_model, weights.random_model, heads.load_score_model, heads.load_actor_critic):
    inspect.unwrap(load).__kwdefaults__["dtype"] = torch.get_default_dtype()
distributed.setup()
leave, distributed.setup, distributed.teardown = distributed.teardown, lambda *_: None, lambda: None
for sys.argv in commands:
    runpy.run_path(sys.argv[0], run_name="__main__")
leave()
"""
Runs = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What each script is told, but for the folder to write to."""
    folder = tmp_path_factory.mktemp("ranks")
    model, prompts = digit_policy(folder)
    tasks = [json.loads(line) for line in prompts.read_text().splitlines()]
    ask = [task["messages"][0]["content"] for task in tasks]
    chats = [
        {"messages": [*task["messages"], {"role": "assistant", "content": "7 is it"[: 1 + i % 7]}]}
        for i, task in enumerate(tasks)
    ]
    pairs = [{"prompt": text, "chosen": "7" + " ok" * (i % 3), "rejected": "3"} for i, text in enumerate(ask)]
    data = {"chats": chats, "pairs": pairs, "tasks": tasks}
    paths = {name: write_lines(folder / f"{name}.jsonl", rows[:21]) for name, rows in data.items()}
    first = {name: write_lines(folder / f"{name}1.jsonl", rows[:1]) for name, rows in data.items()}
    scorer, other, chat = load_score_model(model), hub_folder(folder / "other", seed=1), load_chat(model)
    torch.nn.init.normal_(scorer.score.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    copy_chat(model, folder / "scorer")
    options = {"stop_ids": chat.stop_ids, "labels": ["good"]}
    save_score_model(scorer.config, scorer.state_dict(), folder / "scorer", **options)
    batch = ["--batch-size", 12]
    rollouts = ["--prompts-per-step", 8, "--group-size", 3, "--max-new-tokens", 6, "--minibatches", 2]
    rollouts += ["--verifier", "math", "--temperature", 1.3, "--beta", 0.05]
    told = {
        "sft": ("chats", batch),
        "reward": ("pairs", [*batch, "--labels", "pairs", "--margin", 0.1]),
        "dpo": ("pairs", [*batch, "--ref-model", other, "--sft-weight", 0.1]),
        "grpo": ("tasks", [*rollouts, "--top-k", 20, "--loss", "reinforce++", "--resample", 1]),
        "ppo": (
            "tasks",
            [*rollouts, "--reward-model", folder / "scorer", "--ref-model", other, "--epochs", 2],
        ),
        "distill": ("chats", [*batch, "--mode", "on-policy", "--teacher", other, "--hidden-weight", 0.5]),
    }
    told["distill"][1].extend(["--temperature", 1.3, "--max-new-tokens", 6])
    fixed = ["--model", model, "--steps", 2, "--lr", 1e-3, "--threads", 1]
    return {
        name: [str(x) for x in (*fixed, "--data", paths[kind], "--eval-data", first[kind], *own)]
        for name, (kind, own) in told.items()
    }


@pytest.fixture(scope="module")
def runs(flags: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The folder with a run of each script, by dtype and ranks; made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def run(dtype: str, ranks: int) -> Path:
        out, few = folder / f"{dtype}-{ranks}", ["--micro-batch", "2"] if ranks > 1 else []
        commands = [[f"train_{name}.py", *own, "--out", str(out / name), *few] for name, own in flags.items()]
        if not out.exists():
            run_script(["-c", IN_A_ROW, json.dumps([dtype, commands])], ranks=ranks, limit=240)
        return out

    return run


def same_steps(run: Path, expected: Path, dtype: str = "float64") -> None:
    """Two steps were taken, and told the same but for their times."""
    told, due = (metrics.read_records(folder) for folder in (run, expected))
    assert len(told) == 2
    ours, theirs = (
        [{k: v for k, v in row.items() if k not in TIMES} for row in rows] for rows in (told, due)
    )
    within(f"world sizes, {dtype}", ours, theirs)


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize(
    ("dtype", "ranks"),
    [
        ("float64", 2),
        pytest.param("float64", 4, marks=pytest.mark.slow),
        pytest.param("float32", 2, marks=pytest.mark.slow),
        pytest.param("float32", 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_take_the_steps_of_one_process(runs: Runs, name: str, dtype: str, ranks: int) -> None:
    one, several = (runs(dtype, n) / name for n in (1, ranks))
    assert metrics.read_records(one)[0]["grad_norm"] > 1e-3
    same_steps(several, one, dtype)
    for file in ("model/model.safetensors", *(["critic/model.safetensors"] if name == "ppo" else [])):
        weights, tensors = load_file(several / file), load_file(one / file)
        assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
        within(f"world sizes, {dtype}", weights, tensors)


# ---- memory that runs out

NARROW = """
import torch
from nanopost import optim
set_lr = optim.set_lr
def arm(optimizer, lr):
    set_lr(optimizer, lr)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    def fail(_):
        handle.remove()
        raise torch.OutOfMemoryError("CUDA out of memory")
    handle = trained[len(trained) // 2].register_post_accumulate_grad_hook(fail)
optim.set_lr = arm
"""


def test_memory_that_runs_out_changes_no_step(
    runs: Runs, flags: dict[str, list[str]], tmp_path: Path
) -> None:
    """In the middle of every step's first way back: a part of its gradient is there, and must not count."""
    commands = [[f"train_{name}.py", *own, "--out", str(tmp_path / name)] for name, own in flags.items()]
    printed = run_script(["-c", NARROW + IN_A_ROW, json.dumps(["float64", commands])], ranks=1, limit=240)
    for name in flags:
        same_steps(tmp_path / name, runs("float64", 1) / name)
    halved = printed.count("rows a pass (--micro-batch)")
    assert halved == printed.count("the batch and its gradient stay the same") >= 2 * len(flags), printed


ONE_RANK = """
import json, os, sys
import torch
from nanopost import optim
set_lr, calls = optim.set_lr, []
def arm(optimizer, lr):
    set_lr(optimizer, lr)
    calls.append(lr)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    def fail(_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    if len(calls) == 2 and os.environ["RANK"] == "1":
        trained[len(trained) // 2].register_post_accumulate_grad_hook(fail)
optim.set_lr = arm
"""


@pytest.mark.parametrize(
    "name", ["grpo", *(pytest.param(x, marks=pytest.mark.slow) for x in SCRIPTS if x != "grpo")]
)
def test_a_rank_out_of_memory_writes_what_the_next_start_takes(
    runs: Runs, flags: dict[str, list[str]], tmp_path: Path, name: str
) -> None:
    """In its second step, on the way back; the same command again, as torchrun --max-restarts gives it."""
    command = [f"train_{name}.py", *flags[name], "--out", str(tmp_path / "run"), "--resume"]
    started = json.dumps(["float64", [[*command, "--micro-batch", "4", "--save-every", "1"]]])
    with pytest.raises(AssertionError) as ended:
        run_script(["-c", ONE_RANK + IN_A_ROW, started], ranks=2)
    assert "rank 1 is out of memory with 4 rows a pass (--micro-batch): start again with" in str(ended.value)
    assert read_limit(tmp_path / "run") == 2
    printed = run_script(["-c", IN_A_ROW, started], ranks=2)
    assert "memory ran out before: at most 2 rows a pass" in printed
    assert "preflight: left out, the run goes on from step 1" in printed
    same_steps(tmp_path / "run", runs("float64", 2) / name)


@pytest.mark.slow
def test_torchrun_starts_again_with_what_fits(
    runs: Runs, flags: dict[str, list[str]], tmp_path: Path
) -> None:
    """docs/scale.md's command: its second start goes on from the first one's state, with half the rows."""
    (script := tmp_path / "script.py").write_text(ONE_RANK + IN_A_ROW)
    command = ["train_sft.py", *flags["sft"], "--out", str(tmp_path / "run"), "--resume", "--save-every", "1"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT)}
    started = json.dumps(["float64", [[*command, "--micro-batch", "4"]]])
    subprocess.run(
        [sys.executable, *torchrun, str(script), started], env=environment, cwd=ROOT, check=True, timeout=120
    )
    assert read_limit(tmp_path / "run") == 2
    same_steps(tmp_path / "run", runs("float64", 2) / "sft")


COUNTED = """
import gc
from nanopost import config, optim
from nanopost.models.llama import Llama
parse, set_lr = config.parse, optim.set_lr
def begin(*given):
    gc.collect()  # what the script before has left
    return parse(*given)
def count(*given):
    models = [x for x in gc.get_objects() if isinstance(x, Llama)]
    assert len(models) == 1, f"{len(models)} models are here in a step"
    set_lr(*given)
config.parse, optim.set_lr = begin, count
"""


def test_a_guest_is_gone_before_the_first_step(flags: dict[str, list[str]], tmp_path: Path) -> None:
    """Under FSDP a model that nobody names stays until the collector comes by, and so does its memory."""
    given = dict(zip(flags["distill"][::2], flags["distill"][1::2], strict=True))
    dropped = ["--hidden-weight", "--eval-data", "--mode"]
    text = [x for pair in given.items() if pair[0] not in dropped for x in pair]
    commands = [
        ["train_dpo.py", *flags["dpo"], "--out", str(tmp_path / "dpo")],
        ["train_distill.py", *text, "--mode", "text", "--out", str(tmp_path / "text")],
    ]
    run_script(["-c", COUNTED + IN_A_ROW, json.dumps(["float64", commands])], ranks=2)


PASSES = """
import json
from nanopost import micro_batches
in_parts, most = micro_batches.in_parts, {}
def counted(model, rows, act, micro_batch, *given, desc="train"):
    if desc in ("train", "score"):
        most[desc] = max(most.get(desc, 0), min(micro_batch, len(rows)))
    return in_parts(model, rows, act, micro_batch, *given, desc=desc)
micro_batches.in_parts = counted
"""


@pytest.mark.parametrize(("name", "rows"), [("dpo", [24, 12]), ("grpo", [12, 12]), ("ppo", [12, 12])])
def test_what_scores_reads_no_more_rows_than_a_step(
    flags: dict[str, list[str]], tmp_path: Path, name: str, rows: list[int]
) -> None:
    """The plan knows the step; --micro-batch may be more than that. A record of dpo is two rows."""
    command = [f"train_{name}.py", *flags[name], "--out", str(tmp_path / name), "--micro-batch", "64"]
    printed = run_script(
        ["-c", PASSES + IN_A_ROW + "print(json.dumps(most))", json.dumps(["float64", [command]])], ranks=1
    )
    assert json.loads(printed.splitlines()[-1]) == dict(zip(("score", "train"), rows, strict=True))


# ---- a rank that is gone


def test_a_rank_that_dies_is_told_by_the_others_which_leave(
    flags: dict[str, list[str]], tmp_path: Path
) -> None:
    """SIGKILL, as the kernel does when memory runs out."""
    command = ["train_sft.py", *flags["sft"], "--steps", "100000", "--out", str(tmp_path / "run")]
    code, printed = run_until(
        " 2/100000 ", command, ranks=2, then=lambda pids: os.kill(pids[1], signal.SIGKILL)
    )
    assert code == 1
    assert "rank 0 has lost another rank: that one died, or did not come within 120 s" in printed
    assert "start all ranks again with --resume" in printed


def test_a_rank_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOPOST_TIMEOUT", "0.5")
    hang = "distributed.rank() and signal.pause()"
    program = (
        f"import signal; from nanopost import distributed; distributed.setup(); {hang}; distributed.barrier()"
    )
    with pytest.raises(AssertionError, match=r"rank 0 has lost another rank: .* within 0\.5 s"):
        run_script(["-c", program], ranks=2, limit=12)


@pytest.mark.parametrize("value", ["0", "-3", "soon", "nan"])
def test_a_time_that_is_none_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOPOST_TIMEOUT", value)
    with pytest.raises(
        AssertionError, match=f"NANOPOST_TIMEOUT must be a number of seconds above 0, got '{value}'"
    ):
        run_script(["-c", "from nanopost import distributed; distributed.setup()"], ranks=2, limit=30)
