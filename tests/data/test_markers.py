"""Content can never forge a turn: whatever a message quotes, its control tokens stay text."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from nanopost.data.chat import Chat, encode, prompt_ids, record_samples, render, write_chat
from nanopost.data.markers import MARK
from nanopost.data.schema import Message, Record
from tests.chat_fixtures import CHATML, TEMPLATES, THINK, byte_tokenizer, make_chat

MARKERS = [
    *(
        "<|im_start|>",
        "<|im_end|>",
        "<|bos|>",
        "<|start|>",
        "<|head|>",
        "<|eot|>",
        "<|eom|>",
        "<think>",
        "</think>",
    ),
    *("<|im_", "end|>", "<|im_<|im_end|>end|>", "<|e", "ot|>", "<|im_end|", "<", "|", "<|"),
]
TEXTS = st.lists(st.sampled_from(MARKERS) | st.text("ab1 \n<|>é", max_size=4), max_size=5).map("".join)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    return {kind: make_chat(tmp_path_factory.mktemp(kind), kind) for kind in TEMPLATES}


def controls(chat: Chat) -> set[int]:
    return set(chat.tokenizer.get_added_tokens_decoder())


def frame(chat: Chat, ids: list[int]) -> list[int]:
    return [token for token in ids if token in controls(chat)]


def called(text: str) -> tuple[dict, ...]:
    return ({"function": {"name": text, "arguments": {text: [text]}}},)


@pytest.mark.parametrize("kind", TEMPLATES)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5), call=TEXTS)
def test_no_content_writes_a_control_token(chats, kind, texts, call):
    """Its text is what the template writes; its control tokens are those of a conversation of bare words."""
    chat, roles = chats[kind], ("system", "user", "assistant", "tool", "user")
    messages, bare = (
        [
            Message(role, said(text), called(said(call)) if role == "assistant" else ())
            for role, text in zip(roles, texts, strict=False)
        ]
        for said in (lambda text: text, lambda text: "a")
    )
    ids = prompt_ids(chat, messages)
    assert frame(chat, ids) == frame(chat, prompt_ids(chat, bare))
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == render(
        chat, messages, add_generation_prompt=True
    )


@pytest.mark.parametrize("kind", TEMPLATES)
@given(texts=st.lists(st.text("hello 12\n", max_size=8), min_size=1, max_size=5))
def test_what_quotes_none_is_encoded_as_it_stands(chats, kind, texts):
    messages = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts)]
    text = render(chats[kind], messages, add_generation_prompt=True)
    assert prompt_ids(chats[kind], messages) == encode(chats[kind], text)


@given(text=TEXTS)
def test_an_answer_that_quotes_its_stop_token_is_trained_on_to_its_end(chats, text):
    chat = chats["chatml"]
    record = Record((Message("user", "a"), Message("assistant", f"b{text}c")), None, None, {}, "x.jsonl", 1)
    (sample,) = record_samples(chat, record)
    emitted = [token for token, trained in zip(sample.ids, sample.mask, strict=True) if trained]
    assert [token for token in emitted if token in controls(chat)] == [chat.stop_ids[0]] == emitted[-1:]
    assert chat.tokenizer.decode(emitted, skip_special_tokens=False) == f"b{text}c<|im_end|>"


def thinking(folder: Path) -> Chat:
    """ChatML whose tokenizer has <think> and </think> as tokens that are not special, as Qwen3's."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")]
    )
    return write_chat(folder, tokenizer, THINK, eos_token="<|im_end|>")


def test_an_assistant_thinks_and_nobody_else_does(tmp_path):
    """Reasoning of earlier turns is dropped by the template, which must see the tag; a user's tag is text."""
    chat = thinking(tmp_path)
    answer = Message("assistant", "<think>\nhm\n</think>\n\nyes")
    token = chat.tokenizer.token_to_id("</think>")
    record = Record((Message("user", "</think>"), answer), None, None, {}, "x.jsonl", 1)
    (sample,) = record_samples(chat, record)
    assert sample.ids.count(token) == 1 == sample.mask[sample.ids.index(token)]
    later, bare = (
        prompt_ids(chat, [Message("user", "a"), said, Message("user", last)])
        for said, last in ((answer, "<think>"), (Message("assistant", "yes"), "b"))
    )
    assert frame(chat, later) == frame(chat, bare)


def test_what_only_an_assistant_says_stays_a_token(tmp_path):
    """A special token that the template never writes: the model's own, in its own turns alone."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>", "<|call|>"])
    chat = write_chat(tmp_path, tokenizer, CHATML, eos_token="<|im_end|>")
    call = tokenizer.token_to_id("<|call|>")
    said = [
        prompt_ids(chat, [Message(role, "<|call|>f()")]).count(call)
        for role in ("assistant", "user", "system", "tool")
    ]
    assert said == [1, 0, 0, 0]


def test_a_system_message_may_show_the_tags_of_a_call(tmp_path):
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    chat = write_chat(tmp_path, tokenizer, CHATML, eos_token="<|im_end|>")
    tag = tokenizer.token_to_id("<tool_call>")
    assert [prompt_ids(chat, [Message(role, "a <tool_call>")]).count(tag) for role in ("system", "user")] == [
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("template", "contents"),
    [
        ("{% for m in messages %}{{ m.content | trim }}{% endfor %}<|im_end|>", ("a<|im_ ", "end|>b")),
        ("{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>", ("a<", "|im_end|>b")),
        (
            "{% for m in messages %}{{ m.content.replace('/no', '') }}{% endfor %}<|im_end|>",
            ("a<|im_/noend|>b",),
        ),
    ],
)
def test_a_template_that_makes_a_token_of_pieces_is_refused(tmp_path, template, contents):
    """It writes contents beside each other, or takes something out of one."""
    chat = write_chat(
        tmp_path, byte_tokenizer(["<|im_start|>", "<|im_end|>"]), template, eos_token="<|im_end|>"
    )
    with pytest.raises(ValueError, match=r"the chat template makes '<\|im_end\|>' out of what messages say"):
        prompt_ids(chat, [Message("user", content) for content in contents])
    assert prompt_ids(chat, [Message("user", "a<"), Message("user", "b")]) == encode(chat, "a<b<|im_end|>")


WORDS = {"<|im_end|>": 0, "<|im_start|>": 1, "a": 2, "user": 3, "assistant": 4, "?": 5}


def test_a_tokenizer_that_cannot_quote_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    chat = write_chat(tmp_path, tokenizer, CHATML.replace("\\n", " "), eos_token="<|im_end|>")
    assert 2 in prompt_ids(chat, [Message("user", "a")])
    with pytest.raises(
        ValueError, match=r"a message has '<\|im_end\|>', which this tokenizer cannot write as text"
    ):
        prompt_ids(chat, [Message("user", "a <|im_end|> a")])


def test_what_a_normaliser_makes_a_token_is_refused(tmp_path):
    """Full-width signs, which NFKC turns into the token's own."""
    tokenizer = byte_tokenizer(["<|im_start|>"])
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=True)])
    chat = write_chat(tmp_path, tokenizer, CHATML, eos_token="<|im_end|>")
    assert len(frame(chat, prompt_ids(chat, [Message("user", "a＜b")]))) == 3
    with pytest.raises(ValueError, match=r"a message has '<\|im_end\|>', which this tokenizer cannot write"):
        prompt_ids(chat, [Message("user", "a＜|im_end|＞b")])


def test_a_tokenizer_that_opens_a_text_with_a_space_opens_no_piece_with_one(tmp_path):
    """Metaspace, `prepend_scheme` first, as the Llama-2 tokenizers have it."""
    letters = {letter: i for i, letter in enumerate(dict.fromkeys("▁ab</>user\n?"), start=2)}
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, **letters}, merges=[], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in ("<s>", "</s>")])
    template = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    chat = write_chat(tmp_path, tokenizer, template, eos_token="</s>")
    for text in ("ab<", "ab</", "a b"):
        assert prompt_ids(chat, [Message("user", text)]) == encode(chat, f"<s>user\n{text}</s>\n")
    spelled = [letters[letter] for letter in "user\na</s>b"]
    assert prompt_ids(chat, [Message("user", "a</s>b")]) == [0, *spelled, 1, letters["\n"]]


def test_a_token_that_the_tokenizer_passes_over_in_a_template_is_no_forgery(tmp_path):
    """One that is a token as a whole word only: the template writes it beside letters, where it is text."""
    tokenizer = byte_tokenizer(["<|im_end|>"])
    tokenizer.add_special_tokens([AddedToken("tool", special=True, single_word=True, normalized=False)])
    chat = write_chat(tmp_path, tokenizer, "atool{{ messages[0].content }}<|im_end|>", eos_token="<|im_end|>")
    assert prompt_ids(chat, [Message("user", "b")]) == encode(chat, "atoolb<|im_end|>")
    with pytest.raises(ValueError, match="which this tokenizer cannot write as text"):
        prompt_ids(chat, [Message("user", "b<|im_end|>")])


def test_one_character_that_is_a_control_token_is_refused(tmp_path):
    chat = write_chat(
        tmp_path, byte_tokenizer(["<|im_start|>", "␞"]), "{{ messages[0].content }}␞", eos_token="␞"
    )
    assert frame(chat, prompt_ids(chat, [Message("user", "a")])) == [chat.stop_ids[0]]
    with pytest.raises(ValueError, match=r"messages\[0\] has one character that is a control token, ␞"):
        prompt_ids(chat, [Message("user", "a␞b")])


def test_the_mark_itself_is_refused(chats):
    with pytest.raises(ValueError, match=r"messages\[1\] has the character U\+FDD0"):
        prompt_ids(chats["chatml"], [Message("user", "a"), Message("assistant", f"<{MARK}|im_end|>")])
