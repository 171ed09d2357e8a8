"""Collate: samples in, one batch of tensors out, and the only shift of the project.

    sample   ids   a b c d          mask   · · x x          x = trained on
    batch    input_ids   a b c      target_ids   b c d      completion_mask   · x x

After this room nobody slices: `logps[b, t]` is the log-probability of `target_ids[b, t]` given `input_ids[b,
:t+1]`, and it counts iff `completion_mask[b, t]`. Padding is known by length, never by a token, so the
padding id may be the stop id. `spans` say which positions a row brings: none of the padding, and none of a
beginning that it shares with the row above (the prompt of a group or a pair), which is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nanopost.data.schema import Sample

SHARED = 16  # a common beginning of fewer tokens is computed again: that is quicker than to look it up


@dataclass(frozen=True)
class Batch:
    """Tensors (B, T) of int64, `completion_mask` of bool, and (start, end) a row."""

    input_ids: Tensor
    target_ids: Tensor
    completion_mask: Tensor
    spans: tuple[tuple[int, int], ...]


def collate(samples: Sequence[Sample], *, device: torch.device | None = None) -> Batch:
    """One batch of the samples, a row each, in their order.

    Args:
        samples: at least one, each of at least two tokens, the first of which is not trained on. Those with
            a long beginning in common should stand together: only neighbours share it.
        device: where the tensors go; default the CPU.
    Returns: a Batch, rows padded on the right with zeros. Row b brings the positions `spans[b]`: up to the
        sample's length less one, from where it parts with the row above.
    Raises: ValueError naming the sample that is empty or has a mask of another length.
    """
    lengths = [_checked_length(sample, i) for i, sample in enumerate(samples)]
    if not lengths:
        raise ValueError("samples is empty: a batch needs at least one")
    input_ids, target_ids = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    completion_mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for b, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        input_ids[b, :length] = torch.tensor(sample.ids[:-1])
        target_ids[b, :length] = torch.tensor(sample.ids[1:])
        completion_mask[b, :length] = torch.tensor(sample.mask[1:])
    starts = [0, *(_shared(a.ids[:-1], b.ids[:-1]) for a, b in pairwise(samples))]
    return Batch(
        input_ids.to(device),
        target_ids.to(device),
        completion_mask.to(device),
        tuple(zip(starts, lengths, strict=True)),
    )


def _shared(above: Sequence[int], row: Sequence[int]) -> int:
    """How many positions a row has in common with the one above, one of its own left; 0 below `SHARED`."""
    pairs = enumerate(zip(above, row, strict=False))
    common = next((i for i, (a, b) in pairs if a != b), min(len(above), len(row)))
    common = min(common, len(row) - 1)
    return common if common >= SHARED else 0


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
        completion_mask: (B, T) of that batch.
    Returns: (B, T) in the dtype of the values, 0 where `completion_mask` is false.
    Raises: ValueError when the lengths are not those of the mask.
    """
    if not values or any(value.dim() != 1 for value in values):
        raise ValueError(
            f"values must be 1-D tensors, at least one, got shapes {[tuple(v.shape) for v in values]}"
        )
    if [len(value) for value in values] != completion_mask.sum(dim=1).tolist():
        counts = [len(value) for value in values], completion_mask.sum(dim=1).tolist()
        raise ValueError(
            f"values have lengths {counts[0]}, completion_mask has {counts[1]} supervised tokens a row"
        )
    flat = torch.cat(list(values)).to(completion_mask.device)
    laid = torch.zeros(completion_mask.shape, dtype=flat.dtype, device=flat.device)
    laid[completion_mask] = flat
    return laid


def _checked_length(sample: Sample, i: int) -> int:
    """How many positions the sample takes."""
    if len(sample.ids) < 2:
        raise ValueError(f"samples[{i}] has {len(sample.ids)} tokens: predicting one takes at least two")
    if len(sample.mask) != len(sample.ids):
        raise ValueError(f"samples[{i}] has {len(sample.ids)} ids and a mask of {len(sample.mask)}")
    if sample.mask[0]:
        raise ValueError(f"samples[{i}] trains on its first token, which nothing predicts")
    return len(sample.ids) - 1
