"""What stands beside a tokenizer in a model folder: names of special tokens, the ids that end a turn."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"


def read_token(folder: Path, config: dict[str, Any], key: str, tokenizer: Tokenizer) -> str | None:
    """The token that tokenizer_config.json has under a key; one that the tokenizer lacks is refused."""
    token = config.get(key)
    token = token.get("content") if isinstance(token, dict) else token
    if token is not None and (not isinstance(token, str) or tokenizer.token_to_id(token) is None):
        raise ValueError(f"{folder / CONFIG}: {key} {token!r} is not a token of tokenizer.json")
    return token


def read_stop_ids(folder: Path, tokenizer: Tokenizer, eos_token: str | None) -> tuple[int, ...]:
    """The ids that end a turn: generation_config.json's, else config.json's, else EOS."""
    for name in ("generation_config.json", "config.json"):
        found = read_json(folder / name).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not ids or any(type(i) is not int or tokenizer.id_to_token(i) is None for i in ids):
                raise ValueError(f"{folder / name}: eos_token_id {found!r} is not in tokenizer.json")
            return tuple(dict.fromkeys(ids))
    if eos_token is None:
        raise ValueError(f"{folder} names no stop token: no eos_token_id, and no eos_token in {CONFIG}")
    return (token_id(tokenizer, eos_token),)


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must be there."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"{token!r} is not a token of the tokenizer")
    return found


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Indented, texts as they are."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {found!r}")
    return found
