"""Every script learns on the ledger world: fixed bars on held-out prompts, three seeds (`make test-deep`).

World, base, commands and numbers are the demo's (recipes/demo). Each seed has an SFT model of its own: pairs
are sampled from it, and DPO, the reward model, GRPO and PPO start from it; GRPO's policy is the teacher. DPO
goes without the demo's SFT term, which alone makes nearly all of that stage (exact, sampled: from .39 to .73
of .76): with it the test would pass with a preference loss that does nothing.

What does not learn was measured. At a learning rate of 0 a script gives its start back (gain 0, win rate .5),
a reward model ties everywhere (accuracy .5), and a new student never says JSON. 39 % of the held-out prompts
have no sum in them: who answers those alone has .39. A rate of 400 completions has a standard error of .025
at most. Numbers in brackets are those of seeds 0, 1 and 2; bars lie well below them. Where labels were
spoilt, that was on another base: bases differ by the rounding of the machine, and with them what follows.
"""

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from nanopost import metrics
from nanopost.data.schema import read_jsonl
from nanopost.evals.stages import stage_row
from nanopost.worlds import ledger

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {  # flags of the runs that the demo has not, or has otherwise; a later flag wins
    "dpo": "--loss dpo --beta 1 --sft-weight 0 --steps 36 --batch-size 64 --lr 1e-4 --schedule linear",
    "ppo": "--steps 80 --prompts-per-step 128 --group-size 1 --lr 5e-4 --warmup 3",
    "on-policy": "--steps 40 --batch-size 64 --lr 5e-4 --schedule linear --warmup 3",
}
ON_POLICY = (
    "train_distill.py --out {out}/{name} --mode on-policy --model {out}/sft/model --teacher {out}/grpo/model"
    " --data {out}/data/rl.jsonl --max-new-tokens {max_new_tokens}"
)
Row = dict[str, Any]

pytestmark = pytest.mark.slow


class Lab(NamedTuple):
    """A folder laid out as the demo's own, and the flags of its runs, which end with its seed."""

    demo: SimpleNamespace
    out: Path
    settings: dict[str, Any]

    def command(self, name: str) -> str:
        """That of a step of the demo."""
        return next(step.command for step in self.demo.PLANS["demo"] if step.name == name)

    def run(self, name: str, command: str = "", settings: str = "") -> None:
        """A command, by default that of the demo's step of that name, with the flags of a settings' entry."""
        step = self.demo.Step(name, command or self.command(name), settings or name)
        self.demo.run_step(step, self.out, self.settings)

    def row(self, name: str, previous: str | None = None) -> Row:
        """What a model does on the held-out prompts; printed, so that a failure shows it."""
        before = previous and self.out / previous / "model"
        tests = read_jsonl(self.out / "data" / "test.jsonl")
        options = {"previous": before, "max_new_tokens": self.settings["max_new_tokens"], "seed": 0}
        row = stage_row(self.out / name / "model", tests, ledger.verify, **options)
        told = {key: round(value, 3) for key, value in row.items() if isinstance(value, int | float)}
        print(f"\n{self.out.name} {name}: {json.dumps(told)}")
        return row


@pytest.fixture(scope="module")
def demo() -> Iterator[SimpleNamespace]:
    """The names of recipes/demo: plan, numbers, how a step is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "recipes" / "demo"))
        patch.setenv("PYTHONPATH", str(ROOT))
        modules = [vars(importlib.import_module(name)) for name in ("plan", "recipe", "ppo")]
        yield SimpleNamespace(**{name: value for module in modules for name, value in module.items()})


@pytest.fixture(scope="module")
def start(demo, tmp_path_factory) -> Lab:
    """World, base and an SFT model, as `make demo-ppo` makes them where there are none."""
    found = Lab(demo, tmp_path_factory.mktemp("learning") / "start", demo.SETTINGS | demo.PPO_SETTINGS)
    demo.prepare(found.out, None, found.settings)
    return found


@pytest.fixture(scope="module")
def base(start) -> Row:
    return start.row("base")


@pytest.fixture(scope="module", params=range(3), ids="seed {}".format)
def lab(start, request) -> Lab:
    """A seed's folder: the base that all share, and an SFT model of its own; seed 0 has that of the start."""
    seed, out = f" --seed {request.param}", start.out.with_name(f"seed-{request.param}")
    shutil.copytree(start.out, out, ignore=shutil.ignore_patterns("state", "sft" if request.param else ""))
    flags = {k: v + seed for k, v in (start.settings | SETTINGS).items() if isinstance(v, str)}
    found = Lab(start.demo, out, start.settings | flags)
    if request.param:
        found.run("sft")
    return found


@pytest.fixture(scope="module")
def sft(lab) -> Row:
    return lab.row("sft", "base")


@pytest.fixture(scope="module")
def grpo(lab) -> Row:
    """The demo's command, straight from the SFT model."""
    lab.run("grpo", f"{lab.demo.GRPO} --model {{out}}/sft/model")
    return lab.row("grpo", "sft")


def test_sft(base, sft):
    """Strict JSON, from the base's .17 (.97, .96, .96); exact greedy answers, from 0 (.84, .86, .86).

    Exact sampled ones, from .08 (.40, .40, .43), are fewer: the demonstrations' slips are learnt as well.
    """
    assert base["strict_json"] < 0.30 and sft["strict_json"] >= 0.90
    assert sft["exact_greedy"] >= 0.65
    assert sft["exact_sampled"] >= base["exact_sampled"] + 0.15


def test_dpo(lab, sft):
    """More exact sampled answers (+.16, +.16, +.15), preferred to SFT's (.65, .64, .63), 7 to 8 tokens less.

    With chosen and rejected swapped, seed 0: −.10, .39, and 6 tokens more.
    """
    lab.run("pairs")
    lab.run("dpo", lab.command("preference"))
    row = lab.row("dpo", "sft")
    assert row["exact_sampled"] >= sft["exact_sampled"] + 0.10
    assert row["win_rate"] >= 0.57
    assert row["mean_length"] <= sft["mean_length"] - 3


def test_reward(lab):
    """Right in held-out pairs (.80, .79, .76), and in those whose right answer is the longer (.83, .69, .84).

    A coin has .5 in both; "the shorter is right", which holds in most pairs, has .66 to .67, and 0.
    """
    for name in ("reward", "held_out"):
        lab.run(name, lab.demo.PAIRS, "reward_pairs")
    lab.run("reward", lab.demo.REWARD)
    told = metrics.read_records(lab.out / "reward")[-1]
    print({name: value for name, value in told.items() if name.startswith("eval_")})
    assert told["eval_accuracy"] >= 0.70
    assert told["eval_accuracy_chosen_longer"] >= 0.40


def test_grpo(sft, grpo):
    """More exact sampled answers (+.32, +.32, +.33); −.04 where the gold answers are shuffled, seed 0."""
    assert grpo["exact_sampled"] >= sft["exact_sampled"] + 0.20


def test_ppo(lab, sft):
    """GRPO's command with one sample a prompt, and as many samples in all (+.31, +.36, +.32)."""
    lab.run("ppo", lab.demo.GRPO.replace("train_grpo.py", "train_ppo.py") + " --model {out}/sft/model")
    row = lab.row("ppo", "sft")
    assert row["exact_sampled"] >= sft["exact_sampled"] + 0.20


def test_distill_text(lab, grpo):
    """The demo's student keeps most of its teacher's exact greedy answers (.95, .89, .91).

    Untrained it keeps none, without a right sum .44 (.39 of .88).
    """
    lab.run("student")
    row = lab.row("student", "grpo")
    assert row["strict_json"] >= 0.90
    assert row["exact_greedy"] >= 0.60 * grpo["exact_greedy"]


def test_distill_on_policy(lab, grpo):
    """The SFT model becomes its teacher: KL to it 5.2 nats a completion at first, then (.06, .09, .07).

    It has half of its exact sampled answers at first, and then as many (1.00, 1.01, 1.00).
    """
    lab.run("on-policy", ON_POLICY)
    row = lab.row("on-policy", "grpo")
    assert row["kl"] <= 0.5
    assert row["exact_sampled"] >= 0.85 * grpo["exact_sampled"]
