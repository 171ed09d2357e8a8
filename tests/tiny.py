"""Real models, small enough for float64: 2 layers, grouped queries, a head width that is not hidden / heads;
and hub folders with a tokenizer and a chat template around them.
"""

import dataclasses
import json
import random
from pathlib import Path

import torch

from nanopost.models.config import LlamaConfig
from nanopost.models.llama import Llama
from nanopost.models.weights import random_model, save_model, write_config
from tests.chat_fixtures import make_chat

TINY = LlamaConfig(
    vocab_size=23,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=64,
    rope_theta=500.0,
)


def tiny_folder(
    folder: Path, *, dtype: torch.dtype = torch.float64, stop_ids: tuple[int, ...] = (1,), **changes
) -> Path:
    """A folder with the config alone, `changes` put into TINY."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(dataclasses.replace(TINY, **changes), folder, dtype=dtype, stop_ids=stop_ids)
    return folder


def tiny_model(
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 2.0, **changes
) -> Llama:
    """Random weights, `scale` times the usual ones, so that distributions are far from uniform."""
    model = random_model(tiny_folder(folder, dtype=dtype, **changes), seed=seed, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model


def hub_folder(folder: Path, *, max_position_embeddings: int = 256, seed: int = 0, **changes) -> Path:
    """A small Llama folder as the hub has them: config, random weights, tokenizer, ChatML template."""
    chat = make_chat(folder)
    config = dataclasses.replace(
        TINY,
        vocab_size=chat.tokenizer.get_vocab_size(),
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        **changes,
    )
    write_config(config, folder, dtype=torch.float32, stop_ids=chat.stop_ids)
    model = random_model(folder, seed=seed)
    save_model(config, model.state_dict(), folder, stop_ids=chat.stop_ids)
    return folder


def write_chats(path: Path, count: int, *, seed: int = 0) -> Path:
    """Single-turn chats of ragged lengths with an answer, as JSON lines."""
    rng, lines = random.Random(seed), []
    for _ in range(count):
        number = rng.randint(0, 9)
        words = " ".join(rng.choice(("add", "one", "two", "to")) for _ in range(rng.randint(1, 6)))
        messages = [{"role": "user", "content": words}, {"role": "assistant", "content": f"it is {number}"}]
        lines.append(json.dumps({"messages": messages, "answer": str(number)}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
