"""Who looks at whom: ragged rows that may share a prefix, computed without padding and without repetition.

A batch has B rows of up to T positions. `spans[r] = (start, end)` says which of them row r brings: positions
below `start` are those of the row above (the prompt of a group or a pair), from `end` on there is nothing.
All but attention sees the tokens that rows bring as one list; attention gathers them into blocks of rows that
are alike in length, and puts the outcome back into the list.

    rows  a b c d e      spans  (0, 5)     list  a b c d e x y z p q
          a b c x y z           (3, 6)           x looks at a b c x: the prefix is computed once
          p q                   (0, 2)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopost.kernels import dispatch

Spans = Sequence[tuple[int, int]]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (N, H, E), k and v (N, K, E): (N, H, E)


@dataclass(frozen=True)
class Block:
    """S rows, whose own tokens (at most T) look at their prefix and at each other (at most U)."""

    queries: Tensor  # (S, T) places in the list; behind a row's end again its last
    keys: Tensor  # (S, U) places in the list, prefix first; behind a row's end again its last
    seen: Tensor | None  # (S, 1, T, U), true where a query may look; None: each at itself and what is before


@dataclass(frozen=True)
class Ragged:
    """The rows as FlashAttention's kernel for ragged rows takes them: queries and keys, row after row."""

    keys: Tensor | None  # places in the list of what rows look at; None: the list itself, nothing is shared
    query_ends: Tensor  # (B + 1,), int32: 0, and where each row's queries end
    key_ends: Tensor  # (B + 1,), int32: 0, and where each row's keys end
    most: tuple[int, int]  # queries and keys of the longest rows
    before: int  # how many positions before its own a query looks at; -1: all


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a batch are."""

    tokens: Tensor  # (N,) of each token of the list: its place in the flattened (B, T)
    positions: Tensor  # (N,) of each token of the list: its column
    places: Tensor  # (B, T) of each position: its place in the list; its row's last where there is nothing
    blocks: tuple[Block, ...]  # none: every row brings all of T
    order: Tensor  # (N,) of each token of the list: its place in the blocks' queries, block after block
    ragged: Ragged


def layout(spans: Spans, width: int, device: torch.device, window: int | None = None) -> Layout:
    """Lay out the rows of a batch.

    Args:
        spans: (start, end) of each row, start < end ≤ width; start is at most the end of the row above, 0 in
            the first row.
        width: T.
        device: where the tensors go.
        window: how many positions a query looks at, its own among them; None: all there are.

    Raises:
        ValueError: naming the row whose span cannot be.
    """
    above = 0
    for row, (start, end) in enumerate(spans):
        if not 0 <= start <= above or not start < end <= width:
            limits = f"0 ≤ start ≤ {above} (where the row above ends), start < end ≤ {width}"
            raise ValueError(f"spans[{row}] must have {limits}, got {(start, end)}")
        above = end
    starts, ends = torch.tensor(spans, dtype=torch.long).view(-1, 2).unbind(1)
    column = torch.arange(width)
    own, seen = ((column >= first[:, None]) & (column < ends[:, None]) for first in (starts, 0 * starts))
    tokens = own.flatten().nonzero().squeeze(1)
    places = torch.zeros(own.shape, dtype=torch.long)
    places[own] = torch.arange(len(tokens))
    for row, (start, end) in enumerate(spans):
        places[row, :start] = places[row - 1, :start]
        places[row, end:] = places[row, end - 1]
    blocks, order, count = list[Block](), torch.arange(len(tokens)), 0
    window = None if window is None or window >= width else window
    for block, real in [] if bool(own.all()) and not window else _blocks(starts, ends, places, window):
        order[block.queries[real]] = count + real.flatten().nonzero().squeeze(1)
        count += real.numel()
        seen_there = None if block.seen is None else block.seen.to(device)
        blocks.append(Block(block.queries.to(device), block.keys.to(device), seen_there))
    query_ends, key_ends = (
        F.pad(mask.sum(1).cumsum(0), (1, 0)).to(device, torch.int32) for mask in (own, seen)
    )
    most = int((ends - starts).max()), int(ends.max())
    keys = places[seen].to(device) if bool(starts.any()) else None
    listed, columns, places = tokens.to(device), (tokens % width).to(device), places.to(device)
    ragged = Ragged(keys, query_ends, key_ends, most, window - 1 if window else -1)
    return Layout(listed, columns, places, tuple(blocks), order.to(device), ragged)


def _blocks(
    starts: Tensor, ends: Tensor, places: Tensor, window: int | None
) -> Iterator[tuple[Block, Tensor]]:
    """Blocks of rows whose prefixes and own tokens are alike in number, and where their queries are real."""
    alike = defaultdict(list)
    for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        alike[_size(start), _size(end - start)].append(row)
    for rows in alike.values():
        start, end = starts[rows, None], ends[rows, None]
        query, key = torch.arange(int((end - start).max())), torch.arange(int(end.max()))
        real, column = query < end - start, (start + query).minimum(end - 1)
        queries = places[rows].gather(1, column)
        seen = key <= (column := column[:, None, :, None])
        if window:
            seen &= key > column - window
        block = Block(queries, places[rows][:, : len(key)], seen if window or bool(start.any()) else None)
        yield block, real


def _size(count: int) -> int:
    """A class of lengths: two an octave."""
    return round(2 * math.log2(count)) if count else -1


def attend(rows: Layout, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √E) v, each token of the list over its prefix and what stands before it in its row.

    Args:
        rows: B rows of N tokens in all.
        layer: not read: training keeps no cache.
        q: (N, H, E). k, v: (N, K, E), H / K query heads for each key/value head.

    Returns:
        (N, H, E).
    """
    if not rows.blocks:
        a, b, c = (x.unflatten(0, rows.places.shape).transpose(1, 2) for x in (q, k, v))
        return softmax_attention(a, b, c, None).transpose(1, 2).reshape(q.shape)
    if dispatch.ragged_attention(q):
        return _varlen(rows.ragged, q, k, v)
    outputs = []
    for block in rows.blocks:
        a, b, c = (_take(*x) for x in ((q, block.queries), (k, block.keys), (v, block.keys)))
        outputs.append(softmax_attention(a, b, c, block.seen).transpose(1, 2).flatten(2).flatten(0, 1))
    return F.embedding(rows.order, torch.cat(outputs)).view(q.shape)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Heads from the list, (N, H, E), to the places (S, T) of a block: (S, H, T, E)."""
    return F.embedding(places, x.flatten(1)).unflatten(-1, x.shape[-2:]).transpose(1, 2)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √E + mask) v of whole blocks.

    Args:
        q: (S, H, T, E). k, v: (S, K, U, E).
        seen: (S, 1, T, U), true where a query may look; None: T = U, each at itself and what is before.

    Returns:
        (S, H, T, E).
    """
    (S, H, T, E), (K, U) = q.shape, k.shape[1:3]
    if dispatch.short_attention(q, keys=U):
        seen = seen if seen is not None else torch.ones(T, U, dtype=torch.bool, device=q.device).tril()
        scores = (q * E**-0.5).reshape(S, K, H // K, T, E) @ k.unsqueeze(2).mT
        scores = scores.view(S, H, T, U).masked_fill_(~seen, -torch.inf)
        return (scores.softmax(-1).view(S, K, H // K, T, U) @ v.unsqueeze(2)).view(S, H, T, E)
    if not dispatch.grouped_attention(q):
        k, v = (x.repeat_interleave(H // K, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q, k, v, seen, is_causal=seen is None, enable_gqa=q.shape[1] > k.shape[1]
    )


def _varlen(rows: Ragged, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by FlashAttention's kernel for ragged rows: to it a row's queries are the last of its keys."""
    from torch.nn.attention.varlen import varlen_attn

    share = q.shape[1] // k.shape[1]  # torch 2.11's takes as many key/value heads as query heads
    k, v = (x if rows.keys is None else x[rows.keys] for x in (k, v))
    k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
    out = varlen_attn(q, k, v, rows.query_ends, rows.key_ends, *rows.most, window_size=(rows.before, 0))
    assert isinstance(out, Tensor)  # nothing beside it was asked for
    return out
