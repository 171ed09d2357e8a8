"""Content can never forge a turn: control tokens are what the template writes, not what a message says.

A message may quote `<|im_end|>`. Encoded along with the template's own, its text would end the turn and could
open another one in any role. So before rendering every control token in a content is broken by a mark. Behind
the template what is whole is a control token, and everything else, the marks taken out, is text.

What is broken: in all roles the tokenizer's special tokens, but for those that only an assistant says and the
template never writes; of user and tool also its other added tokens (`<think>`, `<tool_call>`).
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from nanopost.data.schema import Message

MARK = "\ufdd0"  # no character: texts do not have it, templates pass it on


def render_marked(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    render: Callable[[Sequence[Message]], str],
    *,
    own: Collection[str],
) -> str:
    """What a template writes, with a mark in every control token that a message quotes.

    Args:
        render: the template, a function of the messages.
        own: special tokens that an assistant must not say either: the template's turns are made of them.

    Raises:
        ValueError: a message that has the mark in it or a control token of one character, by number; a
            template that makes a control token out of pieces of what messages say.
    """
    special = _tokens(tokenizer, special=True)
    patterns = {
        "assistant": _whole(tuple(token for token in special if token in own)),
        "system": _whole(special),
    }
    every, marked, split = _whole(_tokens(tokenizer, special=False)), list[Message](), list[Message]()
    single = _whole(tuple(token for token in special if len(token) == 1))
    allowed = _whole(tuple(token for token in special if token not in own))  # to an assistant
    firsts = "|".join(re.escape(letter) for letter in {token[0] for token in special}) or r"(?!)"
    for i, message in enumerate(messages):
        if MARK in json.dumps([*vars(message).values()], ensure_ascii=False):
            raise ValueError(f"messages[{i}] has the character U+{ord(MARK):X}, which no text has")
        if _broken(message, single) != message:
            raise ValueError(f"messages[{i}] has one character that is a control token, {single.pattern}")
        marked.append(_broken(message, patterns.get(message.role, every)))
        kept = f"(?!{allowed.pattern})" if message.role == "assistant" else ""
        split.append(_broken(message, re.compile(f"{kept}(?:{firsts})")))
    text = render(marked)
    if split != list(messages):
        found, bare = _frame(special, text), _frame(special, render(split))
        if found != bare:
            made = [*(Counter(found) - Counter(bare)), *(Counter(bare) - Counter(found)), *found]
            raise ValueError(f"the chat template makes {made[0]!r} out of what messages say")
    return text


def unmark(text: str) -> str:
    """The text as it was."""
    return text.replace(MARK, "")


def encode_marked(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a rendered text: its whole control tokens, and everything between them as text.

    Raises:
        ValueError: naming a control token that the tokenizer would write for text, and cannot be kept from.
    """
    controls = _tokens(tokenizer, special=False)
    of = {token: _id(tokenizer, token) for token in controls}
    known = set(of.values())
    ids, wanted = _encode(tokenizer, unmark(text)), [of[token] for token in _frame(controls, text)]
    found = [token for token in ids if token in known]
    more, quoted = Counter(found) - Counter(wanted), unmark(text) != text
    if found == wanted or not (more or quoted):
        return ids
    forged = tokenizer.id_to_token(next(iter(more or Counter(wanted) - Counter(found) or found)))
    harmless = text.replace(MARK, "x")
    ids = _apart(tokenizer, controls, text)
    beside = _apart(tokenizer, controls, harmless) != _encode(tokenizer, harmless)
    if beside or [token for token in ids if token in known] != wanted:
        raise ValueError(f"a message has {forged!r}, which this tokenizer cannot write as text")
    return ids


def _apart(tokenizer: Tokenizer, controls: tuple[str, ...], text: str) -> list[int]:
    """Control tokens by their ids, and each text between them by the tokenizer that knows none."""
    ids = list[int]()
    for place, piece in enumerate(re.split(f"({_whole(controls).pattern})", text)):
        if place % 2:
            ids.append(_id(tokenizer, piece))
        else:
            ids += _encode(_plain(tokenizer, first=not place), unmark(piece))
    return ids


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None  # it is one of its added tokens
    return found


def _frame(tokens: tuple[str, ...], text: str) -> list[str]:
    """The tokens that stand whole in a text, in their order."""
    return _whole(tokens).findall(text)


def _broken(message: Message, pattern: re.Pattern[str]) -> Message:
    """A message with a mark behind the first character of each match, in every field but its role."""

    def within(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
        if isinstance(value, dict):
            return {within(key): within(item) for key, item in value.items()}
        return type(value)(map(within, value)) if isinstance(value, list | tuple) else value

    return replace(message, **{name: within(x) for name, x in vars(message).items() if name != "role"})


@lru_cache(maxsize=16)
def _tokens(tokenizer: Tokenizer, *, special: bool) -> tuple[str, ...]:
    """What a tokenizer has added to its model, or the special ones; not runs of spaces. The longest first."""
    added = tokenizer.get_added_tokens_decoder().values()
    found = {x.content for x in added if x.content.strip() and (x.special or not special)}
    return tuple(sorted(found, key=lambda token: (-len(token), token)))


@lru_cache
def _whole(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Any of the tokens, the longest of those that begin in a place."""
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


@lru_cache(maxsize=8)
def _plain(tokenizer: Tokenizer, *, first: bool) -> Tokenizer:
    """The tokenizer without its added tokens, for the first piece of a text or for a later one."""

    def inside(value: Any) -> Any:  # what is put before the first word is not put before later pieces
        if isinstance(value, list):
            return [inside(item) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {key: inside(item) for key, item in value.items()}
        return kept | ({"prepend_scheme": "never"} if kept.get("prepend_scheme") == "first" else {})

    raw = json.loads(tokenizer.to_str()) | {"added_tokens": [], "post_processor": None}
    return Tokenizer.from_str(
        json.dumps(raw if first else raw | {"pre_tokenizer": inside(raw["pre_tokenizer"])})
    )
