"""The layout of ragged rows and their attention, against attention written out row by row."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanopost.kernels import dispatch
from nanopost.models.attention import attend, layout, softmax_attention

CPU = torch.device("cpu")


@st.composite
def spans(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    """Rows that start anywhere up to the end of the one above; and a width that may leave columns empty."""
    rows, above = list[tuple[int, int]](), 0
    for _ in range(draw(st.integers(1, 7))):
        start = draw(st.integers(0, above))
        above = start + draw(st.integers(1, 12))
        rows.append((start, above))
    return rows, max(end for _, end in rows) + draw(st.integers(0, 3))


def written_out(rows: list[tuple[int, int]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query over the keys of its row, by loops over rows, tokens and heads."""
    outputs, whole, count = [], list[int](), 0
    share = q.shape[1] // k.shape[1]
    for start, end in rows:
        whole = [*whole[:start], *range(count, count + end - start)]
        for position in range(start, end):
            keys = whole[: position + 1]
            for h in range(q.shape[1]):
                scores = k[keys, h // share] @ q[whole[position], h] / math.sqrt(q.shape[2])
                outputs.append(scores.softmax(0) @ v[keys, h // share])
        count += end - start
    return torch.stack(outputs).view(q.shape)


def heads(count: int, *, of: int = 6, seed: int = 0) -> list[Tensor]:
    """q with 4 heads, k and v with 2."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((count, 4, of), (count, 2, of), (count, 2, of))
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def test_grouped_heads_without_a_grouped_kernel(monkeypatch):
    """On a GPU each key/value head is laid out once for every query head that shares it, in their order."""
    (q, k, v), seen = (x.detach().view(1, 5, -1, 6).transpose(1, 2) for x in heads(5)), None
    expected = softmax_attention(q, k, v, seen)
    monkeypatch.setattr(dispatch, "grouped_attention", lambda q: False)
    monkeypatch.setattr(dispatch, "short_attention", lambda q, keys: False)
    torch.testing.assert_close(softmax_attention(q, k, v, seen), expected, rtol=1e-10, atol=1e-12)


@given(spans(), st.booleans())
def test_ragged_attention_is_attention_row_by_row(drawn, short):
    rows, width = drawn
    plan = layout(rows, width, CPU)
    count = sum(end - start for start, end in rows)
    assert len(plan.tokens) == len(plan.positions) == len(plan.order) == count
    assert plan.positions.tolist() == [p for start, end in rows for p in range(start, end)]
    q, k, v = heads(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "short_attention", lambda q, keys: short)
        found, expected = attend(plan, 0, q, k, v), written_out(rows, q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    for ours, theirs in zip(
        *(torch.autograd.grad(x, (q, k, v), upstream) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("short", [True, False])
def test_whole_rows_need_no_blocks(monkeypatch, short):
    monkeypatch.setattr(dispatch, "short_attention", lambda q, keys: short)
    plan, (q, k, v) = layout([(0, 5)] * 3, 5, CPU), heads(15)
    assert plan.blocks == ()
    expected = written_out([(0, 5)] * 3, q, k, v)
    torch.testing.assert_close(attend(plan, 0, q, k, v), expected, rtol=1e-10, atol=1e-12)


def test_rows_alike_share_a_block_and_few_places_are_padding():
    rows = [(0, n) for n in range(1, 200)]
    plan = layout(rows, 199, CPU)
    assert len(plan.blocks) <= 16  # two classes an octave
    assert all(block.seen is None for block in plan.blocks)  # without a prefix a row is plainly causal
    assert sum(block.queries.numel() for block in plan.blocks) < 1.25 * sum(range(1, 200))


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_the_ragged_kernel_is_told_the_same(monkeypatch, window):
    """FlashAttention's kernel needs a GPU: its contract in torch stands in for it here."""
    rows = [(0, 5), (3, 6), (3, 9), (0, 2)]
    plan, (q, k, v) = layout(rows, 9, CPU, window), heads(16)
    blocks = attend(plan, 0, q, k, v)

    def varlen_attn(q, k, v, bounds_q, bounds_k, most_q, most_k, *, window_size):
        assert window_size[1] == 0 and bounds_q.dtype == bounds_k.dtype == torch.int32
        assert bounds_q.is_contiguous() and bounds_k.is_contiguous()  # the kernel asks for both
        assert most_q == bounds_q.diff().max() and most_k == bounds_k.diff().max()
        outputs = []
        for row in range(len(bounds_q) - 1):
            (a, b), (c, d) = (bounds[row : row + 2].tolist() for bounds in (bounds_q, bounds_k))
            key, own = torch.arange(d - c), torch.arange(d - c - (b - a), d - c)[:, None]
            seen = (key <= own) & (key >= own - (d if window_size[0] < 0 else window_size[0]))
            part = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
            outputs.append(F.scaled_dot_product_attention(*part, seen).transpose(0, 1))
        return torch.cat(outputs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(dispatch, "ragged_attention", lambda q: True)
    found = attend(plan, 0, q, k, v)
    torch.testing.assert_close(found, blocks, rtol=1e-10, atol=1e-12)
    if window is None:
        torch.testing.assert_close(found, written_out(rows, q, k, v), rtol=1e-10, atol=1e-12)


def test_what_is_broken_in_a_row_stays_there():
    """The first row's first token is no filling for others: 0 · NaN would be NaN."""
    rows = [(0, 4), (0, 6), (0, 5), (2, 5), (2, 4)]
    plan, (q, k, v) = layout(rows, 7, CPU), heads(20)
    assert len(plan.blocks) == 4  # the second and third row share one, and the shorter is filled up
    clean = attend(plan, 0, q, k, v).detach()
    for x in (q, k, v):
        x.data[:4] = torch.nan
    found = attend(plan, 0, q, k, v)
    assert found[:4].isnan().all() and torch.equal(found[4:], clean[4:])
    found[4:].sum().backward()
    for x in (q, k, v):
        assert x.grad[4:].isfinite().all() and (x.grad[:4].nan_to_num() == 0).all()


def test_heads_of_half_precision_keep_it():
    q, k, v = (x.detach().bfloat16().view(1, 5, -1, 6).transpose(1, 2) for x in heads(5))
    assert softmax_attention(q, k, v, None).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(1, 3)], r"spans\[0\] must have 0 ≤ start ≤ 0 .*, start < end ≤ 6, got \(1, 3\)"),
        ([(0, 3), (4, 5)], r"spans\[1\] must have 0 ≤ start ≤ 3"),
        ([(0, 3), (2, 2)], r"spans\[1\] .* got \(2, 2\)"),
        ([(0, 7)], r"spans\[0\] .* end ≤ 6, got \(0, 7\)"),
    ],
)
def test_a_span_that_cannot_be_is_named(rows, message):
    with pytest.raises(ValueError, match=message):
        layout(rows, 6, CPU)
