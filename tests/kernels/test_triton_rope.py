"""rope against complex multiplication in float64, by hand, and against its own inverse."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from tests.kernels.exact import farthest

pytest.importorskip("triton", reason="the kernels need triton (the extra `kernels`)")

from nanopost.kernels.rope import LAUNCH, rope

pytestmark = pytest.mark.usefixtures("interpreted")

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def drawn(tokens: int, heads: int, head_dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, cosines and sines of unlike angles, and the gradient of the output; that of token 0 is 0."""
    generator = Generator().manual_seed(seed)
    x, grad = (torch.randn(tokens, heads, head_dim, generator=generator) for _ in range(2))
    angles = 7.0 * torch.rand(tokens, head_dim // 2, generator=generator)
    grad[:1] = 0.0
    return x, angles.cos(), angles.sin(), grad


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x_i + i x_{i+E/2}) (cos φ + i sin φ), in float64."""
    left, right = x.double().chunk(2, dim=-1)
    product = torch.complex(left, right) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat([product.real, product.imag], dim=-1)


def written_out(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same as one would write it, every step in the dtype of x."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def run(turn: Turn, x: Tensor, cos: Tensor, sin: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradient of x."""
    x = x.clone().requires_grad_()
    out = turn(x, cos, sin)
    return [out.detach(), *torch.autograd.grad(out, x, grad.to(out.dtype))]


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 2), (7, 3, 12), (LAUNCH["ROWS"], 2, 64)])
def test_value_and_gradient_equal_complex_multiplication(tokens: int, heads: int, head_dim: int) -> None:
    inputs = drawn(tokens, heads, head_dim, seed=tokens)
    for found, true in zip(run(rope, *inputs), run(turned, *inputs), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), true.double(), rtol=1e-6, atol=1e-6)


def test_half_precision_errs_no_more_than_the_naive_program() -> None:
    x, cos, sin, grad = (tensor.half() for tensor in drawn(50, 3, 16, seed=1))
    exact = run(turned, x.double(), cos, sin, grad)
    naive, found = (run(turn, x, cos, sin, grad) for turn in (written_out, rope))
    for output, rough, true in zip(found, naive, exact, strict=True):
        assert output.dtype == torch.float16 and farthest(output, true) <= farthest(rough, true)


def test_a_quarter_turn_by_hand() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])  # the pairs are (1, 3) and (2, 4)
    angles = torch.tensor([[math.pi / 2, math.pi]])
    found = rope(x, angles.cos(), angles.sin())
    torch.testing.assert_close(found, torch.tensor([[[-3.0, -2.0, 1.0, -4.0]]]))


def test_the_opposite_angle_undoes_it_and_lengths_stay() -> None:
    x, cos, sin, _ = drawn(5, 2, 8, seed=2)
    found = rope(x, cos, sin)
    torch.testing.assert_close(rope(found, cos, -sin), x)
    torch.testing.assert_close(found.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(found, x)


def test_a_plain_sum_is_differentiated() -> None:
    x, cos, sin, _ = drawn(3, 2, 4, seed=3)
    x.requires_grad_()
    rope(x, cos, sin).sum().backward()
    expected = torch.cat([cos + sin, cos - sin], dim=-1)[:, None].expand(3, 2, 4)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize(
    ("x", "table", "message"),
    [
        (torch.ones(2, 4), torch.ones(2, 2), "x must have 3 dimension"),
        (torch.ones(2, 3, 5), torch.ones(2, 2), "heads of an even width"),
        (torch.ones(2, 3, 4), torch.ones(2, 4), r"cos must be \(2, 2\), got \(2, 4\)"),
        (torch.ones(3, 2, 4).transpose(0, 1), torch.ones(2, 2), "x must be contiguous"),
        (torch.ones(2, 3, 4).double(), torch.ones(2, 2), "x must be float32, .* torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, table: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope(x, table, table)
