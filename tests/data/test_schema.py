"""Records: every kind reads into one form, everything else is an error that names file and line."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopost.data.schema import Message, parse_record, read_jsonl

text = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)
user, assistant = Message("user", "2 + 2?"), Message("assistant", "4")


def as_line(obj: object) -> bytes:
    return json.dumps(obj, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("obj", "messages"),
    [
        ({"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}, None),
        ({"prompt": "2 + 2?", "completion": "4"}, None),
        ({"question": "2 + 2?", "answer": "4"}, None),
        (
            {
                "prompt": [{"role": "user", "content": "2 + 2?"}],
                "completion": [{"role": "assistant", "content": "4"}],
            },
            None,
        ),
        (
            {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "2 + 2?"}]},
            (Message("system", ""), user),
        ),
    ],
)
def test_every_kind_becomes_messages(obj: dict, messages: tuple | None) -> None:
    record = parse_record(obj, file="a.jsonl", line=7)
    assert record.messages == (messages or (user, assistant))
    assert (record.text, record.file, record.line) == (None, "a.jsonl", 7)


def test_text_answer_and_meta() -> None:
    plain = parse_record({"text": " two \n", "source": "web", "id": 3}, file="f", line=1)
    assert (plain.text, plain.messages, plain.meta) == (" two \n", (), {"source": "web", "id": 3})
    maths = parse_record({"question": "q", "answer": "1 + 1\n#### 2", "split": "train"}, file="f", line=1)
    assert (maths.answer, maths.meta) == ("1 + 1\n#### 2", {"split": "train"})
    prompt = {"messages": [{"role": "user", "content": "q"}], "answer": {"total": 5}, "level": 2}
    record = parse_record(prompt, file="f", line=1)
    assert (record.answer, record.meta) == ({"total": 5}, {"level": 2})
    assert parse_record({"text": "t"}, file="f", line=1).answer is None


def test_prompt_turns_are_context() -> None:
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    record = parse_record(
        {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}, file="f", line=1
    )
    assert [message.content for message in record.messages] == ["a", "b", "c", "d"]
    assert record.context == 3
    assert parse_record({"messages": prompt}, file="f", line=1).context == 0


def test_tool_calls_and_results() -> None:
    call = {"type": "function", "function": {"name": "ledger", "arguments": {"quarter": "Q3"}}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "847", "name": "ledger", "tool_call_id": "c1"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "ledger"}]},
        {"role": "assistant", "content": "done", "tool_calls": None},
    ]
    read = parse_record({"messages": messages}, file="f", line=1).messages
    assert read[0] == Message("assistant", "", (call,))
    assert read[1] == Message("tool", "847", (), "ledger", "c1")
    assert read[2].tool_calls == ({"name": "ledger"},)
    assert read[3] == Message("assistant", "done")


def chat_line(**message: object) -> bytes:
    return as_line({"messages": [{"role": "user", "content": "x"}, message]})


BAD = [
    (b"\xff{}", "not UTF-8: byte 0xff at column 1"),
    (b'{"text": "a\xc3"}', "not UTF-8"),
    (b"", "the line is empty"),
    (b"  \t", "the line is empty"),
    (b"{'text': 1}", "not JSON"),
    (b'{"text": "a"} {"text": "b"}', "not JSON"),
    (b'{"text": "a", "text": "b"}', "duplicate key 'text'"),
    (b'{"messages": [{"role": "user", "role": "user", "content": "x"}]}', "duplicate key 'role'"),
    (b'{"text": "a", "score": NaN}', "NaN"),
    (b'{"text": "a", "score": -Infinity}', "-Infinity"),
    (b'{"text": "\\ud83d"}', "surrogate"),
    (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    (b"[1]", "a record is a JSON object, got a list"),
    (b"3", "got a number"),
    (b"null", "got null"),
    (b"{}", "of no known kind"),
    (b'{"instruction": "x", "output": "y"}', "of no known kind"),
    (b'{"answer": "y"}', "of no known kind"),
    (b'{"text": "x", "messages": []}', "two kinds at once (messages and text)"),
    (b'{"prompt": "x", "completion": "y", "question": "z"}', "two kinds at once"),
    (b'{"prompt": "x"}', "; a prompt alone is written as messages with a user turn"),
    (b'{"completion": "x"}', "'prompt' is missing: prompt and completion come together"),
    (b'{"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}', "prompt must be a list"),
    (b'{"prompt": [{"role": "user", "content": "x"}], "completion": "y"}', "completion must be a list"),
    (
        b'{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "user", "content": "y"}]}',
        "no assistant",
    ),
    (b'{"prompt": "x", "completion": " "}', "completion is empty"),
    (b'{"question": "x"}', "answer must be a string, got null"),
    (b'{"question": "x", "answer": 3}', "answer must be a string, got a number"),
    (b'{"question": "", "answer": "3"}', "question is empty"),
    (b'{"text": ""}', "text is empty"),
    (b'{"text": null}', "text must be a string"),
    (b'{"messages": []}', "messages must be a list of at least one message, got an empty list"),
    (b'{"messages": {"role": "user"}}', "got an object"),
    (b'{"messages": ["hi"]}', "messages[0] must be an object, got a string"),
    (chat_line(role="developer", content="y"), "messages[1] has the unknown role 'developer'"),
    (chat_line(content="y"), "messages[1] has the unknown role None"),
    (chat_line(role=["user"], content="y"), "messages[1] has the unknown role ['user']"),
    (chat_line(role="assistant", content=""), "messages[1] is an empty assistant turn"),
    (chat_line(role="assistant", content=" \n", tool_calls=[]), "messages[1] is an empty assistant turn"),
    (chat_line(role="assistant", content=None), "messages[1].content must be a string, got null"),
    (chat_line(role="user", content=[{"type": "text"}]), "messages[1].content must be a string, got a list"),
    (chat_line(role="user", content=True), "got a boolean"),
    (chat_line(role="user", content="y", weight=0), "messages[1] has the unknown key 'weight'"),
    (chat_line(role="user", content="y", tool_calls=[{"name": "f"}]), "only the assistant calls tools"),
    (chat_line(role="assistant", content="y", tool_calls=[{"id": 1}]), "tool_calls must be a list"),
    (chat_line(role="assistant", content="y", tool_calls={"name": "f"}), "tool_calls must be a list"),
    (chat_line(role="tool", content="y", tool_call_id=3), "messages[1].tool_call_id must be a string"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_names_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n" + b'{"text": "good"}\n')
    with pytest.raises(ValueError) as error:
        read_jsonl(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)


def test_an_empty_or_missing_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.jsonl:1: the file is empty"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "none.jsonl")


@given(st.lists(text, min_size=1, max_size=4), st.booleans(), st.sampled_from([b"\n", b"\r\n"]))
def test_texts_come_back_as_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], ends: bool, newline: bytes
) -> None:
    # among them U+2028 and U+0085, at which Python's splitlines would cut a line in two
    path = tmp_path_factory.mktemp("texts") / "t.jsonl"
    lines = [as_line({"text": t}) for t in [*texts, "a\u2028b\x85c"]]
    path.write_bytes(newline.join(lines) + (newline if ends else b""))
    records = read_jsonl(path)
    assert [record.text for record in records] == [*texts, "a\u2028b\x85c"]
    assert [record.line for record in records] == list(range(1, len(texts) + 2))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_json_is_a_record_or_a_named_error(obj: object) -> None:
    for candidate in (
        obj,
        {"messages": obj},
        {"messages": [obj]},
        {"prompt": obj, "completion": obj},
        {"text": obj},
    ):
        try:
            record = parse_record(candidate, file="f.jsonl", line=3)
        except ValueError as error:
            assert str(error).startswith("f.jsonl:3: ")
        else:
            assert bool(record.messages) != (record.text is not None)
