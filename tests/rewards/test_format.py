"""Shapes: exactly one think block and an answer; exactly one JSON value."""

import doctest
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopost.rewards import format as shape
from nanopost.rewards.format import ThinkAnswer, strict_json, think_answer


@pytest.mark.parametrize(
    "completion", ["<think>a b</think>c", " \n<think> a b\n</think>\n\nc ", "<think>a b</think> c\n"]
)
def test_think_answer_reads(completion: str) -> None:
    assert think_answer(completion) == ThinkAnswer("a b", "c")


def test_an_empty_thought_is_a_thought() -> None:
    assert think_answer("<think></think>c") == ThinkAnswer("", "c")


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "c",
        "<think>a",
        "a</think>c",
        "<think>a</think>",
        "<think>a</think> \n",
        "so <think>a</think>c",
        "<think>a</think>c<think>b</think>d",
        "<think><think>a</think>c",
        "<think>a</think>c</think>",
        "</think>a<think>c",
        "<THINK>a</THINK>c",
        "<think >a</think>c",
    ],
)
def test_think_answer_refuses(completion: str) -> None:
    assert think_answer(completion) is None


@given(st.text("ab \n{}"), st.text("ab \n{}"))
def test_think_answer_round_trip(think: str, answer: str) -> None:
    expected = ThinkAnswer(think.strip(), answer.strip()) if answer.strip() else None
    assert think_answer(f"<think>{think}</think>{answer}") == expected


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3), inner, max_size=3)
    ),
)


@given(values, st.booleans(), st.sampled_from(["", " ", "\n\t"]))
def test_json_reads_back(value: object, ascii_only: bool, space: str) -> None:
    read = strict_json(space + json.dumps(value, ensure_ascii=ascii_only) + space)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "total: 5",
        "{'total': 5}",
        '{"total": 5,}',
        '{"total": 5} {"total": 6}',
        '{"total": 5} done',
        'Here: {"total": 5}',
        '```json\n{"total": 5}\n```',
        '{"total": 5, "total": 6}',
        '{"a": {"b": 1, "b": 1}}',
        '{"total": NaN}',
        "[Infinity]",
        "[-Infinity]",
        "[1e999]",
        "[05]",
        "[.5]",
        "[+5]",
        '"\\ud83d"',
        '"a\nb"',
        "\ufeff{}",
        "\u00a05",
        "[" * 100_000,
        "1" * 5000,
    ],
)
def test_json_refuses(text: str) -> None:
    assert strict_json(text) is None


@given(st.text() | st.text('{}[]",:0123456789.eE+-truefalsn \\u'))
def test_json_never_raises(text: str) -> None:
    strict_json(text)


def test_doctest() -> None:
    result = doctest.testmod(shape)
    assert result.failed == 0 and result.attempted > 0
