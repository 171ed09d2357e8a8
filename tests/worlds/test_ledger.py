"""The ledger world: right work, a strict verifier, corpora disjoint, repeatable and of the right shape."""

import json
import random
import re
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopost.data.chat import Chat, decode, encode, load_chat, prompt_ids, prompt_messages, record_samples
from nanopost.data.schema import Record, read_jsonl
from nanopost.worlds.ledger import (
    KINDS,
    Task,
    add_steps,
    demonstrate,
    draw_padding,
    draw_slips,
    draw_task,
    held_out,
    kind_of,
    subtract_steps,
    verify,
    work,
)
from nanopost.worlds.ledger_chat import write_base_folder
from nanopost.worlds.ledger_corpora import check_disjoint, write_corpora
from nanopost.worlds.ledger_words import ANSWERS, PADDINGS, PAYEES, REFUSALS

SIZES = {"base": 2400, "sft": 600, "preference": 200, "rl": 400, "test": 300}
FILES = tuple(SIZES)
PROMPTS = ("preference", "rl", "test")
amounts = st.integers(10, 999)
slips = st.tuples(*[st.sampled_from((-1, 0, 1))] * 3)
paddings = st.sampled_from((("", ""), *PADDINGS))
tasks = st.builds(
    lambda seed, kind, test: draw_task(random.Random(seed), kind, test=test),
    st.integers(0, 2**32),
    st.sampled_from(KINDS),
    st.booleans(),
)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    write_corpora(folder, 7, **SIZES)
    write_base_folder(folder / "model", folder)
    return folder


@pytest.fixture(scope="module")
def records(corpora: Path) -> dict[str, list[Record]]:
    return {name: read_jsonl(corpora / f"{name}.jsonl") for name in FILES}


@pytest.fixture(scope="module")
def chat(corpora: Path) -> Chat:
    return load_chat(corpora / "model")


def columns(text: str) -> list[tuple[int, int, int]]:
    """The digits and the result of each column of a scratchpad, ones first."""
    return [(int(x), int(y), int(z)) for x, y, z in re.findall(r"(\d)[-+<](\d):(\d\d)", text)]


def digits(number: int, width: int) -> list[int]:
    return [int(digit) for digit in reversed(f"{number:0{width}}")]


# --- the work -------------------------------------------------------------------------------------


@given(amounts, amounts)
def test_a_sum_is_worked_out_right(a: int, b: int) -> None:
    text, total = add_steps(a, b)
    assert total == a + b
    found = columns(text)
    width = max(len(str(a)), len(str(b)))
    assert [x for x, _, _ in found] == digits(a, width) and [y for _, y, _ in found] == digits(b, width)
    carries = [0] + [z // 10 for _, _, z in found]
    assert all(z == x + y + carry for (x, y, z), carry in zip(found, carries, strict=False))
    assert total == sum(z % 10 * 10**i for i, (_, _, z) in enumerate(found)) + carries[-1] * 10**width


@given(amounts, amounts)
def test_a_difference_is_worked_out_right(a: int, b: int) -> None:
    text, difference = subtract_steps(a, b)
    assert difference == abs(a - b)
    assert set(re.findall(r"[-<]", text)) == {"-" if a > b else "<"}  # the sign says which is larger
    found = columns(text)
    width = max(len(str(a)), len(str(b)))
    assert [x for x, _, _ in found] == digits(a, width) and [y for _, y, _ in found] == digits(b, width)
    owed = [0] + [1 - z // 10 for _, _, z in found]
    gap = [x - y if a > b else y - x for x, y, _ in found]
    assert all(z == 10 + g - debt for (_, _, z), g, debt in zip(found, gap, owed, strict=False))
    if a != b:
        assert owed[-1] == 0  # every ten is paid back
        assert difference == sum(z % 10 * 10**i for i, (_, _, z) in enumerate(found))


def test_the_written_examples() -> None:
    assert add_steps(482, 365) == ("2+5:07 8+6:14 4+3:08", 847)
    assert add_steps(95, 7) == ("5+7:12 9+0:10", 102)
    assert subtract_steps(482, 445) == ("2-5:07 8-4:13 4-4:10", 37)
    assert subtract_steps(445, 482) == ("5<2:07 4<8:13 4<4:10", 37)
    assert subtract_steps(7, 482) == ("7<2:05 0<8:17 0<4:14", 475)
    task = Task("reconcile", "", {"difference": -37, "debit": "suspense", "credit": "cash"}, (445, 482))
    assert demonstrate(task) == (
        '<think>2-5:07 8-4:13 4-4:10</think>{"difference": -37, "debit": "suspense", "credit": "cash"}'
    )


@given(amounts, amounts, slips)
def test_slips_are_carried_through(a: int, b: int, slips: tuple[int, ...]) -> None:
    """A slipped column is off by exactly one and everything after it follows from what it says."""
    text, total = add_steps(a, b, slips)
    found = columns(text)
    carry = 0
    for (x, y, z), slip in zip(found, slips, strict=False):
        assert abs(z - (x + y + carry)) == abs(slip) and 0 <= z <= 19
        carry = z // 10
    assert str(total) == "".join(str(z % 10) for _, _, z in [*found, (0, 0, carry)])[::-1].lstrip("0")
    assert (total == a + b) == (not any(slips[: len(found)]))

    text, difference = subtract_steps(a, b, slips)
    found = columns(text)
    owed = 0
    for (x, y, z), slip in zip(found, slips, strict=False):
        gap = x - y if a > b else y - x
        assert abs(z - (10 + gap - owed)) == abs(slip) and 0 <= z <= 19
        owed = 1 - z // 10
    assert difference == sum(z % 10 * 10**i for i, (_, _, z) in enumerate(found))
    assert (difference == abs(a - b)) == (not any(slips[: len(found)]))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_slips_come_at_the_asked_share(share: float) -> None:
    rng = random.Random(3)
    drawn = [slip for _ in range(2000) for slip in draw_slips(rng, share)]
    assert set(drawn) <= {-1, 0, 1}
    assert abs(sum(slip != 0 for slip in drawn) / len(drawn) - share) < 0.03
    assert abs(sum(drawn) / len(drawn)) < 0.03


@given(tasks, slips, paddings)
def test_padding_changes_nothing_but_the_scratchpad(
    task: Task, slips: tuple[int, ...], padding: tuple[str, str]
) -> None:
    """Where there is no work, the chatter is all there is to think; the verdict is the same either way."""
    plain, padded = demonstrate(task, slips), demonstrate(task, slips, padding)
    work = re.fullmatch(r"(?:<think>(.*)</think>)?(.*)", plain)
    assert work and padded.endswith(work[2]) and columns(padded) == columns(plain)
    before, after = padding
    think = " ".join(part for part in (before, work[1], after) if part)
    assert padded == (f"<think>{think}</think>" if think else "") + work[2]
    assert verify(padded, task.answer).score == verify(plain, task.answer).score
    assert verify(padded, task.answer).parts["worked"] == bool(think)


def test_padding_holds_no_operand_and_is_told_from_the_work() -> None:
    for before, after in PADDINGS:
        for text in (before, after):
            assert text and not re.search(r"\d", text) and not any(payee in text for payee in PAYEES)
    assert len({text for padding in PADDINGS for text in padding}) == 2 * len(PADDINGS)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_padding_comes_at_the_asked_share(share: float) -> None:
    rng = random.Random(3)
    drawn = Counter(draw_padding(rng, share) for _ in range(2000))
    assert abs(drawn.pop(("", ""), 0) / 2000 - (1 - share)) < 0.04
    assert set(drawn) == (set(PADDINGS) if share else set())


# --- the verifier ---------------------------------------------------------------------------------


@given(tasks)
def test_gold_scores_one(task: Task) -> None:
    verdict = verify(demonstrate(task), task.answer)
    assert verdict.score == 1.0 and verdict.parts["exact"] == verdict.parts["json"] == 1
    assert verdict.parts["worked"] == (task.kind in ("report", "reconcile"))
    assert verdict.parts["refused"] == verdict.parts["due"] == (task.kind == "refuse")
    assert work(task)[1] == task.answer and kind_of(task.answer) == task.kind
    assert verify(json.dumps(task.answer), task.answer).score == 1.0  # the work shown earns nothing by itself


@given(tasks, slips)
def test_a_demonstration_scores_one_iff_nothing_slipped(task: Task, slips: tuple[int, ...]) -> None:
    text, _ = work(task)
    verdict = verify(demonstrate(task, slips), task.answer)
    assert verdict.score == (0.1 if any(slips[: len(columns(text))]) else 1.0)
    assert verdict.parts["json"] == 1


def perturbed(gold: dict[str, Any]) -> list[tuple[str, float]]:
    """Texts that are not the gold answer, with the score each deserves: its schema is worth a tenth."""
    text = json.dumps(gold)
    key, value = next(iter(gold.items()))
    found = [
        (f"the answer is {text}", 0.0),
        (f"{text} done", 0.0),
        (f"{text}{text}", 0.0),
        (f"[{text}]", 0.0),
        (f"```json\n{text}\n```", 0.0),
        (f"so <think>a</think>{text}", 0.0),
        (f"<think>a{text}", 0.0),
        (f"<think>{text}</think>", 0.0),
        (f"<think>a</think>{text}<think>b</think>{text}", 0.0),
        (text.replace('"', "'"), 0.0),
        (text[:-1] + ",}", 0.0),
        (text[:-1] + f', "{key}": {json.dumps(value)}}}', 0.0),  # a key twice
        (json.dumps({**gold, "note": "ok"}), 0.0),
        (json.dumps({name: gold[name] for name in list(gold)[1:]}), 0.0),
        (json.dumps({**gold, key: [value]}), 0.0),
        (json.dumps({**gold, key: None}), 0.0),
        (str(value), 0.0),
        ("", 0.0),
    ]
    if isinstance(value, int):
        found += [(json.dumps({**gold, key: value + off}), 0.1) for off in (-100, -10, -1, 1, 10, 100)]
        found += [(json.dumps({**gold, key: other}), 0.0) for other in (float(value), str(value), True)]
    else:
        found += [(json.dumps({**gold, key: value + "s"}), 0.1), (json.dumps({**gold, key: 1}), 0.0)]
    if "difference" in gold:
        found += [(json.dumps({**gold, "difference": -value}), 0.1)]
        found += [(json.dumps({**gold, "debit": gold["credit"], "credit": gold["debit"]}), 0.1)]
    if "instead" in gold:
        found += [(json.dumps({**gold, "instead": "nothing"}), 0.1)]
    return found


@given(tasks)
def test_what_is_not_gold_scores_less(task: Task) -> None:
    for text, score in perturbed(task.answer):
        verdict = verify(text, task.answer)
        assert verdict.score == pytest.approx(score), text
        assert verdict.parts["exact"] == 0


@given(tasks, tasks)
def test_another_kind_of_answer_earns_nothing(task: Task, other: Task) -> None:
    """To refuse what is legitimate or to answer what is forbidden scores 0, in however strict a JSON."""
    verdict = verify(json.dumps(other.answer), task.answer)
    assert verdict.parts["json"] == 1
    assert verdict.parts["refused"] == (other.kind == "refuse")
    assert verdict.parts["due"] == (task.kind == "refuse")
    if other.kind != task.kind:
        assert verdict.score == 0
    else:
        assert verdict.score == pytest.approx(1.0 if other.answer == task.answer else 0.1)


def test_length_earns_nothing() -> None:
    answer = {"total": 847}
    thoughts = ["", "<think>2+5:07</think>", f"<think>{'2+5:07 ' * 100}</think>"]
    assert {verify(f'{thought}{{"total": 847}}', answer).score for thought in thoughts} == {1.0}


def test_a_task_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"answer \{'sum': 1\} has none of the schemas"):
        verify('{"sum": 1}', {"sum": 1})
    with pytest.raises(ValueError, match=r"kind must be one of report, .* got 'transfer'"):
        draw_task(random.Random(0), "transfer")


# --- the requests ---------------------------------------------------------------------------------


@given(tasks)
def test_a_request_shows_its_operands_once(task: Task) -> None:
    numbers = [int(number) for number in re.findall(r"(?<!Q)\d+", task.request)]
    if task.kind in ("report", "reconcile"):
        assert sorted(numbers) == sorted(task.operands)
    else:
        payee, amount = task.operands
        assert numbers == [amount] and task.request.count(str(payee)) == 1 and payee in PAYEES


@given(tasks)
def test_the_split_follows_the_operands_alone(task: Task) -> None:
    first, second = task.operands
    assert held_out(first, second) == held_out(second, first)  # type: ignore[arg-type]


@pytest.mark.parametrize("test", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_task_comes_from_the_asked_side(kind: str, test: bool) -> None:
    for seed in range(100):
        assert held_out(*draw_task(random.Random(seed), kind, test=test).operands) == test


def test_a_sign_decides_the_entry() -> None:
    for seed in range(50):
        task = draw_task(random.Random(seed), "reconcile")
        bank, ledger = task.operands
        assert task.request.index(f"ledger {ledger}") < task.request.index(f"bank {bank}")
        assert task.answer["difference"] == int(bank) - ledger
        assert (task.answer["debit"], task.answer["credit"]) == (
            ("cash", "suspense") if int(bank) > ledger else ("suspense", "cash")
        )


def test_refusals_and_near_misses_share_their_words() -> None:
    """No word that comes in several refusals is theirs alone: the boundary is in how a request is put."""
    split = re.compile(r"[a-z]+")
    refused = Counter(
        word for _, phrases in REFUSALS.values() for p in phrases for word in set(split.findall(p))
    )
    answered = {word for phrase, _ in ANSWERS for word in split.findall(phrase)}
    common = {word for word, count in refused.items() if count > 1}
    assert common - answered <= {"in", "there"}
    codes = list(REFUSALS)
    assert len(codes) == len(set(codes)) and len({instead for instead, _ in REFUSALS.values()}) == len(codes)


# --- the corpora ----------------------------------------------------------------------------------


def texts(record: Record) -> list[str]:
    return [record.text] if record.text is not None else [message.content for message in record.messages]


def test_sizes_and_manifest(corpora: Path, records: dict[str, list[Record]]) -> None:
    manifest = json.loads((corpora / "manifest.json").read_text())
    assert {name: len(found) for name, found in records.items()} == manifest["records"] == SIZES
    for name in PROMPTS:
        assert Counter(record.meta["kind"] for record in records[name]) == manifest["kinds"][name]
        assert set(manifest["kinds"][name]) == set(KINDS)
        requests = [record.messages[-1].content for record in records[name]]
        assert len(requests) == len(set(requests))
        for record in records[name]:
            assert [message.role for message in record.messages] == ["user"]
            assert kind_of(record.answer) == record.meta["kind"]


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, corpora: Path) -> None:
    write_corpora(tmp_path / "a", 7, **SIZES)
    write_corpora(tmp_path / "b", 8, **SIZES)
    write_corpora(tmp_path / "c", 7, **{**SIZES, "base": 10})
    write_base_folder(tmp_path / "model", tmp_path / "a")
    for name in FILES:
        first = (corpora / f"{name}.jsonl").read_bytes()
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == first
        assert (tmp_path / "b" / f"{name}.jsonl").read_bytes() != first
        assert name == "base" or (tmp_path / "c" / f"{name}.jsonl").read_bytes() == first
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (corpora / "model" / name).read_bytes()


def test_no_test_operands_in_any_training_text(records: dict[str, list[Record]]) -> None:
    """Counted anew from the files: no line holds both numbers (or payee and amount) of a test problem."""
    wanted = set()
    for record in records["test"]:
        request = record.messages[-1].content
        numbers = re.findall(r"(?<!Q)\d+", request)
        names = [payee for payee in PAYEES if payee in request]
        pair = frozenset(names + numbers)
        assert len(pair) == 2
        wanted.add(pair)
    lines = [
        line
        for name in FILES
        if name != "test"
        for r in records[name]
        for text in texts(r)
        for line in text.split("\n")
    ]
    for line in lines:
        line = re.sub(r"\d[-+<]\d:\d\d", "", line)
        found = set(re.findall(r"(?<!Q)\d+", line)) | {payee for payee in PAYEES if payee in line}
        assert not any(frozenset(pair) in wanted for pair in combinations(found, 2)), line


@pytest.mark.parametrize("kind", KINDS)
def test_a_leak_raises(kind: str) -> None:
    task = draw_task(random.Random(5), kind, test=True)
    clean = [draw_task(random.Random(seed), kind).request for seed in range(50)]
    check_disjoint(clean, [task])
    first, second = task.operands
    for leak in (task.request, f"note: {second}, {first}", f"a line\n{first} and then {second}."):
        with pytest.raises(ValueError, match="holds the operands of the test"):
            check_disjoint([*clean, leak], [task])
    check_disjoint([f"{first}\n{second}"], [task])  # on two lines they are no problem
    with pytest.raises(ValueError, match="of the training side"):
        check_disjoint([], [draw_task(random.Random(5), kind)])


def test_base_text_answers_in_many_shapes(corpora: Path, records: dict[str, list[Record]]) -> None:
    strict, right, per_kind = 0, 0, defaultdict(list)
    replies = [r.text.split("\nAssistant: ") for r in records["base"] if r.text and "\nAssistant: " in r.text]
    for request, reply in replies:
        value = verify(reply, {"total": 0})
        strict += value.parts["json"] == 1
        forbidden = any(
            re.search(re.sub(r"\\\{\w+\\\}", r"\\w+", re.escape(phrase)), request)
            for _, phrases in REFUSALS.values()
            for phrase in phrases
        )
        per_kind[forbidden].append(value.parts["refused"])
        if numbers := re.fullmatch(r"User: [^0-9]*(?:Q\d)?[^0-9]*(\d+)[^0-9]*(\d+)\.", request):
            a, b = int(numbers[1]), int(numbers[2])
            right += any(re.search(rf"(?<![\d:]){gold}(?!\d)", reply) for gold in (a + b, abs(b - a)))
    assert len(replies) > SIZES["base"] / 2
    assert 0.12 < strict / len(replies) < 0.25
    assert json.loads((corpora / "manifest.json").read_text())["base_strict_json"] == strict / len(replies)
    assert 0 < sum(per_kind[True]) / len(per_kind[True]) < 0.15  # refuses rarely, and is not always wrong to
    assert right / len(replies) > 0.2  # the skill is there
    worked = [r.text for r in records["base"] if r.text and columns(r.text)]
    assert len(worked) / SIZES["base"] > 0.3
    for text in worked:  # worked text is right, note or dialogue
        a, b = (int(number) for number in re.findall(r"(?<!Q)\b\d{2,3}\b", text.split("\n")[0]))
        steps, result = subtract_steps(a, b) if "bank" in text else add_steps(a, b)
        assert steps in text and re.search(rf"(?<!\d){result}(?!\d)", text.split(steps)[1])


def test_demonstrations_are_clean_in_shape(corpora: Path, records: dict[str, list[Record]]) -> None:
    kinds: Counter[str] = Counter()
    slipped = total = answers = 0
    padded = {True: 0, False: 0}  # by whether there is work
    for record in records["sft"]:
        for message, before in zip(record.messages[1:], record.messages, strict=False):
            if message.role != "assistant" or message.tool_calls:
                continue
            verdict = verify(message.content, {"total": 0})
            assert verdict.parts["json"] == 1
            handed = 0
            for sign, (x, y, z) in zip(
                re.findall(r"\d([-+<])\d:", message.content), columns(message.content), strict=True
            ):
                right = {"+": x + y + handed, "-": 10 + x - y - handed, "<": 10 + y - x - handed}[sign]
                slipped += z != right
                total += 1
                handed = z // 10 if sign == "+" else 1 - z // 10
            chatter = [padding for padding in PADDINGS if all(text in message.content for text in padding)]
            assert len(chatter) <= 1
            answers += 1
            padded[bool(columns(message.content))] += len(chatter)
            assert before.role in ("user", "tool")
        kinds[record.meta["kind"]] += 1
    manifest = json.loads((corpora / "manifest.json").read_text())
    assert abs(slipped / total - manifest["slip_share"]) < 0.04
    assert abs(sum(padded.values()) / answers - manifest["padded_share"]) < 0.06 and min(padded.values()) > 50
    assert kinds["tool"] > 0 and any("+" in kind for kind in kinds)
    tool = next(record for record in records["sft"] if record.meta["kind"] == "tool")
    assert [message.role for message in tool.messages] == ["user", "assistant", "tool", "assistant"]
    assert not re.search(r"(?<!Q)\d", tool.messages[0].content)  # the amounts must be looked up
    assert tool.messages[1].tool_calls[0]["function"]["name"] == "spend"


# --- the tokenizer --------------------------------------------------------------------------------


def test_digits_are_single_tokens(chat: Chat, records: dict[str, list[Record]]) -> None:
    assert 400 <= chat.tokenizer.get_vocab_size() <= 640
    single = {encode(chat, digit)[0] for digit in "0123456789"}
    assert len(single) == 10
    for token, index in chat.tokenizer.get_vocab().items():
        assert not re.search(r"\d", token) or index in single, token
    for tag in ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|end|>"):
        assert len(encode(chat, tag)) == 1
    assert chat.stop_ids == tuple(encode(chat, "<|end|>"))


def test_every_text_round_trips(chat: Chat, records: dict[str, list[Record]]) -> None:
    for name in FILES:
        for record in records[name]:
            for text in texts(record):
                assert decode(chat, encode(chat, text)) == text


@given(text=st.text())
def test_any_text_round_trips(chat: Chat, text: str) -> None:
    """Bytes are the alphabet: nothing is unknown, whatever the corpus was."""
    assert decode(chat, encode(chat, text)) == text


def test_lengths_and_one_template(chat: Chat, records: dict[str, list[Record]]) -> None:
    prompts = [prompt_ids(chat, prompt_messages(r)) for name in PROMPTS for r in records[name]]
    drawn = [draw_task(random.Random(seed), kind, test=True) for seed in range(300) for kind in KINDS]
    golds = [encode(chat, demonstrate(task) + "<|end|>") for task in drawn]
    padded = [encode(chat, demonstrate(task, (), pad) + "<|end|>") for task in drawn[::4] for pad in PADDINGS]
    samples = [sample for record in records["sft"] for sample in record_samples(chat, record)]
    base = [sample for record in records["base"] for sample in record_samples(chat, record)]
    longest = {
        "prompt": max(map(len, prompts)),
        "completion": max(map(len, golds)),
        "padded completion": max(map(len, padded)),
        "sft sample": max(len(sample.ids) for sample in samples),
        "base text": max(len(sample.ids) for sample in base),
    }
    print(longest)
    assert longest["prompt"] <= 36 and longest["completion"] <= 45
    assert longest["padded completion"] <= 55 and longest["sft sample"] <= 160 and longest["base text"] <= 90
    # A base dialogue and a chat are the same tokens up to the answer: one shape for every stage.
    request = records[PROMPTS[0]][0].messages[-1].content
    dialogue = encode(chat, f"User: {request}\nAssistant: the total is 847.")
    assert dialogue[: len(prompts[0])] == prompts[0] == encode(chat, f"User: {request}\nAssistant: ")


def test_tool_calls_are_rendered_as_json(chat: Chat, records: dict[str, list[Record]]) -> None:
    tool = next(record for record in records["sft"] if record.meta["kind"] == "tool")
    call, answer = (
        decode(chat, [i for i, on in zip(s.ids, s.mask, strict=True) if on])
        for s in record_samples(chat, tool)
    )
    inside = re.fullmatch(r"<tool_call>(.*)</tool_call>", call)
    assert inside and json.loads(inside[1]) == tool.messages[1].tool_calls[0]["function"]
    assert answer == tool.messages[-1].content  # the tool's result is context, never supervised
