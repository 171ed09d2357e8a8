"""A frozen layer with its adapter in few passes, against the formula's own function."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from nanopost.kernels.lora_linear import lora_linear
from nanopost.models.lora import LoRALinear, lora_forward

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))  # N, in, out, r


def problem(n: int, width: int, out: int, rank: int, *, bias: bool) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(n + width)
    shapes = [(n, width), (out, width), (rank, width), (out, rank), *([(out,)] if bias else [])]
    x, weight, lora_A, lora_B, *b = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes
    )
    return [x.requires_grad_(), weight, lora_A.requires_grad_(), lora_B.requires_grad_(), *(b or [None])]


@given(SIZES, st.booleans(), st.floats(0.1, 4.0))
def test_values_and_gradients_are_the_formulas(sizes, bias, alpha):
    given_ = problem(*sizes, bias=bias)
    x, weight, lora_A, lora_B, b = given_
    scale = alpha / sizes[3]
    found, expected = (
        lora_linear(*given_, scale=scale),
        lora_forward(x, weight, lora_A, lora_B, b, alpha=alpha),
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    up = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trained = (x, lora_A, lora_B)
    for ours, theirs in zip(*(torch.autograd.grad(y, trained, up) for y in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_its_gradient_is_its_slope():
    x, weight, lora_A, lora_B, b = problem(3, 4, 5, 2, bias=True)
    assert gradcheck(
        lambda *free: lora_linear(free[0], weight, free[1], free[2], b, scale=0.7), (x, lora_A, lora_B)
    )


def test_an_input_without_a_gradient_costs_none():
    """The first block's: its embedding is frozen."""
    x, weight, lora_A, lora_B, _ = problem(3, 4, 5, 2, bias=False)
    y = lora_linear(x.detach(), weight, lora_A, lora_B, None, scale=0.7)
    y.sum().backward()
    assert x.grad is None and lora_A.grad.abs().max() > 0 and lora_B.grad.abs().max() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_takes_this_way_and_says_the_same(bias):
    layer = LoRALinear(
        torch.nn.Linear(6, 4, bias=bias).double(),
        rank=2,
        alpha=3.0,
        generator=torch.Generator().manual_seed(0),
    )
    torch.nn.init.normal_(layer.lora_B)
    x = problem(3, 6, 4, 2, bias=False)[0]
    two = layer(x)
    assert "LoRALinear" in type(two.grad_fn).__name__
    three = layer(x[None])  # more dimensions than a list of tokens has go the general way
    torch.testing.assert_close(three[0], two, rtol=1e-9, atol=1e-12)
