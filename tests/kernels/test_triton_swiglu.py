"""swiglu against silu(gate)·up in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from tests.kernels.exact import farthest

pytest.importorskip("triton", reason="the kernels need triton (the extra `kernels`)")

from nanopost.kernels.swiglu import LAUNCH, swiglu

pytestmark = pytest.mark.usefixtures("interpreted")


def drawn(*shape: int, seed: int) -> list[Tensor]:
    """gate, up and the gradient of the product, part of it 0."""
    generator = Generator().manual_seed(seed)
    gate, up, grad = (2.0 * torch.randn(*shape, generator=generator) for _ in range(3))
    return [gate, up, grad * (torch.rand(*shape, generator=generator) > 0.2)]


def run(gate: Tensor, up: Tensor, grad: Tensor, kernel: bool) -> list[Tensor]:
    """The product, and the gradients of gate and up."""
    gate, up = (tensor.clone().requires_grad_() for tensor in (gate, up))
    out = swiglu(gate, up) if kernel else F.silu(gate) * up
    return [out.detach(), *torch.autograd.grad(out, (gate, up), grad)]


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, LAUNCH["BLOCK"]), (3, 5, LAUNCH["BLOCK"] // 8 + 3)])
def test_value_and_gradients_equal_the_formula(shape: tuple[int, ...]) -> None:
    inputs = drawn(*shape, seed=len(shape))
    exact = run(*(tensor.double() for tensor in inputs), kernel=False)
    for found, true in zip(run(*inputs, kernel=True), exact, strict=True):
        assert found.dtype == torch.float32 and found.shape == shape
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-6)


def test_half_precision_errs_no_more_than_the_naive_program() -> None:
    inputs = [tensor.half() for tensor in drawn(50, 101, seed=1)]
    found, naive = run(*inputs, kernel=True), run(*inputs, kernel=False)
    exact = run(*(tensor.double() for tensor in inputs), kernel=False)
    for output, rough, true in zip(found, naive, exact, strict=True):
        assert output.dtype == torch.float16 and farthest(output, true) <= farthest(rough, true)


def test_large_gates_are_linear_or_0() -> None:
    gate = torch.tensor([1e4, -1e4, 100.0, -100.0], requires_grad=True)
    out = swiglu(gate, torch.tensor([0.5, 0.5, 2.0, 2.0]))
    assert out.tolist() == [5e3, 0.0, 200.0, 0.0]
    out.sum().backward()  # one number, expanded
    assert gate.grad.tolist() == [0.5, 0.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.ones(2, 3), torch.ones(3), r"shapes must be equal .* gate \(2, 3\), up \(3,\)"),
        (torch.ones(2).double(), torch.ones(2).double(), "gate must be float32, .* torch.float64"),
        (torch.ones(2).half(), torch.ones(2), "one dtype, got torch.float16 and torch.float32"),
        (torch.ones(2, 3), torch.ones(3, 2).T, "up must be contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(gate: Tensor, up: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swiglu(gate, up)
