"""A frozen linear layer and the adapter beside it, in no more passes than the products need.

Autograd's own chain makes a tensor for the update, one for the sum, and in backward two gradients of x, which
it then adds. Here the adapter's part is added where the base's stands already, forward and backward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanopost.kernels import dispatch


def lora_linear(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, *, scale: float
) -> Tensor:
    """x Wᵀ + b + s·(x lora_Aᵀ) lora_Bᵀ, W and b frozen; all of one dtype.

    Args:
        x: (N, in); carries the gradient g W + s·(g lora_B) lora_A.
        weight: W, (out, in). bias: b, (out,), or none. Neither gets a gradient.
        lora_A: (r, in); carries the gradient s·(g lora_B)ᵀ x.
        lora_B: (out, r); carries the gradient s·gᵀ (x lora_Aᵀ).
        scale: s.

    Returns:
        (N, out), as `nanopost.models.lora.lora_forward`.

    Reference: Hu et al. 2021 (LoRA), eq. 3.
    """
    return _LoRALinear.apply(x, weight, lora_A, lora_B, bias, scale)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> Tensor:
        with dispatch.fast_products(x):
            y, thin = F.linear(x, weight, bias), F.linear(x, lora_A)
        ctx.save_for_backward(x, weight, lora_A, lora_B, thin)
        ctx.scale = scale
        return y.addmm_(thin, lora_B.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, thin = ctx.saved_tensors
        with dispatch.fast_products(grad):
            back = ctx.scale * (grad @ lora_B)  # (N, r)
            grad_x = (grad @ weight).addmm_(back, lora_A) if ctx.needs_input_grad[0] else None
            return grad_x, None, back.T @ x, ctx.scale * (grad.T @ thin), None, None
