"""Candidates: sampled groups that stay with their prompts, and the command line that makes data of them."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nanopost.data.chat import decode, load_chat, prompt_ids, prompt_messages
from nanopost.data.preference import read_groups, read_preferences
from nanopost.data.schema import Group, Labelled, Preference, Provenance, Record, read_jsonl
from nanopost.evals.candidates import main, parse, sample_groups
from nanopost.evals.verifier import load_verifier
from nanopost.models.weights import load_model
from nanopost.rewards.verdict import Verdict
from nanopost.rollout.pairs import RULES
from nanopost.rollout.sampler import row_uniforms, sample
from nanopost.rollout.select import FILTERS, KEEP
from tests.mutants.mutant import ROOT
from tests.tiny import hub_folder

SETTINGS: dict[str, Any] = {"group_size": 5, "max_new_tokens": 8, "seed": 3, "temperature": 0.9}
SAMPLED = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
NAME = "tests.evals.test_candidates:echo"


def echo(completion: str, answer: str) -> Verdict:
    """Right when the text has an even length; the reason repeats what was judged, against what."""
    right = float(len(completion) % 2 == 0)
    return Verdict(0.1 + 0.9 * right, {"correct": right}, f"{answer}|{completion}")


def always(completion: str, answer: str) -> Verdict:
    return Verdict(1.0, {"exact": 1.0}, "yes")


def longest(completion: str, answer: str) -> Verdict:
    """Scores by length alone: what was cut is long."""
    return Verdict(min(1.0, len(completion) / 100), {"exact": 0.0}, "by length")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model for which every small letter is a stop token: many rows stop, many are cut."""
    folder = hub_folder(tmp_path_factory.mktemp("model"))
    letters = list(range(ord("a") - 33, ord("z") - 32))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": letters}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    lines = []
    for i in range(7):
        messages = [{"role": "user", "content": "add " * (i % 3 + 1) + str(i)}]
        lines.append(json.dumps({"messages": messages, "answer": f"answer {i}", "place": i}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def records(data: Path) -> list[Record]:
    return read_jsonl(data)


@pytest.fixture(scope="module")
def groups(folder: Path, records: list[Record]) -> list[Group]:
    return sample_groups(folder, records, echo, verifier_name=NAME, verifier_version="7", **SETTINGS)


def test_every_candidate_is_its_own_prompts_and_is_judged_by_its_own_answer(
    folder: Path, records: list[Record], groups: list[Group]
) -> None:
    """Each prompt is sampled anew, alone, with the uniforms of its place."""
    model, chat, stopped = load_model(folder), load_chat(folder), []
    assert len({candidate.text for group in groups for candidate in group.candidates}) > 20
    for i, (record, group) in enumerate(zip(records, groups, strict=True)):
        uniforms = row_uniforms(seed=3, step=0, prompts=[i], group_size=5, count=8)
        options: dict[str, Any] = {"stop_ids": chat.stop_ids, "max_new_tokens": 8, "temperature": 0.9}
        ids = prompt_ids(chat, prompt_messages(record))
        alone = sample(model, [ids], group_size=5, uniforms=uniforms, **options)
        assert [c.text for c in group.candidates] == [decode(chat, r.completion_ids) for r in alone]
        assert [c.tokens for c in group.candidates] == [len(r.completion_ids) for r in alone]
        assert [c.cut for c in group.candidates] == [r.finish_reason == "length" for r in alone]
        stopped += [r.finish_reason == "stop" for r in alone]
        for candidate in group.candidates:
            assert (candidate.reason or "").split("; ")[-1] == f"{record.answer}|{candidate.text}"
            assert candidate.score == echo(candidate.text, "").score
        assert (group.prompt, group.answer) == (record.messages, record.answer)
        assert (group.file, group.line, group.provenance.meta) == (record.file, record.line, {"place": i})
    assert 5 < sum(stopped) < 30


def test_a_group_says_how_it_was_made(folder: Path, groups: list[Group]) -> None:
    for group in groups:
        found = group.provenance
        assert (found.verifier_name, found.verifier_version) == (NAME, "7")
        assert found.sampling == {
            **SETTINGS,
            "top_k": 0,
            "top_p": 1.0,
            "model": str(folder),
            "template": load_chat(folder).version,
        }
        assert found.pass_rate == sum(candidate.correct is True for candidate in group.candidates) / 5
    assert len({group.provenance.pass_rate for group in groups}) > 1
    hashes = {group.provenance.test_case_hash for group in groups}
    assert len(hashes) == len(groups) and all(len(str(name)) == 16 for name in hashes)


def test_what_was_cut_is_never_right(folder: Path, records: list[Record]) -> None:
    groups = sample_groups(folder, records, always, verifier_name="always", **SETTINGS)
    candidates = [candidate for group in groups for candidate in group.candidates]
    assert {candidate.correct for candidate in candidates} == {True, False}
    for candidate in candidates:
        assert candidate.score == 1.0 and candidate.tokens is not None and candidate.cut is not None
        assert candidate.correct != candidate.cut
        if candidate.cut:
            assert (candidate.tokens, candidate.reason) == (8, "cut at 8 tokens; yes")
        else:
            assert candidate.reason == "yes"
    assert any(candidate.correct and candidate.tokens == 1 for candidate in candidates)  # a stop alone counts


def test_a_record_that_cannot_be_judged_is_refused_first(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: no answer to verify against"):
        sample_groups(folder, read_jsonl(path), echo, verifier_name="echo")
    path.write_text('{"prompt": "a", "completion": "b", "answer": "c"}\n', encoding="utf-8")
    verify, _ = load_verifier("nanopost.rewards.math:gsm8k")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: answer must be a number"):
        sample_groups(folder, read_jsonl(path), verify, verifier_name="gsm8k")


@pytest.fixture(scope="module")
def made(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything the command line can make of one sampling run."""
    out = tmp_path_factory.mktemp("made")
    command = ["--model", str(folder), "--data", str(data), "--verifier", NAME, *SAMPLED, "--threads", "1"]
    command += ["--rule", "right_and_concise", "--margin", "1", "--pairs-per-group", "2"]
    command += ["--out", str(out / "pairs.jsonl"), "--labels-out", str(out / "labels.jsonl")]
    command += ["--groups-out", str(out / "groups.jsonl"), "--drop", "all_wrong"]
    main([*command, "--keep", "shortest_right", "--sft-out", str(out / "sft.jsonl")])
    return out


def test_the_groups_written_are_the_groups_sampled(made: Path, groups: list[Group]) -> None:
    def content(group: Group) -> tuple:
        provenance = {k: v for k, v in vars(group.provenance).items() if k != "verifier_version"}
        return group.prompt, group.candidates, group.answer, provenance

    assert [content(g) for g in read_groups(made / "groups.jsonl")] == [content(g) for g in groups]


def test_every_record_written_can_be_read_and_traced_to_its_group(made: Path, groups: list[Group]) -> None:
    by_prompt = {group.prompt: group for group in groups}
    pairs, labels = read_preferences(made / "pairs.jsonl"), read_preferences(made / "labels.jsonl")
    assert pairs and labels
    for record in (*pairs, *labels):
        group = by_prompt[record.prompt]
        assert record.provenance.candidates == group.candidates
        assert record.provenance.sampling == group.provenance.sampling
        assert record.provenance.verifier_name == NAME
        assert record.provenance.meta == {"answer": group.answer, **group.provenance.meta}
    for pair in pairs:
        assert isinstance(pair, Preference) and pair.provenance.preference_reason == "right_and_concise"
        judged = {c.text: c for c in reversed(pair.provenance.candidates)}
        chosen, rejected = judged[pair.chosen[0].content], judged[pair.rejected[0].content]
        assert chosen.correct and chosen.tokens is not None and rejected.tokens is not None
        assert not rejected.correct or rejected.tokens > chosen.tokens + 1
    per_group = [sum(pair.prompt == prompt for pair in pairs) for prompt in by_prompt]
    assert max(per_group) == 2
    kept = [group for group in groups if any(candidate.correct for candidate in group.candidates)]
    assert all(isinstance(label, Labelled) for label in labels)
    assert [(la.completion[0].content, la.label) for la in labels if isinstance(la, Labelled)] == [
        (c.text, c.correct) for group in kept for c in group.candidates if c.text.strip()
    ]


def test_the_supervised_records_are_right_answers_to_their_prompts(made: Path, groups: list[Group]) -> None:
    found = read_jsonl(made / "sft.jsonl")
    assert found
    for record in found:
        group = next(group for group in groups if group.prompt == record.messages[: record.context])
        lengths = [c.tokens for c in group.candidates if c.correct and c.tokens is not None]
        chosen = next(c for c in group.candidates if c.text == record.messages[-1].content and c.correct)
        assert chosen.tokens == min(lengths) and record.answer == group.answer
        assert record.meta["keep"] == "shortest_right" and record.meta["verifier_name"] == NAME


def test_groups_from_a_file_give_the_same_pairs_and_the_counts_are_told(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--groups", str(made / "groups.jsonl"), "--rule", "right_and_concise", "--margin", "1"]
    out = tmp_path / "deep" / "again.jsonl"
    main([*command, "--pairs-per-group", "2", "--out", str(out), "--drop", "all_wrong", "all_right"])
    printed, groups = capsys.readouterr().out.splitlines(), read_groups(made / "groups.jsonl")
    counts = [sum(bool(c.correct) for c in group.candidates) for group in groups]
    kept = [group for group, count in zip(groups, counts, strict=True) if 0 < count < 5]
    pairs = [
        pair for pair in read_preferences(made / "pairs.jsonl") if 0 < (pair.provenance.pass_rate or 0) < 1
    ]
    assert read_preferences(out) and [
        p.rejected for p in read_preferences(out) if isinstance(p, Preference)
    ] == [pair.rejected for pair in pairs if isinstance(pair, Preference)]
    blank = sum(not c.text.strip() for group in groups for c in group.candidates)
    cut = sum(c.cut is True for group in groups for c in group.candidates)
    assert blank > 0 and 0 < cut < 35
    assert printed[0].startswith(f"7 groups, 35 candidates, {sum(counts)} of them right, ")
    fruitful = len({pair.prompt for pair in pairs})
    assert printed[1:-1] == [
        f"{blank} candidates are blank: they stay in their groups and are in no record",
        f"{cut} candidates are cut: they are never right, never chosen and never kept",
        f"dropped by all_wrong: {counts.count(0)} groups",
        f"dropped by all_right: {counts.count(5)} groups",
        f"kept: {len(kept)} groups",
        f"pairs by right_and_concise, margin 1: {len(pairs)} from {fruitful} groups",
    ]
    assert printed[-1].startswith("mean tokens: chosen ")


def test_what_was_cut_is_neither_chosen_nor_kept_though_its_score_is_the_highest(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    """The verifier scores by length, so that cut ones are among the highest."""
    groups, out, sft = (tmp_path / f"{name}.jsonl" for name in ("groups", "pairs", "sft"))
    command = ["--model", str(folder), "--data", str(data), "--verifier", f"{__name__}:longest", *SAMPLED]
    main([*command, "--groups-out", str(groups), "--threads", "1"])
    highest = [max(group.candidates, key=lambda c: c.score or 0.0) for group in read_groups(groups)]
    assert sum(c.cut is True for c in highest) > 3
    read = ["--groups", str(groups), "--rule", "score", "--out", str(out)]
    main([*read, "--keep", "best", "--threshold", "0", "--sft-out", str(sft)])
    pairs, kept = read_preferences(out), read_jsonl(sft)
    assert len(pairs) > 5 and len(kept) > 3
    for pair in pairs:
        assert isinstance(pair, Preference)
        assert pair.chosen[0].content in {c.text for c in pair.provenance.candidates if c.cut is False}
    for record in kept:
        group = next(group for group in read_groups(groups) if group.prompt == record.messages[:1])
        scores = {c.text: c.score for c in group.candidates if not c.cut}
        assert scores[record.messages[-1].content] == max(s for s in scores.values() if s is not None)


def test_lengths_that_a_file_has_not_are_counted_with_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    candidates = [{"text": "hello 2", "correct": True}, {"text": "It is 2", "correct": True, "tokens": 3}]
    path, out = tmp_path / "groups.jsonl", tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "1+1", "candidates": candidates}) + "\n", encoding="utf-8")
    command = ["--groups", str(path), "--rule", "right_and_concise", "--out", str(out)]
    with pytest.raises(ValueError, match=r"groups\.jsonl:1: candidates\[0\] has no tokens"):
        main(command)
    main([*command, "--model", str(folder)])
    pair = read_preferences(out)[0]
    assert [c.tokens for c in pair.provenance.candidates] == [4, 3]  # "hello", " ", "2" and a stop token


REFUSED: list[tuple[list[str], str]] = [
    (["--groups", "g", "--seed", "0", "--labels-out", "l"], "--groups reads groups; --seed is for sampling"),
    (["--model", "m", "--labels-out", "l"], "give --model, --data and --verifier"),
    (["--groups", "g"], "nothing is asked for"),
    (["--groups", "g", "--out", "o"], "--out and --rule come together"),
    (["--groups", "g", "--labels-out", "l", "--keep", "best"], "--sft-out and --keep come together"),
    (["--groups", "g", "--labels-out", "l", "--margin", "1"], "--margin is for --out"),
    (["--groups", "g", "--labels-out", "l", "--pairs-per-group", "1"], "--pairs-per-group is for --out"),
    (["--groups", "g", "--labels-out", "l", "--threshold", "1"], "--threshold is for --keep best"),
    (
        ["--groups", "g", "--keep", "right", "--sft-out", "s", "--threshold", "0.5"],
        "--threshold is for --keep best",
    ),
    (["--groups", "g", "--labels-out", "o", "--groups-out", "o"], "o is there already or given twice"),
    (["--groups", "g", "--labels-out", str(ROOT / "README.md")], "README.md is there already"),
    (["--groups", "g", "--rule", "best", "--out", "o"], "argument --rule: invalid choice: 'best'"),
    (["--groups", "g", "--drop", "equal", "--labels-out", "o"], "argument --drop: invalid choice: 'equal'"),
]


@pytest.mark.parametrize(("command", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_flags_that_do_not_fit_are_refused(
    command: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_no_pairs_is_an_error_and_the_counts_say_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "groups.jsonl", tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "1+1", "candidates": [{"text": "2", "correct": true}]}\n', encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"pairs\.jsonl: there is nothing to write; the counts above say why"
    ):
        main(["--groups", str(path), "--rule", "right_over_wrong", "--out", str(out)])
    assert "pairs by right_over_wrong, margin 0: 0 from 0 groups" in capsys.readouterr().out
    assert not out.exists()


def test_help_is_one_screen() -> None:
    command = [sys.executable, "-m", "nanopost.evals.candidates", "--help"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120, check=True)
    lines = done.stdout.strip().splitlines()
    assert 20 < len(lines) <= 60 and max(map(len, lines)) <= 110 and done.stderr == ""


PAGE = (ROOT / "docs" / "preference-data.md").read_text(encoding="utf-8")


def test_the_pages_commands_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = "python -m nanopost.evals.candidates"
    commands = [line.removeprefix(program) for line in PAGE.splitlines() if line.startswith(program)]
    assert len(commands) == 6
    for command in commands:
        parsed = parse(shlex.split(command))
        assert parsed.groups or (parsed.model and load_verifier(parsed.verifier))


def test_the_page_names_every_rule() -> None:
    for name in (*RULES, *FILTERS, *KEEP):
        assert f"`{name}`" in PAGE, name
    for field in dataclasses.fields(Provenance):
        assert f"`{field.name}`" in PAGE, field.name


@pytest.fixture
def solutions(shared: Path) -> Path:
    return shared / "data" / "gsm8k" / "model_solutions.jsonl"


def test_gsm8ks_published_solutions_give_pairs_and_labels_as_they_are_labelled(
    solutions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every pair is a right solution over a wrong one of the same problem, by the file's own is_correct."""
    problems: dict[str, dict[str, bool]] = {}
    sums = []
    for line in solutions.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        judged = [value for value in row.values() if isinstance(value, dict)]
        assert len(judged) == 4
        sums.append(sum(value["is_correct"] for value in judged))
        # a text that two models wrote has one verdict
        problems.setdefault(row["question"], {}).update({v["solution"]: v["is_correct"] for v in judged})
    assert len(problems) == 1319
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("out", "labels-out")}
    flags = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
    main(["--groups", str(solutions), "--rule", "right_over_wrong", *flags])
    printed = capsys.readouterr().out

    verdicts = [list(texts.values()) for texts in problems.values()]
    expected = sum(min(found.count(True), found.count(False)) for found in verdicts)
    fruitful = sum(len(set(found)) == 2 for found in verdicts)
    pairs, labels = read_preferences(paths["out"]), read_preferences(paths["labels-out"])
    assert len(pairs) == expected and f"{expected} from {fruitful} groups" in printed
    for pair in pairs:
        assert isinstance(pair, Preference) and len(pair.provenance.candidates) == 4
        texts = problems[pair.prompt[0].content]
        assert texts[pair.chosen[0].content] and not texts[pair.rejected[0].content]
    assert len(labels) == 4 * 1319
    for label in labels:
        assert isinstance(label, Labelled)
        assert problems[label.prompt[0].content][label.completion[0].content] == label.label
    chosen = [
        (len(p.chosen[0].content), len(p.rejected[0].content)) for p in pairs if isinstance(p, Preference)
    ]
    right, wrong = (
        [len(la.completion[0].content) for la in labels if la.label is kind] for kind in (True, False)
    )
    means = [sum(column) / len(column) for column in (*zip(*chosen, strict=True), right, wrong)]
    sources = [{c.text: str(c.source) for c in reversed(p.provenance.candidates)} for p in pairs]
    sides = [
        (of[p.chosen[0].content][:2], of[p.rejected[0].content][:2])
        for of, p in zip(sources, pairs, strict=True)
        if isinstance(p, Preference)
    ]
    larger, smaller = sides.count(("17", "6b")), sides.count(("6b", "17"))
    told = " ".join(PAGE.split())
    for text in (
        f"{len(right):,} of the {len(labels):,} right",
        f"{expected} pairs from {fruitful} problems",
        f"in {larger} pairs chosen is the larger model's and rejected the smaller one's, in {smaller} it",
        f"have {means[0]:.1f} characters on average, rejected ones {means[1]:.1f}",
        f"chosen is longer in {100 * sum(a > b for a, b in chosen) / len(pairs):.1f} %",
        f"right ones have {means[2]:.1f} characters, wrong ones {means[3]:.1f}",
        "| problems | " + " | ".join(str(sums.count(i)) for i in range(5)) + " |",
    ):
        assert text in told, text
