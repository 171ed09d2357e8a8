"""A real model, small enough for float64: 2 layers, grouped queries, a head width that is not hidden / heads."""

import dataclasses
from pathlib import Path

import torch

from nanopost.models.llama import Llama, LlamaConfig
from nanopost.models.weights import random_model, write_config

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
    folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 12.0, **changes
) -> Llama:
    """Random weights, `scale` times the usual ones, so that distributions are far from uniform."""
    model = random_model(tiny_folder(folder, dtype=dtype, **changes), seed=seed, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model
