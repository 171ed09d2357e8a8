"""train_reward.py on real records: GSM8K's published solutions, from groups to an evaluation.

And the model of docs/preference-data.md, built as the page builds it. Both need the public data sets.
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

import pytest

from nanopost import metrics
from nanopost.data.preference import read_groups, read_preferences
from nanopost.data.schema import Preference
from nanopost.evals.candidates import main
from nanopost.models.weights import load_model
from nanopost.rollout.pairs import build_labels, build_pairs
from tests.mutants.mutant import ROOT
from tests.tiny import hub_folder

PAGE = (ROOT / "docs" / "preference-data.md").read_text(encoding="utf-8")
GROUPS, TRAIN = 60, 45  # lines of the file: problems to read, and the first of them to train on


def test_real_pairs_and_labels_go_through_the_reward_script(shared: Path, tmp_path: Path) -> None:
    """Counts of the evaluation are those of the file's own is_correct; problems are on one side alone."""
    lines = (shared / "data/gsm8k/model_solutions.jsonl").read_text(encoding="utf-8").splitlines()[:GROUPS]
    for name, some in (("train", lines[:TRAIN]), ("test", lines[TRAIN:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")
        outs = [f"--out={tmp_path}/{name}-pairs.jsonl", f"--labels-out={tmp_path}/{name}-outcomes.jsonl"]
        with contextlib.redirect_stdout(io.StringIO()):
            main([f"--groups={tmp_path}/{name}.jsonl", "--rule=right_over_wrong", *outs])
    verdicts = [
        {v["solution"]: v["is_correct"] for v in json.loads(line).values() if isinstance(v, dict)}
        for line in lines[TRAIN:]
    ]
    flags = [list(of.values()) for of in verdicts]
    places = {
        "pairs": sum(min(of.count(True), of.count(False)) for of in flags),
        "outcomes": 4 * (GROUPS - TRAIN),
    }
    assert places["pairs"] > 5
    for split in ("train", "test"):
        for record in read_preferences(tmp_path / f"{split}-pairs.jsonl"):
            assert isinstance(record, Preference)
            (problem,) = [line for line in lines if json.loads(line)["question"] == record.prompt[0].content]
            assert (lines.index(problem) < TRAIN) == (split == "train")
    model = hub_folder(tmp_path / "hub", max_position_embeddings=2048)
    for kind, count in places.items():
        run = tmp_path / kind
        command = ["train_reward.py", f"--model={model}", f"--labels={kind}", f"--out={run}", "--steps=3"]
        command += [f"--data={tmp_path}/train-{kind}.jsonl", f"--eval-data={tmp_path}/test-{kind}.jsonl"]
        command += ["--batch-size=4", "--lr=1e-2", "--warmup=1", "--threads=1"]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.setattr(sys, "argv", command)
            runpy.run_path(str(ROOT / "train_reward.py"), run_name="__main__")
        assert "left out" not in printed.getvalue()  # every record fits the model's context
        evaluation, records = json.loads((run / "evaluation.json").read_text()), metrics.read_records(run)
        assert len(records) == evaluation["step"] == 3 and evaluation["labels"] == kind
        assert evaluation["pairs" if kind == "pairs" else "places"] == count
        assert 0.0 <= evaluation["accuracy"] <= 1.0 and evaluation["loss"] > 0.0
        if kind == "outcomes":
            assert evaluation["right"] * count == pytest.approx(sum(map(sum, flags)))


def test_the_pages_model_is_built_as_the_page_says(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k").symlink_to(shared / "data" / "gsm8k")
    (block,) = PAGE.split("```python\n")[1:]
    exec(compile(block.split("```")[0], "docs/preference-data.md", "exec"), {})
    count = sum(parameter.numel() for parameter in load_model("hub").parameters())
    assert f"has {count:,} random parameters" in PAGE


def test_rules_that_check_no_sum_do_as_well_as_the_page_says(shared: Path) -> None:
    """The chosen one is longer, is the larger model's, is a verified one: shares of the held-out pairs."""
    groups = read_groups(shared / "data/gsm8k/model_solutions.jsonl")
    pairs = [
        [p for g in some for p in build_pairs(g, rule="right_over_wrong")]
        for some in (groups[:1059], groups[1059:])
    ]
    labels = [[la for g in some for la in build_labels(g)] for some in (groups[:1059], groups[1059:])]
    assert "head -n 1059" in PAGE and "tail -n 260" in PAGE and len(groups) == 1059 + 260
    assert f"| reward, pairs | {len(pairs[0])} | {len(pairs[1])} |" in PAGE
    assert f"| reward, outcomes | {len(labels[0]):,} | {len(labels[1]):,} |" in PAGE
    wrong = sum(not label.label for label in labels[1]) / len(labels[1])
    assert f'"wrong" each time: {wrong:.4f}'.replace("0.", ".") in PAGE
    sums = [0.0, 0.0, 0.0]
    for pair in pairs[1]:
        source = {c.text: str(c.source) for c in reversed(pair.provenance.candidates)}
        texts = pair.chosen[0].content, pair.rejected[0].content
        larger, verified = ([mark in source[text] for text in texts] for mark in ("175b", "verification"))
        for i, (a, b) in enumerate((map(len, texts), larger, verified)):
            sums[i] += (1 + (a > b) - (a < b)) / 2
    longer, large, verify = (f"{total / len(pairs[1]):.3f}"[1:] for total in sums)
    told = " ".join(PAGE.split())
    assert f'"the longer one" has {longer}, "the larger model\'s" {large}, "the verified one' in told
    assert f'`_verification` model" {verify}, a tie' in told
