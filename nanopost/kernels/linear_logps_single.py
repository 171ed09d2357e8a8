"""linear_logps in one Triton kernel that needs next to no workspace: product and softmax in registers.

A program holds BLOCK_N tokens and walks over its share of the vocabulary, BLOCK_V rows of the matrix at a
time, and inside over the width. Its tile of logits never leaves the registers and is never rounded: float32
from the tensor core's sum to the logarithm. Hidden states and matrix come through the tensor memory
accelerator, by descriptors: what lies outside of them arrives as 0, so the ragged edges need no mask where
they are loaded. SPLITS programs share the vocabulary, so that 8,192 tokens keep every multiprocessor busy;
four numbers a token and split are merged in the end. The backward pass is that of `linear_logps_chunked`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gather_logps import fold
from .inputs import Pointer
from .linear_logps_chunked import check_inputs

LAUNCH = {
    "BLOCK_N": 128,
    "BLOCK_V": 128,
    "BLOCK_D": 64,
    "num_warps": 8,
    "num_stages": 4,
}  # 256 words would spill
SPLITS = (
    8  # 8,192 tokens are then 512 programs for 132 multiprocessors: four rounds, the last one nearly full
)


@triton.jit
def _forward_kernel(
    hidden: "TensorDescriptor",
    weight: "TensorDescriptor",
    target_ids_ptr: "Pointer",
    maximum_ptr: "Pointer",
    total_ptr: "Pointer",
    weighted_ptr: "Pointer",
    picked_ptr: "Pointer",
    rows: int,
    vocabulary: int,
    width: int,
    share: int,
    inverse_temperature: float,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """BLOCK_N tokens against a share of the vocabulary, a multiple of BLOCK_V."""
    first = tl.program_id(0) * BLOCK_N
    row = first + tl.arange(0, BLOCK_N)
    target = tl.load(target_ids_ptr + row, mask=row < rows, other=-1)
    maximum = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    picked = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(tl.program_id(1) * share, (tl.program_id(1) + 1) * share, BLOCK_V):
        logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for part in range(0, width, BLOCK_D):
            logits = tl.dot(hidden.load([first, part]), weight.load([start, part]).T, logits)
        column = start + tl.arange(0, BLOCK_V)
        logits = tl.where(column[None, :] < vocabulary, logits, -float("inf"))
        picked += tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), axis=1)
        maximum, total, weighted = fold(maximum, total, weighted, logits, inverse_temperature)
    place = tl.program_id(1) * rows + row
    tl.store(maximum_ptr + place, maximum, mask=row < rows)
    tl.store(total_ptr + place, total, mask=row < rows)
    tl.store(weighted_ptr + place, weighted, mask=row < rows)
    tl.store(picked_ptr + place, picked, mask=row < rows)


def _merge(
    maximum: Tensor, total: Tensor, weighted: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, sum and weighted sum (N,) from those of the shares, (SPLITS, N)."""
    peak = maximum.amax(0)
    shift = ((maximum - peak) / temperature).nan_to_num(nan=0.0, neginf=torch.finfo(torch.float32).min)
    shrink = shift.exp()
    return peak, (shrink * total).sum(0), (shrink * (weighted + shift * total)).sum(0)


def forward(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy and logsumexp of z = h Wᵀ, with 32 numbers a token beside them.

        ℓ = z_y/τ − log Σ_v exp(z_v/τ),   H = −Σ_v p_v log p_v,   logsumexp = log Σ_v exp(z_v/τ)

    h are the hidden states, W the head's matrix, y the target, τ the temperature and p = softmax(z/τ).

    Args:
        hidden: h, (N, D), bfloat16 or float16, contiguous, D a multiple of 8; the gradient is
            `linear_logps_chunked.backward`.
        weight: W, (V, D), of the same dtype, contiguous.
        target_ids: (N,), int32 or int64. An id outside [0, V) makes its log-probability NaN.
        temperature: τ > 0.

    Returns:
        Log-probabilities ≤ 0, entropies in [0, log V] and logsumexps, each (N,), float32, nats; −log V, log V
        and log V for hidden states of 0. A row without a finite softmax is NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, float32 (a tensor core would cut it off), D that is not
            a multiple of 8 (a descriptor's rows start at multiples of 16 bytes), not contiguous, τ ≤ 0.

    Reference:
        Milakov and Gimelshein 2018, algorithm 3; on tiles: Dao et al. 2022 (FlashAttention), algorithm 1.
    """
    check_inputs(hidden, weight, target_ids, temperature)
    (rows, width), vocabulary = hidden.shape, len(weight)
    if hidden.dtype == torch.float32 or width % 8:
        found = f"{tuple(hidden.shape)} of {hidden.dtype}"
        raise ValueError(f"hidden must be in half precision and D a multiple of 8, got {found}")
    parts = torch.empty(4, SPLITS, rows, dtype=torch.float32, device=hidden.device)
    blocks = triton.cdiv(vocabulary, LAUNCH["BLOCK_V"])
    if rows:  # there is no descriptor of nothing
        _forward_kernel[triton.cdiv(rows, LAUNCH["BLOCK_N"]), SPLITS](
            TensorDescriptor.from_tensor(hidden, [LAUNCH["BLOCK_N"], LAUNCH["BLOCK_D"]]),
            TensorDescriptor.from_tensor(weight, [LAUNCH["BLOCK_V"], LAUNCH["BLOCK_D"]]),
            target_ids,
            *parts,
            rows,
            vocabulary,
            width,
            triton.cdiv(blocks, SPLITS) * LAUNCH["BLOCK_V"],
            1.0 / temperature,
            **LAUNCH,
        )
    maximum, total, weighted = _merge(parts[0], parts[1], parts[2], temperature)
    known = (target_ids >= 0) & (target_ids < vocabulary)
    picked = parts[3].sum(0).where(known, torch.nan)
    spread = total.log()
    return (
        (picked - maximum) / temperature - spread,
        spread - weighted / total,
        maximum / temperature + spread,
    )
