r"""Math: does a completion give the right number?

`gsm8k` is binary and strict, `math_reward` is the shaped reward F41. Numbers are exact fractions, read by one
small grammar and never by `eval`: 18, −3, 1,234, .5, 3.0, 1/2, 1 1/2, \frac{1}{2}, 2e3, 5 million. Currency
and percent signs are units: $5 is 5 and 25% is 25, as in GSM8K's own answers.

Where `gsm8k` finds the answer of a completion (behind `</think>`, if there is one):

1. the last `#### n` and the last balanced `\boxed{n}`; if both are there, they must agree;
2. the last "answer is n" or "answer: n", or `A: n` at the start of the last line;
3. the last number of the last line.

The first place that holds anything decides. In 1 and 2 it must be one number, in whatever unit: "#### 5 or 6"
is no answer, and of "A: 2 + 3 = 5" what follows the last "=" counts. What is unclear scores 0, with a reason.
"""

import re
from fractions import Fraction

from nanopost.rewards.verdict import Verdict

TOLERANCE = Fraction(1, 10**6)  # F41's; gsm8k compares exactly
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
DIGITS = r"(?:[0-9](?:[0-9.,]*[0-9])?|\.[0-9]+)"
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}%])[-+])?(?:[$€£¥₹]\s?(?P<minus>-)?)?"  # behind a word or number, - is no sign
    rf"(?<![\w^.])(?P<first>{DIGITS})(?P<power>[eE][-+]?[0-9]{{1,2}}\b)?"
    rf"(?:\s+(?P<top>[0-9]+)/(?P<bottom>[0-9]+)|\s?/\s?(?P<under>{DIGITS}))?"  # 1 1/2, 1/2
    rf"(?P<scale>(?:\s+(?:{'|'.join(SCALES)})\b)*)",
    re.IGNORECASE,
)
DECIMAL = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?")
PLAIN = [  # markdown and LaTeX to plain text, in this order
    (r"<<[^<>]*>>", ""),  # GSM8K's calculator annotations
    (r"\u2212", "-"),
    (r"\*\*|__|`|\\[,;:!]", ""),
    (r"\\([$%])", r"\1"),
    (r"\{,\}", ","),
    (r"\\[()\[\] ]|\^?\{?\\circ\}?|°|~", " "),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<=[0-9])\s*(?=\\[dt]?frac)", " "),
    (r"\\[dt]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r"\1/\2"),
    (r"\\boxed\s*\{([^{}]*)\}", r"\1"),
]
HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*([^\n]*)")
PHRASE = re.compile(r"\banswer\s*(?:is\b|:|=)(?!\s*not\b)", re.IGNORECASE)


def gsm8k(completion: str, answer: str) -> Verdict:
    """Score 1 when the final answer of the completion is the gold number, else 0.

    Args:
        completion: the text the policy wrote, without its stop token.
        answer: a number, or a solution that ends in `#### n` (GSM8K) or in a line `A: n`.
    Returns: a Verdict with score and `parts["correct"]` in {0, 1}; the reason names what was read and where.
    Raises: ValueError when `answer` is or ends in no number.
    Page: docs/gsm8k.md.

    >>> gsm8k("She has 9 * 2 = $18 left.\\n#### 18", "18").score
    1.0
    """
    gold = parse_number(_gold(answer))
    if gold is None:
        raise ValueError(f"answer must be a number or end in '#### n' or 'A: n', got {answer[-60:]!r}")
    found, reason = _final_answer(completion)
    correct = float(found is not None and found == gold)
    return Verdict(correct, {"correct": correct}, f"{reason}, gold {gold}")


def math_reward(completion: str, answer: str) -> Verdict:
    r"""F41: 0.1 for a box, 1 for the right answer, 0.1 for reasoning; scores lie in [0, 1.2].

    score = 0.1·[boxed] + 1·[|predicted − gold| < 1e−6, or equal without spaces] + 0.1·[over 50 letters think]

    Args:
        completion: the answer is in its last balanced `\boxed{…}`; without one, the last number of the last
            line counts for correctness. The reasoning stands between `<think>` and `</think>`.
        answer: a number or an expression, or a solution that ends in `#### n`.
    Returns: a Verdict with the parts boxed, correct and reasoning.
    Raises: ValueError when `answer` is empty.

    >>> math_reward(r"Half of one is \boxed{\frac{1}{2}}", "0.5").score
    1.1
    """
    gold = _gold(answer)
    box = (last_boxed(completion) or "").strip()
    boxed, predicted = box != "", box or _last_number(completion)
    value, right = parse_number(predicted), parse_number(gold)
    if value is not None and right is not None:
        correct = abs(value - right) < TOLERANCE
    else:
        correct = boxed and "".join(box.split()) == "".join(gold.split())
    think, closed, _ = completion.partition("<think>")[2].partition("</think>")
    reasoning = closed != "" and len(think.strip()) > 50
    parts = {"boxed": 0.1 * boxed, "correct": 1.0 * correct, "reasoning": 0.1 * reasoning}
    where = "in a box" if boxed else "on the last line"
    reason = f"{predicted[:40]!r} {where}, gold {gold.strip()[:40]!r}"
    return Verdict((boxed + 10 * correct + reasoning) / 10, parts, reason)


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` whose braces balance, or None; `\{` and `\}` are letters."""
    found: str | None = None
    opened: list[tuple[bool, int]] = []
    for match in re.finditer(r"\\boxed\s*\{|\\.|\{|\}", text, re.DOTALL):
        if match[0] == "}":
            box, start = opened.pop() if opened else (False, 0)
            found = text[start : match.start()] if box else found
        elif match[0][-1] == "{" and match[0] != r"\{":
            opened.append((match[0] != "{", match.end()))
    return found


def parse_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number, with at most a currency or percent sign, or None.

    >>> parse_number("$1,234.50"), parse_number("1 1/2"), parse_number("1,23")
    (Fraction(2469, 2), Fraction(3, 2), None)
    """
    match = NUMBER.match(plain := _plain(text).strip())
    alone = match is not None and re.fullmatch(r"\s?%?\$?\.?", plain[match.end() :])
    return _value(match) if match is not None and alone else None


def _final_answer(completion: str) -> tuple[Fraction | None, str]:
    """The number a completion ends with, and where it stood; or None, and why."""
    text = completion.rsplit("</think>", 1)[-1]
    if "<think>" in text:
        return None, "the reasoning is not closed"
    box, plain = last_boxed(text), _plain(text)
    if box is None and r"\boxed" in text:
        return None, "the box is not closed"
    places = _hashes(plain) + ([] if box is None else [("box", box)]) or _phrases(plain)
    if not places:
        number = _last_number(text)
        return parse_number(number), f"last line: {number or 'no number'}"
    values = {_one_number(part) for _, part in places}
    reason = " and ".join(f"{place}: {part.strip()[:40]!r}" for place, part in places)
    if len(values) > 1 or None in values:
        return None, f"{reason} is not one number"
    return values.pop(), reason


def _hashes(plain: str) -> list[tuple[str, str]]:
    """The last `#### n`. A heading, such as `#### Step 2` or `#### 2. Then`, is none."""
    lines = [line for line in HASHES.findall(plain) if NUMBER.match(line)]
    return [("####", line) for line in lines if not re.match(r"[0-9]+[.:)]\s+\S", line)][-1:]


def _phrases(plain: str) -> list[tuple[str, str]]:
    """The last line behind its `A:`, else the sentence behind the last "answer is" that has a number."""
    if (line := _last_line(plain)).startswith("A:"):
        return [("A:", line.removeprefix("A:"))]
    rests = PHRASE.split(plain)[1:]
    sentences = [re.split(r"\n|[.!?;](?:\s|$)", rest, maxsplit=1)[0] for rest in rests]
    return [("answer", sentence) for sentence in sentences if NUMBER.search(sentence)][-1:]


def _one_number(text: str) -> Fraction | None:
    """The one number of a text with units, behind its last "="; None for none, several or an expression."""
    *_, right = _plain(text).split("=")
    found = list(NUMBER.finditer(right))
    values = {_value(match) for match in found}
    for match in found:
        before, after = right[max(0, match.start() - 9) : match.start()], right[match.end() : match.end() + 9]
        if re.search(r"[-+*/^×÷±]\s*$", before) or re.match(r"\s*[+*/^×÷]|(?i:k\b|e[-+]?[0-9])", after):
            return None
    return values.pop() if len(values) == 1 else None


def _last_number(text: str) -> str:
    """The last number of the last line as it is written, or nothing."""
    found = [match[0] for match in NUMBER.finditer(_last_line(_plain(text)))]
    return found[-1] if found else ""


def _last_line(text: str) -> str:
    return text.strip().split("\n")[-1].strip()


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a NUMBER; None for digits that are none (1,23), a zero below the line, over 60 signs."""
    first, top, bottom = match["first"], match["top"] or "0", match["bottom"] or match["under"] or "1"
    if len(match[0]) > 60 or not all(DECIMAL.fullmatch(digits) for digits in (first, top, bottom)):
        return None
    whole, above, below = (Fraction(digits.replace(",", "")) for digits in (first, top, bottom))
    if below == 0:
        return None
    value = whole + above / below if match["top"] else whole / below
    for scale in match["scale"].lower().split():
        value *= SCALES[scale]
    value *= Fraction(10) ** int((match["power"] or "e0")[1:])
    return -value if "-" in (match["sign"], match["minus"]) else value


def _plain(text: str) -> str:
    for pattern, replacement in PLAIN:
        text = re.sub(pattern, replacement, text)
    return text


def _gold(answer: str) -> str:
    """What a task gives as its answer: a solution's `#### n` or last line `A: n`, else the text itself."""
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"answer must be a text with something in it, got {answer!r}")
    if "####" in answer:
        return answer.rsplit("####", 1)[1]
    last = _last_line(answer)
    return last.removeprefix("A:") if last.startswith("A:") else answer
