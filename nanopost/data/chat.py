"""Chat: a model folder's own template and tokenizer, and the one contract between training and sampling.

The sampler shows the model `render(messages, add_generation_prompt=True)` and stops at a stop token. So the
tokens to train on are exactly those the sampler would have to emit: for each assistant turn, the context
inference would show, then the rest of the rendered turn up to and including its stop token. Nothing else is
supervised, tool results least of all. The context is rendered anew for every turn, as some templates drop the
reasoning of earlier ones. Encoding adds no special tokens: the template has written them already.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer

from nanopost.data.chat_files import (
    CONFIG,
    TEMPLATE,
    read_json,
    read_stop_ids,
    read_token,
    token_id,
    write_json,
)
from nanopost.data.markers import encode_marked, render_marked, unmark
from nanopost.data.schema import Message, Record, Sample
from nanopost.data.template import compile_template, read_template, run_template, write_template

FILES = f"""tokenizer.json {CONFIG} {TEMPLATE} generation_config.json special_tokens_map.json
added_tokens.json vocab.json merges.txt tokenizer.model""".split()


@dataclass(frozen=True)
class Chat:
    """A tokenizer, its template (None: text only), the ids that end a turn, and a version over both texts."""

    folder: Path
    tokenizer: Tokenizer
    template: str | None
    bos_token: str | None
    eos_token: str | None
    stop_ids: tuple[int, ...]
    version: str


def load_chat(folder: str | Path) -> Chat:
    """Read tokenizer, template and stop ids of a model folder in hub format.

    Args:
        folder: holds tokenizer.json; tokenizer_config.json names BOS and EOS. The template is
            chat_template.jinja, else tokenizer_config.json's `chat_template` (a text, or several by name: the
            "default"). The stop ids are generation_config.json's `eos_token_id` (one or several), else
            config.json's, else EOS.
    Returns: a Chat; `version` is the first 16 hex digits of a SHA-256 over template and tokenizer.
    Raises: ValueError naming the file and what is wrong or missing in it.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json")
    source = (folder / "tokenizer.json").read_text(encoding="utf-8")
    try:
        tokenizer = Tokenizer.from_str(source)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(f"{folder / 'tokenizer.json'}: not a tokenizer: {error}") from error
    tokenizer.no_truncation()  # a tokenizer file may carry either, and both change the ids in silence
    tokenizer.no_padding()
    config = read_json(folder / CONFIG)
    template = read_template(folder, config)
    if template is not None:
        compile_template(template, str(folder))  # a broken one is refused here, not at the first record
    bos_token, eos_token = (read_token(folder, config, key, tokenizer) for key in ("bos_token", "eos_token"))
    stop_ids = read_stop_ids(folder, tokenizer, eos_token)
    version = sha256(f"{template}\0{source}".encode()).hexdigest()[:16]
    return Chat(folder, tokenizer, template, bos_token, eos_token, stop_ids, version)


def write_chat(
    folder: str | Path,
    tokenizer: Tokenizer,
    template: str | None,
    *,
    bos_token: str | None = None,
    eos_token: str,
) -> Chat:
    """Write tokenizer, names of its special tokens and template, if any; return what `load_chat` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = {"bos_token": bos_token, "eos_token": eos_token, "tokenizer_class": "PreTrainedTokenizerFast"}
    names["chat_template"] = template
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(folder / CONFIG, {key: value for key, value in names.items() if value is not None})
    if template is not None:
        write_template(folder, template)
    return load_chat(folder)


def copy_chat(source: str | Path, target: str | Path) -> None:
    """Copy every tokenizer, template and generation file to another model folder, byte for byte.

    A template is written in both of its places, a file of its own and a text in tokenizer_config.json: some
    readers know only one of them.
    """
    source, target = Path(source), Path(target)
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"{source} has no tokenizer.json")
    template = read_template(source, config := read_json(source / CONFIG))
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        elif (target / name).exists() and (name not in (CONFIG, TEMPLATE) or template is None):
            raise ValueError(f"{target / name} is left from another tokenizer: {source} has no {name}")
    if template is not None:
        write_template(target, template)
        if not isinstance(config.get("chat_template"), list) and config.get("chat_template") != template:
            write_json(target / CONFIG, config | {"chat_template": template})


def render(chat: Chat, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The text of a conversation as the model's template writes it. Page: docs/losses/render.md"""
    if chat.template is None:
        raise ValueError(f"{chat.folder} has no chat template: no chat_template.jinja, none in {CONFIG}")
    return run_template(
        chat.template,
        str(chat.folder),
        messages=[{k: v for k, v in vars(m).items() if v or k == "content"} for m in messages],
        add_generation_prompt=add_generation_prompt,
        bos_token=chat.bos_token,
        eos_token=chat.eos_token,
    )


def turn_tokens(chat: Chat) -> set[str]:
    """The special tokens that turns are made of: those the template writes, BOS, EOS and the stop tokens."""
    ends = {chat.bos_token, chat.eos_token, *map(chat.tokenizer.id_to_token, chat.stop_ids)}
    special = {x.content for x in chat.tokenizer.get_added_tokens_decoder().values() if x.special}
    return {token for token in special if token in ends or token in (chat.template or "")}


def encode(chat: Chat, text: str) -> list[int]:
    """Token ids of the text as it stands: special tokens written in it are read as such, none is added."""
    return chat.tokenizer.encode(text, add_special_tokens=False).ids


def decode(chat: Chat, ids: Sequence[int]) -> str:
    """The text of the ids, without the stop token that ends them; every other special token stays visible."""
    end = len(ids) - 1 if len(ids) and ids[-1] in chat.stop_ids else len(ids)
    return chat.tokenizer.decode(list(ids[:end]), skip_special_tokens=False)


def prompt_ids(chat: Chat, messages: Sequence[Message]) -> list[int]:
    """What the sampler shows the model before it answers."""
    ids = encode_marked(chat.tokenizer, _render_marked(chat, messages, add_generation_prompt=True))
    if chat.bos_token is not None and ids[:2] == [token_id(chat.tokenizer, chat.bos_token)] * 2:
        raise ValueError(f"the chat template of {chat.folder} starts with {chat.bos_token!r} twice")
    return ids


def prompt_messages(record: Record) -> tuple[Message, ...]:
    """The messages to answer: a record's own prompt, else those before a last assistant turn, else all."""
    answered = bool(record.messages) and record.messages[-1].role == "assistant"
    messages = record.messages[: record.context or len(record.messages) - answered]
    if not messages:
        raise ValueError(f"{record.file}:{record.line}: the record has no messages to answer")
    return messages


def record_samples(chat: Chat, record: Record) -> list[Sample]:
    """The training samples of a record: one for each assistant turn, or one for a plain text.

    Args:
        chat: template, tokenizer and stop ids.
        record: its first `context` messages are never trained on; a text is framed by BOS (if any) and EOS.
    Returns: samples whose mask is true on the tokens the sampler would have to emit, stop token included.
    Raises: ValueError `file:line: ...` when the template does not continue its own generation prompt, when a
        turn has no stop token or text behind it, or when its tokens do not decode to its text.
    Page: docs/losses/record_samples.md
    """
    place = f"{record.file}:{record.line}"
    try:
        if record.text is not None:
            return [replace(_text_sample(chat, record.text), place=place)]
        turns = [i for i, m in enumerate(record.messages) if m.role == "assistant" and i >= record.context]
        if not turns:
            raise ValueError("the record has no assistant turn: nothing to train on")
        return [replace(_turn_sample(chat, record.messages[: i + 1]), place=place) for i in turns]
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _turn_sample(chat: Chat, messages: Sequence[Message]) -> Sample:
    """The last message: its context as the sampler shows it, then what the sampler must emit."""
    where, tokenizer = f"messages[{len(messages) - 1}]", chat.tokenizer
    context = _render_marked(chat, messages[:-1], add_generation_prompt=True)
    text = _render_marked(chat, messages, add_generation_prompt=False)
    if not text.startswith(context):
        raise ValueError(f"{where}: the template does not write it behind its own generation prompt")
    stops = [tokenizer.id_to_token(i) or "" for i in chat.stop_ids]
    ends = [(at, -len(stop)) for stop in stops if (at := text.find(stop, len(context))) >= 0]
    if not ends:
        raise ValueError(f"{where}: the template ends it without a stop token; the stop tokens are {stops}")
    start, length = min(ends)  # the first one, and of two that start together the longer
    end = start - length
    if text[end:].strip():
        raise ValueError(f"{where}: there is text behind its first stop token: {unmark(text[end:])[:60]!r}")
    before, joint = prompt_ids(chat, messages[:-1]), encode_marked(chat.tokenizer, text[:end])
    after = joint[len(before) :]
    if joint[: len(before)] != before:
        # A token straddles the boundary; the sampler, behind the context, emits the completion's own tokens.
        after = encode_marked(chat.tokenizer, text[len(context) : end])
        if tokenizer.decode(before + after, skip_special_tokens=False) != unmark(text[:end]):
            raise ValueError(f"{where}: the tokens of context and completion do not decode to their text")
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None and tokenizer.token_to_id(unknown) in after:
        raise ValueError(
            f"{where}: the tokenizer has no token for a part of {unmark(text[len(context) : end])!r}"
        )
    if [i for i in after if i in chat.stop_ids] != after[-1:]:
        raise ValueError(f"{where}: its tokens do not end with their only stop token")
    return Sample(tuple(before + after), (False,) * len(before) + (True,) * len(after))


def _render_marked(chat: Chat, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """`render`, with a mark in every control token that a message quotes (`markers.py`)."""
    written = partial(render, chat, add_generation_prompt=add_generation_prompt)
    return render_marked(chat.tokenizer, messages, written, own=turn_tokens(chat))


def _text_sample(chat: Chat, text: str) -> Sample:
    if chat.eos_token is None:
        raise ValueError(f"{chat.folder} names no eos_token to end a text with")
    bos = [] if chat.bos_token is None else [token_id(chat.tokenizer, chat.bos_token)]
    ids, eos = encode(chat, text), token_id(chat.tokenizer, chat.eos_token)
    if ids[-1:] == [eos] or (bos and ids[:1] == bos):
        raise ValueError("the text carries its own BOS or EOS, and the frame would double it")
    # Nothing predicts the first token of a sequence: without a BOS it is the text's own.
    return Sample((*bos, *ids, eos), (False,) + (True,) * (len(bos) + len(ids)))
