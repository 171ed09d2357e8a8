"""Collate: samples in, one batch of tensors out, and the only shift of the project.

    sample   ids   a b c d          mask   · · x x          x = trained on
    batch    input_ids   a b c      target_ids   b c d      completion_mask   · x x

After this room nobody slices: `logps[b, t]` is the log-probability of `target_ids[b, t]` given
`input_ids[b, :t+1]`, and it counts iff `completion_mask[b, t]`. Padding is known by length, never by a token,
so the padding id may be the stop id. Packing lays several samples in a row; each is shifted by itself, starts
again at position 0 and has its own segment id: no target and no attention crosses over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nanopost.data.schema import Sample


@dataclass(frozen=True)
class Batch:
    """Tensors (B, T) of int64, `completion_mask` of bool; `segment_ids` is None unless packed."""

    input_ids: Tensor
    target_ids: Tensor
    completion_mask: Tensor
    position_ids: Tensor
    segment_ids: Tensor | None


def collate(
    samples: Sequence[Sample], *, pack_length: int | None = None, device: torch.device | None = None
) -> Batch:
    """One batch of the samples, in their order.

    Args:
        samples: at least one, each of at least two tokens, the first of which is not trained on.
        pack_length: None gives every sample its own row, padded on the right with zeros. A number packs them
            in order into rows of at most that many positions (a sample of n tokens takes n − 1).
        device: where the tensors go; default the CPU.
    Returns: a Batch; read row by row, the true places of `completion_mask` are the supervised tokens of the
        samples in order. `segment_ids` counts 1, 2, … in each row and is 0 on padding.
    Raises: ValueError naming the sample that is empty, too long, or has a mask of another length.
    """
    lengths = [_checked_length(sample, i, pack_length) for i, sample in enumerate(samples)]
    if not lengths:
        raise ValueError("samples is empty: a batch needs at least one")
    rows: list[list[Sample]] = []
    used = room = 0 if pack_length is None else pack_length
    for sample, length in zip(samples, lengths, strict=True):
        if used + length > room:
            rows.append([])
            used = 0
        rows[-1].append(sample)
        used += length
    width = max(sum(len(sample.ids) - 1 for sample in row) for row in rows)
    shape = (len(rows), width)
    input_ids, target_ids, position_ids, segment_ids = (
        torch.zeros(shape, dtype=torch.long) for _ in range(4)
    )
    completion_mask = torch.zeros(shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row, start=1):
            place = slice(start, start + len(sample.ids) - 1)
            input_ids[b, place] = torch.tensor(sample.ids[:-1])
            target_ids[b, place] = torch.tensor(sample.ids[1:])
            completion_mask[b, place] = torch.tensor(sample.mask[1:])
            position_ids[b, place] = torch.arange(place.stop - start)
            segment_ids[b, place] = segment
            start = place.stop
    return Batch(
        input_ids.to(device),
        target_ids.to(device),
        completion_mask.to(device),
        position_ids.to(device),
        None if pack_length is None else segment_ids.to(device),
    )


def pad_ids(
    sequences: Sequence[Sequence[int]], *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Whole sequences side by side, unshifted: what a score, read at a row's last token, is read from.

    Args:
        sequences: token ids, at least one sequence, each of at least one token.
        device: where the tensors go; default the CPU.
    Returns: `input_ids` (B, T), padded on the right with zeros, and `lengths` (B,), int64: all there is to
        know about padding, whatever token it is made of.
    Raises: ValueError naming the sequence that is empty.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not lengths or 0 in lengths:
        empty = f"sequences[{lengths.index(0)}] has no token" if lengths else "sequences is empty"
        raise ValueError(f"{empty}: there is nothing to score")
    input_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for b, sequence in enumerate(sequences):
        input_ids[b, : lengths[b]] = torch.tensor(sequence)
    return input_ids.to(device), torch.tensor(lengths, device=device)


def spread(values: Sequence[Tensor], completion_mask: Tensor) -> Tensor:
    """Lay one value per supervised token of each sample on the places where a batch predicts those tokens.

    Args:
        values: one 1-D tensor a sample, in the order given to `collate`, as long as its supervised tokens.
        completion_mask: (B, T) of that batch, padded or packed.
    Returns: (B, T) in the dtype of the values, 0 where `completion_mask` is false.
    Raises: ValueError when the lengths are not those of the mask.
    """
    if not values or any(value.dim() != 1 for value in values):
        raise ValueError(
            f"values must be 1-D tensors, at least one, got shapes {[tuple(v.shape) for v in values]}"
        )
    ends = list(accumulate(len(value) for value in values))
    row_ends = completion_mask.sum(dim=1).cumsum(dim=0).tolist()
    aligned = row_ends == ends if len(ends) == len(row_ends) else set(row_ends) <= {0, *ends}
    if not aligned or ends[-1] != row_ends[-1]:
        counts = [len(value) for value in values], completion_mask.sum(dim=1).tolist()
        raise ValueError(
            f"values have lengths {counts[0]}, completion_mask has {counts[1]} supervised tokens a row"
        )
    flat = torch.cat(list(values)).to(completion_mask.device)
    laid = torch.zeros(completion_mask.shape, dtype=flat.dtype, device=flat.device)
    laid[completion_mask] = flat
    return laid


def _checked_length(sample: Sample, i: int, pack_length: int | None) -> int:
    """How many positions the sample takes in a row."""
    if len(sample.ids) < 2:
        raise ValueError(f"samples[{i}] has {len(sample.ids)} tokens: predicting one takes at least two")
    if len(sample.mask) != len(sample.ids):
        raise ValueError(f"samples[{i}] has {len(sample.ids)} ids and a mask of {len(sample.mask)}")
    if sample.mask[0]:
        raise ValueError(f"samples[{i}] trains on its first token, which nothing predicts")
    if pack_length is not None and len(sample.ids) - 1 > pack_length:
        raise ValueError(f"samples[{i}] takes {len(sample.ids) - 1} positions, pack_length is {pack_length}")
    return len(sample.ids) - 1
