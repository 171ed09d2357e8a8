"""Runs that are stopped, cut and started twice: what is on disk afterwards, and what goes on from it.

Runs of every script that are killed at random: test_same_bits.py.
"""

import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanopost import checkpoint, metrics
from tests.forks import start_python
from tests.ranks import ROOT, run_script
from tests.tiny import hub_folder, write_chats
from tests.tolerances import within

STEPS = 12


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> list[str]:
    """A command without its run folder: 12 steps of a tiny model, a state after each."""
    folder = tmp_path_factory.mktemp("survive")
    model, data = hub_folder(folder / "hub"), write_chats(folder / "chats.jsonl", 16)
    command = ["train_sft.py", "--model", model, "--data", data, "--steps", STEPS, "--batch-size", 4]
    return [*map(str, command), "--lr", "1e-2", "--save-every", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def straight(start, tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    run = tmp_path_factory.mktemp("straight") / "run"
    run_script([*start, "--out", str(run)], ranks=1)
    return run


def begin(command: list[str], log: Path) -> BaseProcess:
    log.touch()
    return start_python(ROOT, command, environment={**os.environ, "PYTHONPATH": str(ROOT)}, printed=str(log))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


def told(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in metrics.read_records(run)]


def same(run: Path, straight: Path) -> None:
    """Bit for bit the run that nothing happened to: the model, and every number of every step."""
    within("resumed, same world size", [weights(run), told(run)], [weights(straight), told(straight)])


def newest(run: Path) -> int:
    """The step of the newest state that is whole, 0 without one; a state that is not whole fails."""
    states = sorted((run / "state").glob("step_*")) if (run / "state").exists() else []
    assert not [flaw for flaw in map(checkpoint.flaw, states) if flaw]
    return int(states[-1].name.removeprefix("step_")) if states else 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_leave_it_saves_and_goes_on(start, straight, tmp_path, number, code):
    run, log = tmp_path / "run", tmp_path / "log"
    command = [*start, "--out", str(run)]
    command[command.index("--save-every") + 1] = "0"  # no state but the one it saves because it was asked
    process, deadline = begin(command, log), time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code, log.read_text()[-2000:]
    assert 0 < newest(run) < STEPS and newest(run) == len(metrics.read_records(run))
    assert "asked to leave: the state is saved" in log.read_text()
    run_script([*command, "--resume"], ranks=1)
    same(run, straight)


def test_every_rank_leaves_when_one_is_asked(start, straight, tmp_path):
    """The signal reaches rank 1 alone; both save the same step, and one process goes on from it."""
    run = tmp_path / "run"
    program = (
        "import os, runpy, signal, sys\n"
        "from nanopost import optim\n"
        "schedule, calls = optim.schedule, []\n"
        "def counted(*args, **options):\n"
        "    calls.append(args)\n"
        "    if len(calls) == 9 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return schedule(*args, **options)\n"
        "optim.schedule = counted\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as left:\n"
        "    assert left.code == 143, left.code\n"
        "else:\n"
        "    raise AssertionError('it did not leave')\n"
    )
    command = [*start, "--out", str(run)]
    command[command.index("--save-every") + 1] = "0"
    run_script(["-c", program, *command], ranks=2)
    assert newest(run) == len(metrics.read_records(run)) == 5
    run_script([*command, "--resume"], ranks=1)
    found, expected = [weights(run), told(run)], [weights(straight), told(straight)]
    within("resumed, other world size, float32", found, expected)


def test_a_second_trainer_is_refused(start, straight, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    process, deadline = begin([*start, "--out", str(run)], log), time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)  # it stays at work, however fast it is
    try:
        with pytest.raises(AssertionError, match="another process is at work in"):
            run_script([*start, "--out", str(run), "--resume"], ranks=1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    run_script([*start, "--out", str(run), "--resume"], ranks=1)
    same(run, straight)


def test_a_broken_state_is_named_and_the_one_before_is_taken(start, straight, tmp_path):
    run = tmp_path / "run"
    run_script([*start, "--out", str(run)], ranks=1)
    path = run / "state/step_000012/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    printed = run_script([*start, "--out", str(run), "--resume"], ranks=1)
    assert "step_000012 passed over: model.safetensors is {'size'" in printed
    same(run, straight)


CUT = """
import errno, os, sys
from pathlib import Path
import torch
from nanopost import checkpoint, optim, shards
where, how, calls = Path(sys.argv[1]), sys.argv[2], 0
def hurt(function, at):
    def call(*args, **options):
        global calls
        calls += 1
        if calls - 1 == at:
            if how == "kill":
                os._exit(9)
            raise OSError(getattr(errno, how), how)
        return function(*args, **options)
    return call
def save(at):
    os.rename, os.fsync, os.open = hurt(os.rename, at), hurt(os.fsync, at), hurt(os.open, at)
    shards.save_file, Path.write_text = hurt(shards.save_file, at), hurt(Path.write_text, at)
    Path.mkdir, os.unlink, os.rmdir = hurt(Path.mkdir, at), hurt(os.unlink, at), hurt(os.rmdir, at)
    try:
        checkpoint.save_state(where, 2, model, optimizer, keep=1)
    except OSError as error:
        assert error.errno == getattr(errno, how)
        os._exit(28)
    os._exit(0)
model = torch.nn.Linear(3, 2)
optimizer = optim.adamw(model, lr=0.1, weight_decay=0.0)
codes, seen = [], set()
while 0 not in codes:
    checkpoint.save_state(where, 1, model, optimizer)
    if not (child := os.fork()):
        save(len(codes))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    states = sorted(path.name for path in (where / "state").glob("step_*"))
    assert states and not [f for name in states if (f := checkpoint.flaw(where / "state" / name))], states
    step = checkpoint.load_state(where, model, optimizer)
    assert step == int(states[-1][-1]) and (step == 2 or codes[-1]), (step, codes)
    seen.add(tuple(states))
    for name in states:
        checkpoint.shutil.rmtree(where / "state" / name)
print(codes)
assert set(codes) == {0, 9 if how == "kill" else 28} and len(codes) > 15
assert seen == {("step_000001",), ("step_000001", "step_000002"), ("step_000002",)}, seen
"""


@pytest.mark.parametrize("how", ["kill", "ENOSPC", "EIO"])
def test_a_save_that_is_cut_at_any_call_leaves_a_whole_state(tmp_path, how):
    """Each call to the file system that a save makes is where it is killed, or the disk is full or broken."""
    run_script(["-c", CUT, str(tmp_path), how], ranks=1)


def test_every_flipped_bit_of_a_state_is_seen(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    checkpoint.save_state(tmp_path, 1, model, torch.optim.AdamW(model.parameters()))
    folder = tmp_path / "state/step_000001"
    assert checkpoint.flaw(folder) is None
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            assert checkpoint.flaw(folder), (path.name, place)
        path.write_bytes(whole)
    for hurt in (
        lambda p: p.unlink(),
        lambda p: p.write_bytes(p.read_bytes()[:-1]),
        lambda p: p.write_bytes(b""),
    ):
        for name in ("model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"):
            whole = (folder / name).read_bytes()
            hurt(folder / name)
            assert name in checkpoint.flaw(folder)
            (folder / name).write_bytes(whole)
    (folder / "more").write_text("")
    assert checkpoint.flaw(folder).startswith("more is ")
    (folder / "more").unlink()
    folder.rename(other := folder.with_name("step_000002"))
    assert checkpoint.flaw(other) == "MANIFEST.json is not the one of step 2"


def test_the_same_command_by_hand(start, tmp_path):
    """In a process of its own, as a shell would start it: Ctrl-C lets the step end and saves."""
    run = tmp_path / "run"
    command = [sys.executable, *start, "--out", str(run), "--steps", "100000"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "asked to leave: after this step" in process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130 and newest(run) > 0


TWICE = """
import signal, sys, runpy
from nanopost import optim
schedule = optim.schedule
def asked(*args, **options):
    signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)  # both inside the first step
    return schedule(*args, **options)
optim.schedule = asked
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_asked_twice_it_ends_at_once(start, tmp_path):
    process = begin(["-c", TWICE, *start, "--out", str(tmp_path / "run")], tmp_path / "log")
    process.join(60)
    assert process.exitcode == -signal.SIGINT and not (tmp_path / "run/metrics.jsonl").exists()
