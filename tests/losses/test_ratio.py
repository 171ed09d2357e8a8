"""The ratio of two policies, of a token and of a sequence, and the weights between sampler and trainer."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanopost.losses import aggregate, importance_weights, policy_ratio, reinforce_loss, token_logps
from tests.pages import scalar
from tests.policies import Batch, each, pair
from tests.properties import check_half, check_masked_slots, check_only_gradient, check_split, slope
from tests.ragged import JUNK, junk_outside, normal, ragged

LEVELS = ("token", "sequence")


def by_page(logps: Tensor, old_logps: Tensor, mask: Tensor, level: str) -> Tensor:
    """The page's ratios of each row's masked tokens, and 1 elsewhere."""
    ratio = torch.ones_like(logps)
    for row, (kept, new, old) in enumerate(zip(mask, logps, old_logps, strict=True)):
        if kept.any():
            values = scalar("policy_ratio")(new[kept].tolist(), old[kept].tolist(), level)
            ratio[row, kept] = torch.tensor(values, dtype=torch.float64)
    return ratio


@pytest.mark.parametrize("level", LEVELS)
@given(batch=ragged())
def test_R1_value_equals_the_page(level: str, batch: Batch) -> None:
    logps, old_logps = pair(batch, scale=30.0)
    found = policy_ratio(logps, old_logps, batch[0], level=level)
    torch.testing.assert_close(found, by_page(logps, old_logps, batch[0], level), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@given(batch=ragged())
def test_R2_ratio_is_one_before_the_first_update(
    temperature: float, top_k: int, top_p: float, level: str, batch: Batch
) -> None:
    mask, generator = batch
    logits = normal(generator, *mask.shape, 5, scale=2.0)
    rows = [[z / temperature for z in row] for row in logits.reshape(-1, 5).tolist()]
    tokens, recorded = [], []
    for number, row in enumerate(rows):  # a sampler by the pages alone: truncate, normalise, take some token
        support = [math.exp(z) for z in scalar("truncate_logits")(row, top_k, top_p)]
        allowed = [token for token, power in enumerate(support) if power > 0.0]
        tokens.append(allowed[number % len(allowed)])
        recorded.append(math.log(support[tokens[-1]] / sum(support)))
    ids = torch.tensor(tokens).reshape(mask.shape)
    old_logps = torch.tensor(recorded, dtype=torch.float64).reshape(mask.shape)
    logps = token_logps(logits, ids, temperature=temperature, top_k=top_k, top_p=top_p)
    ratio = policy_ratio(logps, old_logps, mask, level=level)
    torch.testing.assert_close(ratio, torch.ones_like(old_logps), rtol=0.0, atol=1e-12)


@given(batch=ragged())
def test_R3_gradient_is_the_ratio_and_the_old_policy_gets_none(batch: Batch) -> None:
    logps, old_logps = pair(batch)
    check_only_gradient(policy_ratio, (logps, old_logps, batch[0]), to=[0])
    gradient = slope(policy_ratio(logps.requires_grad_(), old_logps, batch[0]), logps)
    expected = (logps - old_logps).exp().detach() * batch[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_R4_masked_slots_may_hold_anything(level: str, soiled: int, junk: float, batch: Batch) -> None:
    mask = batch[0]
    inputs = list(pair(batch))
    check_masked_slots(lambda *both: policy_ratio(*both, mask, level=level), inputs, mask, soiled, junk)
    inputs[soiled] = junk_outside(inputs[soiled], mask, junk)
    leaf = inputs[0].requires_grad_()
    ratio = policy_ratio(*inputs, mask.double(), level=level)
    assert (ratio[~mask] == 1.0).all() and not slope(ratio, leaf)[~mask].any()  # without `aggregate` as well


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [61.0, 1e4, float("inf")])
def test_R5_extreme_log_ratios_are_finite_with_gradient_zero(
    size: float, dtype: torch.dtype, level: str
) -> None:
    logps = torch.tensor([[size], [-size], [0.5]], dtype=dtype, requires_grad=True)
    ratio = policy_ratio(logps, torch.zeros(3, 1, dtype=dtype), torch.ones(3, 1), level=level)
    assert ratio.isfinite().all() and (ratio > 0).all()
    above, below, inside = slope(ratio, logps).flatten().tolist()
    assert above == below == 0.0 and inside == pytest.approx(math.exp(0.5), rel=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(batch=ragged())
def test_R5_half_precision_is_computed_in_float32(dtype: torch.dtype, level: str, batch: Batch) -> None:
    check_half(lambda *both: policy_ratio(*both, level=level), (*pair(batch), batch[0]), dtype)


@given(batch=ragged())
def test_R6_a_sequence_has_one_ratio_and_its_gradient_is_shared(batch: Batch) -> None:
    mask, generator = batch
    logps, old_logps = pair(batch)
    weights = normal(generator, *mask.shape)
    ratio = policy_ratio(logps.requires_grad_(), old_logps, mask, level="sequence")
    (gradient,) = torch.autograd.grad((ratio * weights).sum(), logps)
    for row, kept in enumerate(mask):
        if kept.any():
            (one,) = ratio[row, kept].unique()
            tokens = (logps - old_logps).exp().detach()[row, kept]
            assert one.item() == pytest.approx(tokens.prod().item() ** (1 / len(tokens)), rel=1e-9)
            share = (one.detach() / len(tokens) * weights[row, kept].sum()).expand_as(tokens)
            torch.testing.assert_close(gradient[row, kept], share, rtol=1e-9, atol=1e-9)
    assert not gradient[~mask].any()


def test_R6_gradcheck() -> None:
    logps, old_logps = normal(torch.Generator().manual_seed(3), 2, 2, 4)
    mask = torch.tensor([[True, False, True, True], [False, True, False, False]])
    assert torch.autograd.gradcheck(
        lambda leaf: policy_ratio(leaf, old_logps, mask, level="sequence"), logps.requires_grad_()
    )


@pytest.mark.parametrize("level", LEVELS)
def test_R7_an_empty_row_is_one_everywhere(level: str) -> None:
    logps = torch.tensor([[math.nan, 3.0], [-1.0, -2.0]], requires_grad=True)
    ratio = policy_ratio(logps, torch.zeros(2, 2), torch.tensor([[0, 0], [0, 1]]), level=level)
    assert ratio[0].tolist() == [1.0, 1.0] and ratio[1, 0].item() == 1.0
    assert slope(ratio, logps).tolist() == [[0.0, 0.0], [0.0, pytest.approx(math.exp(-2.0))]]
    empty = policy_ratio(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0), level=level)
    assert empty.shape == (2, 0)


@pytest.mark.parametrize("level", LEVELS)
@given(batch=ragged(), left=st.integers(0, 3), right=st.integers(0, 3), data=st.data())
def test_R8_padding_row_order_and_neighbours_change_nothing(
    level: str, batch: Batch, left: int, right: int, data: st.DataObject
) -> None:
    mask, _ = batch
    inputs = (*pair(batch), mask)
    whole = policy_ratio(*inputs, level=level)
    wider = [torch.nn.functional.pad(tensor, (left, right)) for tensor in inputs]
    width = mask.shape[1]
    padded = policy_ratio(*wider, level=level)[:, left : left + width]
    torch.testing.assert_close(padded, whole, rtol=1e-14, atol=0.0)
    order = data.draw(st.permutations(range(len(mask))))
    permuted = policy_ratio(*(tensor[order] for tensor in inputs), level=level)
    torch.testing.assert_close(permuted, whole[order], rtol=1e-14, atol=0.0)
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in mask])
    check_split(lambda *part: policy_ratio(*part, level=level), inputs, owner)


MODES = ("truncate", "mask")


@pytest.mark.parametrize("mode", MODES)
@given(batch=ragged(), low=st.floats(0.1, 0.9), high=st.floats(1.1, 3.0))
def test_IW1_value_equals_the_page(mode: str, batch: Batch, low: float, high: float) -> None:
    ratio = policy_ratio(*pair(batch), batch[0])
    found = importance_weights(ratio, mode=mode, low=low, high=high)
    expected = each(scalar("importance_weights"), ratio, mode=mode, low=low, high=high)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_IW2_weights_carry_no_gradient(mode: str) -> None:
    ratio = torch.tensor([[0.3, 1.0, 4.0]], requires_grad=True)
    assert not importance_weights(ratio, mode=mode, low=0.2, high=2.0).requires_grad


def test_IW3_weights_lie_in_their_range_and_bounds_are_kept() -> None:
    ratio = torch.tensor([0.25, 0.5, 1.0, 2.0, 2.5])
    assert importance_weights(ratio, mode="mask", low=0.5, high=2.0).tolist() == [0.0, 0.5, 1.0, 2.0, 0.0]
    assert importance_weights(ratio, mode="truncate", low=0.5, high=2.0).tolist() == [0.5, 0.5, 1.0, 2.0, 2.0]
    assert importance_weights(ratio, mode="mask", low=2.0, high=2.0).tolist() == [0.0, 0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 2**31), vocabulary=st.integers(2, 6))
def test_IW4_out_of_reach_bounds_give_the_trainers_mean(mode: str, seed: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    trainer, sampler = normal(generator, 2, vocabulary).softmax(-1)
    reward = normal(generator, vocabulary)
    ratio = policy_ratio(trainer.log()[None], sampler.log()[None], torch.ones(1, vocabulary))[0]
    weights = importance_weights(ratio, mode=mode, high=1e9)
    found = (sampler * weights * reward).sum().item()
    assert found == pytest.approx((trainer * reward).sum().item(), abs=1e-12)
    agreed = policy_ratio(trainer.log()[None], trainer.log()[None], torch.ones(1, vocabulary))
    assert (importance_weights(agreed, mode=mode, low=0.5, high=2.0) == 1.0).all()
    capped = importance_weights(ratio, mode=mode, high=1.01)
    assert (sampler * capped).sum() <= 1.0 + 1e-12  # a bound only ever takes mass away


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("junk", JUNK)
@given(batch=ragged())
def test_IW5_junk_outside_the_mask_stays_out_of_the_product(
    mode: str, level: str, junk: float, batch: Batch
) -> None:
    mask, generator = batch
    old_logps, sampler_logps = (junk_outside(tensor, mask, junk) for tensor in pair(batch))
    ratio = policy_ratio(old_logps, sampler_logps, mask, level=level)
    weights = importance_weights(ratio, mode=mode, high=1e9)
    logps = junk_outside(normal(generator, *mask.shape), mask, junk).requires_grad_()
    values = weights * reinforce_loss(logps, torch.ones_like(logps))
    gradient = slope(aggregate(values, mask, mode="token_mean", denom=1.0), logps)
    assert not gradient[~mask].any() and torch.equal(gradient[mask], -weights[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
def test_IW6_extreme_ratios(mode: str, dtype: torch.dtype) -> None:
    ratio = torch.tensor([0.0, 1e30, math.inf, math.nan]).to(dtype)
    zero, huge, infinite, loud = importance_weights(ratio, mode=mode, high=2.0)
    assert zero == 0.0 and huge == infinite == (2.0 if mode == "truncate" else 0.0) and loud.isnan()
    assert zero.dtype == torch.promote_types(dtype, torch.float32)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: policy_ratio(ONES, ONES[:1], ONES), r"logps \(2, 3\), old_logps \(1, 3\)"),
        (lambda: policy_ratio(ONES, ONES, ONES[:, :2]), r"old_logps \(2, 3\), mask \(2, 2\)"),
        (
            lambda: policy_ratio(ONES[0], ONES[0], ONES[0]),
            r"logps must have 2 dimension\(s\), got shape \(3,\)",
        ),
        (lambda: policy_ratio(ONES.long(), ONES, ONES), "logps must be floating point, got torch.int64"),
        (
            lambda: policy_ratio(ONES, ONES, ONES / 2),
            "mask must be bool or hold only 0 and 1, got the value 0.5",
        ),
        (
            lambda: policy_ratio(ONES, ONES, ONES, level="word"),
            "level must be one of 'token', 'sequence', got 'word'",
        ),
        (lambda: importance_weights(ONES.long(), mode="mask", high=2.0), "ratio must be floating point"),
        (
            lambda: importance_weights(ONES, mode="clip", high=2.0),
            "mode must be one of 'truncate', 'mask', got 'clip'",
        ),
        (
            lambda: importance_weights(ONES, mode="mask", high=0.0),
            "high must be positive and finite, got 0.0",
        ),
        (
            lambda: importance_weights(ONES, mode="mask", high=math.inf),
            "high must be positive and finite, got inf",
        ),
        (
            lambda: importance_weights(ONES, mode="mask", high=2.0, low=-0.1),
            r"low must lie in \[0, 2.0\], got -0.1",
        ),
        (
            lambda: importance_weights(ONES, mode="mask", high=2.0, low=2.1),
            r"low must lie in \[0, 2.0\], got 2.1",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
