"""train_dpo.py on small real models: every number of the line is computed again, by the losses' pages.

A run on one process is a call of `main` here, which saves the start of an interpreter; ranks are processes.
"""

import functools
import io
import json
import math
import random
import runpy
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from nanopost import distributed, metrics
from nanopost.data.chat import Chat, load_chat, prompt_ids
from nanopost.data.order import step_indices
from nanopost.data.preference import preference_line, read_groups, read_preferences
from nanopost.data.preference_samples import completion_sample, preference_samples
from nanopost.data.schema import Labelled, Sample
from nanopost.models.llama import Llama
from nanopost.models.weights import load_model
from nanopost.rollout.pairs import build_labels, build_pairs
from tests.pages import scalar
from tests.ranks import ROOT, run_script
from tests.tiny import hub_folder
from tests.tolerances import within

PAIR = {  # each loss with numbers away from its defaults, and its page's scalar function
    "dpo": ("dpo_loss", {"beta": 0.3, "label_smoothing": 0.15}, {}),
    "dpo_norm": ("dpo_loss", {"beta": 3.0}, {}),
    "ipo": ("ipo_loss", {"beta": 0.2}, {}),
    "orpo": ("orpo_loss", {"odds_weight": 0.4}, {}),
    "simpo": ("simpo_loss", {"beta": 1.5, "margin": 0.4}, {}),
    "robust": ("dpo_loss", {"beta": 0.3, "label_smoothing": 0.2}, {"robust": True}),
}
KTO = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
MEAN, ALONE = ("dpo_norm", "orpo", "simpo"), ("orpo", "simpo")
Start = tuple[Path, Path]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pairs(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of their own; 7 is preferred to 3, and the rejected answers are longer on average."""
    rng, found = random.Random(seed), []
    for i in range(count):
        words = " ".join(rng.choice(("add", "one", "two", "to")) for _ in range(rng.randint(1, 5)))
        chosen, rejected = "it is 7" + " ok" * rng.randint(0, 2), "it is 3" + " so" * rng.randint(0, 5)
        found.append({"prompt": f"{words} {seed}.{i}", "chosen": chosen, "rejected": rejected})
    return found


def singles(count: int) -> list[dict[str, Any]]:
    """Liked and disliked answers without a partner, two disliked to a liked one."""
    return [
        {"prompt": f"say {i}", "completion": ("yes 7", "no 3 3", "no")[i % 3], "label": i % 3 == 0}
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Start:
    """A model with random weights, and 14 pairs; beside it another model, and files that share records."""
    folder = tmp_path_factory.mktemp("dpo")
    every = pairs(14)
    hub_folder(folder / "other", seed=1)
    write_lines(folder / "held_out.jsonl", [*every[9:4:-1], *pairs(2, seed=5)])
    write_lines(folder / "mixed.jsonl", [*every[:5], *singles(4), *every[5:9]])
    write_lines(folder / "held_out_mixed.jsonl", [*singles(6)[3:], *every[7:4:-1]])
    return hub_folder(folder / "hub"), write_lines(folder / "pairs.jsonl", every)


@functools.cache
def script() -> dict[str, Any]:
    """The script's names; its report is drawn in the runs on two ranks alone, which saves a second a run."""
    names = runpy.run_path(str(ROOT / "train_dpo.py"), run_name="train_dpo")
    names["export"].offer_report = lambda run: run
    return names


def train(start: Start, out: Path, *, ranks: int = 1, **flags: Any) -> str:
    """A run, and what it printed."""
    fields = {"model": start[0], "data": start[1], "out": out, "steps": 3, "batch_size": 6, "lr": 3e-3}
    fields |= {"warmup": 1, "threads": 1, **flags}
    if ranks > 1:
        switches = [f"--{name.replace('_', '-')}" for name, value in fields.items() if value is True]
        named = {f"--{name.replace('_', '-')}": str(v) for name, v in fields.items() if v is not True}
        return run_script(
            ["train_dpo.py", *switches, *(x for pair in named.items() for x in pair)], ranks=ranks
        )
    with redirect_stdout(io.StringIO()) as printed:
        script()["main"](script()["Config"](**fields))
    return printed.getvalue()


def records(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in metrics.read_records(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


# ---- the numbers of a line once more: one sample after the other, by torch's cross-entropy and the pages


def logps(model: Llama, sample: Sample) -> list[float]:
    ids, mask = torch.tensor(sample.ids), torch.tensor(sample.mask[1:])
    with torch.no_grad():
        return (-cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none"))[mask].tolist()


def rows_of(chat: Chat, record: Any) -> list[tuple[Sample, bool]]:
    if isinstance(record, Labelled):
        sample = completion_sample(chat, record.prompt, record.completion, file="", line=0)
        return [(sample, record.label)]
    chosen, rejected = preference_samples(chat, record)
    return [(chosen, True), (rejected, False)]


def step_kl(chat: Chat, new: Llama, ref: Llama, every: list, chosen: list[int]) -> float:
    """KTO's KL of these records: each prompt before the completion the next record has in that place."""
    gains = []
    for i in chosen:
        prompt = prompt_ids(chat, every[i].prompt)
        answers = rows_of(chat, every[(i + 1) % len(every)])
        for k in range(len(rows_of(chat, every[i]))):
            answer = answers[k % len(answers)][0]
            tail = [t for t, trained in zip(answer.ids, answer.mask, strict=True) if trained]
            mask = (False,) * len(prompt) + (True,) * len(tail)
            other = Sample((*prompt, *tail), mask)
            gains.append(sum(logps(new, other)) - sum(logps(ref, other)))
    return sum(gains) / len(gains)


def expected(
    loss: str, chat: Chat, new: Llama, start: Llama, ref: Llama, every: list, chosen: list[int], sft: float
) -> dict[str, float]:
    """The line of a step on these records of the file, with `sft` as weight of the SFT term."""
    average = (lambda x: sum(x) / len(x)) if loss in MEAN else sum
    losses, margins, wins, nll, kl = [], [], [], [], []
    changes: dict[bool, list[float]] = {True: [], False: []}
    z = max(0.0, step_kl(chat, new, ref, every, chosen)) if loss == "kto" else 0.0
    for i in chosen:
        rows = rows_of(chat, every[i])
        mine, theirs, first = ([logps(model, sample) for sample, _ in rows] for model in (new, ref, start))
        for own, other, old, (_, liked) in zip(mine, theirs, first, rows, strict=True):
            changes[liked].append(sum(own) - sum(old))
            kl += [math.exp(b - a) - 1 - (b - a) for a, b in zip(other, own, strict=True)]  # e^-k1 - 1 + k1
            nll += [-x for x in own] if liked else []
        if loss == "kto":
            for own, other, (_, liked) in zip(mine, theirs, rows, strict=True):
                losses.append(scalar("kto_loss")(sum(own), sum(other), liked, z, **KTO))
                wins.append((sum(own) - sum(other) - z) * (1 if liked else -1))
                margins.append(KTO["beta"] * wins[-1])
        else:
            page, numbers, more = PAIR[loss]
            four = [average(x) for x in (*mine, *(() if loss in ALONE else theirs))]
            losses.append(scalar(page)(*four, **numbers, **more))
            wins.append(four[0] - four[1] - (0 if loss in ALONE else four[2] - four[3]))
            margins.append(numbers.get("beta", 1.0) * wins[-1])
    mean = {
        "loss": sum(losses) / len(losses) + (sft * sum(nll) / len(nll) if sft else 0.0),
        "margin": sum(margins) / len(margins),
        "accuracy": sum(win > 0 for win in wins) / len(wins),
        "chosen_change": sum(changes[True]) / len(changes[True]),
        "rejected_change": sum(changes[False]) / len(changes[False]),
        "kl_from_ref": sum(kl) / len(kl),
    }
    return mean | ({"sft": sum(nll) / len(nll)} if sft else {})


REFERENCES = [
    (loss, other) for loss in (*PAIR, "kto") for other in (False, True) if not (other and loss in ALONE)
]


@pytest.mark.parametrize(("loss", "other"), REFERENCES, ids=[name + "-ref" * x for name, x in REFERENCES])
def test_every_number_of_the_line_is_the_pages(start, tmp_path, loss, other):
    """After steps over shuffled records, in micro-batches that do not divide the batch; held out as well."""
    model, data = start
    suffix = "mixed" if loss == "kto" else "pairs"
    data = data.with_name(f"{suffix}.jsonl")
    held_out = data.with_name("held_out_mixed.jsonl" if loss == "kto" else "held_out.jsonl")
    numbers = KTO if loss == "kto" else PAIR[loss][1]
    sft = 0.25 if loss in ("dpo", "kto") and other else 0.0
    flags = {"loss": loss, "micro_batch": 4, "eval_data": held_out, "save_every": 1, **numbers}
    flags |= {"sft_weight": sft} if sft else {}
    flags |= {"ref_model": model.with_name("other")} if other else {}
    lr = 3e-4 if loss == "ipo" else 3e-3
    train((model, data), tmp_path / "run", **flags, lr=lr)
    last, chat = records(tmp_path / "run")[-1], load_chat(model)
    first, ref = load_model(model), load_model(flags.get("ref_model", model))
    before = load_model(model)  # the third step's weights, before its update
    before.load_state_dict(load_file(tmp_path / "run/state/step_000002/model.safetensors"), strict=False)
    every = read_preferences(data)
    indices = step_indices(seed=0, step=2, batch_size=6, size=len(every))
    told = expected(loss, chat, before, first, ref, every, indices, sft)
    rows = [row for i in indices for row in rows_of(chat, every[i])]
    assert last["tokens"] == sum(sum(sample.mask) for sample, _ in rows)
    assert ("sft" in last) == bool(sft)
    assert {name: last[name] for name in told} == pytest.approx(told, rel=2e-4, abs=2e-5)  # float32
    assert abs(told["chosen_change"]) > 0.01 and told["kl_from_ref"] > 1e-4  # something has happened
    after, every = load_model(tmp_path / "run/model"), read_preferences(held_out)
    told = expected(loss, chat, after, first, ref, every, list(range(len(every))), sft)
    evaluated = {name: last[f"eval_{name}"] for name in told}
    assert evaluated == pytest.approx(told, rel=2e-4, abs=2e-5)


# ---- step 0, and what each loss does


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """Eight steps under the defaults of every loss."""
    folder, told = tmp_path_factory.mktemp("losses"), {}
    for loss in (*PAIR, "kto"):
        lr = 2e-4 if loss == "ipo" else 2e-3
        train(start, folder / loss, loss=loss, steps=8, lr=lr, schedule="constant")
        told[loss] = records(folder / loss)
    return told


STEP_0 = {"dpo": math.log(2), "dpo_norm": math.log(2), "robust": math.log(2), "ipo": 1 / 0.2**2, "kto": 0.5}


@pytest.mark.parametrize("loss", [*PAIR, "kto"])
def test_the_card_of_step_0(start, runs, loss):
    first = runs[loss][0]
    zero = ["chosen_change", "rejected_change", "kl_from_ref", *(["margin"] if loss not in ALONE else [])]
    assert [first[name] for name in zero] == pytest.approx([0.0] * len(zero), abs=2e-6)  # float32
    if loss not in ALONE:
        assert first["accuracy"] == 0.5 and first["loss"] == pytest.approx(STEP_0[loss], rel=1e-6)
        return
    model, chat, every = load_model(start[0]), load_chat(start[0]), read_preferences(start[1])
    sides = []
    for i in step_indices(seed=0, step=0, batch_size=6, size=len(every)):
        scored = [logps(model, sample) for sample, _ in rows_of(chat, every[i])]
        sides.append([sum(x) / len(x) for x in scored])
    numbers = {"orpo": {"odds_weight": 0.1}, "simpo": {"beta": 2.0, "margin": 1.0}}[loss]
    mean = sum(scalar(f"{loss}_loss")(*pair, **numbers) for pair in sides) / len(sides)
    margin = numbers.get("beta", 1.0) * sum(a - b for a, b in sides) / len(sides)
    assert first["loss"] == pytest.approx(mean, rel=1e-5)
    assert first["margin"] == pytest.approx(margin, abs=1e-5)


def test_every_loss_learns_and_none_is_another(runs):
    for loss, told in runs.items():
        assert told[-1]["loss"] < told[0]["loss"] and told[-1]["margin"] > told[0]["margin"], loss
        assert told[-1]["rejected_change"] < told[-1]["chosen_change"], loss
    norms = sorted(told[0]["grad_norm"] for told in runs.values())
    assert norms[0] > 0.01 and all(b > 1.01 * a for a, b in pairwise(norms)), norms


# ---- resume, ranks, micro-batches


def test_resume_continues_bit_for_bit_and_scores_nothing_again(start, tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    mixed, other = start[1].with_name("mixed.jsonl"), start[0].with_name("other")
    flags = {"steps": 4, "save_every": 2, "loss": "kto", "eval_data": start[1], "ref_model": other}
    for run in (straight, cut):
        train((start[0], mixed), run, **flags)
    kept = {path.name: path.stat().st_mtime_ns for path in (cut / "logps").iterdir()}
    assert {*kept} == {"start.safetensors", "reference.safetensors"}
    shutil.rmtree(cut / "state/step_000004")  # as if it had died after step 2
    shutil.rmtree(cut / "model")
    train((start[0], mixed), cut, resume=True, **flags)
    assert records(cut) == records(straight)
    assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in weights(cut).items())
    assert {path.name: path.stat().st_mtime_ns for path in (cut / "logps").iterdir()} == kept
    hub_folder(tmp_path / "third", seed=2)
    with pytest.raises(ValueError, match=r"reference\.safetensors: log-probs under the weights"):
        third = {"ref_model": tmp_path / "third", "accept": "ref_model"}
        train((start[0], mixed), cut, resume=True, **(flags | third))
    with pytest.raises(ValueError, match=r"loss: .* was started with 'kto', this start has 'robust'"):
        train((start[0], mixed), cut, resume=True, **(flags | {"loss": "robust"}))


def test_a_falling_chosen_log_prob_is_explained_once(start, tmp_path):
    told, warning = {}, "the chosen completions are less likely than at the start"
    flags = {"lr": 1e-2, "schedule": "constant", "save_every": 2}
    told["first"] = train(start, tmp_path / "run", **flags)
    assert [record["chosen_change"] < -1e-4 for record in records(tmp_path / "run")] == [False, True, True]
    shutil.rmtree(tmp_path / "run/state/step_000003")
    told["again"] = train(start, tmp_path / "run", resume=True, **flags)
    assert [text.count(warning) for text in told.values()] == [1, 0]
    assert "sft" not in records(tmp_path / "run")[0]
    held = train(start, tmp_path / "held", sft_weight=2.0, **flags)
    assert records(tmp_path / "held")[-1]["chosen_change"] > 0 and warning not in held


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_micro_batches_and_ranks_change_nothing(start, tmp_path, loss):
    """Ranks with unequal numbers of rows, an evaluation in which one has no share, lengths that differ."""
    model, data = start[0], start[1].with_name("mixed.jsonl" if loss == "kto" else "pairs.jsonl")
    few = pairs(1, seed=3) if loss == "dpo" else singles(2)
    flags = {"loss": loss, "eval_data": write_lines(tmp_path / "few.jsonl", few), "sft_weight": 0.1}
    flags |= {"ref_model": model.with_name("other"), "save_every": 3}
    train((model, data), tmp_path / "one", **flags)
    train((model, data), tmp_path / "micro", micro_batch=4, **flags)
    train((model, data), tmp_path / "ranks", micro_batch=2, ranks=2, **flags)
    one, micro, ranks = (
        [weights(tmp_path / name), records(tmp_path / name)] for name in ("one", "micro", "ranks")
    )
    within("micro-batches, float32", micro, one)
    within("world sizes, float32", ranks, one)


def test_gradients_clipped_to_nothing_leave_the_decay_of_matrices(start, tmp_path):
    """At a norm far below Adam's ε its step is 0, and what is left is θ ← θ − lr·λ·θ, not of the norms."""
    flags = {"steps": 1, "lr": 0.01, "weight_decay": 0.5, "max_grad_norm": 1e-14}
    train(start, tmp_path / "run", **flags)
    before = load_file(start[0] / "model.safetensors")
    for name, tensor in weights(tmp_path / "run").items():
        share = 1 - 0.01 * 0.5 if tensor.ndim == 2 else 1.0
        torch.testing.assert_close(tensor, share * before[name], rtol=1e-6, atol=1e-7)


def test_a_batch_of_one_has_its_mismatched_pair(start, tmp_path):
    """z comes from the data, not from the batch: one record a step learns, and z is not the row's own."""
    data = write_lines(tmp_path / "singles.jsonl", singles(3))
    train((start[0], data), tmp_path / "run", loss="kto", batch_size=1, steps=6, lr=1e-2)
    told = records(tmp_path / "run")
    assert any(record["chosen_change"] is None for record in told)  # a step without a liked completion
    assert any(abs(record["loss"] - 0.5) > 1e-3 for record in told)


# ---- what is refused


def test_bad_input_is_named(start, tmp_path, monkeypatch):
    def refused(match: str, data: list[dict[str, Any]] | None = None, **flags: Any) -> None:
        path = start[1] if data is None else write_lines(tmp_path / "bad.jsonl", data)
        with pytest.raises(ValueError, match=match):
            train((start[0], path), tmp_path / "refused", **flags)
        assert not (tmp_path / "refused/logps").exists()  # before anything is scored

    steps = {"prompt": "add", "completions": ["1", "2"], "labels": [True, False]}
    refused(r"bad\.jsonl:3: loss=dpo cannot use a record of labelled", [*pairs(2), *singles(1)])
    refused(r"bad\.jsonl:2: loss=kto cannot use a record of steps", [*pairs(1), steps], loss="kto")
    same = [pair | {"prompt": "add"} for pair in pairs(3)]
    refused(r"bad\.jsonl:1: no completion to another prompt", same, loss="kto")
    refused(r"margin must not be given: dpo has no such term, got 1.0", margin=1.0)
    refused(r"label_smoothing must not be given: ipo", loss="ipo", label_smoothing=0.0)
    refused(r"beta must not be given: orpo has no such term, got 0.1", loss="orpo", beta=0.1)
    refused(r"ref_model must not be given: simpo", loss="simpo", ref_model=start[0])
    refused(r"desirable_weight must be positive and finite, got 0.0", loss="kto", desirable_weight=0.0)
    refused(r"label_smoothing must lie in \[0, 0.5\), got 0.5", loss="robust", label_smoothing=0.5)
    refused(r"sft_weight must be at least 0, got -1.0", sft_weight=-1.0)
    refused(r"micro_batch must be at least 1, got 0", micro_batch=0)
    refused(r"warmup: expected 0 <= warmup <= steps, got warmup -3", warmup=-3)
    refused(r"final: expected a share in \[0, 1\], got 1.5", final_lr=1.5)
    refused(r"lr must be at least 0, got -1.0", lr=-1.0)
    refused(r"epochs and max_grad_norm must be above 0, got 1.0, 0.0", max_grad_norm=0.0)
    refused(r"pairs\.jsonl: no record of at most 3 tokens", max_length=3)
    hub_folder(tmp_path / "strange")
    vocabulary = json.loads((tmp_path / "strange/tokenizer.json").read_text())
    vocabulary["added_tokens"][0]["content"] = "<|other|>"
    (tmp_path / "strange/tokenizer.json").write_text(
        json.dumps(vocabulary).replace("<|im_start|>", "<|other|>")
    )
    refused(r"ref_model: .*strange has another tokenizer", ref_model=tmp_path / "strange")
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    refused(r"batch_size=6 must be a multiple of the number of ranks \(4\)")


def test_a_record_with_one_side_too_long_is_left_out_whole(start, tmp_path):
    data = pairs(4)
    data[1]["rejected"] = "so " * 60
    printed = train((start[0], write_lines(tmp_path / "long.jsonl", data)), tmp_path / "run", max_length=60)
    assert "left out 1 of 4 records over 60 tokens (first: " in printed and "long.jsonl:2, " in printed
    assert (
        "3 records, 3 steps of 6" in printed and len(load_file(tmp_path / "run/logps/start.safetensors")) == 6
    )


def test_gsm8k_pairs_and_labels_of_published_models(shared, tmp_path):
    groups = read_groups(shared / "data/gsm8k/model_solutions.jsonl")[:40]
    made: dict[str, Callable[[Any], list]] = {
        "dpo": lambda group: build_pairs(group, rule="right_over_wrong"),
        "kto": build_labels,
    }
    folder = hub_folder(tmp_path / "hub", max_position_embeddings=2048)
    for loss, build in made.items():
        lines = [preference_line(record) for group in groups for record in build(group)]
        data = write_lines(tmp_path / f"{loss}.jsonl", lines)
        printed = train((folder, data), tmp_path / loss, loss=loss, steps=2, batch_size=4, micro_batch=2)
        assert f"{len(lines)} records, 2 steps of 4" in printed
        assert records(tmp_path / loss)[0]["loss"] == pytest.approx(STEP_0[loss], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("loss", [*PAIR, "kto"])
def test_every_loss_learns_what_held_out_pairs_prefer(tmp_path, loss, seed):
    """Three starts: 9 of 10 held-out pairs are ranked right, and the chosen gain on the rejected.

    Under orpo both gain, by its SFT part, and on this untrained model the longer rejected ones gain as much.
    """
    model = hub_folder(tmp_path / "hub", seed=seed)
    data, held_out = (
        write_lines(tmp_path / f"{name}.jsonl", pairs(n, seed=10 * seed + k))
        for k, (name, n) in enumerate((("train", 64), ("held_out", 32)))
    )
    lr = 5e-4 if loss == "ipo" else 3e-3
    train((model, data), tmp_path / "run", loss=loss, eval_data=held_out, steps=40, batch_size=16, lr=lr)
    last = records(tmp_path / "run")[-1]
    assert last["eval_accuracy"] >= 0.9, last
    assert last["eval_chosen_change"] - (loss != "orpo") * last["eval_rejected_change"] > 2.0, last
