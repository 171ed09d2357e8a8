"""Rotary positions in Triton: every pair (x_i, x_{i+E/2}) of a head is turned by its token's angle.

A rotation is undone by the opposite one: the backward pass is the same kernel with the sine's sign changed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanopost.losses.checks import check_dims

from .inputs import Pointer, check_dense, check_shape

LAUNCH = {"ROWS": 32, "num_warps": 4}  # 32 heads of 64 pairs: 16 pairs a thread


@triton.jit
def _rotate_kernel(
    x_ptr: "Pointer",
    cos_ptr: "Pointer",
    sin_ptr: "Pointer",
    out_ptr: "Pointer",
    rows: int,
    heads: int,
    half: int,
    direction: float,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """A few heads, the next tokens' as well if a token has fewer: turned forward (1) or back (−1)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]  # head `row % heads` of token `row // heads`
    pair = tl.arange(0, HALF)[None, :]
    inside = (row < rows) & (pair < half)
    angle = (row // heads) * half + pair
    left = row.to(tl.int64) * (2 * half) + pair
    right = left + half
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32) * direction
    x_left = tl.load(x_ptr + left, mask=inside, other=0.0).to(tl.float32)
    x_right = tl.load(x_ptr + right, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + left, x_left * cos - x_right * sin, mask=inside)
    tl.store(out_ptr + right, x_right * cos + x_left * sin, mask=inside)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    tokens, heads, head_dim = x.shape
    out = torch.empty_like(x)
    _rotate_kernel[(triton.cdiv(tokens * heads, LAUNCH["ROWS"]),)](
        x,
        cos,
        sin,
        out,
        tokens * heads,
        heads,
        head_dim // 2,
        direction,
        HALF=triton.next_power_of_2(head_dim // 2),
        **LAUNCH,
    )
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad_out.contiguous(), cos, sin, -1.0), None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every pair (x_i, x_{i+E/2}) of every head by the angle of its token.

        y_i = x_i cos φ_i − x_{i+E/2} sin φ_i,   y_{i+E/2} = x_{i+E/2} cos φ_i + x_i sin φ_i

    φ_i = p·θ^(−2i/E) at position p. The two halves of a head are paired, as in the hub's Llama, and not its
    neighbours. Computed in float32 and rounded once. The gradient is turned back by the same angles.

    Args:
        x: (N, heads, E), a list of N tokens, float32, bfloat16 or float16, contiguous; carries the gradient.
        cos: (N, E/2), contiguous, of any of these dtypes; no gradient.
        sin: (N, E/2), likewise.

    Returns:
        Shape (N, heads, E), in x's dtype; x itself for angles of 0, and of the same length for any.

    Raises:
        ValueError: x not (N, heads, E) with an even E, tables not (N, E/2), another dtype, not contiguous.

    Reference:
        Su et al. 2021 (RoFormer), eq. 34, with halves for pairs.
    """
    check_dims("x", x, 3)
    check_dense(x=x, cos=cos, sin=sin)
    tokens, _, head_dim = x.shape
    if head_dim % 2 or not head_dim:
        raise ValueError(f"x must have heads of an even width, got {tuple(x.shape)}")
    check_shape("cos", cos, (tokens, head_dim // 2))
    check_shape("sin", sin, (tokens, head_dim // 2))
    return _Rope.apply(x, cos, sin)
