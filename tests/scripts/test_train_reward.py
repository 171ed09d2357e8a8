"""train_reward.py on a world in which one word decides, wherever lengths and padding fall.

A run takes its flags as a user gives them; one process runs in this one, which saves its start, several are
started as torchrun would.
"""

import contextlib
import io
import json
import math
import random
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanopost import metrics
from nanopost.data.chat import load_chat
from nanopost.data.preference import ATTRIBUTES, read_preferences
from nanopost.data.preference_samples import completion_sample, preference_samples, steps_sample
from nanopost.evals.audit import read_audit
from nanopost.evals.rollouts import completion_scores
from nanopost.models.heads import load_score_model
from tests.ranks import ROOT, run_script
from tests.tiny import hub_folder
from tests.tolerances import within

Folder = dict[str, Path]
AUDIT = [("calm", "one good", "two bad"), ("calm", "to good", "bad"), ("terse", "good", "add one to two bad")]


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(("add", "one", "two", "to")) for _ in range(rng.randint(1, most)))


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def pair_lines(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    return [
        {"prompt": words(rng, 5), "chosen": words(rng, 4) + " good", "rejected": words(rng, 4) + " bad"}
        for _ in range(count)
    ]


def outcome_lines(count: int, seed: int) -> list[dict]:
    pairs = zip(pair_lines(count, seed), ("chosen", "rejected") * count, strict=False)
    return [
        {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"} for pair, key in pairs
    ]


def step_lines(count: int, seed: int) -> list[dict]:
    rng, lines = random.Random(seed), []
    for _ in range(count):
        labels = [rng.random() < 0.7 for _ in range(rng.randint(1, 4))]
        steps = [f"{words(rng, 3)} {'good' if label else 'bad'}" for label in labels]
        lines.append({"prompt": words(rng, 3), "completions": steps, "labels": labels})
    return lines


def rating_lines(count: int, seed: int) -> list[dict]:
    """Helpfulness is said by a word; the others are 0, 4, or not rated."""
    rng, lines = random.Random(seed), []
    for _ in range(count):
        good = rng.random() < 0.5
        ratings = {name: rng.choice((0, 4, None)) for name in ATTRIBUTES} | {"helpfulness": 4 * good}
        response = f"{words(rng, 3)} {'good' if good else 'bad'}"
        lines.append({"prompt": words(rng, 3), "response": response, **ratings})
    return lines


LINES = {"pairs": pair_lines, "outcomes": outcome_lines, "steps": step_lines, "attributes": rating_lines}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A random model, and training and held-out records of every kind."""
    folder = tmp_path_factory.mktemp("reward")
    audit = [
        dict(zip(("category", "prompt", "chosen", "rejected"), (c, "to", a, b), strict=True))
        for c, a, b in AUDIT
    ]
    files = {kind: write_lines(folder / f"{kind}.jsonl", make(96, 0)) for kind, make in LINES.items()}
    files |= {f"{k}_test": write_lines(folder / f"{k}_test.jsonl", make(30, 1)) for k, make in LINES.items()}
    return {**files, "model": hub_folder(folder / "hub"), "audit": write_lines(folder / "audit.jsonl", audit)}


def run_here(*flags: object) -> str:
    """`python train_reward.py FLAGS` without a process of its own; returns what it printed."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(sys, "argv", ["train_reward.py", *map(str, flags)])
        runpy.run_path(str(ROOT / "train_reward.py"), run_name="__main__")
    return printed.getvalue()


def flags_of(start: Folder, out: Path, *flags: object, kind: str = "pairs") -> list[str]:
    fixed = ["--model", start["model"], "--data", start[kind], "--eval-data", start[f"{kind}_test"]]
    fixed += ["--audit", start["audit"]] if kind in ("pairs", "outcomes") and "audit" in start else []
    fixed += ["--out", out, "--labels", kind, "--batch-size", 16, "--lr", 1e-2, "--warmup", 2, "--threads", 1]
    return [str(flag) for flag in (*fixed, *flags)]


def train(start: Folder, out: Path, *flags: object, kind: str = "pairs") -> str:
    return run_here(*flags_of(start, out, *flags, kind=kind))


def records(run: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in metrics.read_records(run)]


def evaluation(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


@pytest.fixture(scope="module")
def learnt(start: Folder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run on pairs that has learnt most of it, and what it printed."""
    run = tmp_path_factory.mktemp("learnt") / "run"
    return run, train(start, run, "--steps", "6", "--eval-every", "2", "--save-every", "3", "--margin", "0.1")


def test_the_first_record_is_that_of_a_head_of_zeros(start, learnt, tmp_path):
    first = records(learnt[0])[0]
    assert first["loss"] == pytest.approx(math.log(1 + math.exp(0.1)), rel=1e-6)  # log 2 without a margin
    assert (first["accuracy"], first["margin"]) == (0.5, 0.0) and first["grad_norm"] > 0.01
    train(start, tmp_path / "run", "--steps", "1", "--lr", "0")  # a rate of 0: the head stays what it was
    (told,), page = records(tmp_path / "run"), evaluation(tmp_path / "run")
    for name in ("loss", "eval_loss"):
        assert told[name] == pytest.approx(math.log(2), rel=1e-6)
    for name in ("accuracy", "eval_accuracy", "eval_audit_calm", "eval_audit_terse"):
        assert told[name] == 0.5  # all ties
    assert (told["eval_elo"], told["eval_margin"], told["eval_length_correlation"]) == (0.0, 0.0, None)
    assert [row["pairs"] for row in page["calibration"]] == [30] + [0] * 8
    assert weights(tmp_path / "run")["score.weight"].abs().max() == 0.0


def test_it_learns_the_word_that_decides(start, learnt):
    run, printed = learnt
    told = records(run)
    assert [record["step"] for record in told] == list(range(6))
    assert told[-1]["eval_accuracy"] > 0.95
    assert told[-1]["eval_loss"] < told[1]["eval_loss"] < told[0]["loss"]
    assert told[-1]["eval_elo"] == pytest.approx(400 / math.log(10) * told[-1]["eval_margin"])
    assert "eval_audit_calm" not in told[1] and "eval_audit_calm" in told[-1]  # looked at once, after the run
    assert "not for tuning" in printed and "not for tuning" in evaluation(run)["audit_note"]
    names = {path.name for path in run.iterdir()}
    assert names >= {"args.json", "env.json", "metrics.jsonl", "model", "state", "report.html"}


def scores_of(run: Path, start: Folder, file: str) -> tuple[torch.Tensor, list]:
    """Scores (N, 2) of a file of pairs under the saved model, by the library's own way, and the samples."""
    model, chat = load_score_model(run / "model"), load_chat(run / "model")
    pairs = [preference_samples(chat, record) for record in read_preferences(start[file])]
    flat = [sample.ids for pair in pairs for sample in pair]
    return completion_scores(model, flat, micro_batch=1).double().view(-1, 2), pairs


def test_the_evaluation_is_what_the_saved_model_says(start, learnt):
    run, _ = learnt
    scores, pairs = scores_of(run, start, "pairs_test")
    leads = [a - b for a, b in scores.tolist()]
    page, n = evaluation(run), len(leads)
    said = records(run)[-1]
    close = {"rel": 1e-4, "abs": 1e-5}
    assert page["pairs"] == n == 30 and page["labels"] == "pairs" and page["step"] == 6
    assert page["accuracy"] == said["eval_accuracy"] == sum(lead > 0 for lead in leads) / n
    assert page["loss"] == pytest.approx(sum(math.log1p(math.exp(0.1 - x)) for x in leads) / n, **close)
    assert page["margin"] == pytest.approx(sum(leads) / n, **close)
    lengths = [[sum(sample.mask) for sample in pair] for pair in pairs]
    for name, kept in (("shorter", lambda a, b: a < b), ("longer", lambda a, b: a > b)):
        own = [lead > 0 for lead, two in zip(leads, lengths, strict=True) if kept(*two)]
        assert page[f"pairs_chosen_{name}"] == len(own) > 5
        assert page[f"accuracy_chosen_{name}"] == sum(own) / len(own)
    together = torch.stack([scores.flatten(), torch.tensor(lengths).double().flatten()])
    assert page["length_correlation"] == pytest.approx(float(torch.corrcoef(together)[0, 1]), **close)
    used = [row for row in page["calibration"] if row["pairs"]]
    for row in used:
        own = [x for x in leads if row["from"] <= abs(x) < (row["to"] or math.inf)]
        assert row["pairs"] == len(own) and row["wins"] == sum(x > 0 for x in own)
        assert row["expected"] == pytest.approx(sum(1 / (1 + math.exp(-abs(x))) for x in own), **close)
    assert len(used) > 1 and sum(row["pairs"] for row in used) == n
    error = sum(abs(row["wins"] - row["expected"]) for row in used) / n
    assert page["calibration_error"] == pytest.approx(error)
    audit = [a > b for a, b in scores_of(run, start, "audit")[0].tolist()]
    assert page["audit"] == {
        "calm": {"pairs": 2, "accuracy": sum(audit[:2]) / 2},
        "terse": {"pairs": 1, "accuracy": float(audit[2])},
    }


def test_the_exported_folder_is_the_trained_state_with_its_chat(start, learnt):
    run, _ = learnt
    state = load_file(run / "state/step_000006/model.safetensors")
    assert state.keys() == weights(run).keys() >= {"score.weight", "model.norm.weight"}
    assert all(torch.equal(state[name], tensor) for name, tensor in weights(run).items())
    ours, theirs = load_chat(run / "model"), load_chat(start["model"])
    assert (ours.version, ours.stop_ids) == (theirs.version, theirs.stop_ids)
    assert json.loads((run / "model/config.json").read_text())["id2label"] == {"0": "reward"}


def test_resume_continues_bit_for_bit(start, learnt, tmp_path):
    straight, cut = learnt[0], tmp_path / "cut"
    shutil.copytree(straight, cut)
    shutil.rmtree(cut / "state/step_000006")  # as if it had died after step 3
    shutil.rmtree(cut / "model")
    (cut / "evaluation.json").unlink()
    flags = ["--steps", "6", "--eval-every", "2", "--save-every", "3", "--margin", "0.1"]
    train(start, cut, *flags, "--resume")
    assert records(cut) == records(straight) and evaluation(cut) == evaluation(straight)
    assert all(torch.equal(tensor, weights(straight)[name]) for name, tensor in weights(cut).items())
    with pytest.raises(ValueError, match=r"labels: .* was started with 'pairs', this start has 'outcomes'"):
        train(start, cut, "--resume", kind="outcomes")


def test_gradients_clipped_to_nothing_leave_the_decay_of_matrices(start, learnt, tmp_path):
    """At a norm far below Adam's ε its step is 0, and what is left is θ ← θ − lr·λ·θ, not of the norms."""
    flags = ["--steps", "1", "--warmup", "1", "--weight-decay", "0.5", "--max-grad-norm", "1e-14"]
    train({**start, "model": learnt[0] / "model"}, tmp_path / "run", *flags)
    for name, tensor in weights(tmp_path / "run").items():
        share = 1 - 0.01 * 0.5 if tensor.ndim == 2 else 1.0
        torch.testing.assert_close(tensor, share * weights(learnt[0])[name], rtol=1e-6, atol=1e-7)


KINDS = ("pairs", "attributes", "steps")
SLOW = ["--lr", "1e-3"]  # a step of Adam makes of a gradient's last digits the learning rate's
# Several runs in one process group: importing torch takes longer than they do.
RUNS = """
import json, runpy, sys
import nanopost.report
from nanopost import distributed
nanopost.report.offer_report = lambda run: run
distributed.setup()
leave, distributed.setup, distributed.teardown = distributed.teardown, lambda *_: None, distributed.barrier
for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
leave()
"""


@pytest.fixture(scope="module")
def odd(start: Folder, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Five records to evaluate, three audit pairs; and each kind on one process, in two micro-batches."""
    folder, odd = tmp_path_factory.mktemp("runs"), dict(start)
    for kind in KINDS:
        lines = start[f"{kind}_test"].read_text().splitlines()[:5]
        odd[f"{kind}_test"] = folder / f"{kind}.jsonl"
        odd[f"{kind}_test"].write_text("\n".join(lines) + "\n")
        for name, size in (("one", 32), ("micro", 3)):
            flags = ["--steps", 3, "--micro-batch", size, *SLOW]
            train(odd, folder / f"{kind}-{name}", *flags, kind=kind)
    return {**odd, "runs": folder}


@pytest.fixture(scope="module")
def ranks(odd: Folder) -> None:
    """The same on two ranks."""
    flags, commands = ["--steps", 3, "--micro-batch", 3, "--eval-every", 2, *SLOW], []
    for kind in KINDS:
        out = odd["runs"] / f"{kind}-ranks"
        commands.append(["train_reward.py", *flags_of(odd, out, *flags, kind=kind)])
    run_script(["-c", RUNS, json.dumps(commands)], ranks=2)


def parted(rows: list[dict]) -> list[list[dict]]:
    """Pearson's correlations alone, and what is left without them."""
    told = [[(name, "length_correlation" in name, value) for name, value in row.items()] for row in rows]
    return [[{n: x for n, own, x in row if own == part} for row in told] for part in (True, False)]


@pytest.mark.parametrize("other", ["micro", "ranks"])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_and_ranks_change_nothing(odd, request, kind, other):
    """Steps and ratings: records with unequal numbers of labels, so that a mean of means would show."""
    if other == "ranks":
        request.getfixturevalue("ranks")
    one, two = odd["runs"] / f"{kind}-one", odd["runs"] / f"{kind}-{other}"
    first, told = records(one), records(two)
    assert abs(first[2]["loss"] - first[0]["loss"]) > 1e-3
    assert ("eval_audit_calm" in first[2]) == (kind == "pairs")
    if other == "ranks":  # it has looked at step 2 as well
        told[1] = {name: value for name, value in told[1].items() if not name.startswith("eval_")}
    (found, told), (expected, first) = parted([*told, evaluation(two)]), parted([*first, evaluation(one)])
    within("correlations, float32", found, expected)
    found, expected = [weights(two), told], [weights(one), first]
    if other == "ranks":
        within("world sizes, float32", found, expected)
    else:
        within("micro-batches, float32", found, expected)


def test_a_pair_and_an_outcome_are_read_at_their_own_last_token(start, learnt, tmp_path):
    """One step at a rate of 0 on a trained score model: the record is the loss of each row by itself."""
    again = {**start, "model": learnt[0] / "model"}
    scores, _ = scores_of(learnt[0], start, "pairs")
    train(again, tmp_path / "pairs", "--steps", "1", "--batch-size", "96", "--micro-batch", "7", "--lr", "0")
    (told,) = records(tmp_path / "pairs")
    leads = [a - b for a, b in scores.tolist()]
    assert told["loss"] == pytest.approx(sum(math.log1p(math.exp(-x)) for x in leads) / 96, rel=1e-4)
    assert told["margin"] == pytest.approx(sum(leads) / 96, rel=1e-4)
    assert told["accuracy"] == pytest.approx(sum(x > 0 for x in leads) / 96)
    train(again, tmp_path / "outcomes", "--steps", "1", "--batch-size", "96", "--lr", "0", kind="outcomes")
    model, chat = load_score_model(learnt[0] / "model"), load_chat(start["model"])
    for name, file in (("", "outcomes"), ("eval_", "outcomes_test")):
        total = right = 0.0
        every = read_preferences(start[file])
        for record in every:
            place = {"file": record.file, "line": record.line}
            sample = completion_sample(chat, record.prompt, record.completion, **place)
            assert sample.ids[-1] in chat.stop_ids
            score = float(completion_scores(model, [sample.ids]))
            lead = score if record.label else -score
            total, right = total + math.log1p(math.exp(-lead)), right + (lead > 0)
        (told,) = records(tmp_path / "outcomes")
        assert told[f"{name}loss"] == pytest.approx(total / len(every), rel=1e-4)
        assert told[f"{name}accuracy"] == pytest.approx(right / len(every))


def test_steps_are_read_where_they_end(start, tmp_path):
    train(start, tmp_path / "run", "--steps", "12", kind="steps")
    told, page = records(tmp_path / "run"), evaluation(tmp_path / "run")
    assert told[0]["loss"] == pytest.approx(math.log(2), rel=1e-6) and told[0]["accuracy"] == 0.5
    model, chat = load_score_model(tmp_path / "run/model"), load_chat(start["model"])
    leads, labels = [], []
    for record in read_preferences(start["steps_test"]):
        sample, ends = steps_sample(chat, record)
        for end, label in zip(ends, record.labels, strict=True):  # a step sees nothing behind it
            score = float(completion_scores(model, [sample.ids[: end + 1]]))
            leads.append(score if label else -score)
            labels.append(label)
    assert page["places"] == len(leads) > 30
    assert page["accuracy"] == sum(lead > 0 for lead in leads) / len(leads) > 0.95
    assert page["loss"] == pytest.approx(sum(math.log1p(math.exp(-x)) for x in leads) / len(leads), rel=1e-3)
    assert page["right"] == pytest.approx(sum(labels) / len(labels))
    assert "audit" not in page and "eval_audit_calm" not in told[-1]


def test_an_attribute_that_nobody_rated_is_absent_not_zero(start, tmp_path):
    train(start, tmp_path / "run", "--steps", "40", kind="attributes")
    model, chat = load_score_model(tmp_path / "run/model"), load_chat(start["model"])
    squares, errors = [], {name: [] for name in ATTRIBUTES}
    for record in read_preferences(start["attributes_test"]):
        place = {"file": record.file, "line": record.line}
        sample = completion_sample(chat, record.prompt, record.completion, **place)
        said = dict(zip(ATTRIBUTES, completion_scores(model, [sample.ids])[0].tolist(), strict=True))
        for name, rating in record.ratings.items():
            if rating is not None:
                squares.append((said[name] - rating) ** 2)
                errors[name].append(abs(said[name] - rating))
    page = evaluation(tmp_path / "run")
    assert page["loss"] == pytest.approx(sum(squares) / len(squares), rel=1e-4)
    for name, own in errors.items():
        assert page[f"rated_{name}"] == len(own) and (len(own) < 30) == (name != "helpfulness")
        assert page[f"error_{name}"] == pytest.approx(sum(own) / len(own), rel=1e-4)
    assert page["error_helpfulness"] < 0.5 * page["spread_helpfulness"]
    first = records(tmp_path / "run")[0]  # every prediction is 0: the mean square of the ratings there are
    names = json.loads((tmp_path / "run/model/config.json").read_text())["id2label"]
    assert list(names.values()) == list(ATTRIBUTES) and 5.0 < first["loss"] < 11.0
    assert first["error"] == pytest.approx(first["loss"] / 4, rel=1e-6)  # ratings are 0 or 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--labels", "outcomes"],
            "pairs.jsonl:1: labels=outcomes reads Labelled, this record is Preference",
        ),
        (["--max-length", "3"], "pairs.jsonl: no record of at most 3 tokens"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--labels", "steps"], "audit=.*audit.jsonl compares whole answers, labels=steps"),
        (["--labels", "steps", "--margin", "1"], "margin=1.0 is for labels=pairs, got labels=steps"),
        (["--audit", "DATA"], "pairs.jsonl:1: an audit pair has no text 'category'"),
        (
            ["--audit", "LONG"],
            "long.jsonl:1: the pair has 3.. tokens, .* context 256: audit=.*long.jsonl must",
        ),
        (["--warmup", "-3"], "warmup: expected 0 <= warmup <= steps, got warmup -3"),
        (["--max-grad-norm", "0"], "epochs and max_grad_norm must be above 0, got 1.0, 0.0"),
    ],
)
def test_bad_input_is_named(start, tmp_path, flags, message):
    line = {"category": "long", "prompt": "to", "chosen": "good " * 60, "rejected": "bad"}
    files = {"DATA": start["pairs"], "LONG": write_lines(tmp_path / "long.jsonl", [line])}
    with pytest.raises(ValueError, match=message):
        train(start, tmp_path / "run", "--steps", 1, *[files.get(flag, flag) for flag in flags])


@pytest.mark.parametrize("context", [256, 128])
def test_nanoposts_own_audit_pairs_that_do_not_fit_are_counted(start, tmp_path, context):
    """Without --audit a model that can read some of them is asked those; one that reads none, nothing."""
    model = hub_folder(tmp_path / "hub", max_position_embeddings=context)
    chat, pairs = load_chat(model), read_audit()
    sizes = [max(len(s.ids) for s in preference_samples(chat, pair)) for pair in pairs]
    fits = [size <= context for size in sizes]
    own = {name: path for name, path in start.items() if name != "audit"}
    printed = train({**own, "model": model}, tmp_path / "run", "--steps", 1)
    line, size = fits.index(False) + 1, sizes[fits.index(False)]
    told = f"left out {fits.count(False)} of {len(pairs)} audit pairs (first: "
    assert printed.count("audit pairs (") == 1 and told in printed
    assert f"audit.jsonl:{line}: the pair has {size} tokens, the model's context {context})" in printed
    assert any(fits) == (context == 256) == ("not for tuning" in printed)
    asked = sum(row["pairs"] for row in evaluation(tmp_path / "run").get("audit", {}).values())
    assert asked == sum(fits)


def test_records_over_the_limit_are_counted(start, tmp_path):
    data = write_lines(tmp_path / "some.jsonl", [{"prompt": "to", "chosen": "to " * 90, "rejected": "bad"}])
    data.write_text(data.read_text() + start["pairs"].read_text())
    printed = train({**start, "pairs": data}, tmp_path / "run", "--steps", 1)
    assert "left out 1 of 97 records over 256 tokens" in printed and "some.jsonl:1)" in printed
    assert "96 records, 1 steps of 16" in printed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_on_every_seed(start, tmp_path, seed):
    """The word decides 30 held-out pairs and the audit, which has the word as well; length does not."""
    model = hub_folder(tmp_path / "hub", seed=seed)
    train({**start, "model": model}, tmp_path / "run", "--steps", 40, "--seed", seed)
    told = records(tmp_path / "run")[-1]
    assert told["eval_accuracy"] >= 0.95 and told["eval_loss"] < 0.1
    assert min(told["eval_accuracy_chosen_shorter"], told["eval_accuracy_chosen_longer"]) >= 0.9
    assert abs(told["eval_length_correlation"]) < 0.5
    assert told["eval_audit_calm"] == told["eval_audit_terse"] == 1.0
