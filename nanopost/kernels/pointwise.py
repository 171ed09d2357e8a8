"""RMSNorm, SwiGLU and RoPE with the gradients written out: few passes over memory, little kept for backward.

Token by token these cost nothing beside the products, but every pass over a tensor that no cache holds is
paid in memory traffic, and autograd's own chain of elementary operations makes two to three times as many. On
a GPU the same three run as one Triton kernel each way.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopost.kernels import dispatch
from nanopost.losses.checks import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + ε) · w: the mean in float32 (or wider), the product in the weight's dtype.

    Args:
        x: (..., D); carries the gradient r (w g − n mean(w g n)), n = r x, r = 1/√(mean x² + ε).
        weight: (D,); carries the gradient Σ g n.
        eps: ε > 0.

    Returns:
        (..., D) in promote_types(weight.dtype, x.dtype); the weight where x is constant.

    Reference: Zhang & Sennrich 2019, eq. 4.
    """
    if dispatch.fused(x, weight) and x.shape[-1] <= dispatch.WIDEST_NORM:
        from nanopost.kernels import rms_norm as kernel

        return kernel.rms_norm(x, weight, eps)
    if not torch.is_grad_enabled() and x.dtype == weight.dtype == wide(x).dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up, silu(a) = a σ(a).

    Args:
        gate: (..., I); carries the gradient g ⊙ up ⊙ σ(a)(1 + a (1 − σ(a))).
        up: (..., I); carries the gradient g ⊙ silu(gate).

    Reference: Shazeer 2020, eq. 6.
    """
    if dispatch.fused(gate, up):
        from nanopost.kernels import swiglu as kernel

        return kernel.swiglu(gate, up)
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pair (x_i, x_{i+E/2}) of each head by its position's angle.

        (a, b) → (a cos − b sin, b cos + a sin)

    Args:
        x: (N, heads, E); carries the gradient turned back, by −angle.
        cos, sin: (N, E/2), no gradient.

    Reference: Su et al. 2021, eq. 34; the pairing of the hub's files.
    """
    if dispatch.fused(x):
        from nanopost.kernels import rope as kernel

        return kernel.rope(x, cos, sin)
    turned = _RoPE.apply if torch.is_grad_enabled() else _turn
    return turned(x, cos.unsqueeze(1), sin.unsqueeze(1))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rate = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rate)
        return (wide(x) * rate).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rate = ctx.saved_tensors
        grad, normed = wide(grad), wide(x) * rate
        pull = grad * weight
        inner = (pull * normed).mean(-1, keepdim=True)
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad_x = pull.addcmul_(normed, inner, value=-1).mul_(rate)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Both halves written where they belong."""
    (left, right), out = x.chunk(2, dim=-1), torch.empty_like(x)
    low, high = out.chunk(2, dim=-1)
    torch.mul(left, cos, out=low).addcmul_(right, sin, value=-1)
    torch.mul(right, cos, out=high).addcmul_(left, sin)
    return out
