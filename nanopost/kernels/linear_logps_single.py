"""linear_logps in one Triton kernel that needs no workspace: product, softmax and entropy in registers.

A program holds BLOCK_N tokens and walks over the vocabulary, BLOCK_V rows of the matrix at a time, and inside
over the width. Its tile of logits never leaves the registers and is never rounded: float32 from the tensor
core's sum to the logarithm. Hidden states and matrix come through the tensor memory accelerator, by
descriptors: what lies outside of them arrives as 0, so the ragged edges need no mask where they are loaded.
With few tokens, 128 a program, most of the GPU is idle; that, and the backward pass, is what
`linear_logps_chunked` is for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .gather_logps import fold
from .inputs import Pointer
from .linear_logps_chunked import check_inputs

LAUNCH = {"BLOCK_N": 128, "BLOCK_V": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}


@triton.jit
def _forward_kernel(
    hidden: "TensorDescriptor",
    weight: "TensorDescriptor",
    target_ids_ptr: "Pointer",
    logps_ptr: "Pointer",
    entropy_ptr: "Pointer",
    logsumexp_ptr: "Pointer",
    rows: int,
    vocabulary: int,
    width: int,
    inverse_temperature: float,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """BLOCK_N tokens against the whole vocabulary."""
    first = tl.program_id(0) * BLOCK_N
    row = first + tl.arange(0, BLOCK_N)
    target = tl.load(target_ids_ptr + row, mask=row < rows, other=-1)
    maximum = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    picked = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for part in range(0, width, BLOCK_D):
            logits = tl.dot(hidden.load([first, part]), weight.load([start, part]).T, logits)
        column = start + tl.arange(0, BLOCK_V)
        logits = tl.where(column[None, :] < vocabulary, logits, -float("inf"))
        picked += tl.sum(tl.where(column[None, :] == target[:, None], logits, 0.0), axis=1)
        maximum, total, weighted = fold(maximum, total, weighted, logits, inverse_temperature)
    picked = tl.where((target >= 0) & (target < vocabulary), picked, float("nan"))
    spread = tl.log(total)
    tl.store(logps_ptr + row, (picked - maximum) * inverse_temperature - spread, mask=row < rows)
    tl.store(entropy_ptr + row, spread - weighted / total, mask=row < rows)
    tl.store(logsumexp_ptr + row, maximum * inverse_temperature + spread, mask=row < rows)


def forward(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy and logsumexp of z = h Wᵀ, with no memory but the results'.

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
    logps, entropy, logsumexp = (
        torch.empty(rows, dtype=torch.float32, device=hidden.device) for _ in range(3)
    )
    if rows:  # there is no descriptor of nothing
        _forward_kernel[(triton.cdiv(rows, LAUNCH["BLOCK_N"]),)](
            TensorDescriptor.from_tensor(hidden, [LAUNCH["BLOCK_N"], LAUNCH["BLOCK_D"]]),
            TensorDescriptor.from_tensor(weight, [LAUNCH["BLOCK_V"], LAUNCH["BLOCK_D"]]),
            target_ids,
            logps,
            entropy,
            logsumexp,
            rows,
            vocabulary,
            width,
            1.0 / temperature,
            **LAUNCH,
        )
    return logps, entropy, logsumexp
