"""RMSNorm in Triton: one read forward; backward, the weight's gradient adds up in float32.

A row lies in the registers of one program. Backward, a fixed number of programs share the rows; each keeps
the weight's gradient of its rows in registers, and one sum over the programs follows: no atomics, so the same
inputs give the same bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanopost.losses.checks import check_positive

from .dispatch import WIDEST_NORM as WIDEST
from .inputs import Pointer, check_dense, check_shape

PROGRAMS = 396  # of the backward pass: 3 for each of 132 multiprocessors, all at work at the same time


def _launch(width: int) -> dict[str, int]:
    """The block that holds a row, and warps for 16 numbers a thread."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, block // (32 * 16))}


@triton.jit
def _forward_kernel(
    x_ptr: "Pointer",
    weight_ptr: "Pointer",
    out_ptr: "Pointer",
    scale_ptr: "Pointer",
    width: int,
    eps: float,
    BLOCK: tl.constexpr,
) -> None:
    """One row: its scale 1/√(mean x² + ε), and the product with the weight."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    normed = (x * scale).to(x_ptr.dtype.element_ty)  # rounded before it meets the weight, as in the model
    tl.store(out_ptr + row * width + columns, normed.to(tl.float32) * weight, mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _backward_kernel(
    x_ptr: "Pointer",
    weight_ptr: "Pointer",
    scale_ptr: "Pointer",
    grad_out_ptr: "Pointer",
    grad_x_ptr: "Pointer",
    partial_ptr: "Pointer",
    rows: int,
    width: int,
    BLOCK: tl.constexpr,
) -> None:
    """Rows program, program + programs, …: their own gradient, and their share of the weight's."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        offsets = row * width + columns
        scale = tl.load(scale_ptr + row)
        normed = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * scale
        grad_out = tl.load(grad_out_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        grad_weight += grad_out * normed.to(x_ptr.dtype.element_ty).to(tl.float32)
        grad_normed = grad_out * weight
        along = tl.sum(grad_normed * normed, axis=0) / width  # what the change of the scale takes back
        tl.store(grad_x_ptr + offsets, (grad_normed - along * normed) * scale, mask=inside)
    tl.store(partial_ptr + program * width + columns, grad_weight, mask=inside)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        width = x.shape[-1]
        rows = x.numel() // width
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
        scale = torch.empty(rows, dtype=torch.float32, device=x.device)
        _forward_kernel[(rows,)](x, weight, out, scale, width, eps, **_launch(width))
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows, width = len(scale), x.shape[-1]
        programs = min(rows, PROGRAMS)
        grad_x = torch.empty_like(x)
        partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _backward_kernel[(programs,)](
            x, weight, scale, grad_out.contiguous(), grad_x, partial, rows, width, **_launch(width)
        )
        return grad_x, partial.sum(dim=0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension, as `models.llama.RMSNorm` has it.

        y = n·w,   n = x/√(mean x² + ε)

    The mean is taken in float32 and n is rounded to x's dtype before the product with the weight w. Backward,
    with g = w·∂L/∂y: ∂L/∂x = (g − n·mean(g·n))/√(mean x² + ε), and ∂L/∂w = Σ n·∂L/∂y over the rows, added up
    in float32.

    Args:
        x: (..., D), float32, bfloat16 or float16, contiguous, D ≤ 8192; carries the gradient.
        weight: w, (D,), of any of these dtypes; carries the gradient.
        eps: ε > 0.

    Returns:
        Shape (..., D), in promote_types of x and weight, any sign; of root mean square 1 for weights of 1.

    Raises:
        ValueError: a weight that is not (D,), D > 8192, another dtype, not contiguous, ε ≤ 0.

    Reference:
        Zhang and Sennrich 2019, eq. 4, with ε and without the bias.
    """
    check_dense(x=x, weight=weight)
    check_shape("weight", weight, tuple(x.shape[-1:]))
    check_positive("eps", eps)
    if not 1 <= weight.numel() <= WIDEST:
        raise ValueError(f"weight must have 1 to {WIDEST} entries, got {weight.numel()}")
    return _RMSNorm.apply(x, weight, eps)
