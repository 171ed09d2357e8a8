"""The path of `linear_logps` on a GPU: cuBLAS multiplies a tile of the vocabulary, Triton folds it.

One buffer (N, TILE) is filled by a matrix product again and again; (N, V) is never stored. Forward, a kernel
takes each tile into the running maximum and sums of its rows (see `gather_logps.fold`); backward, each tile
is multiplied once more and a kernel turns it into its gradient, in place, for two more products. A tile's
logits are rounded to the dtype of the hidden states, as in a model that stores them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanopost.losses.checks import check_dims, check_positive

from .gather_logps import fold, logit_gradient
from .inputs import Pointer, check_dense, check_shape, check_targets

TILE = 4096  # logits of a row that are there at the same time
LAUNCH = {"TILE": TILE, "num_warps": 8}  # 16 logits a thread


@triton.jit
def _fold_kernel(
    tile_ptr: "Pointer",
    target_ids_ptr: "Pointer",
    maximum_ptr: "Pointer",
    total_ptr: "Pointer",
    weighted_ptr: "Pointer",
    picked_ptr: "Pointer",
    start: int,
    width: int,
    inverse_temperature: float,
    TILE: tl.constexpr,
) -> None:
    """Take one row of the tile into the row's running numbers, and its target's logit if it is here."""
    row = tl.program_id(0)
    tile_ptr += row.to(tl.int64) * TILE
    columns = tl.arange(0, TILE)
    logits = tl.load(tile_ptr + columns, mask=columns < width, other=-float("inf")).to(tl.float32)
    maximum, total, weighted = fold(
        tl.load(maximum_ptr + row),
        tl.load(total_ptr + row),
        tl.load(weighted_ptr + row),
        logits,
        inverse_temperature,
    )
    tl.store(maximum_ptr + row, maximum)
    tl.store(total_ptr + row, total)
    tl.store(weighted_ptr + row, weighted)
    target = tl.load(target_ids_ptr + row) - start
    here = (target >= 0) & (target < width)
    tl.store(picked_ptr + row, tl.load(tile_ptr + target, mask=here, other=0.0).to(tl.float32), mask=here)


@triton.jit
def _gradient_kernel(
    tile_ptr: "Pointer",
    target_ids_ptr: "Pointer",
    logsumexp_ptr: "Pointer",
    entropy_ptr: "Pointer",
    grad_logps_ptr: "Pointer",
    grad_entropy_ptr: "Pointer",
    grad_logsumexp_ptr: "Pointer",
    start: int,
    width: int,
    inverse_temperature: float,
    TILE: tl.constexpr,
) -> None:
    """One row of the tile: logits are read, their gradient is written to the same place."""
    row = tl.program_id(0)
    columns = tl.arange(0, TILE)
    place = tile_ptr + row.to(tl.int64) * TILE + columns
    gradient = logit_gradient(
        tl.load(place, mask=columns < width, other=-float("inf")).to(tl.float32),
        columns == tl.load(target_ids_ptr + row) - start,
        tl.load(logsumexp_ptr + row),
        tl.load(entropy_ptr + row),
        tl.load(grad_logps_ptr + row),
        tl.load(grad_entropy_ptr + row),
        tl.load(grad_logsumexp_ptr + row),
        inverse_temperature,
    )
    tl.store(place, gradient, mask=columns < width)


def check_inputs(hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float) -> None:
    """hidden (N, D) and weight (V, D) of one dtype, a target a row, τ > 0."""
    check_dims("hidden", hidden, 2)
    check_dims("weight", weight, 2)
    check_dense(hidden=hidden, weight=weight)
    if hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype or not weight.numel():
        found = " and ".join(f"{tuple(tensor.shape)} of {tensor.dtype}" for tensor in (hidden, weight))
        raise ValueError(f"hidden must be (N, D) and weight (V, D) of one dtype, got {found}")
    check_targets(target_ids, len(hidden))
    check_positive("temperature", temperature)


def forward(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy and logsumexp of z = h Wᵀ, without storing z.

        ℓ = z_y/τ − log Σ_v exp(z_v/τ),   H = −Σ_v p_v log p_v,   logsumexp = log Σ_v exp(z_v/τ)

    h are the hidden states, W the head's matrix, y the target, τ the temperature and p = softmax(z/τ).

    Args:
        hidden: h, (N, D), float32, bfloat16 or float16, contiguous; for its gradient see `backward`.
        weight: W, (V, D), of the same dtype, contiguous.
        target_ids: (N,), int32 or int64. An id outside [0, V) makes its log-probability NaN.
        temperature: τ > 0.

    Returns:
        Log-probabilities ≤ 0, entropies in [0, log V] and logsumexps, each (N,), float32, nats; −log V, log V
        and log V for hidden states of 0. A row without a finite softmax is NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, not contiguous, τ ≤ 0.

    Reference:
        Hsu et al. 2024 (Liger Kernel), §3.2, cut along the vocabulary where they cut along the tokens.
    """
    check_inputs(hidden, weight, target_ids, temperature)
    rows, vocabulary = len(hidden), len(weight)
    tile = hidden.new_empty(rows, TILE)
    maximum, total, weighted, picked = (
        torch.full((rows,), value, dtype=torch.float32, device=hidden.device)
        for value in (-torch.inf, 0.0, 0.0, torch.nan)
    )
    for start in range(0, vocabulary, TILE):
        width = min(TILE, vocabulary - start)
        torch.mm(hidden, weight[start : start + width].T, out=tile[:, :width])
        _fold_kernel[(rows,)](
            tile, target_ids, maximum, total, weighted, picked, start, width, 1.0 / temperature, **LAUNCH
        )
    spread = total.log()
    logps = (picked - maximum) / temperature - spread
    return logps, spread - weighted / total, maximum / temperature + spread


def backward(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    temperature: float,
    logsumexp: Tensor,
    entropy: Tensor,
    upstream: tuple[Tensor, Tensor, Tensor],
    *,
    trained: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the hidden states and of the head's matrix, from those of the three outputs.

        g_v = [a·(1[v = y] − p_v) − b·p_v·(log p_v + H) + c·p_v]/τ,   ∂L/∂h = g W,   ∂L/∂W = gᵀ h

    g is the gradient of the logits; a, b, c are those of log-probability, entropy and logsumexp, row by row.
    g is rounded to the dtype of h, for the products; ∂L/∂h adds up over the tiles in float32, ∂L/∂W of a tile
    is one product over all tokens.

    Args:
        hidden, weight, target_ids, temperature: as in `forward`.
        logsumexp, entropy: (N,), float32, what `forward` returned.
        upstream: a, b, c, each (N,).
        trained: whether ∂L/∂W is asked for; under an adapter the head is frozen.

    Returns:
        ∂L/∂h, (N, D), and ∂L/∂W, (V, D), in the dtype of h and W, or None; nats per unit of h and W. A row
        without a finite softmax sends 0 back.

    Raises:
        ValueError: as `forward`, and numbers of rows that differ.

    Reference:
        As `forward`; the target's column is corrected in float32 (see `gather_logps.logit_gradient`).
    """
    check_inputs(hidden, weight, target_ids, temperature)
    by_row = [
        tensor.float().contiguous()  # the gradient of a plain sum is one number, expanded
        for tensor in (logsumexp, entropy, *upstream)
    ]
    for name, tensor in zip(("logsumexp", "entropy", "a", "b", "c"), by_row, strict=True):
        check_shape(name, tensor, (len(hidden),))
    tile = hidden.new_empty(len(hidden), TILE)
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    grad_weight = torch.empty_like(weight) if trained else None
    for start in range(0, len(weight), TILE):
        width = min(TILE, len(weight) - start)
        weight_tile, gradient = weight[start : start + width], tile[:, :width]
        torch.mm(hidden, weight_tile.T, out=gradient)
        _gradient_kernel[(len(hidden),)](tile, target_ids, *by_row, start, width, 1.0 / temperature, **LAUNCH)
        if grad_weight is not None:
            torch.mm(gradient.T, hidden, out=grad_weight[start : start + width])
        grad_hidden += gradient @ weight_tile
    return grad_hidden.to(hidden.dtype), grad_weight
