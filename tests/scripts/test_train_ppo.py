"""train_ppo.py, run as a user runs it: against PPO written out by hand, against itself, against bad input."""

import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanopost import metrics, optim
from nanopost.data.chat import copy_chat, decode, load_chat, prompt_ids
from nanopost.data.order import step_indices
from nanopost.data.schema import read_jsonl
from nanopost.evals.rollouts import completion_scores
from nanopost.models.heads import load_score_model, save_score_model
from nanopost.models.weights import load_config, load_model, random_model, save_model, write_config
from nanopost.rewards.math import math_reward
from nanopost.rollout.sampler import row_uniforms, sample
from tests.chat_fixtures import make_chat
from tests.digits import digit_policy, write_lines
from tests.ranks import ROOT, run_script
from tests.tiny import hub_folder
from tests.tolerances import within

TIMES = ("rollout_s", "verify_s", "train_s")
STEADY = ["--epochs", "2", "--minibatches", "2", "--beta", "0.1", "--kl-target", "0.01", "--save-every", "2"]
HAND = {"--beta": 0.3, "--gae-lambda": 0.8, "--value-clip": 0.02, "--value-weight": 0.7, "--lr": 2e-3}
HANDS = {"hand": 1e6, "hand_clipped": 0.3}  # max_grad_norm of each
IN_A_ROW = """
import json, runpy, sys
from nanopost import distributed
sys.modules["matplotlib"] = None  # no report
distributed.setup()
leave, distributed.setup, distributed.teardown = distributed.teardown, lambda *_: None, lambda: None
for argv in json.loads(sys.argv[1]):
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
leave()
"""  # many runs in one process and process group: the libraries are loaded once
NOTE = "the reward model reads the policy's chat template, which is not its own"


def command(start: dict[str, Path], out: Path, *flags: str) -> list[str]:
    fixed = ["--model", start["model"], "--data", start["data"], "--out", out, "--max-new-tokens", "6"]
    fixed += ["--prompts-per-step", "8", "--group-size", "4", "--lr", "3e-3", "--threads", "1"]
    return ["train_ppo.py", *map(str, fixed), "--steps", "4", "--rollouts-every", "1", *flags]


def train_all(commands: list[list[str]], *, ranks: int = 1) -> str:
    return run_script(["-c", IN_A_ROW, json.dumps(commands)], ranks=ranks)


def language_model(folder: Path, like: Path, **changes: int) -> Path:
    """Random weights of another shape around the same tokenizer."""
    copy_chat(like, folder)
    config, stop_ids = dataclasses.replace(load_config(like), **changes), load_chat(like).stop_ids
    write_config(config, folder, dtype=torch.float32, stop_ids=stop_ids)
    save_model(config, random_model(folder, seed=1).state_dict(), folder, stop_ids=stop_ids)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> dict[str, Path]:
    """The policy that says 3 or 7, prompts whose answers are 3 and 7, a reward model with a random head."""
    folder = tmp_path_factory.mktemp("ppo")
    model, sevens = digit_policy(folder)
    lines = sevens.read_text().splitlines()
    tasks = [json.loads(line) | {"answer": "37"[i % 2]} for i, line in enumerate(lines)]
    scorer = load_score_model(model)
    torch.nn.init.normal_(scorer.score.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    copy_chat(model, folder / "scorer")
    stop_ids = load_chat(model).stop_ids
    save_score_model(
        scorer.config, scorer.state_dict(), folder / "scorer", stop_ids=stop_ids, labels=["good"]
    )
    template = folder / "scorer/chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    language_model(folder / "narrow", model, num_hidden_layers=1, hidden_size=12, intermediate_size=16)
    language_model(folder / "short", model, max_position_embeddings=16)
    data = write_lines(folder / "mixed.jsonl", tasks)
    return {
        "model": model,
        "sevens": sevens,
        "data": data,
        **{name: folder / name for name in ("scorer", "hub", "narrow", "short")},
    }


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a run by its name. Runs are made when a test first asks for one, a group in a process.

    A group is a number of ranks and its runs; what it has printed lies beside each of them.
    """
    folder, math = tmp_path_factory.mktemp("runs"), ["--verifier", "math"]
    both = [*math, "--reward-model", str(start["scorer"])]
    hand = [str(x) for pair in HAND.items() for x in pair] + ["--minibatches", "2", "--epochs", "2"]
    hand += ["--critic", str(start["scorer"]), "--ref-model", str(start["hub"])]
    hand += ["--steps", "1", "--temperature", "1.3"]
    tasks = [json.loads(line) for line in start["data"].read_text().splitlines()]
    one = write_lines(folder / "one.jsonl", tasks[:1])
    bare = write_lines(folder / "bare.jsonl", [{"messages": task["messages"]} for task in tasks])
    shared = [*math, *STEADY, "--critic", "shared"]

    def run(name: str, *flags: str, data: Path = start["data"]) -> list[str]:
        return command(start | {"data": data}, folder / name, *flags)

    told = [*both, "--eval-data", str(one), "--steps", "1", "--temperature", "1.5"]
    groups = [
        (
            1,
            [
                run("own", *math, *STEADY),
                run("micro", *math, *STEADY, "--micro-batch", "5"),
                run("cut", *math, *STEADY, "--steps", "2"),
                run("cut", *math, *STEADY, "--resume", "--accept", "steps"),
                run("shared", *shared),
                run("cut_shared", *shared, "--steps", "2"),
                run("cut_shared", *shared, "--resume", "--accept", "steps"),
            ],
        ),
        (1, [run(name, *both, *hand, "--max-grad-norm", str(norm)) for name, norm in HANDS.items()]),
        (
            1,
            [
                run("told", *told),
                run("bare", *both[2:], "--steps", "1", "--group-size", "1", data=bare),
                run("narrow", *math, "--critic", str(start["narrow"]), "--steps", "2", "--lr", "3e-2"),
                run("learn", *math, "--steps", "24", "--lr", "4e-3", data=start["sevens"]),
            ],
        ),
        (
            2,
            [
                run("own_ranks", *math, *STEADY, "--micro-batch", "3"),
                run("shared_ranks", *shared, "--micro-batch", "3"),
                run("told_ranks", *told),
            ],
        ),
    ]

    def folder_of(name: str) -> Path:
        out = folder / name
        if not out.exists():
            ranks, group = next((n, runs) for n, runs in groups if any(str(out) in argv for argv in runs))
            printed = train_all(group, ranks=ranks)
            for argv in group:
                (Path(argv[argv.index("--out") + 1]) / "printed.txt").write_text(printed)
        return out

    return folder_of


def records(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in metrics.read_records(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": tensor
        for name in ("model", "critic")
        for key, tensor in load_file(run / name / "model.safetensors").items()
    }


# ---- the first step


def first_rollouts(start: dict[str, Path], *, temperature: float) -> list[tuple[Any, Any]]:
    """The records and rollouts of step 0: a pure function of seed, step and place."""
    chat, tasks = load_chat(start["model"]), read_jsonl(start["data"])
    chosen = [tasks[i] for i in step_indices(seed=0, step=0, batch_size=8, size=len(tasks))]
    uniforms = row_uniforms(seed=0, step=0, prompts=range(8), group_size=4, count=6)
    prompts = [prompt_ids(chat, record.messages) for record in chosen]
    options = {"stop_ids": chat.stop_ids, "max_new_tokens": 6, "group_size": 4, "temperature": temperature}
    drawn = sample(load_model(start["model"]), prompts, uniforms=uniforms, **options)
    return [(chosen[i // 4], rollout) for i, rollout in enumerate(drawn)]


def advantages_and_returns(reward: list[float], value: list[float], lam: float) -> tuple[list, list]:
    """GAE by its definition, γ = 1: Σ_k λ^k δ_{t+k}."""
    value = [*value, 0.0]
    delta = [reward[t] + value[t + 1] - value[t] for t in range(len(reward))]
    sums = [sum(lam ** (s - t) * delta[s] for s in range(t, len(delta))) for t in range(len(delta))]
    return sums, [a + v for a, v in zip(sums, value, strict=False)]


def test_the_first_line_shows_zeros(start, runs):
    """The step-0 card: no KL, no clip, values 0. So returns are λ^(tokens left) · score, on real tokens."""
    first = records(runs("own"))[0]
    rows = metrics.read_rollouts(runs("own"), 0)
    assert first["kl_ref"] < 0.02 and first["beta"] == 0.1
    returns = torch.tensor(
        [0.95**left * row["score"] for row in rows for left in reversed(range(len(row["tokens"])))]
    )
    assert first["value_loss"] == pytest.approx(0.5 * returns.square().mean().item(), rel=1e-6)
    assert first["explained_variance"] == pytest.approx(0.0, abs=1e-9)
    assert {row["score"] for row in rows} == {0.0, 1.0}
    told = records(runs("learn"))[0]
    assert [told[name] for name in ("kl_ref", "kl_old", "clipped")] == pytest.approx([0.0] * 3, abs=1e-9)
    assert abs(told["loss"]) < 1e-6 and told["grad_norm"] > 0.01  # whitened: loss 0, gradient not
    assert told["beta"] == 0.02 == records(runs("learn"))[-1]["beta"]


def test_a_step_is_ppo_written_out_by_hand(start, runs):
    """Two epochs of two minibatches, row by row in float64, with the gradients in the optimiser's moments.

    Once without a clip of the gradients, once with one that holds for the policy's and the critic's, each by
    its own norm.
    """
    beta, lam, clip, weight, lr = HAND.values()
    policy, reference = (load_model(start[name]).double() for name in ("model", "hub"))
    critic, judge = (load_score_model(start["scorer"]).double() for _ in range(2))
    both = torch.nn.ModuleDict({"policy": policy, "critic": critic})
    begin = {name: tensor.clone() for name, tensor in both.state_dict().items()}

    def read(r: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs under the policy and the reference, and the value before each token."""
        ids, before = torch.tensor([r.sample.ids]), slice(len(r.prompt_ids) - 1, -1)
        chosen = torch.tensor(r.completion_ids)[:, None]
        logps = [
            (m(ids)[0, before] / 1.3).log_softmax(-1).gather(1, chosen)[:, 0] for m in (policy, reference)
        ]
        return *logps, critic(ids)[0, before, 0]

    rows, scores = [], []
    drawn = first_rollouts(start, temperature=1.3)
    with torch.no_grad():
        for _, r in drawn:
            logps, ref_logps, values = read(r)
            scores.append(float(judge(torch.tensor([r.sample.ids]))[0, -1, 0]))
            reward = (-beta * (logps - ref_logps)).tolist()
            reward[-1] += scores[-1]
            rows.append([r, logps, values, *advantages_and_returns(reward, values.tolist(), lam)])
    flat = torch.tensor([a for *_, advantages, _ in rows for a in advantages], dtype=torch.float64)
    told, written = records(runs("hand"))[0], metrics.read_rollouts(runs("hand"), 0)
    values = torch.cat([row[2] for row in rows])
    returns = torch.tensor([g for *_, row in rows for g in row], dtype=torch.float64)
    assert len({len(r.completion_ids) for _, r in drawn}) > 1
    assert told["reward"] == pytest.approx(sum(scores) / 32, rel=1e-5)
    assert told["value_loss"] == pytest.approx(0.5 * (values - returns).square().mean().item(), rel=1e-4)
    share = 1.0 - float((returns - values).var() / returns.var())
    assert told["explained_variance"] == pytest.approx(share, rel=1e-3)
    for row, line, (record, r) in zip(rows, written, drawn, strict=True):
        text = decode(load_chat(start["model"]), r.completion_ids)
        assert (line["line"], line["completion"]) == (record.line, text)
        assert line["parts"]["verified"] == math_reward(text, record.answer).score
        row[3] = ((torch.tensor(row[3], dtype=torch.float64) - flat.mean()) / flat.std()).tolist()
        assert line["advantage"] == pytest.approx(sum(row[3]) / len(row[3]), abs=1e-4)

    for run, max_norm in HANDS.items():
        both.load_state_dict(begin)
        optimizer = optim.adamw(both, lr=lr, weight_decay=0.0)
        clips, norms = 0, {"policy": [], "critic": []}
        for part in (rows[:16], rows[16:]) * 2:
            tokens, loss = sum(len(row[3]) for row in part), torch.zeros((), dtype=torch.float64)
            for r, old, before, advantages, returns_of_row in part:
                logps, _, guess = read(r)
                a, g = (torch.tensor(x, dtype=torch.float64) for x in (advantages, returns_of_row))
                ratio = (logps - old).exp()
                near = guess.clamp(before - clip, before + clip)
                clips += int((near != guess).sum())
                loss = loss - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / tokens
                worst = torch.maximum((guess - g).square(), (near - g).square())
                loss = loss + weight * 0.5 * worst.sum() / tokens
            optimizer.zero_grad()
            loss.backward()
            for name, found in norms.items():
                grads = [p.grad for p in both[name].parameters() if p.grad is not None]
                found.append(sum(float(grad.square().sum()) for grad in grads) ** 0.5)
                for grad in grads:
                    grad.mul_(min(1.0, max_norm / (found[-1] + 1e-6)))
            optimizer.step()
        assert clips > 20  # the clip of the values has been at work
        assert all((found[0] > 1.5 * max_norm) == (run == "hand_clipped") for found in norms.values())
        assert records(runs(run))[0]["grad_norm"] == pytest.approx(max(norms["policy"]), rel=1e-3)
        moments = load_file(runs(run) / "state/step_000001/optimizer.safetensors")
        for name, parameter in both.named_parameters():
            ours, theirs = moments[f"{name}/exp_avg"].double(), optimizer.state[parameter]["exp_avg"]
            assert (ours - theirs).norm() < 0.01 * theirs.norm() + 1e-6, (run, name)


def test_the_reward_model_gives_the_reward_and_the_verifier_is_told_beside_it(start, runs):
    judge, drawn = load_score_model(start["scorer"]), first_rollouts(start, temperature=1.5)
    chat, rows, told = (
        load_chat(start["model"]),
        metrics.read_rollouts(runs("told"), 0),
        records(runs("told")),
    )
    alone = [completion_scores(judge, [r.sample.ids]).item() for _, r in drawn]  # no padding anywhere
    for (record, r), row, score in zip(drawn, rows, alone, strict=True):
        assert row["score"] == pytest.approx(score, abs=1e-5)
        assert row["prompt"] == decode(chat, r.prompt_ids) and row["line"] == record.line
        assert row["parts"]["verified"] == math_reward(row["completion"], record.answer).score
    assert told[0]["reward"] == pytest.approx(sum(alone) / 32, abs=1e-5)
    assert told[0]["verified"] == sum(row["parts"]["verified"] for row in rows) / 32
    assert 0 < told[0]["verified"] < 1 and len({len(r.completion_ids) for _, r in drawn}) > 1
    assert {"eval_reward", "eval_verified"} <= told[-1].keys()
    assert told[-1]["eval_verified"] in (0.0, 1.0) != told[-1]["eval_reward"]
    printed = (runs("told") / "printed.txt").read_text()
    assert printed.count(NOTE) == 2  # its template is another: told once by each of two runs
    told = [
        f"{what} (read again: the same {said})\n"
        for what, said in (("critic", "scores"), ("model", "logits"))
    ]
    assert printed.count(told[0]) == printed.count(told[1]) > 1


def test_a_reward_model_alone_needs_no_answers(runs):
    (told,) = records(runs("bare"))
    rows = metrics.read_rollouts(runs("bare"), 0)
    assert "verified" not in told and len(rows) == 8 and len({row["prompt"] for row in rows}) == 8
    assert told["reward"] == pytest.approx(sum(row["score"] for row in rows) / 8)


# ---- the run


def test_the_reward_rises_and_the_values_follow(runs):
    told = records(runs("learn"))
    assert 0.25 < told[0]["reward"] < 0.75 < 0.9 < told[-1]["reward"]
    assert told[-1]["value_loss"] < 0.2 * told[0]["value_loss"]
    assert told[-1]["kl_ref"] > 0.01 and told[-1]["entropy"] < told[0]["entropy"]


def test_the_controller_steers_beta_towards_its_target(runs):
    told = records(runs("own"))
    for before, after in pairwise(told):
        change = 1 + 0.1 * min(max(before["kl_ref"] / 0.01 - 1, -0.2), 0.2)
        assert after["beta"] == pytest.approx(before["beta"] * change, rel=1e-12)
    assert len({record["beta"] for record in told}) == 4


@pytest.mark.parametrize(("cut", "whole"), [("cut", "own"), ("cut_shared", "shared")])
def test_resume_continues_bit_for_bit(runs, cut, whole):
    assert records(runs(cut)) == records(runs(whole))
    theirs = weights(runs(whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(runs(cut)).items())
    assert metrics.read_rollouts(runs(cut), 3) == metrics.read_rollouts(runs(whole), 3)


@pytest.mark.parametrize("whole", ["own", "shared", "told"])
def test_micro_batches_and_ranks_change_nothing(runs, whole):
    """Of told, with a reward model, one prompt is evaluated: one of the two ranks has no share in that."""
    one, ranks = ([weights(runs(name)), records(runs(name))] for name in (whole, f"{whole}_ranks"))
    within("world sizes, float32", ranks, one)
    if whole == "own":
        within("micro-batches, float32", [weights(runs("micro")), records(runs("micro"))], one)


def test_the_folders_load_as_a_policy_and_a_critic(runs):
    ids = torch.tensor([[3, 1, 4]])
    for whole in ("own", "shared"):
        policy, critic = (
            load_model(runs(whole) / "model"),
            load_score_model(runs(whole) / "critic", labels=1),
        )
        same = torch.equal(policy.model.rows(ids)[0], critic.model.rows(ids)[0])
        assert same == (whole == "shared") and critic.score.weight.abs().max() > 1e-3
        assert load_chat(runs(whole) / "critic").version == load_chat(runs(whole) / "model").version
    state = load_file(runs("shared") / "state/step_000004/model.safetensors")
    assert not any(name.startswith("critic.") for name in state)  # one trunk, told once


def test_a_critic_of_another_shape_is_saved_in_that_shape(start, runs):
    before, after = load_score_model(start["narrow"]), load_score_model(runs("narrow") / "critic", labels=1)
    assert after.config == before.config != load_model(runs("narrow") / "model").config
    assert after.config.num_hidden_layers == 1 and after.score.weight.abs().max() > 1e-3


# ---- the file, and what it refuses


def test_the_difference_to_grpo_is_a_page():
    done = subprocess.run(["diff", "train_grpo.py", "train_ppo.py"], cwd=ROOT, capture_output=True, text=True)
    changed = [line for line in done.stdout.splitlines() if line[:1] in ("<", ">")]
    assert 50 < len(changed) <= 100, len(changed)


M = ["--verifier", "math"]
ROOM = r"mixed\.jsonl:1: the prompt has \d+ tokens, 10 leave room for max_new_tokens"
AGAIN = ["--accept", "data,group_size,steps,micro_batch"]
BAD = [
    ([], "verifier or reward_model must be given"),
    ([*M, "--reward-model", "{stranger}"], r"its tokenizer is not that of .*train_reward\.py"),
    ([*M, "--reward-model", "{hub}"], r"hub: no tensor score\.weight: a language model has no score"),
    ([*M, "--critic", "{stranger}"], "its tokenizer is not that of"),
    ([*M, "--ref-model", "{stranger}"], "ref_model: .*stranger has another tokenizer than"),
    ([*M, "--reward-model", "{short}"], ROOM),
    ([*M, "--critic", "{short}"], ROOM),
    ([*M, "--ref-model", "{short}"], ROOM),
    ([*M, "--epochs", "0"], "epochs must be at least 1 with loss=ppo, got 0"),
    ([*M, "--value-clip", "nan"], "value_clip must be at least 0 with loss=ppo, got nan"),
    ([*M, "--beta", "0", "--kl-target", "1"], "kl_target: expected 0, or above 0 with beta"),
    ([*M, "--warmup", "-1"], "warmup: expected 0 <= warmup <= steps, got warmup -1"),
    ([*M, "--minibatches", "3"], "must be a multiple of ranks × minibatches"),
    ([*M, "--data", "{bare}"], r"bare\.jsonl:1: no answer to verify against"),
    (
        ["--reward-model", "{judge}", "--out", "{run}", *AGAIN, "--resume"],
        "reward_model: .* was started with",
    ),
]


def test_bad_input_is_named_before_anything_is_sampled(start, runs, tmp_path):
    """Every refusal of the table, in one process."""
    make_chat(tmp_path / "stranger", "header")
    hub = hub_folder(tmp_path / "other")
    shutil.copy(hub / "model.safetensors", tmp_path / "stranger")
    shutil.copy(hub / "config.json", tmp_path / "stranger")
    places = start | {"stranger": tmp_path / "stranger", "bare": runs("bare").parent / "bare.jsonl"}
    places |= {"run": runs("bare"), "judge": runs("learn") / "critic"}
    before = records(runs("bare"))
    commands = [
        command(start, tmp_path / f"bad{i}", *(flag.format(**places) for flag in flags))
        for i, (flags, _) in enumerate(BAD)
    ]
    attempt = "    try:\n    {}\n    except ValueError as error:\n        print('REFUSED', error)"
    program = re.sub("^    runpy.*$", lambda line: attempt.format(line[0]), IN_A_ROW, flags=re.MULTILINE)
    program = (
        f"from nanopost.rollout import sampler\nsampler.sample = None\n{program}"  # a call fails the test
    )
    printed = run_script(["-c", program, json.dumps(commands)], ranks=1)
    refused = [line for line in printed.splitlines() if line.startswith("REFUSED")]
    assert len(refused) == len(BAD), printed
    for line, (_, message) in zip(refused, BAD, strict=True):
        assert re.search(message, line), line
    left = {path.name for path in tmp_path.glob("bad*/*")}
    assert left <= {".lock", "args.json", "env.json"} and records(runs("bare")) == before


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_it_learns_from_every_seed(start, tmp_path, seed):
    """From a coin's toss (0.53, 0.44, 0.47 were seen) to every answer of the last 160 right (1.0 each)."""
    flags = ["--verifier", "math", "--steps", "60", "--epochs", "2", "--minibatches", "2", "--seed", seed]
    train_all([command(start | {"data": start["sevens"]}, tmp_path / "run", *flags)])
    told = records(tmp_path / "run")
    assert told[0]["reward"] < 0.7 and sum(record["reward"] for record in told[-5:]) / 5 > 0.97
