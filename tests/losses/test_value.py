"""The critic's loss: both branches of the clip, the half, and gradients that stay in the mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from nanopost.losses import aggregate, value_loss
from tests.pages import scalar
from tests.properties import check_half, check_masked_slots, check_only_gradient, check_split, slope
from tests.ragged import JUNK, normal, ragged

Ragged = tuple[Tensor, Generator]
CLIPS = [None, 0.3]


def drawn(batch: Ragged, scale: float = 1.0) -> list[Tensor]:
    """Values, old values not far from them, and returns."""
    mask, generator = batch
    values = normal(generator, *mask.shape, scale=scale)
    old_values = values + normal(generator, *mask.shape, scale=0.5 * scale)
    return [values, old_values, normal(generator, *mask.shape, scale=2.0 * scale)]


def page(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    flat = zip(*(tensor.flatten().tolist() for tensor in (values, old_values, returns)), strict=True)
    losses = [scalar("value_loss")(*slot, clip) for slot in flat]
    return torch.tensor(losses, dtype=torch.float64).reshape(values.shape)


@given(batch=ragged(), clip=st.none() | st.floats(0.05, 0.9))
def test_VL1_value_equals_the_page(batch: Ragged, clip: float | None) -> None:
    inputs = drawn(batch)
    found = value_loss(*inputs, clip=clip)
    torch.testing.assert_close(found, page(*inputs, clip), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("value", "old_value", "ret", "expected"),
    [
        (1.0, 0.5, 3.0, 0.0),  # moved .5 up, towards the return: clipped
        (1.0, 1.5, 3.0, -2.0),  # moved .5 down, away from it: not
        (1.0, 1.5, -3.0, 0.0),  # moved down, towards it: clipped
        (1.0, 0.5, -3.0, 4.0),  # moved up, away: not
        (1.0, 0.9, 3.0, -2.0),  # within the clip
        (1.0, 1.1, 3.0, -2.0),
        (1.0, 0.5, 0.7, 0.3),  # past the return: the clipped value is nearer to it than the value is
        (1.0, 0.0, 0.9, 0.0),  # past the return, but the clipped value is further from it
    ],
)
def test_VL2_gradient_follows_the_table(value: float, old_value: float, ret: float, expected: float) -> None:
    values, old_values, returns = torch.tensor([[[value]], [[old_value]], [[ret]]], dtype=torch.float64)
    values.requires_grad_()
    found = slope(value_loss(values, old_values, returns, clip=0.3), values).item()
    assert found == pytest.approx(expected, abs=1e-15)


@given(batch=ragged(), clip=st.none() | st.floats(0.05, 0.9))
def test_VL2_gradient_equals_finite_differences_of_the_page(batch: Ragged, clip: float | None) -> None:
    values, old_values, returns = drawn(batch)
    step = 1e-6
    above, below = (page(values + sign * step, old_values, returns, clip) for sign in (1, -1))
    values.requires_grad_()
    found = slope(value_loss(values, old_values, returns, clip=clip), values)
    smooth = torch.ones_like(found, dtype=torch.bool)
    if clip is not None:  # away from the kinks
        with torch.no_grad():
            held = values.clamp(old_values - clip, old_values + clip)
            gap = (values - returns).square() - (held - returns).square()
            smooth = ((values - old_values).abs() - clip).abs().gt(1e-4) & (
                gap.abs().gt(1e-4) | held.eq(values)
            )
    torch.testing.assert_close(found[smooth], ((above - below) / (2 * step))[smooth], rtol=0.0, atol=1e-7)


@pytest.mark.parametrize("clip", CLIPS)
@given(batch=ragged())
def test_VL3_returns_and_old_values_get_no_gradient(clip: float | None, batch: Ragged) -> None:
    check_only_gradient(lambda *tensors: value_loss(*tensors, clip=clip), drawn(batch), to=[0])


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1, 2])
@pytest.mark.parametrize("clip", CLIPS)
@given(batch=ragged())
def test_VL4_masked_slots_may_hold_anything(
    clip: float | None, soiled: int, junk: float, batch: Ragged
) -> None:
    values, old_values, returns = drawn(batch)
    old_values = values + 0.2 * (old_values - values).tanh()  # within the clip: every token has a gradient
    loss = lambda *tensors: value_loss(*tensors, clip=clip)  # noqa: E731
    check_masked_slots(loss, [values, old_values, returns], batch[0], soiled, junk)


@given(batch=ragged())
def test_VL4_gradient_of_the_aggregate_is_the_error_inside_and_zero_outside(batch: Ragged) -> None:
    mask, (values, old_values, returns) = batch[0], drawn(batch)
    values.requires_grad_()
    losses = value_loss(values, old_values, returns, clip=None)
    (found,) = torch.autograd.grad(aggregate(losses, mask, mode="token_mean", denom=2.5), values)
    expected = torch.where(mask, (values - returns).detach() / 2.5, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0.0)
    assert torch.equal(found != 0.0, mask)


@given(batch=ragged(), distance=st.floats(-0.29, 0.29))
def test_VL5_within_the_clip_and_without_one_it_is_half_the_square(batch: Ragged, distance: float) -> None:
    values, old_values, returns = drawn(batch)
    plain = 0.5 * (values - returns) ** 2
    assert torch.equal(value_loss(values, values + distance, returns, clip=0.3), plain)
    assert torch.equal(value_loss(values, old_values, returns, clip=None), plain)
    near = values.clone().requires_grad_()
    found = slope(value_loss(near, values + distance, returns, clip=0.3), near)
    torch.testing.assert_close(found, values - returns, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_VL6_extremes_are_finite(dtype: torch.dtype, size: float, clip: float | None) -> None:
    values = torch.tensor([[size, 0.0, size]], dtype=dtype, requires_grad=True)
    old_values = torch.tensor([[0.0, size, size]], dtype=dtype)
    losses = value_loss(values, old_values, -old_values, clip=clip)
    assert losses.isfinite().all() and losses.dtype == torch.promote_types(dtype, torch.float32)
    gradient = slope(losses, values)
    assert gradient.isfinite().all() and gradient.abs().max() > 1e4


@pytest.mark.parametrize("clip", CLIPS)
@given(batch=ragged(), data=st.data())
def test_VL7_any_split_gives_the_gradient_of_the_step(
    clip: float | None, batch: Ragged, data: st.DataObject
) -> None:
    mask, inputs = batch[0], drawn(batch)
    inputs[1] = inputs[0] + 0.1
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in mask])

    def loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        losses = value_loss(values, old_values, returns, clip=clip)
        return aggregate(losses, mask, mode="token_mean", denom=7.0)

    check_split(loss, [*inputs, mask], owner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("clip", CLIPS)
@given(batch=ragged())
def test_VL8_half_precision_is_computed_in_float32(
    clip: float | None, dtype: torch.dtype, batch: Ragged
) -> None:
    check_half(lambda *tensors: value_loss(*tensors, clip=clip), drawn(batch), dtype)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_token_that_is_not_finite_stays_loud(broken: int) -> None:
    inputs = [torch.zeros(1, 2) for _ in range(3)]
    inputs[broken][0, 1] = float("nan")
    losses = value_loss(*inputs, clip=0.2)
    assert losses[0, 0] == 0.0 and losses[0, 1].isnan()


@pytest.mark.parametrize("clip", [0.0, -0.2, float("nan"), float("inf")])
def test_a_clip_that_is_not_positive_is_refused(clip: float) -> None:
    with pytest.raises(ValueError, match=f"clip must be positive and finite, got {clip}"):
        value_loss(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2), clip=clip)


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("clip", CLIPS)
def test_shapes_that_differ_are_refused(clip: float | None, wrong: int) -> None:
    inputs = [torch.ones(2, 3) for _ in range(3)]
    inputs[wrong] = torch.ones(1, 3)
    with pytest.raises(ValueError, match=r"shapes must be equal \(nothing broadcasts\)"):
        value_loss(*inputs, clip=clip)
