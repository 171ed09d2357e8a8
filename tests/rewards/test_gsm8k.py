"""The GSM8K verifier: cases of both polarities by hand, then every gold answer and labelled solution."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopost.rewards.math import gsm8k

RIGHT = [  # completion, gold
    ("She has 9 * 2 = $<<9*2=18>>18 left.\n#### 18", "18"),
    ("#### 18", "so 9 * 2 = 18\n#### 18"),
    ("#### 18", "so 9 * 2 = 18\nA: 18"),
    ("####18 eggs", "18"),
    ("#### **18**", "18"),
    ("#### $1,234.50.", "1234.5"),
    ("#### 2125", "#### 2,125"),
    ("#### -5", "#### -5"),
    ("#### −5", "-5"),  # the typographic minus
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### 3.0", "3"),
    ("#### 007", "7"),
    ("#### 1/2", "0.5"),
    ("#### 1 1/2 cups", "1.5"),
    ("#### -1 1/2", "-1.5"),
    ("#### 2e3", "2000"),
    ("#### 25%", "25"),
    ("#### 25", "25%"),
    ("#### 2 million dollars", "2000000"),
    ("#### 3 hundred thousand", "300000"),
    ("#### 5 (five)", "5"),
    ("#### 25 m^2", "25"),
    ("#### 1\n#### 18", "18"),
    (r"\boxed{18}", "18"),
    (r"so \(x = \boxed{18}\) is it, for 3 people", "18"),
    (r"\boxed{3} and then \boxed{18}", "18"),
    (r"\boxed{\frac{1}{2}}", "1/2"),
    (r"\boxed{-\dfrac{3}{2}}", "-1.5"),
    (r"\boxed{1\frac{1}{2}}", "1.5"),
    (r"\boxed{x = 18\text{ eggs}}", "18"),
    (r"\boxed{\$1{,}234}", "1234"),
    (r"\boxed{1\,234}", "1234"),
    (r"\boxed{25\%}", "25"),
    (r"\boxed{90^\circ}", "90"),
    (r"#### \boxed{18}", "18"),
    ("\\boxed{18}\n#### 18.0", "18"),
    ("The answer is 18.", "18"),
    ("The answer is $18 a day. I hope 2 of you liked it.", "18"),
    ("The answer is 3. No: the answer is 18.", "18"),
    ("**Final answer:** 18", "18"),
    ("A: 3 + 15 = 18", "18"),
    ("The answer is 3.\nA: 18", "18"),
    ("The answer is not 3 but 18", "18"),  # no phrase: the last number
    ("#### Step 1: add\nso it is 18", "18"),  # headings, not answers
    ("#### 1. Add\nso it is 18", "18"),
    ("First 3.\nIn the end there are 18 eggs.\n\n", "18"),
    ("5-3 = 2", "2"),
    ("it ended 5-3", "3"),
    ("9:00 and 18", "18"),
    ("<think>the answer is 3</think>\n18", "18"),
    ("the answer is 3</think>The answer is 18.", "18"),
]
WRONG = [
    ("", "18"),
    ("\n \n", "18"),
    ("no idea", "18"),
    ("#### 19", "18"),
    ("#### 5", "-5"),
    ("#### -5", "5"),
    ("#### 18.001", "18"),
    ("#### 0.25", "25%"),
    ("#### 17 or 18", "18"),
    ("#### 18 or 17", "18"),
    ("#### 17-18", "18"),
    ("#### 10 + 8", "18"),
    ("#### 18 * x", "18"),
    ("#### 18 + John's age", "18"),
    ("#### 2^18", "18"),
    ("A: ± 18", "18"),
    ("#### 18k", "18"),
    ("#### 18 000", "18"),
    ("#### 1,8", "18"),
    ("#### 18 million", "18"),
    ("#### 18.0.0", "18"),
    ("#### 18/0", "18"),
    ("#### 18e999", "18"),
    ("#### 18\n#### 19", "18"),
    ("#### x18", "18"),
    (r"\boxed{18} or rather \boxed{19}", "18"),
    (r"\boxed{18", "18"),
    (r"\boxed 18", "18"),
    (r"\boxed{}", "18"),
    (r"\boxed{17, 18}", "18"),
    (r"\boxed{\text{eighteen}}", "18"),
    (r"\boxed{18} #### 19", "18"),
    ("\\boxed{19}\n#### 18", "18"),
    ("#### 19\nThe answer is 18", "18"),
    ("The answer is 18 or 19.", "18"),
    ("A: 17 and 18", "18"),
    ("A: x", "18"),
    ("A: 18 + x", "18"),
    ("The total is 18.\nI am sure.", "18"),
    ("1.2.18", "18"),
    ("<think>so it is 18", "18"),
    ("<think>a</think><think>so it is 18", "18"),
    ("1" * 5000, "18"),
    ("#### " + "1" * 5000, "18"),
    ("#### ¹⁸", "18"),
    ("#### ١٨", "18"),
]


@pytest.mark.parametrize(("completion", "answer"), RIGHT)
def test_right(completion: str, answer: str) -> None:
    verdict = gsm8k(completion, answer)
    assert (verdict.score, verdict.parts) == (1.0, {"correct": 1.0}), verdict.reason


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_wrong(completion: str, answer: str) -> None:
    verdict = gsm8k(completion, answer)
    assert (verdict.score, verdict.parts) == (0.0, {"correct": 0.0})
    assert verdict.reason


@pytest.mark.parametrize(
    "gold", ["", "  ", "eighteen", "#### ", "#### 1,23", "18 eggs", "#### 5\nor 6", "17 18", "A: x", None, 18]
)
def test_a_malformed_gold_answer_is_an_error(gold: str) -> None:
    with pytest.raises(ValueError, match="answer must be"):
        gsm8k("#### 18", gold)


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["#### {}", r"\boxed{{{}}}", "The answer is {}.", "A: {}", "So {}"]),
)
def test_the_number_and_no_other(value: int, frame: str) -> None:
    for written in (str(value), f"{value:,}", f"{value}.00", f"{2 * value}/2"):
        assert gsm8k(frame.format(written), str(value)).score == 1
        assert gsm8k(frame.format(written), str(value + 1)).score == 0
        assert gsm8k(frame.format(written), str(value - 1)).score == 0
        assert gsm8k(frame.format(written), str(-value)).score == (value == 0)


@given(st.text() | st.text("#0123456789.,-+/$%=: \\boxed{}<think>/A\n"))
def test_any_completion_gets_exactly_one_score(completion: str) -> None:
    assert gsm8k(completion, "18").score in (0.0, 1.0)


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        " ",
        "1 ",
        "1/",
        "1,",
        "\\boxed{",
        "{",
        "<<",
        "#### ",
        "the answer is ",
        "\\text{",
        "-",
        "<think>",
        "7 = ",
        "\\frac{1}",
    ],
)
def test_long_nonsense_is_read_in_linear_time(piece: str) -> None:
    start = time.perf_counter()
    gsm8k(piece * (100_000 // len(piece)), "18")
    assert time.perf_counter() - start < 2


# ---- the public data ----


@pytest.mark.parametrize(("name", "count"), [("train", 7473), ("test", 1319)])
def test_every_gold_answer_and_no_answer_beside_it(shared: Path, name: str, count: int) -> None:
    lines = (shared / "data" / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == count
    for answer in (json.loads(line)["answer"] for line in lines):
        solution, number = answer.rsplit("#### ", 1)
        value = int(number.replace(",", ""))
        assert gsm8k(answer, answer).score == 1
        assert gsm8k(answer, str(value)).score == 1
        assert gsm8k(f"{solution}#### {value + 1}", answer).score == 0
        assert gsm8k(f"{solution}#### {value - 1}", answer).score == 0


def test_agreement_with_the_labels_of_four_models(shared: Path) -> None:
    lines = (shared / "data" / "gsm8k" / "model_solutions.jsonl").read_text(encoding="utf-8").splitlines()
    agreed = total = right = 0
    for problem in map(json.loads, lines):
        gold = problem.pop("ground_truth")
        assert gsm8k(gold, gold).score == 1
        for model in (value for value in problem.values() if isinstance(value, dict)):
            score = gsm8k(model["solution"], gold).score
            agreed += score == model["is_correct"]
            right += model["is_correct"]
            total += 1
    assert (total, right) == (5276, 2001)
    assert agreed == total  # docs/gsm8k.md says so
