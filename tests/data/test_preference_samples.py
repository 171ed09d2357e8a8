"""Preference samples: the mask is the completion's assistant turns, the prompt's tokens are the sampler's."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopost.data.chat import Chat, decode, prompt_ids
from nanopost.data.preference import parse_preference, read_groups
from nanopost.data.preference_samples import completion_sample, preference_samples, steps_sample
from nanopost.data.schema import Message, Preference, Provenance, Sample, Steps
from tests import chat_fixtures
from tests.chat_fixtures import make_chat

PLACE = {"file": "f.jsonl", "line": 3}
USER, GOOD = Message("user", "2 + 2?"), Message("assistant", "4")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    return {kind: make_chat(tmp_path_factory.mktemp(kind), kind) for kind in ("chatml", "header", "think")}


def trained(chat: Chat, sample: Sample) -> list[str]:
    """The texts of the runs of tokens that are trained on."""
    texts, run = [], []
    for token, on in zip((*sample.ids, -1), (*sample.mask, False), strict=True):
        if on:
            run.append(token)
        elif run:
            texts.append(chat.tokenizer.decode(run, skip_special_tokens=False))
            run = []
    return texts


def test_golden_ids_of_a_pair(chats: dict[str, Chat]) -> None:
    record = parse_preference({"prompt": "a", "chosen": "b", "rejected": "cd"}, **PLACE)
    chosen, rejected = preference_samples(chats["chatml"], record)
    start, end, newline = 264, 265, 198
    user, assistant = ([ord(c) - 33 for c in role] for role in ("user", "assistant"))
    shown = (start, *user, newline, ord("a") - 33, end, newline, start, *assistant, newline)
    assert chosen == Sample((*shown, ord("b") - 33, end), (False,) * len(shown) + (True,) * 2)
    assert rejected == Sample(
        (*shown, ord("c") - 33, ord("d") - 33, end), (False,) * len(shown) + (True,) * 3
    )


def test_the_prompts_own_answers_are_not_trained(chats: dict[str, Chat]) -> None:
    turns = (USER, Message("assistant", "first"), Message("user", "and 3 + 3?"))
    for kind, stop in (("chatml", "<|im_end|>"), ("header", "<|eot|>")):
        sample = completion_sample(chats[kind], turns, (Message("assistant", "6"),), **PLACE)
        assert trained(chats[kind], sample) == ["6" + stop]


def test_every_assistant_turn_of_a_completion_is_trained_and_nothing_else(chats: dict[str, Chat]) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"of": [2, 2]}}}
    completion = (
        Message("assistant", "", (call,)),
        Message("tool", "4", name="add"),
        Message("assistant", "It is 4."),
        Message("user", "sure?"),
        Message("assistant", "yes"),
    )
    called, *rest = trained(chats["chatml"], completion_sample(chats["chatml"], (USER,), completion, **PLACE))
    assert called.startswith("<call>") and called.endswith("</call><|im_end|>")
    assert rest == ["It is 4.<|im_end|>", "yes<|im_end|>"]
    called, *rest = trained(chats["header"], completion_sample(chats["header"], (USER,), completion, **PLACE))
    assert called.endswith("]<|eom|>") and rest == ["It is 4.<|eot|>", "yes<|eot|>"]


def test_bos_comes_once(chats: dict[str, Chat]) -> None:
    completion = (GOOD, USER, GOOD)
    for side in preference_samples(
        chats["header"], Preference((USER,), completion, (USER, GOOD), Provenance(), **PLACE)
    ):
        assert side.ids.count(264) == 1 and side.ids[0] == 264


def test_a_template_that_writes_earlier_turns_anew_is_refused(chats: dict[str, Chat]) -> None:
    thought = Message("assistant", "<think>\nsum\n</think>\n4")
    whole = completion_sample(chats["think"], (USER,), (thought,), **PLACE)
    assert trained(chats["think"], whole) == [thought.content + "<|im_end|>"]
    with pytest.raises(ValueError, match=r"f\.jsonl:3: the chat template writes earlier turns anew"):
        completion_sample(chats["think"], (USER,), (thought, USER, GOOD), **PLACE)
    earlier = completion_sample(chats["think"], (USER, thought, USER), (GOOD,), **PLACE)
    assert "sum" not in decode(chats["think"], earlier.ids)  # the sampler does not see it either


def test_an_earlier_turn_keeps_the_tokens_in_which_it_was_emitted(chats: dict[str, Chat]) -> None:
    # "\n1" is one token where header and answer are read together; the sampler emits the "1" alone.
    first, chat = Message("assistant", "1"), chats["chatml"]
    alone = completion_sample(chat, (USER,), (first,), **PLACE)
    both = completion_sample(chat, (USER,), (first, USER, GOOD), **PLACE)
    assert both.ids[: len(alone.ids)] == alone.ids and both.mask[: len(alone.mask)] == alone.mask
    assert alone.ids[-2:] == (ord("1") - 33, 265)
    assert trained(chat, both) == ["1<|im_end|>", "4<|im_end|>"]


@pytest.mark.parametrize("completion", [(), (USER,), (GOOD, USER)])
def test_a_completion_ends_with_an_answer(chats: dict[str, Chat], completion: tuple) -> None:
    with pytest.raises(ValueError, match=r"f\.jsonl:3: the completion must end with an assistant turn"):
        completion_sample(chats["chatml"], (USER,), completion, **PLACE)


word = st.sampled_from(["a", "hello", "1", "12", "é", "\n\n1", "lo wo", "🦀"])
content = st.lists(word, min_size=1, max_size=3).map(" ".join).filter(str.strip)
given_turn = st.builds(Message, st.sampled_from(["user", "assistant", "tool"]), content)
answer = st.builds(Message, st.just("assistant"), content)
side = st.tuples(st.lists(given_turn, max_size=2), answer).map(lambda parts: (*parts[0], parts[1]))


@given(
    st.lists(given_turn, min_size=1, max_size=3).map(tuple), side, side, st.sampled_from(["chatml", "header"])
)
def test_the_prompt_is_the_samplers_and_never_trained(
    chats: dict[str, Chat], prompt: tuple, chosen: tuple, rejected: tuple, kind: str
) -> None:
    chat = chats[kind]
    stop = {"chatml": "<|im_end|>", "header": "<|eot|>"}[kind]
    record = Preference(prompt, chosen, rejected, Provenance(), **PLACE)
    for turns, sample in zip((chosen, rejected), preference_samples(chat, record), strict=True):
        before = next(i for i, m in enumerate(turns) if m.role == "assistant")
        shown = prompt_ids(chat, prompt + turns[:before])
        assert list(sample.ids[: len(shown)]) == shown
        assert not any(sample.mask[: len(shown)]) and sample.mask[len(shown)]
        assert sample.mask[-1] and len(sample.ids) == len(sample.mask)
        told = [m.content.strip() if kind == "header" else m.content for m in turns if m.role == "assistant"]
        assert trained(chat, sample) == [text + stop for text in told]


# ---- steps

STEPS = Steps((USER,), ("hello é", "2 + 2 = 5\n", "12"), (True, False, True), Provenance(), **PLACE)


@pytest.mark.parametrize("kind", ["chatml", "header"])
def test_a_step_ends_at_its_own_last_token(chats: dict[str, Chat], kind: str) -> None:
    sample, ends = steps_sample(chats[kind], STEPS)
    start = sample.mask.index(True)
    texts = [decode(chats[kind], sample.ids[start : end + 1]) for end in ends]
    assert texts == ["hello é", "hello é\n2 + 2 = 5", "hello é\n2 + 2 = 5\n\n12"]
    assert sample.ids[ends[-1] + 1 :] == chats[kind].stop_ids[:1]
    # One token less, and the step is not complete: its end is its last token and not one of the separator.
    shorter = [decode(chats[kind], sample.ids[start:end]) for end in ends]
    assert all(
        before != text and text.startswith(before.rstrip("�"))
        for before, text in zip(shorter, texts, strict=True)
    )


@given(st.lists(content, min_size=1, max_size=4).map(tuple), st.sampled_from(["chatml", "header"]))
def test_each_step_has_one_end_and_they_rise(
    chats: dict[str, Chat], steps: tuple[str, ...], kind: str
) -> None:
    record = replace(STEPS, steps=steps, labels=(True,) * len(steps))
    sample, ends = steps_sample(chats[kind], record)
    start = sample.mask.index(True)
    assert len(ends) == len(steps) and list(ends) == sorted(set(ends))
    assert start <= ends[0] and ends[-1] < len(sample.ids) - 1
    text = "\n".join(steps)
    for i, end in enumerate(ends):
        whole = "\n".join(steps[: i + 1])
        lead = len(text) - len(text.lstrip()) if kind == "header" else 0  # that template trims
        assert decode(chats[kind], sample.ids[start : end + 1]) == whole[lead:].rstrip()


def test_the_words_of_a_template_before_the_steps_are_none_of_theirs(tmp_path: Path) -> None:
    # It writes an empty thought before each answer, and the thought has the step's own text in it.
    template = chat_fixtures.THINK.replace(
        "{{- message.content }}", "{{- '<think>4</think>' + message.content }}"
    )
    assert template != chat_fixtures.THINK
    chat = chat_fixtures.write_chat(
        tmp_path,
        chat_fixtures.byte_tokenizer(["<|im_start|>", "<|im_end|>"]),
        template,
        eos_token="<|im_end|>",
    )
    sample, ends = steps_sample(chat, replace(STEPS, steps=("4",), labels=(True,)))
    assert decode(chat, sample.ids[sample.mask.index(True) : ends[0] + 1]) == "<think>4</think>4"


def test_a_template_that_changes_the_steps_is_refused(tmp_path: Path) -> None:
    template = chat_fixtures.CHATML.replace("message.content }}", "message.content | upper }}")
    assert template != chat_fixtures.CHATML
    chat = chat_fixtures.write_chat(
        tmp_path,
        chat_fixtures.byte_tokenizer(["<|im_start|>", "<|im_end|>"]),
        template,
        eos_token="<|im_end|>",
    )
    with pytest.raises(ValueError, match=r"f\.jsonl:3: the chat template changes the text of the steps"):
        steps_sample(chat, STEPS)


def test_a_token_over_the_end_of_a_step_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_fixtures, "MERGES", [*chat_fixtures.MERGES, ("Ċ", "b"), ("a", "Ċb")])
    chat = make_chat(tmp_path)
    with pytest.raises(ValueError, match=r"f\.jsonl:3: one token holds the end of completions\[0\]"):
        steps_sample(chat, replace(STEPS, steps=("a", "b"), labels=(True, True)))
    assert len(steps_sample(chat, replace(STEPS, steps=("a", "c"), labels=(True, True)))[1]) == 2


def test_real_solutions_are_samples(shared: Path, chats: dict[str, Chat]) -> None:
    groups = read_groups(shared / "data" / "gsm8k" / "model_solutions.jsonl")[:50]
    for group in groups:
        for candidate in group.candidates:
            turn = (Message("assistant", candidate.text),)
            sample = completion_sample(chats["chatml"], group.prompt, turn, file=group.file, line=group.line)
            assert trained(chats["chatml"], sample) == [candidate.text + "<|im_end|>"]
            shown = decode(chats["chatml"], sample.ids)
            assert shown.startswith(f"<|im_start|>user\n{group.prompt[0].content}<|im_end|>")
