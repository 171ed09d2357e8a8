"""NF4: weights in four bits, of which sixteen levels are quantiles of the normal distribution (QLoRA's base).

A tensor is read row by row as one long list and cut into blocks of 64; each block is divided by its largest
absolute value, its scale, and each weight replaced by the nearest level. The scales are then quantised too,
to eight bits: 4 + 8/64 + 32/(64·256) = 4.127 bits a weight.

Reference: Dettmers et al. 2023 (QLoRA), §3 and appendix E.
"""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopost.losses.checks import check_count, check_finite, wide

# How far into the normal's tail ±1 stand: 1 − (1/32 + 1/30)/2, in the digits the published levels come from.
OFFSET = 0.9677083


def nf4_levels() -> tuple[float, ...]:
    """The sixteen levels, ascending: quantiles at even steps of probability, divided by the largest.

        0;   Q(o − (o − ½)·i/8), i = 0…7;   −Q(o − (o − ½)·i/7), i = 0…6;   over Q(o)

    Seven levels below zero, an exact zero, eight above it: so 0 is a level and both ends are ±1.
    Returns: −1, −.6962, −.5251, …, 0, .0796, …, .7230, 1.
    """
    quantile = NormalDist().inv_cdf
    above = [quantile(OFFSET - (OFFSET - 0.5) * i / 8) for i in range(8)]
    below = [-quantile(OFFSET - (OFFSET - 0.5) * i / 7) for i in range(7)]
    return tuple(level / max(above) for level in sorted([*below, 0.0, *above]))


LEVELS = nf4_levels()
PAIRS = [(LEVELS[byte // 16], LEVELS[byte % 16]) for byte in range(256)]  # of the two codes in a byte
BORDERS = tuple((low + high) / 2 for low, high in pairwise(LEVELS))


def bits_per_weight(block_size: int = 64, scale_block_size: int | None = 256) -> float:
    """Bits a weight takes: 4 + 8/b + 32/(b·b₂), or 4 + 32/b when the scales stay in float32 (None)."""
    if scale_block_size is None:
        return 4 + 32 / block_size
    return 4 + 8 / block_size + 32 / (block_size * scale_block_size)


def quantize_nf4(weight: Tensor, *, block_size: int = 64) -> tuple[Tensor, Tensor]:
    """Weights to codes of four bits, and a scale for each block.

        s = max |w| over the block,   code = argmin_i |w/s − level_i|

    Blocks run over the tensor read row by row, so they cross rows; the last one may be shorter. On a tie the
    lower level wins. Computed in promote_types(dtype, float32), without a gradient.

    Args:
        weight: any shape, finite.
        block_size: weights a scale, even or odd.
    Returns: codes, uint8, shape (⌈n/2⌉,): two a byte, the first in the high half (`unpack_nf4` reads them);
        scales, shape (⌈n/block_size⌉,), ≥ 0. |w − ŵ| ≤ .152 s, half the widest gap between levels; a block of
        zeros and the largest |w| of each block come back exactly.
    Raises: ValueError for a weight that is empty, not floating point or not finite, a block below 1.
    Reference: Dettmers et al. 2023 (QLoRA), eq. 1 and appendix E.
    Page: docs/losses/quantize_nf4.md
    """
    check_values("weight", weight)
    check_count("block_size", block_size, 1)
    blocks = in_blocks(wide(weight.detach()).reshape(-1), block_size)
    scales = blocks.abs().amax(dim=-1)
    shares = blocks / scales.where(scales > 0, 1.0)[:, None]
    codes = torch.bucketize(shares, shares.new_tensor(BORDERS)).reshape(-1)[: weight.numel()]
    return pack_nf4(codes), scales


def dequantize_nf4(
    codes: Tensor,
    scales: Tensor,
    *,
    shape: tuple[int, ...],
    block_size: int = 64,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Codes and scales back to weights.

        ŵ = s·level_code

    Args:
        codes: packed as `quantize_nf4` packs them, shape (⌈n/2⌉,). scales: shape (⌈n/block_size⌉,).
        shape: of the weight. dtype: to which the product is rounded, once; the scales' own by default.
    Returns: ŵ, of this shape and dtype.
    Raises: ValueError when codes are not uint8, or codes or scales do not have the length the shape asks for.
    Reference: Dettmers et al. 2023 (QLoRA), eq. 2 and 6.
    Page: docs/losses/dequantize_nf4.md
    """
    count = math.prod(shape)
    check_length("codes", codes, math.ceil(count / 2), torch.uint8)
    check_length("scales", scales, math.ceil(count / block_size), wide(scales).dtype)
    levels = scales.new_tensor(PAIRS).index_select(0, codes.int()).reshape(-1)[:count]
    weights = in_blocks(levels, block_size) * scales[:, None]
    return weights.reshape(-1)[:count].reshape(shape).to(dtype or scales.dtype)


def quantize_scales(scales: Tensor, *, block_size: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: the scales themselves to eight bits.

        μ = mean of all scales,   S = max |s − μ| over the block,   code = round(127·(s − μ)/S)

    Scales are positive and alike, so their mean is taken off first. The codes are evenly spaced.

    Args:
        scales: shape (M,), finite, ≥ 0, as `quantize_nf4` gives them.
        block_size: scales a second scale.
    Returns: codes, int8 in [−127, 127], shape (M,); second scales S, shape (⌈M/block_size⌉,); μ, shape ().
        |s − ŝ| ≤ S/254, and equal scales come back exactly.
    Raises: ValueError for scales that are no vector, empty, negative or not finite, a block below 1.
    Reference: Dettmers et al. 2023 (QLoRA), §3, double quantization.
    Page: docs/losses/quantize_scales.md
    """
    check_values("scales", scales)
    check_count("block_size", block_size, 1)
    if scales.dim() != 1 or bool((scales < 0).any()):
        raise ValueError(f"scales must be a vector of numbers ≥ 0, got {tuple(scales.shape)}, {scales.min()}")
    mean = scales.min() + (scales - scales.min()).mean()  # exact when all are equal
    blocks = in_blocks(scales - mean, block_size)
    seconds = blocks.abs().amax(dim=-1)
    shares = blocks / seconds.where(seconds > 0, 1.0)[:, None]
    return (127 * shares).round().to(torch.int8).reshape(-1)[: len(scales)], seconds, mean


def dequantize_scales(codes: Tensor, seconds: Tensor, mean: Tensor, *, block_size: int = 256) -> Tensor:
    """Eight bits back to scales: ŝ = max(0, μ + S·code/127), shape (M,), in the dtype of the second scales.

    Raises: ValueError when codes are not int8 or the second scales do not have ⌈M/block_size⌉ numbers.
    Page: docs/losses/quantize_scales.md
    """
    check_length("codes", codes, codes.numel(), torch.int8)
    check_length("seconds", seconds, math.ceil(codes.numel() / block_size), wide(seconds).dtype)
    blocks = in_blocks(codes.to(seconds.dtype), block_size) * seconds[:, None] / 127
    return (mean + blocks.reshape(-1)[: len(codes)]).clamp_min(0.0)


def pack_nf4(codes: Tensor) -> Tensor:
    """Codes below 16, shape (n,), to bytes, shape (⌈n/2⌉,): the first of a pair in the high half."""
    pairs = in_blocks(codes.to(torch.uint8), 2)
    return pairs[:, 0] * 16 + pairs[:, 1]


def unpack_nf4(packed: Tensor, count: int) -> Tensor:
    """Bytes back to `count` codes, as int64."""
    return torch.stack([packed // 16, packed % 16], dim=-1).reshape(-1)[:count].long()


def in_blocks(values: Tensor, block_size: int) -> Tensor:
    """A list as rows of `block_size`, the last one filled up with zeros."""
    return F.pad(values, (0, -values.numel() % block_size)).reshape(-1, block_size)


def check_values(name: str, tensor: Tensor) -> None:
    """At least one number, and all of them finite floats."""
    if not tensor.dtype.is_floating_point or not tensor.numel():
        raise ValueError(
            f"{name} must hold floating-point numbers, got {tuple(tensor.shape)} of {tensor.dtype}"
        )
    check_finite(name, tensor)


def check_length(name: str, tensor: Tensor, length: int, dtype: torch.dtype) -> None:
    """A vector of this length and dtype."""
    if tuple(tensor.shape) != (length,) or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be ({length},) of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
        )
