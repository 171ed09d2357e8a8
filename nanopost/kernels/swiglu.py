"""The gate of the MLP, silu(gate)·up, as one pass over memory forward and one backward, in Triton.

Written out in PyTorch, silu's result makes a round trip through memory, is rounded on the way and kept for
the backward pass. Here neither happens: gate and up are all that is kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanopost.losses.checks import check_floats

from .inputs import Pointer, check_dense

LAUNCH = {"BLOCK": 4096, "num_warps": 8}  # 16 numbers a thread


@triton.jit
def _forward_kernel(
    gate_ptr: "Pointer", up_ptr: "Pointer", out_ptr: "Pointer", size: int, BLOCK: tl.constexpr
) -> None:
    """One block of the product."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _backward_kernel(
    gate_ptr: "Pointer",
    up_ptr: "Pointer",
    grad_out_ptr: "Pointer",
    grad_gate_ptr: "Pointer",
    grad_up_ptr: "Pointer",
    size: int,
    BLOCK: tl.constexpr,
) -> None:
    """One block of both gradients."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    grad_out = tl.load(grad_out_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(grad_up_ptr + offsets, grad_out * gate * sigmoid, mask=inside)
    silu_slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_gate_ptr + offsets, grad_out * up * silu_slope, mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        _forward_kernel[(triton.cdiv(gate.numel(), LAUNCH["BLOCK"]),)](gate, up, out, gate.numel(), **LAUNCH)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        _backward_kernel[(triton.cdiv(gate.numel(), LAUNCH["BLOCK"]),)](
            gate, up, grad_out.contiguous(), grad_gate, grad_up, gate.numel(), **LAUNCH
        )
        return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """The gated product of the MLP, rounded once.

        y = silu(g)·u,   silu(g) = g·σ(g)

    g and u are the two projections of the MLP's input, σ the logistic function. Computed in float32.

    Args:
        gate: g, any shape, float32, bfloat16 or float16, contiguous; carries the gradient
            u·σ(g)·(1 + g·(1 − σ(g))).
        up: u, of the same shape and dtype; carries the gradient silu(g).

    Returns:
        Of the same shape and dtype, any sign; 0 where gate or up is 0.

    Raises:
        ValueError: shapes or dtypes that differ, another dtype, not contiguous.

    Reference:
        Shazeer 2020, eq. 6 (SwiGLU), without the last matrix.
    """
    check_floats(gate=gate, up=up)
    check_dense(gate=gate, up=up)
    if gate.dtype != up.dtype:
        raise ValueError(f"gate and up must have one dtype, got {gate.dtype} and {up.dtype}")
    return _SwiGLU.apply(gate, up)
