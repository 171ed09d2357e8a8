"""Content can never forge a turn: control tokens are what the template writes, not what a message says.

A message may quote `<|im_end|>`. Encoded along with the template's own, its text would end the turn and could
open another one in any role. So before rendering every control token in a content is broken by a mark; behind
the template, what is whole is a control token and everything else, the marks taken out, is text.

Control tokens are all that a tokenizer has added to its model. What an assistant says may hold those that are
not special (`<think>`, `<tool_call>`): the model says them itself.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nanopost.data.schema import Message

MARK = "\ufdd0"  # no character: texts do not have it, templates pass it on


def mark(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[Message]:
    """The messages with their control tokens broken.

    Raises:
        ValueError: naming the message that has the mark in it.
    """
    controls, special = _controls(tokenizer, special=False), _controls(tokenizer, special=True)
    found = []
    for i, message in enumerate(messages):
        pattern = _breaks(special if message.role == "assistant" else controls)
        told = {name: _broken(value, pattern) for name, value in vars(message).items() if name != "role"}
        if MARK in json.dumps([*vars(message).values()], ensure_ascii=False):
            raise ValueError(f"messages[{i}] has the character U+{ord(MARK):X}, which no text has")
        found.append(replace(message, **told))
    return found


def unmark(text: str) -> str:
    """The text as it was."""
    return text.replace(MARK, "")


def encode_marked(tokenizer: Tokenizer, folder: Path, text: str) -> list[int]:
    """Token ids of a rendered text: its whole control tokens, and everything between them as text.

    Args:
        tokenizer: that of the folder.
        text: by a template from marked messages; without a mark it is encoded as it stands.

    Raises:
        ValueError: a tokenizer that does not take texts apart like that, or has a control token for one.
    """
    if MARK not in text:
        return tokenizer.encode(text, add_special_tokens=False).ids
    plain, harmless = _without_added(folder / "tokenizer.json"), text.replace(MARK, "x")
    if _apart(tokenizer, plain, harmless)[0] != tokenizer.encode(harmless, add_special_tokens=False).ids:
        raise ValueError(
            f"{folder}: this tokenizer reads text otherwise beside a control token; it cannot be quoted"
        )
    ids, said = _apart(tokenizer, plain, text)
    if forged := said & {tokenizer.token_to_id(token) for token in _controls(tokenizer, special=False)}:
        names = [tokenizer.id_to_token(token) for token in sorted(forged)]
        raise ValueError(f"{folder}: this tokenizer cannot write {names[0]!r} as text")
    return ids


def _apart(tokenizer: Tokenizer, plain: Tokenizer, text: str) -> tuple[list[int], set[int]]:
    """Ids of control tokens and of the texts between them; and of the texts alone."""
    ids, said = list[int](), set[int]()
    controls = _controls(tokenizer, special=False)
    for place, piece in enumerate(re.split(f"({_any(controls)})", text)):
        if place % 2:
            ids += tokenizer.encode(piece, add_special_tokens=False).ids
        else:
            found = plain.encode(unmark(piece), add_special_tokens=False).ids
            ids, said = ids + found, said | set(found)
    return ids, said


@lru_cache(maxsize=8)
def _controls(tokenizer: Tokenizer, *, special: bool) -> tuple[str, ...]:
    """The added tokens that a mark can break, the longest first."""
    added = tokenizer.get_added_tokens_decoder().values()
    found = {token.content for token in added if len(token.content) > 1 and (token.special or not special)}
    return tuple(sorted(found, key=lambda token: (-len(token), token)))


def _any(tokens: Sequence[str]) -> str:
    return "|".join(map(re.escape, tokens)) or r"(?!)"


@lru_cache
def _breaks(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """A control token, or what could become one where the template goes on behind the content."""
    begun = sorted({token[:end] for token in tokens for end in range(2, len(token))}, key=len, reverse=True)
    return re.compile(rf"{_any(tokens)}|(?:{_any(begun)})(?=\s*\Z)")


def _broken(value: Any, pattern: re.Pattern[str]) -> Any:
    """Every text in a JSON value, names of fields too, with a mark behind the first character of a match."""
    if isinstance(value, str):
        return pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
    if isinstance(value, dict):
        return {_broken(key, pattern): _broken(item, pattern) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_broken(item, pattern) for item in value)
    return value


@lru_cache(maxsize=4)
def _without_added(path: Path) -> Tokenizer:
    """The tokenizer of a file that knows no control token."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    found = Tokenizer.from_str(json.dumps(raw | {"added_tokens": [], "post_processor": None}))
    found.no_truncation()
    found.no_padding()
    return found
