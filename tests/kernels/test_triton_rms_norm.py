"""rms_norm against its formula: in float64, and in half precision rounding for rounding."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from tests.kernels.exact import farthest

pytest.importorskip("triton", reason="the kernels need triton (the extra `kernels`)")

from nanopost.kernels.rms_norm import WIDEST, rms_norm

pytestmark = pytest.mark.usefixtures("interpreted")

EPS = 3e-3
Norm = Callable[[Tensor, Tensor, float], Tensor]


def drawn(*shape: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and the gradient of the output; row 1 of x is small (ε counts), that of the gradient 0."""
    generator = Generator().manual_seed(seed)
    x, grad = (torch.randn(*shape, generator=generator) for _ in range(2))
    x.view(-1, shape[-1])[1:2] *= 0.02
    grad.view(-1, shape[-1])[1:2] = 0.0
    return x, 1.0 + 0.5 * torch.randn(shape[-1], generator=generator), grad


def formula(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x/√(mean x² + ε), in float32 at least, rounded to x's dtype, times the weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype)


def run(norm: Norm, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of x and weight."""
    x, weight = (tensor.detach().clone().requires_grad_() for tensor in (x, weight))
    out = norm(x, weight, EPS)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), grad.to(out.dtype))]


def exactly(*inputs: Tensor) -> list[Tensor]:
    """The same from the formula, in float64."""
    return run(formula, *(tensor.double() for tensor in inputs))


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of a small test goes round as one of many rows does on a GPU."""
    monkeypatch.setattr("nanopost.kernels.rms_norm.PROGRAMS", 8)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("shape", [(1, 1), (5, 40), (3, 2, 100), (2, WIDEST), (21, 24)])
def test_value_and_gradients_equal_the_formula(shape: tuple[int, ...]) -> None:
    inputs = drawn(*shape, seed=shape[-1])
    for found, true in zip(run(rms_norm, *inputs), exactly(*inputs), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-5)


def test_half_precision_is_rounded_before_the_weight() -> None:
    x, weight, _ = (tensor.half() for tensor in drawn(32, 100, seed=1))
    found, same = rms_norm(x, weight, EPS), formula(x, weight, EPS)
    assert found.dtype == torch.float16
    # the scale may differ in its last bit, and then a rounding here and there
    assert (found == same).double().mean() > 0.995


def test_half_precision_errs_no_more_than_the_naive_program() -> None:
    inputs = [tensor.half() for tensor in drawn(32, 100, seed=2)]
    outputs, roughs = run(rms_norm, *inputs), run(formula, *inputs)
    for found, naive, true in zip(outputs, roughs, exactly(*inputs), strict=True):
        assert found.dtype == torch.float16 and farthest(found, true) <= farthest(naive, true)


@pytest.mark.usefixtures("few_programs")
def test_the_gradient_of_the_weight_adds_up_in_float32() -> None:
    generator = Generator().manual_seed(3)
    x = torch.rand(20, 24, generator=generator).half().repeat_interleave(2, dim=0)  # the rows of a pair go to
    grad = (2.0 + torch.rand(20, 24, generator=generator)).half().repeat_interleave(2, dim=0)  # two programs
    grad[1::2] = 0.0625 - grad[1::2]  # and cancel, all but a sixteenth
    inputs = x, torch.ones(24).half(), grad
    found, true = run(rms_norm, *inputs)[2], exactly(*inputs)[2]
    # the sum is rounded, and before it each n, at most 2; the sums of the programs, ±12 each, are not
    assert ((found.double() - true).abs() <= 2.0**-11 * true + 20 * 0.0625 * 2.0**-11).all()


def test_a_wide_weight_makes_a_wide_output() -> None:
    x, weight, _ = drawn(5, 40, seed=4)
    found = rms_norm(x.half(), weight, EPS)
    same = formula(x.half(), weight, EPS)
    assert found.dtype == same.dtype == torch.float32
    torch.testing.assert_close(found, same, rtol=2.0**-10, atol=0.0)


def test_a_plain_sum_is_differentiated() -> None:
    x, weight, _ = drawn(4, 12, seed=5)
    x.requires_grad_()
    rms_norm(x, weight, EPS).sum().backward()
    true = exactly(x, weight, torch.ones(4, 12))[1]
    torch.testing.assert_close(x.grad.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight", "eps", "message"),
    [
        (torch.ones(2, 3), torch.ones(4), 1e-5, r"weight must be \(3,\), got \(4,\)"),
        (torch.ones(2, 3).double(), torch.ones(3), 1e-5, "x must be float32, .* torch.float64"),
        (torch.ones(3, 2).T, torch.ones(3), 1e-5, "x must be contiguous"),
        (torch.ones(2, 3), torch.ones(3), 0.0, "eps must be positive and finite, got 0.0"),
        (torch.ones(1, WIDEST + 1), torch.ones(WIDEST + 1), 1e-5, "1 to 8192 entries, got 8193"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, weight: Tensor, eps: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, eps)
