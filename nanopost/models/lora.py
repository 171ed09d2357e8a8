"""LoRA: a frozen matrix plus a product of two thin ones, as a formula, as a forward pass and as a module.

Shapes and names are those of the ecosystem's adapter files, W (out, in), lora_A (r, in), lora_B (out, r), for
x Wᵀ. Texts that write W + A·B with A (d, r) and B (r, k) mean x W: their A is lora_Aᵀ, their B is lora_Bᵀ,
and the product is the same one transposed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopost.kernels.linear import linear
from nanopost.kernels.lora_linear import lora_linear
from nanopost.losses.checks import check_count, check_positive, check_unit, wide
from nanopost.models.nf4 import NF4Linear


def lora_scale(rank: int, *, alpha: float, rank_stabilised: bool = False) -> float:
    """The number s in front of lora_B·lora_A: α/r, or α/√r (rsLoRA).

    Returns: α = 16 and r = 64 give .25, rank-stabilised 2.
    Raises: ValueError when α is not above 0 or r is no whole number above 0.
    Reference: Hu et al. 2021, §4.1; Kalajdzievski 2023 (rsLoRA), theorem 3.2.
    """
    check_count("rank", rank, 1)
    check_positive("alpha", alpha)
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def trainable_count(in_features: int, out_features: int, *, rank: int) -> int:
    """Numbers that LoRA trains for a matrix: r(d + k); 131,072 of 16,777,216 for d = k = 4096 and r = 16."""
    return rank * (in_features + out_features)


def lora_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, alpha: float, rank_stabilised: bool = False
) -> Tensor:
    """The matrix with its adapter merged into it.

        W' = W + s·lora_B·lora_A,   s = α/r or α/√r

    Product and sum are computed in promote_types(dtypes, float32) and rounded once, at the end, to the
    weight's dtype. In bfloat16 that one rounding still swallows an update below 2⁻⁹ of a weight.

    Args:
        weight: W, shape (out, in).
        lora_A: shape (r, in). lora_B: shape (out, r). All three carry a gradient.
        alpha: α, above 0. rank_stabilised: divide it by √r in the place of r.
    Returns: W', shape (out, in), in the weight's dtype; W itself when lora_B is 0.
    Raises: ValueError for shapes that do not fit, what is not floating point, α not above 0.
    Reference: Hu et al. 2021 (LoRA), eq. 3.
    Page: docs/losses/lora_weight.md
    """
    check_factors(weight, lora_A, lora_B)
    scale = lora_scale(len(lora_A), alpha=alpha, rank_stabilised=rank_stabilised)
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), wide(weight).dtype)
    merged = weight.to(dtype) + scale * (lora_B.to(dtype) @ lora_A.to(dtype))
    return merged.to(weight.dtype)


def lora_forward(
    hidden: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    uniforms: Tensor | None = None,
    *,
    alpha: float,
    rank_stabilised: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """A linear layer with its adapter beside it; the product lora_B·lora_A is never formed.

        y = x Wᵀ + b + s·(x̃ lora_Aᵀ) lora_Bᵀ,   x̃ = x·1[u ≥ p] / (1 − p)

    The bias is here because a linear layer adds it inside its product: so with lora_B = 0 its very bits come
    out. Dropout meets what the adapter reads and nothing else, and its uniforms are an argument.
    The base's product has the dtype of x and W. The adapter's part is computed in the widest dtype of x and
    the factors, added there, and the sum rounded once to the base's dtype.

    Args:
        hidden: x, shape (..., in). weight: W, shape (out, in), of the same dtype.
        lora_A: shape (r, in). lora_B: shape (out, r).
        bias: b, shape (out,), or none. uniforms: u in [0, 1), of the shape of x; needed when p > 0.
        alpha, rank_stabilised: as in `lora_weight`. dropout: p in [0, 1]; 1 leaves the base alone.
    Returns: y, shape (..., out), with a gradient to all but the uniforms; x `lora_weight`ᵀ + b when p = 0.
    Raises: ValueError for shapes that do not fit, p outside [0, 1], p > 0 without uniforms, α not above 0.
    Reference: Hu et al. 2021 (LoRA), eq. 3.
    Page: docs/losses/lora_forward.md
    """
    check_factors(weight, lora_A, lora_B)
    check_input(hidden, weight)
    check_unit("dropout", dropout)
    scale = lora_scale(len(lora_A), alpha=alpha, rank_stabilised=rank_stabilised)
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), hidden.dtype)
    seen = hidden.to(dtype) if dropout == 0.0 else kept_by(hidden.to(dtype), uniforms, dropout)
    thin = F.linear(seen, lora_A.to(dtype))
    return add_update(F.linear(hidden, weight, bias), thin, lora_B, scale)


def add_update(base: Tensor, thin: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """base + s·thin lora_Bᵀ, rounded once to the base's dtype; of one dtype it is a single product."""
    lora_B = lora_B.to(thin.dtype)
    if base.dtype != thin.dtype:
        return (base + scale * F.linear(thin, lora_B)).to(base.dtype)
    flat = torch.addmm(base.reshape(-1, len(lora_B)), thin.reshape(-1, thin.shape[-1]), lora_B.T, alpha=scale)
    return flat.view(base.shape)


def kept_by(hidden: Tensor, uniforms: Tensor | None, dropout: float) -> Tensor:
    """Inverted dropout: x·1[u ≥ p] / (1 − p); p = 1 keeps nothing."""
    if uniforms is None:
        raise ValueError(f"dropout {dropout} needs uniforms: which numbers are dropped is an argument")
    if uniforms.shape != hidden.shape:
        raise ValueError(
            f"uniforms {tuple(uniforms.shape)} must have the shape of hidden {tuple(hidden.shape)}"
        )
    factor = 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0
    return hidden * (uniforms >= dropout) * factor


def check_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """lora_A (r, in) and lora_B (out, r) fit the weight (out, in)."""
    named = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    for name, tensor in named.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    rank = lora_A.shape[0] if lora_A.dim() == 2 else 0
    if (
        weight.dim() != 2
        or shapes["lora_A"] != (rank, weight.shape[1])
        or shapes["lora_B"] != (len(weight), rank)
    ):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"weight must be (out, in), lora_A (r, in) and lora_B (out, r), got {listed}")


def check_input(hidden: Tensor, weight: Tensor) -> None:
    """hidden (..., in) fits the weight (out, in), in shape and dtype."""
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden must be (..., {weight.shape[1]}) and {weight.dtype} as the weight, "
            f"got {tuple(hidden.shape)} and {hidden.dtype}"
        )


class LoRALinear(nn.Module):
    """A linear layer, frozen, with its two factors: `lora_A` Kaiming-uniform from a generator, `lora_B` zero.

    The factors are at least float32, whatever the base is. `merge` writes `lora_weight` into the base and
    keeps a copy of what was there; `unmerge` puts it back, so the base's bits survive any number of merges.
    Merged layers are not saved (whoever loads one would add the adapter a second time), and not trained.
    """

    kept: Tensor | None  # the base's weight while the adapter is merged into it

    def __init__(
        self,
        base: nn.Linear | NF4Linear,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        rank_stabilised: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_unit("dropout", dropout)
        self.alpha, self.rank_stabilised, self.dropout = alpha, rank_stabilised, dropout
        self.scale = lora_scale(rank, alpha=alpha, rank_stabilised=rank_stabilised)
        self.base = base.requires_grad_(False)
        weight = base.weight
        dtype = wide(weight).dtype
        device = "cpu" if weight.is_meta else weight.device  # the base may not be read yet, they are made now
        # Drawn on the CPU: the same on every device.
        lora_A = torch.empty(rank, base.in_features, dtype=dtype)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)  # within ±1/√in
        self.lora_A = nn.Parameter(lora_A.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))
        self.register_buffer("kept", None, persistent=False)
        self.register_state_dict_pre_hook(refuse_merged)

    @property
    def merged(self) -> bool:
        """Whether the base holds the merged weight."""
        return self.kept is not None

    def forward(self, hidden: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out). Training with dropout asks for the uniforms; eval() drops nothing."""
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise ValueError("merged: no gradient would reach lora_A and lora_B; unmerge, or call eval()")
            return self.base(hidden)
        dropped, base = self.training and self.dropout > 0.0, self.base
        plain = not (dropped or isinstance(base, NF4Linear) or torch.is_autocast_enabled(hidden.device.type))
        if plain and hidden.dim() == 2 and hidden.dtype == self.lora_A.dtype == base.weight.dtype:
            return lora_linear(hidden, base.weight, self.lora_A, self.lora_B, base.bias, scale=self.scale)
        seen = kept_by(wide(hidden), uniforms, self.dropout) if dropped else wide(hidden)
        return add_update(base(hidden), linear(seen, self.lora_A), self.lora_B, self.scale)

    @torch.no_grad()
    def merge(self) -> None:
        """Put W' in the place of W and keep a copy of W; merging twice is refused."""
        if self.merged:
            raise ValueError("the adapter is merged already: a second time would add it twice")
        if isinstance(self.base, NF4Linear):
            raise ValueError("the base is in four bits and cannot hold the sum; `merged_state` tells it")
        merged = lora_weight(
            self.base.weight, self.lora_A, self.lora_B, alpha=self.alpha, rank_stabilised=self.rank_stabilised
        )
        self.kept = self.base.weight.clone()
        self.base.weight.copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the copy back, bit for bit; (W + ΔW) − ΔW would not be W."""
        if self.kept is None:
            raise ValueError("the adapter is not merged: there is nothing to take back")
        self.base.weight.copy_(self.kept)
        self.kept = None


def refuse_merged(module: Any, prefix: str, keep_vars: bool) -> None:
    """Before a state dict: a merged layer would be saved with its adapter in the base and beside it."""
    if module.merged:
        name = prefix.rstrip(".") or "the layer"
        raise ValueError(f"{name} is merged: unmerge before saving, or its adapter counts twice")
