"""Deliberate bugs of the rewards room: numbers, boxes, ambiguity, malformed input."""

from tests.mutants.mutant import Mutant

MATH, FORMAT = "nanopost/rewards/math.py", "nanopost/rewards/format.py"
TEST_GSM8K, TEST_MATH, TEST_FORMAT = (f"tests/rewards/test_{name}.py" for name in ("gsm8k", "math", "format"))

MUTANTS = [
    Mutant(
        name="negative_answers_lose_their_sign",
        source="open-instruct#1530",
        story="The number pattern knows no minus: −5 is read as 5, which is wrong for both.",
        file=MATH,
        before='return -value if "-" in (match["sign"], match["minus"]) else value',
        after="return value",
        killer=f"{TEST_GSM8K}::test_the_number_and_no_other",
    ),
    Mutant(
        name="hyphen_is_a_minus",
        source="open-instruct#1530",
        story="Every dash before a digit is a sign: of 5-3 the last number is −3.",
        file=MATH,
        before=r'r"(?P<sign>(?<![\w)\]}%])[-+])?',
        after=r'r"(?P<sign>[-+])?',
        killer=f"{TEST_GSM8K}::test_right",
    ),
    Mutant(
        name="thousands_comma_ends_a_number",
        source="open-instruct#1683",
        story="1,234 is read as 1 and 234.",
        file=MATH,
        before='DIGITS = r"(?:[0-9](?:[0-9.,]*[0-9])?|',
        after='DIGITS = r"(?:[0-9](?:[0-9.]*[0-9])?|',
        killer=f"{TEST_GSM8K}::test_right",
    ),
    Mutant(
        name="any_of_several_answers",
        source="NeMo#3635",
        story="Of several numbers in the answer's place one is taken: a hedge is paid like an answer.",
        file=MATH,
        before="return values.pop() if len(values) == 1 else None",
        after="return _value(found[0]) if found else None",
        killer=f"{TEST_GSM8K}::test_wrong",
    ),
    Mutant(
        name="places_may_disagree",
        source="open-r1#55",
        story="Several places are read and one is enough: #### 18 beside a box with 19 is paid.",
        file=MATH,
        before='_hashes(plain) + ([] if box is None else [("box", box)]) or _phrases(plain)',
        after='_hashes(plain) or ([] if box is None else [("box", box)]) or _phrases(plain)',
        killer=f"{TEST_GSM8K}::test_wrong",
    ),
    Mutant(
        name="malformed_gold_scores_zero",
        source="open-instruct#1605",
        story="A gold answer that cannot be read gives a reward of 0 in silence, whatever the policy does.",
        file=MATH,
        before='        raise ValueError(f"answer must be a number or end',
        after='        return Verdict(0.0, {}, f"answer must be a number or end',
        killer=f"{TEST_GSM8K}::test_a_malformed_gold_answer_is_an_error",
    ),
    Mutant(
        name="containment_reversed",
        source="open-instruct#1683",
        story="An expression counts when it is contained in the gold answer: x is right where x+1 is asked.",
        file=MATH,
        before='boxed and "".join(box.split()) == "".join(gold.split())',
        after='boxed and "".join(box.split()) in "".join(gold.split())',
        killer=f"{TEST_MATH}::test_f41_worked_values",
    ),
    Mutant(
        name="box_to_the_first_brace",
        source="tinker#643",
        story="The box ends at the first closing brace: a fraction in it is cut in half and never right.",
        file=MATH,
        before="found = text[start : match.start()] if box else found",
        after='found = text[start : text.index("}", start)] if box else found',
        killer=f"{TEST_MATH}::test_last_boxed",
    ),
    Mutant(
        name="answers_in_open_reasoning",
        source="NeMo#3635",
        story="A completion cut off in its reasoning is scored by the last number it happened to think of.",
        file=MATH,
        before='if "<think>" in text:',
        after='if "<think>" in text and not text:',
        killer=f"{TEST_GSM8K}::test_wrong",
    ),
    Mutant(
        name="last_duplicate_key_wins",
        source="open-r1#55",
        story="Of a key given twice the last value is kept: an answer and its hedge in one object.",
        file=FORMAT,
        before="if len(dict(pairs)) != len(pairs):",
        after="if len(dict(pairs)) > len(pairs):",
        killer=f"{TEST_FORMAT}::test_json_refuses",
    ),
]
