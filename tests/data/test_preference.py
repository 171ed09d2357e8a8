"""Preferences: every form reads into its record, nothing of a line is dropped, the rest is a named error."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopost.data.preference import (
    ATTRIBUTES,
    common_prefix,
    group_line,
    parse_preference,
    preference_line,
    read_groups,
    read_preferences,
)
from nanopost.data.schema import (
    Candidate,
    Group,
    Labelled,
    Message,
    Preference,
    PreferenceRecord,
    Provenance,
    Ratings,
    Steps,
)

PLACE = ("f.jsonl", 3)
PROMPT, GOOD, BAD = Message("user", "2 + 2?"), Message("assistant", "4"), Message("assistant", "5")
prompt = {"role": "user", "content": "2 + 2?"}
good, bad = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
RATED = {"helpfulness": 4, "correctness": 3.5, "coherence": None, "complexity": 0, "verbosity": 1}


def parse(obj: Any) -> PreferenceRecord:
    return parse_preference(obj, file="f.jsonl", line=3)


def pair(*turns: Message, **meta: Any) -> Preference:
    return Preference(turns or (PROMPT,), (GOOD,), (BAD,), Provenance(meta=meta), *PLACE)


SYSTEM = {"role": "system", "content": "Sums."}
OPENAI = {
    "input": {"messages": [SYSTEM, prompt], "tools": [{"type": "function"}], "parallel_tool_calls": True},
    "preferred_output": [good],
    "non_preferred_output": [bad],
}
ULTRAFEEDBACK = {
    "prompt": "2 + 2?",
    "prompt_id": "ab12",
    "chosen": [prompt, good],
    "rejected": [prompt, bad],
    "messages": [prompt, good],
    "score_chosen": 8.5,
    "score_rejected": 3,
}
KEPT = {key: ULTRAFEEDBACK[key] for key in ("prompt_id", "messages", "score_chosen", "score_rejected")}
FORMS = {
    "strings": ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, pair()),
    "messages": ({"prompt": [prompt], "chosen": [good], "rejected": [bad], "id": 7}, pair(id=7)),
    "conversations": (
        {"chosen": [SYSTEM, prompt, good], "rejected": [SYSTEM, prompt, bad]},
        pair(Message("system", "Sums."), PROMPT),
    ),
    "openai": (
        OPENAI,
        pair(
            Message("system", "Sums."),
            PROMPT,
            input={"tools": [{"type": "function"}], "parallel_tool_calls": True},
        ),
    ),
    "ultrafeedback": (ULTRAFEEDBACK, pair(**KEPT)),
    "unpaired": (
        {"prompt": "2 + 2?", "completion": "5", "label": False, "id": 1},
        Labelled((PROMPT,), (BAD,), False, Provenance(meta={"id": 1}), *PLACE),
    ),
    "unpaired messages": (
        {"prompt": [prompt], "completion": [good], "label": True},
        Labelled((PROMPT,), (GOOD,), True, Provenance(), *PLACE),
    ),
    "process": (
        {"prompt": "2 + 2?", "completions": ["1 + 1 = 2", "so 5"], "labels": [True, False]},
        Steps((PROMPT,), ("1 + 1 = 2", "so 5"), (True, False), Provenance(), *PLACE),
    ),
    "helpsteer": (
        {"prompt": "2 + 2?", "response": "4", **RATED},
        Ratings((PROMPT,), (GOOD,), RATED, Provenance(), *PLACE),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str) -> None:
    line, record = FORMS[form]
    assert parse(line) == record


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_from_its_line(form: str) -> None:
    record = parse(FORMS[form][0])
    assert parse(json.loads(json.dumps(preference_line(record)))) == record


def test_a_file_of_all_forms_keeps_order_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line, _ in FORMS.values()))
    expected = [
        replace(record, file=str(path), line=number) for number, (_, record) in enumerate(FORMS.values(), 1)
    ]
    assert read_preferences(path) == expected


# ---- whole conversations


def turns(roles: str, *contents: str) -> list[dict[str, str]]:
    names = {"u": "user", "a": "assistant"}
    return [{"role": names[r], "content": c} for r, c in zip(roles, contents, strict=True)]


def test_the_prompt_is_what_two_conversations_share() -> None:
    record = parse({"chosen": turns("uaua", *"pqrs"), "rejected": turns("uaua", *"pqrt")})
    assert [[m.content for m in side] for side in (record.prompt, record.chosen, record.rejected)] == [
        ["p", "q", "r"],
        ["s"],
        ["t"],
    ]
    assert parse({"chosen": turns("uaua", *"pqrs"), "rejected": turns("uaua", *"pzrs")}).prompt == (
        Message("user", "p"),
    )


def test_a_conversation_that_goes_on_leaves_the_shorter_its_answer() -> None:
    record = parse({"chosen": turns("ua", *"pq"), "rejected": turns("uaua", *"pqrs")})
    assert [m.content for m in record.prompt] == ["p"]
    assert ([m.content for m in record.chosen], [m.content for m in record.rejected]) == (["q"], [*"qrs"])
    record = parse({"chosen": turns("uaua", *"pqrs"), "rejected": turns("ua", *"pq")})
    assert ([m.content for m in record.chosen], [m.content for m in record.rejected]) == ([*"qrs"], ["q"])


message = st.builds(Message, st.sampled_from(["user", "assistant"]), st.sampled_from(["a", "b"]))
messages = st.lists(message, max_size=4).map(tuple)
conversations = st.tuples(messages, messages, messages).map(
    lambda parts: (parts[0] + parts[1], parts[0] + parts[2])
)


@given(conversations.filter(all))
def test_the_common_prefix_is_maximal_and_leaves_each_side_its_last_turn(
    both: tuple[tuple[Message, ...], tuple[Message, ...]],
) -> None:
    chosen, rejected = both
    shared = common_prefix(chosen, rejected)
    possible = [n for n in range(min(map(len, both))) if chosen[:n] == rejected[:n]]
    assert shared == max(possible)
    assert common_prefix(rejected, chosen) == shared


@given(conversations)
def test_two_conversations_are_a_pair_or_an_error(
    both: tuple[tuple[Message, ...], tuple[Message, ...]],
) -> None:
    lines = [[{"role": m.role, "content": m.content} for m in side] for side in both]
    chosen, rejected = both
    answered = all(side and side[-1].role == "assistant" for side in both)
    try:
        record = parse({"chosen": lines[0], "rejected": lines[1]})
    except ValueError as error:
        assert str(error).startswith("f.jsonl:3: ")
        repeats = (
            answered
            and (shared := common_prefix(*both))
            and any(side[shared : 2 * shared] == side[:shared] for side in both)
        )
        assert not answered or chosen == rejected or common_prefix(*both) == 0 or repeats
    else:
        assert answered and chosen != rejected and record.prompt
        assert (record.prompt + record.chosen, record.prompt + record.rejected) == both
        assert record.chosen[-1].role == record.rejected[-1].role == "assistant"


@pytest.mark.parametrize("first", [[], [SYSTEM]])
def test_a_pair_has_a_prompt(first: list) -> None:
    with pytest.raises(ValueError, match=r"f\.jsonl:3: chosen and rejected share no message"):
        parse({"chosen": [*first, good], "rejected": [bad]})


def test_a_doubled_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"f\.jsonl:3: chosen repeats the prompt"):
        parse({"prompt": [prompt], "chosen": [prompt, good], "rejected": [prompt, bad]})


def test_a_prompt_of_another_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"f\.jsonl:3: prompt is no user turn"):
        parse(ULTRAFEEDBACK | {"prompt": "3 + 3?"})


# ---- provenance

FULL = {
    "preference_reason": "right_over_wrong",
    "error_type": "sum",
    "safety_label": "safe",
    "factuality_label": "wrong",
    "style_label": "plain",
    "annotator_id_hash": "9f",
    "review_round": 2,
    "disagreement": 0.25,
    "verifier_name": "maths",
    "verifier_version": "3",
    "test_case_hash": "c0",
    "pass_rate": 0.5,
    "failure_reason": "answer",
    "sampling": {"temperature": 0.7, "top_p": 0.9, "seed": 0, "model": "m"},
    "candidates": [
        {"text": "4", "score": 0.0, "correct": True, "tokens": 2, "reason": "right", "source": "a"},
        {"text": "", "correct": False, "cut": True},
        {"text": "5", "cut": False},
    ],
}


CANDIDATES = (
    Candidate("4", 0.0, True, 2, "right", "a"),  # of which nothing says whether it was cut
    Candidate("", correct=False, cut=True),
    Candidate("5", cut=False),
)


def test_every_field_of_the_provenance_is_read_and_written() -> None:
    assert set(FULL) == {field.name for field in fields(Provenance)} - {"meta"}
    line = {"prompt": [prompt], "chosen": [good], "rejected": [bad], **FULL, "split": "train"}
    source = parse(line).provenance
    assert source.meta == {"split": "train"}
    for key in set(FULL) - {"candidates"}:
        assert getattr(source, key) == FULL[key]
    assert source.candidates == CANDIDATES
    assert preference_line(parse(line)) == line


def test_null_in_the_provenance_says_nothing() -> None:
    line = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    assert parse(line | dict.fromkeys(FULL)) == parse(line)


def test_a_line_has_no_key_twice() -> None:
    for meta in ({"chosen": 1}, {"completion": 1}, {"review_round": 1}, {"candidates": 1}, {"prompt": "x"}):
        with pytest.raises(ValueError, match=f"f.jsonl:3: '{min(meta)}' is a key of the form's own"):
            preference_line(pair(**meta))
    group = Group((PROMPT,), (Candidate("4"),), Provenance(candidates=(Candidate("5"),)), None, *PLACE)
    with pytest.raises(ValueError, match="'candidates' is a key of the form's own"):
        group_line(group)


# ---- what is refused

STRINGS = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
UNPAIRED = {"prompt": "2 + 2?", "completion": "4", "label": True}
PROCESS = {"prompt": "2 + 2?", "completions": ["a", "b"], "labels": [True, False]}
RATING = {"prompt": "2 + 2?", "response": "4", **RATED}
BROKEN: list[tuple[Any, str]] = [
    (3, "a record is a JSON object, got a number"),
    ({"prompt": "2 + 2?"}, "of no known kind"),
    ({"messages": [prompt, good]}, "of no known kind"),
    (STRINGS | {"completion": "4"}, "two kinds at once (chosen+rejected and prompt+completion+label)"),
    (STRINGS | {"preferred_output": [good]}, "two kinds at once"),
    ({"prompt": "2 + 2?", "chosen": "4"}, "'rejected' is missing: chosen and rejected come together"),
    ({"prompt": "2 + 2?", "rejected": "4"}, "'chosen' is missing"),
    (STRINGS | {"rejected": "4"}, "chosen and rejected are identical"),
    (STRINGS | {"rejected": " "}, "rejected is empty"),
    (STRINGS | {"chosen": ""}, "chosen is empty"),
    (STRINGS | {"rejected": None}, "rejected must be a string, got null"),
    (STRINGS | {"prompt": ""}, "prompt is empty"),
    (STRINGS | {"prompt": None}, "prompt must be a string, got null"),
    (STRINGS | {"prompt": []}, "prompt must be a list of at least one message"),
    ({"chosen": "4", "rejected": "5"}, "chosen must be a list of at least one message, got a string"),
    ({"chosen": [], "rejected": [prompt, bad]}, "chosen must be a list of at least one message"),
    ({"chosen": [prompt, good], "rejected": []}, "rejected must be a list of at least one message"),
    ({"chosen": [prompt, good], "rejected": [prompt, good]}, "identical"),
    ({"chosen": [SYSTEM, prompt, good], "rejected": [prompt, bad]}, "share no message"),
    ({"chosen": [prompt, good], "rejected": [prompt]}, "share no message"),
    ({"chosen": [prompt, good, prompt], "rejected": [prompt, bad]}, "chosen must end with an assistant turn"),
    ({"chosen": [prompt, good], "rejected": [prompt, bad, prompt]}, "rejected must end with an assistant"),
    ({"prompt": [prompt], "chosen": [prompt, good], "rejected": [bad]}, "chosen repeats the prompt"),
    ({"prompt": [prompt], "chosen": [good], "rejected": [prompt, bad]}, "rejected repeats the prompt"),
    ({"prompt": [prompt], "chosen": [prompt], "rejected": [bad]}, "chosen must end with an assistant turn"),
    (ULTRAFEEDBACK | {"rejected": "5"}, "rejected must be a list"),
    (OPENAI | {"input": [prompt]}, "input must be an object with messages, got a list"),
    (OPENAI | {"input": {}}, "input.messages must be a list"),
    (OPENAI | {"preferred_output": []}, "got an empty list"),
    ({"preferred_output": [good], "input": OPENAI["input"]}, "'non_preferred_output' is missing"),
    ({"preferred_output": [good], "non_preferred_output": [bad]}, "input must be an object"),
    (OPENAI | {"non_preferred_output": [good]}, "preferred_output and non_preferred_output are identical"),
    (UNPAIRED | {"label": 1}, "label must be true or false, got 1"),
    (UNPAIRED | {"label": None}, "label must be true or false, got None"),
    (UNPAIRED | {"completion": ""}, "completion is empty"),
    (UNPAIRED | {"completion": [prompt]}, "completion must end with an assistant turn, got a user turn"),
    (UNPAIRED | {"completion": [prompt, good]}, "completion repeats the prompt"),
    ({"completion": "4", "label": True}, "prompt must be a string, got null"),
    (PROCESS | {"labels": [True]}, "2 completions and 1 labels: a step has one label"),
    (PROCESS | {"labels": [True, 0]}, "labels[1] must be true or false, got 0"),
    (PROCESS | {"labels": []}, "labels must be a list with one item a step, got an empty list"),
    (PROCESS | {"completions": ["a", ""]}, "completions[1] is empty"),
    (PROCESS | {"completions": "ab"}, "completions must be a list"),
    ({"prompt": "x", "completions": ["a"]}, "labels must be a list"),
    (RATING | {"coherence": 5}, "coherence must be a number from 0 to 4, got 5"),
    (RATING | {"coherence": -0.5}, "coherence must be a number from 0 to 4"),
    (RATING | {"coherence": True}, "coherence must be a number from 0 to 4, got True"),
    (RATING | dict.fromkeys(ATTRIBUTES), "is rated"),
    ({"prompt": "x", "response": "4"}, "the rating 'helpfulness' is missing"),
    (STRINGS | {"review_round": 1.5}, "review_round must be a whole number from 0, got 1.5"),
    (STRINGS | {"review_round": True}, "review_round must be a whole number"),
    (STRINGS | {"pass_rate": 1.5}, "pass_rate must be a number from 0 to 1"),
    (STRINGS | {"disagreement": "low"}, "disagreement must be a finite number, got 'low'"),
    (STRINGS | {"disagreement": 1e999}, "disagreement must be a finite number"),
    (STRINGS | {"verifier_version": 3}, "verifier_version must be a string, got 3"),
    (STRINGS | {"sampling": [0.7]}, "sampling must be an object"),
    (STRINGS | {"candidates": []}, "candidates must be a list of at least one object"),
    (STRINGS | {"candidates": ["4"]}, "candidates[0] must be an object, got a string"),
    (STRINGS | {"candidates": [{"score": 1}]}, "candidates[0].text must be a string, got None"),
    (STRINGS | {"candidates": [{"text": "4", "correct": 1}]}, "candidates[0].correct must be true or false"),
    (STRINGS | {"candidates": [{"text": "4", "tokens": -1}]}, "candidates[0].tokens must be a whole number"),
    (STRINGS | {"candidates": [{"text": "4", "cut": "length"}]}, "candidates[0].cut must be true or false"),
    (STRINGS | {"candidates": [{"text": "4", "logp": -1}]}, "candidates[0] has the unknown key 'logp'"),
]


@pytest.mark.parametrize(("line", "problem"), BROKEN)
def test_a_bad_line_names_file_and_line(line: Any, problem: str) -> None:
    with pytest.raises(ValueError) as error:
        parse(line)
    assert str(error.value).startswith("f.jsonl:3: ")
    assert problem in str(error.value)


# ---- groups

SOLUTIONS = {
    "question": "2 + 2?",
    "ground_truth": "A: 4",
    "small": {"is_correct": False, "solution": "A: 5"},
    "large": {"is_correct": True, "solution": "A: 4"},
}


def test_both_forms_of_a_group(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    own = {
        "prompt": "2 + 2?",
        "candidates": FULL["candidates"],
        "answer": {"total": 4},
        "verifier_name": "maths",
        "sampling": {"seed": 1},
        "level": 2,
    }
    path.write_text(json.dumps(own) + "\n" + json.dumps(SOLUTIONS | {"id": 9}) + "\n")
    first, second = read_groups(path)
    assert first == Group(
        (PROMPT,),
        CANDIDATES,
        Provenance(verifier_name="maths", sampling={"seed": 1}, meta={"level": 2}),
        {"total": 4},
        str(path),
        1,
    )
    assert second == Group(
        (PROMPT,),
        (Candidate("A: 5", correct=False, source="small"), Candidate("A: 4", correct=True, source="large")),
        Provenance(meta={"id": 9}),
        "A: 4",
        str(path),
        2,
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt": "2 + 2?"}, "of no known kind"),
        ({"prompt": "2 + 2?", "candidates": []}, "candidates must be a list of at least one object"),
        ({"candidates": [{"text": "4"}]}, "prompt must be a string"),
        ({**STRINGS, "candidates": [{"text": "4"}]}, "a group has no key 'chosen'"),
        ({"question": "2 + 2?", "ground_truth": "4"}, "candidates must be a list"),
        (SOLUTIONS | {"ground_truth": None}, "ground_truth must be a string"),
        (SOLUTIONS | {"small": {"is_correct": 1, "solution": "5"}}, "correct must be true or false"),
        (SOLUTIONS | {"small": {"is_correct": True}}, "text must be a string"),
        (SOLUTIONS | {"small": {"is_correct": True, "solution": "5", "logp": 1}}, "unknown key 'logp'"),
    ],
)
def test_a_bad_group_names_file_and_line(tmp_path: Path, line: Any, problem: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(SOLUTIONS) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(ValueError) as error:
        read_groups(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert problem in str(error.value)


def test_gsm8k_solutions_stay_with_their_problems(shared: Path) -> None:
    groups = read_groups(shared / "data" / "gsm8k" / "model_solutions.jsonl")
    text = (shared / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8")
    problems = [json.loads(line) for line in text.splitlines()]
    assert len(groups) == len(problems) == 1319
    models = ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"]
    same = []
    for group, problem in zip(groups, problems, strict=True):
        final = problem["answer"].split("####")[1].strip()
        assert group.prompt == (Message("user", problem["question"]),)
        assert group.answer.split("A:")[-1].strip() == final
        assert [candidate.source for candidate in group.candidates] == models
        same += [c.correct for c in group.candidates if c.text.split("A:")[-1].strip() == final]
    # What ends in the reference's own words is labelled right: label, text and problem belong together.
    assert all(same) and len(same) == 1991


# ---- the way out and back

text = st.text(st.characters(codec="utf-8"), max_size=5)
solid = text.filter(str.strip)
maybe = st.none() | text
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | text, lambda x: st.lists(x, max_size=2), max_leaves=3
)
numbers = st.none() | st.integers(-9, 9) | st.floats(allow_nan=False, allow_infinity=False)
calls = st.sampled_from([(), ({"name": "f"},), ({"function": {"name": "f", "arguments": {"q": 3}}},)])
assistants = st.builds(Message, st.just("assistant"), solid, calls)
others = st.builds(Message, st.sampled_from(["system", "user", "tool"]), text, name=maybe, tool_call_id=maybe)
prompts = st.lists(others | assistants, min_size=1, max_size=2).map(tuple)
completions = st.tuples(st.lists(others | assistants, max_size=2), assistants).map(lambda c: (*c[0], c[1]))
flags = st.none() | st.booleans()
candidate = st.builds(Candidate, text, numbers, flags, st.none() | st.integers(0, 9), maybe, maybe, flags)
candidates, groups_of = (st.lists(candidate, min_size=n, max_size=2).map(tuple) for n in (0, 1))
provenances = st.builds(
    Provenance,
    **{field.name: maybe for field in fields(Provenance) if field.type == str | None},
    review_round=st.none() | st.integers(0, 9),
    disagreement=numbers,
    pass_rate=st.none() | st.floats(0, 1),
    sampling=st.dictionaries(text, json_values, max_size=2),
    candidates=candidates,
    meta=st.dictionaries(
        st.sampled_from(["id", "meta", "messages", "input", "answer"]), json_values, max_size=2
    ),
)
ratings = st.fixed_dictionaries({key: st.none() | st.floats(0, 4) for key in ATTRIBUTES}).filter(
    lambda found: set(found.values()) != {None}
)
steps = st.lists(st.tuples(solid, st.booleans()), min_size=1, max_size=3)
place = [st.just(value) for value in PLACE]


def sides(record: PreferenceRecord) -> list[tuple[Message, ...]]:
    return [
        getattr(record, name) for name in ("chosen", "rejected", "completion") if getattr(record, name, None)
    ]


records = st.one_of(
    st.builds(Preference, prompts, completions, completions, provenances, *place),
    st.builds(Labelled, prompts, completions, st.booleans(), provenances, *place),
    st.builds(
        lambda prompt, steps, source: Steps(prompt, *zip(*steps, strict=True), source, *PLACE),
        prompts,
        steps,
        provenances,
    ),
    st.builds(Ratings, prompts, completions, ratings, provenances, *place),
).filter(lambda record: all(side[: len(record.prompt)] != record.prompt for side in sides(record)))


@given(records.filter(lambda r: not isinstance(r, Preference) or r.chosen != r.rejected))
def test_a_record_comes_back_from_its_line(record: PreferenceRecord) -> None:
    line = json.loads(json.dumps(preference_line(record)))
    assert parse(line) == record


@given(
    st.builds(Group, prompts, groups_of, provenances, json_values, *place),
    st.builds(Group, prompts, groups_of, provenances, json_values, *place),
)
def test_groups_come_back_from_their_file(
    tmp_path_factory: pytest.TempPathFactory, first: Group, second: Group
) -> None:
    path = tmp_path_factory.mktemp("groups") / "g.jsonl"
    groups = []
    for number, group in enumerate((first, second), start=1):
        source = replace(group.provenance, candidates=())
        source.meta.pop("answer", None)
        groups.append(replace(group, provenance=source, file=str(path), line=number))
    path.write_text("".join(json.dumps(group_line(group)) + "\n" for group in groups), encoding="utf-8")
    assert read_groups(path) == groups


@given(json_values, st.sampled_from([*FORMS, "group"]), st.data())
def test_any_value_in_a_form_is_a_record_or_a_named_error(value: Any, form: str, data: st.DataObject) -> None:
    line = dict(FORMS[form][0]) if form in FORMS else {"prompt": "x", **FULL}
    key = data.draw(st.sampled_from(sorted(line)))
    for changed in (line | {key: value}, line | {key: [value]}, {k: v for k, v in line.items() if k != key}):
        try:
            parse(changed)
        except ValueError as error:
            assert str(error).startswith("f.jsonl:3: ")
