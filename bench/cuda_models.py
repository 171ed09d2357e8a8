"""The models of the CUDA table, and what its rows ask of them.

Random weights in Llama's shape. 0.5 B is Qwen2.5-0.5B's: D 896, 24 layers, 14 query and 2 key/value heads,
inside 4,864, V 151,936. 1 B is Llama-3.2-1B's: D 2,048, 16 layers, 32 and 8 heads, inside 8,192, V 128,256.
Both have the embedding as head.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cuda_measure import DEVICE
from bench.inputs import token_rows
from nanopost.data.collate import Batch, collate
from nanopost.data.schema import Sample
from nanopost.models.config import LlamaConfig
from nanopost.models.llama import Llama

HALF_B = LlamaConfig(151_936, 896, 4864, 24, 14, 2, 64, 4096, tie_word_embeddings=True)
ONE_B = LlamaConfig(128_256, 2048, 8192, 16, 32, 8, 64, 8192, rope_theta=5e5, tie_word_embeddings=True)
SMALL = LlamaConfig(512, 64, 192, 2, 4, 2, 64, 512)


@torch.no_grad()
def random_llama(config: LlamaConfig, dtype: torch.dtype) -> Llama:
    """Matrices N(0, 0.02²), norms 1, on the GPU."""
    with torch.device(DEVICE):
        model = Llama(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(1.0)
    return model.to(dtype)


def copied(model: Llama, dtype: torch.dtype) -> Llama:
    """The same weights in another dtype."""
    twin = random_llama(model.config, dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def fresh_rows(rows: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random tokens that no other call gives."""
    return token_rows(rows, length, vocabulary, seed=random.randrange(2**32))


def batch_of(samples: list[Sample], device: str = DEVICE) -> Batch:
    return collate(samples, device=torch.device(device))


@torch.no_grad()
def scored(model: Llama, batch: Batch, rows: list[int] | None = None) -> Tensor:
    """The log-probs of a batch's completions, one row after the other; of some rows alone, on the CPU."""
    mask = batch.completion_mask
    logps = model.logps(batch.input_ids, batch.target_ids, mask=mask, spans=batch.spans)
    return torch.cat([logps[r][mask[r]] for r in (range(len(mask)) if rows is None else rows)]).cpu()


def seconds(call: Callable[[], object]) -> float:
    """Of one call, Python's part included, by CUDA events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
