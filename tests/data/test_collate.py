"""Collate: one shift, masks that are data, rows that do not see each other."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopost.data.collate import SHARED, collate, pad_ids, spread
from nanopost.data.schema import Sample

VOCABULARY = 7
STOP = 0  # the padding id, too


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    """Samples with a context, supervised tokens in any pattern and a stop token, supervised or not."""

    def one() -> Sample:
        ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=9))
        mask = [False, *draw(st.lists(st.booleans(), min_size=len(ids) - 1, max_size=len(ids) - 1))]
        return Sample((*ids, STOP), (*mask, draw(st.booleans())))

    return [one() for _ in range(draw(st.integers(1, 6)))]


def test_golden_batch() -> None:
    batch = collate(
        [Sample((5, 6, 1, 2, STOP), (False, False, True, True, True)), Sample((4, 3), (False, True))]
    )
    assert batch.input_ids.tolist() == [[5, 6, 1, 2], [4, 0, 0, 0]]
    assert batch.target_ids.tolist() == [[6, 1, 2, STOP], [3, 0, 0, 0]]
    assert batch.completion_mask.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert batch.spans == ((0, 4), (0, 1))


@given(samples())
def test_the_target_is_the_next_token_and_everything_can_be_read_back(some: list[Sample]) -> None:
    batch = collate(some)
    real = torch.zeros_like(batch.completion_mask)
    for b, sample in enumerate(some):
        columns = slice(0, len(sample.ids) - 1)
        real[b, columns] = True
        inputs, targets = batch.input_ids[b, columns].tolist(), batch.target_ids[b, columns].tolist()
        assert list(zip(inputs, targets, strict=True)) == list(pairwise(sample.ids))
        assert (False, *batch.completion_mask[b, columns].tolist()) == sample.mask
        assert batch.spans[b] == (0, len(sample.ids) - 1)
    for tensor in (batch.input_ids, batch.target_ids, batch.completion_mask):
        assert not tensor[~real].any()


@given(samples())
def test_gradient_falls_on_the_supervised_tokens_alone(some: list[Sample]) -> None:
    batch = collate(some)
    logits = torch.randn(*batch.input_ids.shape, VOCABULARY, dtype=torch.float64, requires_grad=True)
    logps = logits.log_softmax(-1).gather(-1, batch.target_ids[..., None])[..., 0]
    (-logps * batch.completion_mask).sum().backward()
    assert logits.grad is not None
    # the gradient at a place is softmax − onehot(target): it names the token that is trained there
    trained = [int(g.argmin()) for g in logits.grad.reshape(-1, VOCABULARY) if g.any()]
    assert trained == [i for s in some for i, on in zip(s.ids, s.mask, strict=True) if on]


def test_a_stop_token_that_is_also_the_padding_is_trained() -> None:
    batch = collate(
        [Sample((3, 1, STOP), (False, True, True)), Sample((3, 1, 1, 1, STOP), (False, False) + (True,) * 3)]
    )
    assert batch.completion_mask.tolist() == [[True, True, False, False], [False, True, True, True]]
    assert batch.target_ids[0].tolist() == [1, STOP, 0, 0]


@st.composite
def relatives(draw: st.DrawFn) -> list[Sample]:
    """Samples of one family: each begins with a part, often a long one, of a common text."""
    text = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=40, max_size=40))
    tails = st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=6)
    pieces = draw(st.lists(st.tuples(st.integers(0, 40), tails), min_size=1, max_size=6))
    return [Sample(ids := (*text[:cut], *tail), (False,) + (True,) * (len(ids) - 1)) for cut, tail in pieces]


@given(relatives())
def test_a_row_brings_what_the_row_above_has_not(some: list[Sample]) -> None:
    """What neighbours have in common is the row above's, if it is worth it; one position stays."""
    batch = collate(some)
    assert batch.spans[0][0] == 0
    for b, (above, sample) in enumerate(pairwise(some), start=1):
        start, end = batch.spans[b]
        inputs, before = sample.ids[:-1], above.ids[:-1]
        assert end == len(inputs) and start < end
        assert inputs[:start] == before[:start]
        longer = inputs[: start + 1] == before[: start + 1] and len(before) > start and start + 1 < end
        assert (start >= SHARED and not longer) or start == 0
        if start == 0:
            assert inputs[:SHARED] != before[:SHARED] or len(inputs) <= SHARED or len(before) < SHARED


def test_a_sample_that_the_row_above_has_whole_keeps_one_position() -> None:
    ids = tuple(range(30))
    long, short = Sample(ids, (False,) + (True,) * 29), Sample(ids[:25], (False,) + (True,) * 24)
    assert collate([long, long, short, long]).spans == ((0, 29), (28, 29), (23, 24), (24, 29))


@given(samples(), st.sampled_from([torch.float32, torch.float64]))
def test_spread_is_the_way_back(some: list[Sample], dtype: torch.dtype) -> None:
    batch = collate(some)
    values = [
        torch.tensor([float(i) + 1 for i, on in zip(s.ids, s.mask, strict=True) if on], dtype=dtype)
        for s in some
    ]
    laid = spread(values, batch.completion_mask)
    assert laid.dtype == dtype and laid.shape == batch.completion_mask.shape
    assert torch.equal(laid[batch.completion_mask], torch.cat(values))
    # each token's own value stands where the token is the target
    assert torch.equal(laid, (batch.target_ids + 1).to(dtype) * batch.completion_mask)


def test_spread_refuses_lengths_that_are_not_the_masks() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    one, two, three = (torch.ones(n) for n in (1, 2, 3))
    assert spread([two, one], mask).tolist() == [[1, 1, 0], [1, 0, 0]]
    for wrong in (
        [one, one, one],
        [one, two],
        [two],
        [two, two],
        [one, one],
        [three],
        [two, one, one],
        [one, two, one],
    ):
        with pytest.raises(ValueError, match=r"completion_mask has \[2, 1\] supervised tokens a row"):
            spread(wrong, mask)
    for wrong in ([], [torch.ones(1, 2), one]):
        with pytest.raises(ValueError, match="values must be 1-D tensors"):
            spread(wrong, mask)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Sample((1,), (False,)), r"samples\[1\] has 1 tokens"),
        (Sample((), ()), r"samples\[1\] has 0 tokens"),
        (Sample((1, 2), (False, True, True)), r"samples\[1\] has 2 ids and a mask of 3"),
        (Sample((1, 2), (True, True)), r"samples\[1\] trains on its first token"),
    ],
)
def test_a_bad_sample_is_named(bad: Sample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate([Sample((1, 2, 3, 4, 5), (False,) * 5), bad])


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="samples is empty"):
        collate([])


def test_whole_sequences_are_padded_on_the_right_and_known_by_length() -> None:
    input_ids, lengths = pad_ids([(3, 4, 0), (5,), (6, 7, 8, 9)])
    assert input_ids.tolist() == [[3, 4, 0, 0], [5, 0, 0, 0], [6, 7, 8, 9]]  # unshifted: the last token stays
    assert lengths.tolist() == [3, 1, 4]  # an id of 0 at the end is a token, not padding
    assert input_ids.dtype == lengths.dtype == torch.long


@pytest.mark.parametrize(
    ("bad", "message"), [([], "sequences is empty"), ([[1], []], r"sequences\[1\] has no token")]
)
def test_no_sequence_or_an_empty_one_is_refused(bad: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pad_ids(bad)
