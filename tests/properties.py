"""Properties that every loss has, whatever its formula: masks, splits, half precision, who has a gradient."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanopost.losses import aggregate
from tests.ragged import junk_outside

Loss = Callable[..., Tensor]


def slope(loss: Tensor, leaf: Tensor) -> Tensor:
    """The gradient of the sum of a loss."""
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return gradient


def check_masked_slots(
    loss: Loss, inputs: Sequence[Tensor], mask: Tensor, soiled: int, junk: float, leaf: int = 0
) -> None:
    """With junk outside the mask of inputs[soiled], value and gradient of the aggregate stay bit for bit.

    The gradient, with respect to inputs[leaf], is exactly 0 outside the mask and not 0 everywhere inside.
    """

    def run(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        tensors = [*tensors]
        tensors[leaf] = tensors[leaf].clone().requires_grad_()
        value = aggregate(loss(*tensors), mask, mode="sequence_mean", denom=1.7)
        return value.detach(), torch.autograd.grad(value, tensors[leaf])[0]

    clean = list(inputs)
    value, gradient = run(clean)
    clean[soiled] = junk_outside(clean[soiled], mask, junk)
    soiled_value, soiled_gradient = run(clean)
    assert torch.equal(soiled_value, value)
    assert torch.equal(soiled_gradient, gradient)
    assert not soiled_gradient[~mask].any() and gradient.isfinite().all() and gradient.any()


def check_split(loss: Loss, inputs: Sequence[Tensor], owner: Tensor, leaf: int = 0) -> None:
    """The rows dealt to micro-batches (owner: a number a row) give the gradient of the whole, to 1e-14."""
    leaves = [tensor.clone().requires_grad_(index == leaf) for index, tensor in enumerate(inputs)]

    def gradient(rows: Tensor) -> Tensor:
        return torch.autograd.grad(loss(*(tensor[rows] for tensor in leaves)).sum(), leaves[leaf])[0]

    whole = gradient(torch.arange(len(owner)))
    parts = sum(gradient((owner == part).nonzero()[:, 0]) for part in owner.unique())
    size = float(whole.abs().max())
    assert size > 0.0
    torch.testing.assert_close(parts, whole, rtol=0.0, atol=1e-14 * size)


def check_half(loss: Loss, inputs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Half-precision inputs are computed in float32: its rounding and no more (float64 on the same input)."""
    halves = [tensor.to(dtype) if tensor.dtype.is_floating_point else tensor for tensor in inputs]
    exact = [tensor.double() if tensor.dtype.is_floating_point else tensor for tensor in halves]
    found, expected = loss(*halves), loss(*exact)
    assert found.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


def check_only_gradient(loss: Loss, inputs: Sequence[Tensor], *, to: Sequence[int]) -> None:
    """Exactly the inputs at the places `to` get a gradient; the floating-point others get none at all."""
    leaves = [t.clone().requires_grad_() if t.dtype.is_floating_point else t for t in inputs]
    floating = [place for place, tensor in enumerate(leaves) if tensor.dtype.is_floating_point]
    gradients = torch.autograd.grad(loss(*leaves).sum(), [leaves[p] for p in floating], allow_unused=True)
    got = [place for place, gradient in zip(floating, gradients, strict=True) if gradient is not None]
    assert got == list(to), f"gradients at {got}, expected {list(to)}"
