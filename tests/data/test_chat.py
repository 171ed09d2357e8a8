"""Chats: what is trained on is what the sampler would have to emit, and nothing else.

Golden ids are worked out by hand: of `byte_tokenizer`, ASCII is ord − 33, newline 198, merges from 256 on.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanopost.data.chat import (
    CONFIG,
    TEMPLATE,
    Chat,
    copy_chat,
    decode,
    encode,
    load_chat,
    prompt_ids,
    prompt_messages,
    record_samples,
    render,
    write_chat,
)
from nanopost.data.schema import Message, Record, Sample, parse_record
from tests.chat_fixtures import CHATML, HEADER, THINK, byte_tokenizer, make_chat
from tests.pages import namespace, scalar

KINDS = ("chatml", "header", "think")
CALL = {"name": "ledger", "arguments": {"of": "Q3 – Zürich"}}
TRAJECTORY = (
    Message("system", "add"),
    Message("user", "total?"),
    Message("assistant", "<think>ask</think>\nI ask.", (CALL,)),
    Message("tool", "482 and 365"),
    Message("assistant", "<think>482+365</think>\n847"),
    Message("user", "thanks"),
    Message("assistant", "hello"),
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chat]:
    return {kind: make_chat(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def record_of(*messages: Message, text: str | None = None) -> Record:
    return Record(messages, text, None, {}, "chats.jsonl", 12)


def trained(chat: Chat, sample: Sample) -> str:
    """The supervised tokens as text, special tokens shown."""
    ids = [i for i, on in zip(sample.ids, sample.mask, strict=True) if on]
    return chat.tokenizer.decode(ids, skip_special_tokens=False)


def shown(chat: Chat, sample: Sample) -> str:
    return chat.tokenizer.decode(list(sample.ids), skip_special_tokens=False)


def ascii_ids(text: str) -> list[int]:
    return [198 if c == "\n" else ord(c) - 33 for c in text]


# ---- golden ids ----


def test_golden_ids_chatml(chats: dict[str, Chat]) -> None:
    (sample,) = record_samples(
        chats["chatml"], record_of(Message("user", "ab"), Message("assistant", "hello!"))
    )
    start, end = 264, 265
    context = [start, *ascii_ids("user\nab"), end, 198, start, *ascii_ids("assistant\n")]
    assert sample.ids == (*context, 259, ord("!") - 33, end)  # hello is one token
    assert sample.mask == (False,) * len(context) + (True, True, True)


def test_golden_ids_header(chats: dict[str, Chat]) -> None:
    (sample,) = record_samples(chats["header"], record_of(Message("user", "ab"), Message("assistant", "12")))
    bos, start, head, eot = 264, 265, 266, 267
    context = [
        bos,
        start,
        *ascii_ids("user"),
        head,
        260,
        *ascii_ids("ab"),
        eot,
        start,
        *ascii_ids("assistant"),
        head,
        260,
    ]
    assert sample.ids == (*context, 262, eot)
    assert sample.mask == (False,) * len(context) + (True, True)


# ---- the contract between training and sampling ----


@pytest.mark.parametrize("kind", KINDS)
def test_one_sample_per_turn_in_the_context_inference_shows(chats: dict[str, Chat], kind: str) -> None:
    chat = chats[kind]
    samples = record_samples(chat, record_of(*TRAJECTORY))
    turns = [i for i, message in enumerate(TRAJECTORY) if message.role == "assistant"]
    assert len(samples) == len(turns) == 3
    for i, sample in zip(turns, samples, strict=True):
        before = prompt_ids(chat, TRAJECTORY[:i])
        assert list(sample.ids[: len(before)]) == before
        assert sample.mask == (False,) * len(before) + (True,) * (len(sample.ids) - len(before))
        assert sample.ids[-1] in chat.stop_ids
        assert not set(sample.ids[len(before) : -1]) & set(chat.stop_ids)


def test_think_stripping_shows_only_the_reasoning_of_the_turn(chats: dict[str, Chat]) -> None:
    chat = chats["think"]
    first, second, third = record_samples(chat, record_of(*TRAJECTORY))
    assert trained(chat, first) == "<think>ask</think>\nI ask.<|im_end|>"
    assert trained(chat, second) == "<think>482+365</think>\n847<|im_end|>"
    assert trained(chat, third) == "hello<|im_end|>"
    assert ["<think>ask" in shown(chat, sample) for sample in (first, second, third)] == [True, False, False]
    assert ["<think>482" in shown(chat, sample) for sample in (first, second, third)] == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_tool_results_are_never_supervised(chats: dict[str, Chat], kind: str) -> None:
    chat = chats[kind]
    texts = [trained(chat, sample) for sample in record_samples(chat, record_of(*TRAJECTORY))]
    for text in texts:
        for given_text in ("add", "total?", "482 and 365", "thanks", "user", "tool", "assistant"):
            assert given_text not in text
    if kind != "think":
        assert json.dumps(CALL, ensure_ascii=False) in texts[0]  # a call is what the sampler must write


def test_each_stop_token_ends_a_turn(chats: dict[str, Chat]) -> None:
    chat = chats["header"]
    assert chat.stop_ids == (267, 268)
    samples = record_samples(chat, record_of(*TRAJECTORY))
    assert [sample.ids[-1] for sample in samples] == [268, 267, 267]
    assert [sample.mask[-1] for sample in samples] == [True, True, True]


def test_prompt_turns_of_a_completion_record_are_not_trained_on(chats: dict[str, Chat]) -> None:
    chat = chats["chatml"]
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    obj = {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    assert [trained(chat, s) for s in record_samples(chat, parse_record(obj, file="f", line=1))] == [
        "d<|im_end|>"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_bos_comes_once(chats: dict[str, Chat], kind: str) -> None:
    chat = chats[kind]
    count = 0 if chat.bos_token is None else 1
    for messages in (TRAJECTORY[:2], TRAJECTORY):
        ids = prompt_ids(chat, messages)
        assert ids.count(264) == count or kind != "header"
        assert chat.bos_token is None or ids[0] == 264
    for sample in record_samples(chat, record_of(*TRAJECTORY)):
        assert chat.bos_token is None or (sample.ids[0] == 264 and sample.ids.count(264) == 1)
    (sample,) = record_samples(chat, record_of(text="hello"))
    assert sample.ids == ((264, 259, 267) if kind == "header" else (259, 265))


def test_a_template_that_doubles_bos_is_refused(tmp_path: Path) -> None:
    chat = make_chat(tmp_path, "header")
    chat = replace(chat, template="{{ bos_token }}" + HEADER)
    with pytest.raises(ValueError, match=r"chats\.jsonl:12: .* starts with '<\|bos\|>' twice"):
        record_samples(chat, record_of(Message("user", "a"), Message("assistant", "b")))


def test_text_is_framed_and_supervised(chats: dict[str, Chat]) -> None:
    (framed,) = record_samples(chats["header"], record_of(text="hello!"))
    assert framed == Sample((264, 259, 0, 267), (False, True, True, True))
    (bare,) = record_samples(
        chats["chatml"], record_of(text="hello!")
    )  # no BOS: nothing predicts the first token
    assert bare == Sample((259, 0, 265), (False, True, True))


@pytest.mark.parametrize("text", ["<|bos|>hello", "hello<|eot|>"])
def test_a_text_with_its_own_frame_is_refused(chats: dict[str, Chat], text: str) -> None:
    with pytest.raises(ValueError, match=r"chats\.jsonl:12: .* BOS or EOS"):
        record_samples(chats["header"], record_of(text=text))


# ---- tokens that straddle the boundary ----


def test_a_merge_across_the_boundary_does_not_change_the_context(chats: dict[str, Chat]) -> None:
    chat = chats["chatml"]  # "\n1" is one token of the joint text; the sampler has emitted no such thing
    joint = encode(chat, "<|im_start|>assistant\n12<|im_end|>")
    assert joint[-3:] == [261, ord("2") - 33, 265]
    (sample,) = record_samples(chat, record_of(Message("user", "a"), Message("assistant", "12")))
    assert sample.ids[-3:] == (198, 262, 265)
    assert sample.mask[-3:] == (False, True, True)


def test_joint_tokens_are_kept_where_they_continue_the_context(tmp_path: Path) -> None:
    # This tokenizer puts a space before every piece it is given: a completion alone would begin with one.
    tokenizer = byte_tokenizer(["<|im_start|>", "<|im_end|>"], prefix_space=True)
    chat = write_chat(tmp_path, tokenizer, CHATML, eos_token="<|im_end|>")
    (sample,) = record_samples(chat, record_of(Message("user", "a"), Message("assistant", "hello")))
    assert trained(chat, sample) == "hello<|im_end|>"
    # And where both fail, the tokens cannot say the text.
    with pytest.raises(ValueError, match=r"chats\.jsonl:12: messages\[1\]: .* do not decode to their text"):
        record_samples(chat, record_of(Message("user", "a"), Message("assistant", "12")))


written = st.text(st.characters(codec="utf-8"), max_size=12) | st.text("he lo12\n", max_size=12)


@given(
    st.sampled_from(KINDS),
    st.lists(written, min_size=1, max_size=3),
    st.lists(written, min_size=3, max_size=3),
)
def test_any_text_is_shown_whole_and_trained_exactly(
    chats: dict[str, Chat], kind: str, prompts: list[str], answers: list[str]
) -> None:
    chat = chats[kind]
    assume(all(answer.strip() for answer in answers))
    turns = [(Message("user", p), Message("assistant", a)) for p, a in zip(prompts, answers, strict=False)]
    messages = tuple(message for turn in turns for message in turn)
    samples = record_samples(chat, record_of(*messages))
    assert len(samples) == len(turns)
    for i, sample in enumerate(samples):
        context = render(chat, messages[: 2 * i + 1], add_generation_prompt=True)
        whole = render(chat, messages[: 2 * i + 2], add_generation_prompt=False)
        assert whole.startswith(context)  # the template is a prefix code of its own conversations
        stop = chat.tokenizer.id_to_token(sample.ids[-1])
        answer = answers[i].strip() if kind == "header" else answers[i]
        assert shown(chat, sample) == context + answer + stop == whole.rstrip("\n")
        assert trained(chat, sample) == answer + stop
        assert decode(chat, [t for t, on in zip(sample.ids, sample.mask, strict=True) if on]) == answer


# ---- the two pages: the text of a conversation, and which of its tokens are trained on ----

plain = st.text(st.characters(codec="utf-8", exclude_characters="<>|\ufdd0"), max_size=9) | st.text(
    "he lo12\n", max_size=9
)
turns = st.builds(
    Message,
    st.sampled_from(("system", "user", "assistant", "tool")),
    plain,
    st.lists(st.dictionaries(st.just("name"), plain, min_size=1), max_size=2).map(tuple),
)
conversations = st.lists(turns, min_size=1, max_size=5)


def by_page(messages: Sequence[Message]) -> list[dict[str, object]]:
    """Messages as the pages' blocks take them: tool calls are JSON texts."""
    return [
        {
            "role": m.role,
            "content": m.content,
            "calls": [json.dumps(c, ensure_ascii=False) for c in m.tool_calls],
        }
        for m in messages
    ]


@given(conversations, st.booleans())
def test_RE1_the_template_writes_what_the_page_says(
    chats: dict[str, Chat], messages: list[Message], prompt: bool
) -> None:
    expected = scalar("render")(by_page(messages), prompt)
    assert render(chats["chatml"], messages, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(conversations, plain)
def test_RE2_the_prompt_is_a_prefix_of_the_finished_turn(
    chats: dict[str, Chat], kind: str, messages: list[Message], answer: str
) -> None:
    prompt = render(chats[kind], messages, add_generation_prompt=True)
    finished = [*messages, Message("assistant", answer)]
    whole = render(chats[kind], finished, add_generation_prompt=False)
    if kind != "think" or messages[-1].role != "assistant":
        assert whole.startswith(prompt) and len(whole) > len(prompt)
    assert "assistant" in prompt[len(render(chats[kind], messages, add_generation_prompt=False)) :]


@pytest.mark.parametrize("kind", KINDS)
@given(conversations)
def test_RE3_tokenising_adds_and_loses_nothing(
    chats: dict[str, Chat], kind: str, messages: list[Message]
) -> None:
    chat = chats[kind]
    text = render(chat, messages, add_generation_prompt=True)
    ids = prompt_ids(chat, messages)
    assert ids == encode(chat, text)
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == text
    for i, token in chat.tokenizer.get_added_tokens_decoder().items():
        assert ids.count(i) == text.count(token.content)


@given(conversations)
def test_RE4_a_conversation_can_be_read_back(chats: dict[str, Chat], messages: list[Message]) -> None:
    start, end = (namespace("render")[name] for name in ("START", "END"))
    read = []
    for turn in render(chats["chatml"], messages, add_generation_prompt=False).split(end + "\n")[:-1]:
        role, _, body = turn.removeprefix(start).partition("\n")
        content, *calls = body.split("<call>")
        read.append(Message(role, content, tuple(json.loads(c.removesuffix("</call>")) for c in calls)))
    assert read == messages


def test_RE5_a_function_of_the_messages_alone(chats: dict[str, Chat], tmp_path: Path) -> None:
    for chat in chats.values():
        texts = {render(chat, TRAJECTORY, add_generation_prompt=True) for _ in range(3)}
        (text,) = texts | {render(chat, list(TRAJECTORY), add_generation_prompt=True)}
        assert "None" not in text and "tool_calls" not in text
    shown = "{% for m in messages %}{% for key in m %}{{ key }},{% endfor %};{% endfor %}"
    messages = [
        Message("user", ""),
        Message("assistant", "b", (CALL,)),
        Message("tool", "c", (), "ledger", "7"),
    ]
    fields = render(replace(chats["chatml"], template=shown), messages, add_generation_prompt=False)
    assert fields == "role,content,;role,content,tool_calls,;role,content,name,tool_call_id,;"
    with pytest.raises(ValueError, match="has no chat template"):
        render(replace(chats["chatml"], template=None), messages, add_generation_prompt=False)


@given(conversations, plain)
def test_RS1_shown_and_trained_are_what_the_page_says(
    chats: dict[str, Chat], messages: list[Message], answer: str
) -> None:
    chat, messages = chats["chatml"], [*messages, Message("assistant", answer)]
    found = []
    for sample in record_samples(chat, record_of(*messages)):
        given_ids = [i for i, on in zip(sample.ids, sample.mask, strict=True) if not on]
        found.append((chat.tokenizer.decode(given_ids, skip_special_tokens=False), trained(chat, sample)))
    assert found == scalar("record_samples")(by_page(messages))


@pytest.mark.parametrize("kind", KINDS)
@given(plain, plain)
def test_RS2_what_others_say_is_never_supervised(
    chats: dict[str, Chat], kind: str, one: str, other: str
) -> None:
    chat = chats[kind]

    def supervised(words: str) -> list[str]:
        messages = [replace(m, content=words) if m.role != "assistant" else m for m in TRAJECTORY]
        return [trained(chat, sample) for sample in record_samples(chat, record_of(*messages))]

    assert supervised(one) == supervised(other) == supervised("482 and 365")


@pytest.mark.parametrize("kind", ["chatml", "header"])
def test_RS3_text_call_answer_and_stop_token_are_supervised(chats: dict[str, Chat], kind: str) -> None:
    chat, call = chats[kind], json.dumps(CALL, ensure_ascii=False)
    ends = {
        "chatml": (f"<call>{call}</call><|im_end|>", "<|im_end|>"),
        "header": (f"[{call}]<|eom|>", "<|eot|>"),
    }
    expected = [
        "<think>ask</think>\nI ask." + ends[kind][0],
        "<think>482+365</think>\n847" + ends[kind][1],
        "hello" + ends[kind][1],
    ]
    samples = record_samples(chat, record_of(*TRAJECTORY))
    assert [trained(chat, sample) for sample in samples] == expected


@pytest.mark.parametrize("kind", KINDS)
@given(st.integers(0, 6))
def test_RS4_what_is_given_is_never_trained_on(chats: dict[str, Chat], kind: str, context: int) -> None:
    chat = chats[kind]
    every = record_samples(chat, record_of(*TRAJECTORY))
    later = record_samples(chat, replace(record_of(*TRAJECTORY), context=context))
    turns_left = sum(m.role == "assistant" for m in TRAJECTORY[context:])
    assert later == every[-turns_left:] and turns_left >= 1
    if kind == "chatml":
        assert len(scalar("record_samples")(by_page(TRAJECTORY), context)) == turns_left


@pytest.mark.parametrize("kind", KINDS)
@given(conversations, plain)
def test_RS5_the_masked_tokens_are_the_samplers_prompt(
    chats: dict[str, Chat], kind: str, messages: list[Message], answer: str
) -> None:
    chat = chats[kind]
    asked = [m for m in messages if m.role != "assistant"] or [Message("user", "a")]
    (sample,) = record_samples(chat, record_of(*asked, Message("assistant", answer)))
    before = prompt_ids(chat, asked)
    assert list(sample.ids[: len(before)]) == before
    assert sample.mask == (False,) * len(before) + (True,) * (len(sample.ids) - len(before))
    assert [i for i in sample.ids[len(before) :] if i in chat.stop_ids] == [sample.ids[-1]]


# ---- decoding ----


def test_decode_drops_only_the_final_stop_token(chats: dict[str, Chat]) -> None:
    chat = chats["header"]
    assert decode(chat, [259, 267]) == decode(chat, [259, 268]) == decode(chat, [259]) == "hello"
    assert decode(chat, [259, 267, 267]) == "hello<|eot|>"
    assert decode(chat, [264, 259, 265]) == "<|bos|>hello<|start|>"
    assert decode(chat, [267]) == decode(chat, []) == ""


def test_a_character_may_be_split_over_tokens(chats: dict[str, Chat]) -> None:
    chat = chats["chatml"]
    text = "€5 für 🧮"
    ids = encode(chat, text)
    assert len(ids) == len(text.encode())  # no merges among them: one token a byte
    assert decode(chat, ids) == text
    assert decode(chat, ids[:2]) == "\ufffd"  # a character that is not complete is no error
    (sample,) = record_samples(chat, record_of(Message("user", text), Message("assistant", text)))
    assert trained(chat, sample) == text + "<|im_end|>"


# ---- templates that break the contract ----


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("<|im_end|>", "<end>"), "without a stop token; the stop tokens are ['<|im_end|>']"),
        (
            CHATML.replace("<|im_end|>\\n", "<|im_end|>\\nbye"),
            "text behind its first stop token: '\\nbye'",
        ),
        (CHATML + "{% if add_generation_prompt %}<think>{% endif %}", "behind its own generation prompt"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        ("{{ messages[7].content.x.y }}", "refuses the messages"),
        ("{{ messages.append(1) }}", "refuses the messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages"),
        ("{{ 1 // 0 }}", "refuses the messages"),
    ],
)
def test_a_template_that_breaks_the_contract_is_named(tmp_path: Path, template: str, message: str) -> None:
    chat = write_chat(
        tmp_path, byte_tokenizer(["<|im_start|>", "<|im_end|>"]), template, eos_token="<|im_end|>"
    )
    with pytest.raises(ValueError) as error:
        record_samples(chat, record_of(Message("user", "a"), Message("assistant", "b")))
    assert str(error.value).startswith("chats.jsonl:12: ")
    assert message in str(error.value)


def test_records_without_a_turn_are_refused(chats: dict[str, Chat]) -> None:
    with pytest.raises(ValueError, match=r"chats\.jsonl:12: the record has no assistant turn"):
        record_samples(chats["chatml"], record_of(Message("user", "a")))
    with pytest.raises(ValueError, match=r"chats\.jsonl:12: the record has no messages to answer"):
        prompt_messages(record_of(text="a"))
    with pytest.raises(ValueError, match="no messages to answer"):
        prompt_messages(record_of(Message("assistant", "a")))


def test_prompt_messages() -> None:
    assert prompt_messages(record_of(*TRAJECTORY)) == TRAJECTORY[:-1]
    assert prompt_messages(record_of(*TRAJECTORY[:4])) == TRAJECTORY[:4]


def test_what_the_tokenizer_cannot_write_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[UNK]", "<e>", "Q", "A", "yes"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ 'Q ' if m.role == 'user' else '' }}{{ m.content + ' ' }}"
    template += "{{ 'A ' if m.role == 'user' else '<e>' }}{% endfor %}"
    chat = write_chat(tmp_path, tokenizer, template, eos_token="<e>")
    (sample,) = record_samples(chat, record_of(Message("user", "maybe"), Message("assistant", "yes")))
    assert sample == Sample((2, 0, 3, 4, 1), (False, False, False, True, True))
    with pytest.raises(
        ValueError, match=r"chats\.jsonl:12: messages\[1\]: the tokenizer has no token for a part"
    ):
        record_samples(chat, record_of(Message("user", "yes"), Message("assistant", "no")))


# ---- the hub's templates ----


def test_what_hub_templates_use(tmp_path: Path) -> None:
    template = (
        "{%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }};{% endfor %}\n"
        "    {%- if tools is not none or documents is not none %}no{% endif %}\n"
        "{{- strftime_now('%Y')[:2] }} {{ messages[1].tool_calls | tojson(indent=1) }}{{ bos_token }}"
        "{%- generation %}!{% endgeneration -%}   ?"
    )
    chat = write_chat(tmp_path, byte_tokenizer(["<e>"]), template, eos_token="<e>")
    messages = [Message("user", "a"), Message("assistant", "b", ({"name": "é<"},)), Message("user", "c")]
    text = render(chat, messages, add_generation_prompt=False)
    assert text == 'a;b;20 [\n {\n  "name": "é<"\n }\n]!?'


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_with_transformers(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
    chat = make_chat(tmp_path, kind)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for end in range(2, len(TRAJECTORY) + 1):
        messages = TRAJECTORY[:end]
        plain = [
            {"role": m.role, "content": m.content, "tool_calls": list(m.tool_calls) or None} for m in messages
        ]
        for prompt in (True, False):
            text = theirs.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)
            assert render(chat, messages, add_generation_prompt=prompt) == text
        ids = theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert prompt_ids(chat, messages) == ids


def test_template_sources_in_order(tmp_path: Path) -> None:
    chat = make_chat(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]

    def reload(**extra: object) -> Chat:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **extra}))
        return load_chat(tmp_path)

    assert reload(chat_template=THINK).template == CHATML  # the file wins
    (tmp_path / "chat_template.jinja").unlink()
    assert reload(chat_template=THINK).template == THINK
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": HEADER}]
    assert reload(chat_template=named).template == HEADER
    with pytest.raises(ValueError, match="chat_template must be a text or have a 'default'"):
        reload(chat_template=named[:1])
    with pytest.raises(ValueError, match=r"does not parse, line 2"):
        reload(chat_template="\n{% if %}")
    none = reload()
    assert none.template is None and none.version != chat.version
    with pytest.raises(ValueError, match="has no chat template"):
        render(none, [Message("user", "a")], add_generation_prompt=True)
    assert record_samples(none, record_of(text="hello")) == [Sample((259, 265), (False, True))]


def test_special_tokens_and_stop_ids(tmp_path: Path) -> None:
    make_chat(tmp_path)
    written = {"content": "<|im_end|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": written, "bos_token": None}))
    assert (load_chat(tmp_path).eos_token, load_chat(tmp_path).stop_ids) == ("<|im_end|>", (265,))
    (tmp_path / "config.json").write_text('{"eos_token_id": 264}')
    assert load_chat(tmp_path).stop_ids == (264,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [265, 264, 265]}')
    assert load_chat(tmp_path).stop_ids == (265, 264)
    for wrong in ("[]", "266", '["<|im_end|>"]', "true"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {wrong}}}')
        with pytest.raises(
            ValueError, match=r"generation_config\.json: eos_token_id .* is not in tokenizer\.json"
        ):
            load_chat(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: must hold a JSON object"):
        load_chat(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        load_chat(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(ValueError, match=r"eos_token '</s>' is not a token of tokenizer\.json"):
        load_chat(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="names no stop token"):
        load_chat(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        load_chat(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_chat(tmp_path)


def test_padding_and_truncation_of_a_tokenizer_file_are_off(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(["<e>"])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    chat = write_chat(tmp_path, tokenizer, None, eos_token="<e>")
    assert len(encode(chat, "abcdefghij")) == 10 and len(encode(chat, "a")) == 1


def test_version_follows_template_and_tokenizer(tmp_path: Path) -> None:
    chats = [make_chat(tmp_path / kind, kind) for kind in KINDS]
    assert len({chat.version for chat in chats}) == 3
    assert all(len(chat.version) == 16 and int(chat.version, 16) >= 0 for chat in chats)
    assert make_chat(tmp_path / "again", "chatml").version == chats[0].version


@pytest.mark.parametrize("place", [TEMPLATE, CONFIG])
def test_a_template_is_copied_to_both_of_its_places(tmp_path: Path, place: str) -> None:
    """From either; twice, as a run that is exported again does; and transformers reads what is there."""
    chat = make_chat(tmp_path / "a")
    if place == TEMPLATE:
        config = json.loads((tmp_path / "a" / CONFIG).read_text())
        (tmp_path / "a" / CONFIG).write_text(
            json.dumps({k: v for k, v in config.items() if k != "chat_template"})
        )
    else:
        (tmp_path / "a" / TEMPLATE).unlink()
    for _ in range(2):
        copy_chat(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / TEMPLATE).read_text() == chat.template
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["chat_template"] == chat.template
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (tmp_path / "a/tokenizer.json").read_bytes()
    assert load_chat(tmp_path / "b").version == chat.version


def test_a_copied_template_is_one_and_the_same(tmp_path: Path) -> None:
    """Line ends, a null, no tokenizer_config.json at all, two that differ: the file wins."""
    make_chat(tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    (tmp_path / "a" / TEMPLATE).write_bytes(CHATML.replace("\n", "\r\n").encode())
    chat = load_chat(tmp_path / "a")
    for number, change in enumerate((config, config | {"chat_template": None}, None)):
        (tmp_path / "a" / CONFIG).unlink(missing_ok=True)
        if change is not None:
            (tmp_path / "a" / CONFIG).write_text(json.dumps(change))
        else:
            (tmp_path / "a/generation_config.json").write_text('{"eos_token_id": 265}')
        for _ in range(2):
            copy_chat(tmp_path / "a", copy := tmp_path / str(number))
        assert load_chat(copy).version == chat.version
        text = json.loads((copy / CONFIG).read_text())["chat_template"]
        assert text == chat.template == (copy / TEMPLATE).read_bytes().decode()


def test_copy_is_byte_for_byte(tmp_path: Path) -> None:
    chat = make_chat(tmp_path / "a", "header")
    copy_chat(tmp_path / "a", tmp_path / "b")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names == {path.name for path in (tmp_path / "b").iterdir()}
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    copied = load_chat(tmp_path / "b")
    assert (copied.version, copied.stop_ids) == (chat.version, chat.stop_ids)
    make_chat(tmp_path / "c")
    with pytest.raises(ValueError, match=r"generation_config\.json is left from another tokenizer"):
        copy_chat(tmp_path / "c", tmp_path / "b")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        copy_chat(tmp_path / "none", tmp_path / "d")
