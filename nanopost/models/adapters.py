"""Many adapters over one base: which one a request gets, and a batch whose rows have different ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from nanopost.models.lora import check_factors, check_input, lora_scale

T = TypeVar("T")


def mixed_lora_forward(
    hidden: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter: Tensor,
    *,
    alpha: float,
    rank_stabilised: bool = False,
) -> Tensor:
    """A linear layer in which each row of the batch has its own adapter of a bank.

        y_b = x_b Wᵀ + s·(x_b lora_A[i_b]ᵀ) lora_B[i_b]ᵀ

    The rows' adapters are fetched by their index. A sum over the whole bank with one-hot weights would be the
    same on paper, but 0 · NaN is NaN: one tenant's broken adapter would break everyone. Every product is a
    product of its own for each row, so a row does not depend on its neighbours: on one CPU thread bit for
    bit, elsewhere to rounding.

    Args:
        hidden: x, shape (B, in) or (B, T, in). weight: W, shape (out, in), of the same dtype.
        lora_A: bank, shape (N, r, in). lora_B: bank, shape (N, out, r).
        adapter: i, whole numbers in [0, N), shape (B,); −1 is not the last one, and there is no default.
        alpha, rank_stabilised: as in `lora_weight`.
    Returns: y, shape (B, out) or (B, T, out); row b is `lora_forward` of row b with adapter i_b, and its
        gradient reaches that adapter alone.
    Raises: ValueError for shapes that do not fit, an adapter that the bank does not have, α not above 0.
    Reference: Hu et al. 2021 (LoRA), eq. 3, a row at a time; Chen et al. 2023 (Punica), §3.
    Page: docs/losses/mixed_lora_forward.md
    """
    check_bank(hidden, weight, lora_A, lora_B, adapter)
    scale = lora_scale(lora_A.shape[1], alpha=alpha, rank_stabilised=rank_stabilised)
    rows = hidden[:, None] if hidden.dim() == 2 else hidden  # (B, T, in)
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), hidden.dtype)
    own_A, own_B = lora_A[adapter].to(dtype), lora_B[adapter].to(dtype)  # (B, r, in), (B, out, r)
    update = torch.bmm(torch.bmm(rows.to(dtype), own_A.mT), own_B.mT)
    base = torch.bmm(rows, weight.mT.expand(len(rows), -1, -1))
    mixed = (base + scale * update).to(base.dtype)
    return mixed[:, 0] if hidden.dim() == 2 else mixed


def route(table: Mapping[tuple[str, str], T], tenant: str, version: str) -> T:
    """The adapter of a tenant's policy version: a lookup and nothing else.

        i = g(z),   z = (tenant, version)

    Args:
        table: (tenant, version) to an adapter, a number of a bank or a name of a registry.
    Returns: the adapter; {("bank_A", "policy_v3"): 17} sends bank_A with policy_v3 to 17.
    Raises: ValueError that names tenant and version when the table lacks the pair. There is no default: the
        base, another version or another tenant's adapter would answer fluently under the wrong policy.
    Page: docs/losses/route.md
    """
    if (tenant, version) not in table:
        versions = sorted(known for owner, known in table if owner == tenant)
        known = f"it has {', '.join(map(repr, versions))}" if versions else "the tenant is unknown"
        raise ValueError(f"no adapter for tenant {tenant!r} and version {version!r}: {known}")
    return table[tenant, version]


def check_bank(hidden: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, adapter: Tensor) -> None:
    """Banks (N, r, in) and (N, out, r) fit the weight, and every row names one of the N."""
    if lora_A.dim() != 3 or lora_B.dim() != 3 or len(lora_A) != len(lora_B) or not len(lora_A):
        shapes = f"{tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        raise ValueError(f"lora_A must be (N, r, in) and lora_B (N, out, r) with one N ≥ 1, got {shapes}")
    check_factors(weight, lora_A[0], lora_B[0])
    check_input(hidden, weight)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"hidden must be (B, in) or (B, T, in), got {tuple(hidden.shape)}")
    if tuple(adapter.shape) != (len(hidden),) or adapter.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(adapter.shape)} of {adapter.dtype}"
        raise ValueError(f"adapter must be ({len(hidden)},), a whole number a row of hidden, got {got}")
    for row, index in enumerate(adapter.tolist()):
        if not 0 <= index < len(lora_A):
            raise ValueError(f"adapter of row {row} must lie in [0, {len(lora_A)}), got {index}")
