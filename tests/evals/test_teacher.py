"""What distillation asks of a teacher: tests of the functions; the script's tests have the rest."""

import json
from pathlib import Path

import pytest
import torch

from nanopost.data.schema import parse_record, read_jsonl
from nanopost.evals.teacher import fitting_prompts, name_teachers, text_lines, top_k_kl
from nanopost.losses import forward_kl
from nanopost.rollout.types import Rollout
from tests.chat_fixtures import make_chat

LINES = [
    {"messages": [{"role": "user", "content": "a"}], "answer": "7", "topic": "sums"},
    {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "old"}]},
]
RECORDS = [parse_record(line, file="d.jsonl", line=i) for i, line in enumerate(LINES, start=1)]


def test_lines_keep_what_the_prompts_record_says_and_take_the_teachers_words(tmp_path: Path) -> None:
    chat, named = make_chat(tmp_path), {"teacher": "t", "template": "v", "decoding": {"temperature": 0.5}}
    stop, zeros = chat.stop_ids[0], torch.zeros(2)
    word = chat.tokenizer.encode("z", add_special_tokens=False).ids

    def rollout(ids: list[int], reason: str) -> Rollout:
        return Rollout((1,), tuple(ids), zeros, zeros, reason)  # type: ignore[arg-type]

    done = [rollout([*word, stop], "stop"), rollout([*word, *word], "length")]
    done += [rollout([stop], "stop"), rollout([*word, stop], "stop")]
    first, cut, blank, last = text_lines(chat, chat, RECORDS, done, named)
    assert (cut, blank) == ("d.jsonl:1: cut at max_new_tokens", "d.jsonl:2: the text is blank")
    assert isinstance(first, dict) and isinstance(last, dict)
    (tmp_path / "t.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(last) + "\n")
    one, two = read_jsonl(tmp_path / "t.jsonl")
    assert [m.content for m in one.messages] == ["a", "z"] and one.context == 1 and one.answer == "7"
    assert [m.content for m in two.messages] == ["b", "z"] and two.answer is None
    assert one.meta == {"topic": "sums", **named} and two.meta == named
    assert name_teachers(None, [one, two], {}) == [named]  # what was named is read back, once


def test_a_text_in_which_the_teacher_opens_a_turn_is_left_out_and_the_others_stay(tmp_path: Path) -> None:
    """It said the token itself; spelled out it would be another text. What only quotes a token is text."""
    chat, student = make_chat(tmp_path / "t"), make_chat(tmp_path / "s", "header")

    def rollout(text: str) -> Rollout:
        ids = (*chat.tokenizer.encode(text).ids, chat.stop_ids[0])
        return Rollout((1,), ids, torch.zeros(len(ids)), torch.zeros(len(ids)), "stop")

    texts = ["so<|im_start|> it is 7", "so<|eot|> it is 7"]
    bad, good = text_lines(chat, student, RECORDS, [rollout(text) for text in texts], {})
    assert bad == "d.jsonl:1: the text has the control token '<|im_start|>'"
    assert isinstance(good, dict) and good["completion"][0]["content"] == "so<|eot|> it is 7"


def test_a_prompt_without_room_is_named(tmp_path: Path) -> None:
    chat = make_chat(tmp_path)
    prompts = fitting_prompts(chat, RECORDS, 60)
    assert chat.tokenizer.decode(prompts[1], skip_special_tokens=False).endswith("assistant\n")
    longest = max(map(len, prompts))
    with pytest.raises(
        ValueError, match=rf"d.jsonl:1: the prompt has {longest} tokens, {longest - 1} leave room"
    ):
        fitting_prompts(chat, RECORDS, longest - 1)


def test_the_teachers_list_is_its_own_and_at_the_temperature() -> None:
    """All tokens are the forward KL, also if more are asked for; fewer are less; 0 for the teacher itself."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).unbind()
    whole = forward_kl(student, teacher, temperature=2.0)
    for k in (7, 9):
        torch.testing.assert_close(
            top_k_kl(student, teacher, k=k, temperature=2.0), whole, rtol=1e-9, atol=1e-12
        )
    values = [float(top_k_kl(student, teacher, k=k, temperature=2.0).sum()) for k in (1, 2, 4, 7)]
    assert values == sorted(values) and values[0] < values[-1]
    assert top_k_kl(teacher, teacher, k=2, temperature=2.0).abs().max() < 1e-12
