"""Ragged batches for property tests: unequal rows with holes, padding on both sides and empty rows."""

import torch
from hypothesis import strategies as st
from torch import Generator, Tensor

JUNK = (float("nan"), float("inf"), float("-inf"), 1e30, -1e30)


@st.composite
def ragged(draw: st.DrawFn) -> tuple[Tensor, Generator]:
    """A mask (B, T) with at least one supervised token and never square, and a generator for its values."""
    rows = draw(st.lists(st.lists(st.booleans(), max_size=7), min_size=1, max_size=5))
    rows[draw(st.integers(0, len(rows) - 1))] += [True]
    lead = [draw(st.integers(0, 2)) for _ in rows]
    width = max(skip + len(row) for skip, row in zip(lead, rows, strict=True))
    width += width == len(rows)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (skip, pattern) in enumerate(zip(lead, rows, strict=True)):
        mask[row, skip : skip + len(pattern)] = torch.tensor(pattern, dtype=torch.bool)
    return mask, torch.Generator().manual_seed(draw(st.integers(0, 2**31)))


def normal(generator: Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Float64 draws from N(0, scale²)."""
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def junk_outside(values: Tensor, mask: Tensor, junk: float) -> Tensor:
    """The values with every slot outside the mask overwritten."""
    return torch.where(mask, values, torch.full_like(values, junk))


def rows_of(tensor: Tensor) -> list[list[float]]:
    """A tensor as nested Python lists, for the scalar references."""
    return tensor.tolist()
