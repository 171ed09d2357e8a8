"""The same run gives the same bits: begun again in another process, and killed at any moment and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanopost import metrics
from tests.ranks import ROOT, run_script
from tests.scripts.test_survive import newest
from tests.small_runs import LIVELY, Start, begin, hashes, lively
from tests.tolerances import within

DEEP = "NANOPOST_EXAMPLES" in os.environ
STEPS = 20 if DEEP else 4
PROCESSES, EACH = (5, 10) if DEEP else (1, 1)  # 50 runs of each script, or 1; and what is killed and whole
KILLS = {name: 100 if DEEP else 5 for name in LIVELY} | {"sft": 400 if DEEP else 70}  # 1,000, or 100


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return begin(tmp_path_factory.mktemp("start"))


AGAIN = """
import json, runpy, shutil, sys, warnings
from pathlib import Path
from tests.small_runs import hashes
warnings.simplefilter("error")
sys.modules["matplotlib"] = None  # no report
folder, each, commands = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
found = {}
for name, argv in commands.items():
    for _ in range(each):
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        found.setdefault(name, []).append(hashes(folder / name))
        shutil.rmtree(folder / name)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def again(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """Hashes of every script's runs, in interpreters of their own: their sets of strings are in other orders
    and their memory lies elsewhere. In each, one run follows the other.
    """

    def runs(seed: int) -> dict[str, list[dict[str, str]]]:
        folder = tmp_path_factory.mktemp("again")
        commands = {name: command(start, name, folder / name) for name in LIVELY}
        argv = [sys.executable, "-c", AGAIN, str(folder), str(EACH), json.dumps(commands)]
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    found = [runs(seed) for seed in range(1, PROCESSES + 1)]
    return {name: [run for runs in found for run in runs[name]] for name in LIVELY}


def command(start: Start, name: str, out: Path, *flags: str) -> list[str]:
    return lively(start, name, out, "--steps", str(STEPS), "--save-every", "1", *flags)


KILLED = """
import itertools, json, os, random, runpy, signal, sys, time
from pathlib import Path
import nanopost.report
nanopost.report.offer_report = lambda run: run  # drawing takes longer than all else
from nanopost import config, metrics
from tests.scripts.test_survive import newest
folder, kills, steps, script = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
names = runpy.run_path(script, run_name="script")
names["main"].__globals__["check_run"] = lambda *given, **options: None  # it leaves no trace
def begin(run):
    if not (child := os.fork()):
        names["main"](config.parse(names["Config"], [*sys.argv[5:], "--out", str(run), "--resume"]))
        sys.stdout.flush()
        os._exit(0)
    return child
start = time.perf_counter()
assert os.waitpid(begin(folder / "run0"), 0)[1] == 0
lasts, rng, killed, between, runs = time.perf_counter() - start, random.Random(0), 0, 0, [folder / "run0"]
while killed < kills or not between:
    runs.append(run := folder / f"run{len(runs)}")
    for attempt in itertools.count():  # ever longer, so that it ends however slow the machine has become
        before, child = newest(run), begin(run)
        time.sleep(rng.uniform(0, (1 + attempt / 8) * lasts))
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, status
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        done, killed = len(metrics.read_records(run)), killed + 1
        between += 0 < done < steps
        assert newest(run) >= max(before, done - 1), (newest(run), before, done)
print(json.dumps([str(run) for run in runs]))
"""


@pytest.mark.parametrize("name", LIVELY)
def test_begun_again_or_killed_at_any_moment_the_end_is_the_same(start, again, tmp_path, name):
    """SIGKILL at random: every state on disk is whole, at most one step is lost, nothing is told twice."""
    program = ["-c", KILLED, str(tmp_path), str(KILLS[name]), str(STEPS), *command(start, name, tmp_path)]
    *_, printed = run_script(program, ranks=1, limit=60 + 6 * KILLS[name]).splitlines()
    whole, *killed = (hashes(Path(run)) for run in json.loads(printed))
    assert killed and len(again[name]) == PROCESSES * EACH
    assert {"model/model.safetensors", f"state/step_{STEPS:06d}/optimizer.safetensors", "metrics"} <= {*whole}
    for run in again[name]:
        within("again", run, whole)
    for run in killed:
        within("resumed, same world size", run, whole)


ASKED = """
import runpy, signal, sys
from nanopost import optim
schedule = optim.schedule
def asked(step, **options):
    if step == 1:
        signal.raise_signal(signal.SIGTERM) if not calls else None
        calls.append(step)
    return schedule(step, **options)
calls, optim.schedule, sys.argv = [], asked, sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as left:
    assert left.code == 143, left.code
else:
    raise AssertionError("it did not leave")
"""


def test_a_critic_and_its_weight_of_the_kl_go_on_after_sigterm(start, again, tmp_path):
    """Asked in the middle of its second step: it ends that one, saves a state, and leaves with 143."""
    argv = command(start, "ppo", tmp_path / "run", "--save-every", "0")
    run_script(["-c", ASKED, *argv], ranks=1)
    assert newest(tmp_path / "run") == len(metrics.read_records(tmp_path / "run")) == 2
    run_script([*argv, "--resume"], ranks=1)
    within("resumed, same world size", hashes(tmp_path / "run"), again["ppo"][0])


OVERWRITTEN = """
import os, random, runpy, signal, sys, tempfile, time
from pathlib import Path
import torch
import nanopost.report
nanopost.report.offer_report = lambda run: run
from safetensors.torch import load_file, save_file
from nanopost import checkpoint, config, metrics
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
names = runpy.run_path("train_sft.py", run_name="script")
names["main"].__globals__["check_run"] = lambda *given, **options: None
def save_state(run, step, model, optimizer, **options):
    (state := run / "state").mkdir(exist_ok=True)
    numbers, mark = optimizer.state_dict()["state"].items(), {"step": torch.tensor(step)}
    moments = {f"{i}/{name}": tensor for i, own in numbers for name, tensor in own.items()}
    save_file(checkpoint.full_state(model) | mark, state / "model.safetensors")
    save_file(moments | mark, state / "optimizer.safetensors")
def whole(state):
    try:
        files = [load_file(state / f"{name}.safetensors") for name in ("model", "optimizer")]
        return files[0]["step"] == files[1]["step"]
    except Exception:  # a missing, empty or torn file
        return False
checkpoint.save_state = save_state
def begin(run):
    if not (child := os.fork()):
        names["main"](config.parse(names["Config"], [*sys.argv[4:], "--out", str(run)]))
        os._exit(0)
    return child
start = time.perf_counter()
assert os.waitpid(begin(folder / "run"), 0)[1] == 0 and whole(folder / "run/state")
lasts, rng, killed, lost = time.perf_counter() - start, random.Random(0), 0, 0
while killed < kills:
    child = begin(run := Path(tempfile.mkdtemp(dir=folder)))
    time.sleep(rng.uniform(0, lasts))
    os.kill(child, signal.SIGKILL)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
        killed += 1
        lost += (run / "state").exists() and not whole(run / "state")
print(lost)
"""


@pytest.mark.slow
def test_one_state_that_is_overwritten_is_lost_by_some_of_such_kills(start, tmp_path):
    """What save_state's new folder and rename are for; docs/determinism.md has the share that was seen."""
    argv = lively(start, "sft", tmp_path / "run", "--steps", "12", "--save-every", "1")
    lost = int(run_script(["-c", OVERWRITTEN, str(tmp_path), "100", *argv], ranks=1, limit=300).split()[-1])
    print(f"{lost} of 100")
    assert 0 < lost < 100
