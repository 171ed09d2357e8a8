"""F41 against its rules written out, `last_boxed` and `parse_number` against small references."""

import doctest
import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopost.rewards import math
from nanopost.rewards.math import last_boxed, math_reward, parse_number

LONG = "<think>" + "because " * 7 + "</think>"


def f41(completion: str, truth: str) -> float:
    """F41 for completions with plain decimal numbers and boxes without braces inside, by floats."""
    reward = 0.0
    boxes = re.findall(r"\\boxed\{([^{}]+)\}", completion)
    if boxes:
        reward += 0.1
        try:
            reward += abs(float(boxes[-1]) - float(truth)) < 1e-6
        except ValueError:
            reward += boxes[-1].replace(" ", "") == truth.replace(" ", "")
    else:
        numbers = re.findall(r"-?\d+\.\d+|-?\d+", completion.strip().split("\n")[-1])
        if numbers:
            reward += abs(float(numbers[-1]) - float(truth)) < 1e-6
    think = re.search(r"<think>(.*?)</think>", completion, re.DOTALL)
    return reward + 0.1 * (think is not None and len(think[1].strip()) > 50)


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        (r"\boxed{18}", "18", 1.1),
        (LONG + r"\boxed{18}", "18", 1.2),
        (LONG + "it is 18", "18", 1.1),
        (LONG + r"\boxed{17}", "18", 0.2),
        (LONG, "18", 0.1),
        ("it is 18", "18", 1.0),
        ("3 eggs, 18 in all", "18", 1.0),
        ("18\nso there", "18", 0.0),
        ("", "18", 0.0),
        (r"\boxed{18.0000009}", "18", 1.1),  # within 1e-6
        (r"\boxed{18.000001}", "18", 0.1),  # not within: the bound is strict, and exact
        (r"\boxed{\frac{1}{2}}", "0.5", 1.1),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", 1.1),
        (r"\boxed{x^{2} + 1}", "x^{2}+1", 1.1),
        (r"\boxed{x^{2} + 1}", "x^{2}+12", 0.1),
        (r"\boxed{x}", "x+1", 0.1),
        ("x+1", "x+1", 0.0),  # an expression counts in a box only
        (r"\boxed{3} \boxed{18}", "18", 1.1),
        (r"\boxed{ } 18", "18", 1.0),  # nothing in the box: no box
        (r"\boxed{18", "18", 1.0),
        (r"\boxed{18 eggs}", "18", 0.1),
        (r"18 \boxed{17}", "18", 0.1),
        ("1,234", "1234", 1.0),
        (r"\boxed{18}", "9 * 2 = 18\n#### 18", 1.1),
        ("<think>" + "x" * 50 + "</think>18", "18", 1.0),
        ("<think>" + "x" * 51 + "</think>18", "18", 1.1),
        ("<think>" + " " * 60 + "</think>18", "18", 1.0),
        ("<think>" + "x" * 60 + "\n18", "18", 1.0),
    ],
)
def test_f41_worked_values(completion: str, answer: str, score: float) -> None:
    verdict = math_reward(completion, answer)
    assert verdict.score == score, verdict.reason
    assert sum(verdict.parts.values()) == pytest.approx(score, abs=1e-12)
    assert set(verdict.parts) == {"boxed", "correct", "reasoning"}


numbers = st.sampled_from(["18", "-3", "2.5", "0.5", "17.9999999", "400"])


@given(
    st.lists(
        st.sampled_from(["", "\n", "so ", LONG, "<think>no</think>", "x "]) | numbers.map(" {} ".format),
        max_size=5,
    ),
    st.lists(numbers.map(r" \boxed{{{}}} ".format) | st.just(r"\boxed{x y}"), max_size=2),
    numbers | st.just("xy"),
)
def test_f41_equals_its_rules(texts: list[str], boxes: list[str], truth: str) -> None:
    if not boxes and truth == "xy":
        truth = "400"
    completion = "".join([*texts, *boxes])
    assert math_reward(completion, truth).score == pytest.approx(f41(completion, truth), abs=1e-12)


@given(st.text() | st.text("\\boxed{}0123456789 <think>/\n"))
def test_f41_stays_in_its_range(completion: str) -> None:
    assert 0 <= math_reward(completion, "18").score <= 1.2


@pytest.mark.parametrize("gold", ["", " \n", None, 3])
def test_an_empty_gold_answer_is_an_error(gold: str) -> None:
    with pytest.raises(ValueError, match="answer must be a text"):
        math_reward("18", gold)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{a}", "a"),
        (r"\boxed{a} \boxed {b}", "b"),
        (r"\boxed{\frac{1}{2}} \boxed{3", r"\frac{1}{2}"),
        (r"\boxed{1 + \boxed{2}}", r"1 + \boxed{2}"),
        (r"\boxed{1 + \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\}}", r"\}"),
        (r"} \boxed{a} }", "a"),
        (r"{\boxed{a}", "a"),
        (r"\boxed{}", ""),
        (r"\boxed{a", None),
        (r"boxed{a} \box{b}", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


balanced = st.recursive(
    st.text("ab1 ", max_size=3), lambda s: st.lists(s, max_size=3).map(lambda p: "{" + "".join(p) + "}")
)


@given(st.lists(balanced, min_size=1, max_size=3), st.text("ab} ", max_size=5))
def test_last_boxed_finds_what_was_put_in(contents: list[str], tail: str) -> None:
    assert last_boxed("".join(rf"so \boxed{{{content}}}" for content in contents) + tail) == contents[-1]


@given(st.fractions(), st.sampled_from(["{}", " {} ", "${}", "{}%", "{}."]))
def test_fractions_read_exactly(value: Fraction, frame: str) -> None:
    if len(str(value)) < 50:
        assert parse_number(frame.format(value)) == value
        latex = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
        assert parse_number(frame.format(latex)) == value


@given(st.integers(-(10**15), 10**15), st.integers(0, 6))
def test_decimals_read_exactly(scaled: int, places: int) -> None:
    value = Fraction(scaled, 10**places)
    sign, digits = "-" if scaled < 0 else "", str(abs(scaled)).zfill(places + 1)
    whole, rest = (digits[:-places], "." + digits[-places:]) if places else (digits, "")
    assert parse_number(sign + whole + rest) == parse_number(f"{sign}{int(whole):,}{rest}") == value
    assert parse_number(f"{sign}{whole}{rest}e2") == 100 * value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "18 eggs",
        "1 2",
        "1,23",
        "12,34,567",
        "1.2.3",
        "1/0",
        "1/2/3",
        "--5",
        "5-",
        "1e",
        "1e999",
        "0x12",
        "१२",
        "nan",
        "inf",
        "1_000",
        "x5",
        "2^3",
        "()",
        "9" * 61,
    ],
)
def test_what_is_no_number(text: str) -> None:
    assert parse_number(text) is None


def test_doctest() -> None:
    result = doctest.testmod(math)
    assert result.failed == 0 and result.attempted > 0
