"""x Wᵀ on a CPU whose default float32 product leaves half of its speed unused.

PyTorch's float32 products go to MKL, which runs at half speed on processors that are not Intel's. The product
of oneDNN, behind the precision called "medium", is a float32 one on a CPU without matrix units for bfloat16,
and runs at full speed; but attention gets slower under that setting. So it holds for linear layers and heads
alone, forward and backward, and nothing is set when the package is imported.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopost.kernels import dispatch


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ.

    Args:
        x: (N, D); carries the gradient g W.
        weight: (V, D); carries the gradient gᵀ x.

    Returns:
        (N, V), as `torch.nn.functional.linear`.
    """
    if dispatch.fast_linear(x):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with dispatch.fast_products(x):
            return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        with dispatch.fast_products(grad):
            grad_x = grad @ weight if ctx.needs_input_grad[0] else None
            grad_weight = grad.T @ x if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight
