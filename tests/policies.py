"""What the tests of ratios, surrogates and KL terms share: two policies, and a page over every slot."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from tests.ragged import normal

Batch = tuple[Tensor, Generator]
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def pair(batch: Batch, scale: float = 1.5) -> tuple[Tensor, Tensor]:
    """Log-probabilities of two policies that differ a good deal."""
    mask, generator = batch
    return -normal(generator, *mask.shape).abs(), -normal(generator, *mask.shape, scale=scale).abs()


def each(function: Callable[..., float], *tensors: Tensor, **arguments: object) -> Tensor:
    """A page's scalar function over every slot."""
    flat = zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True)
    values = [function(*slot, **arguments) for slot in flat]
    return torch.tensor(values, dtype=torch.float64).reshape(tensors[0].shape)
