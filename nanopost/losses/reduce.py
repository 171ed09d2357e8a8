"""From per-token values to one number, and the denominator that makes the number right.

The denominator counts the whole optimiser step: every micro-batch and every process adds its `local_denom`,
and each divides by the total. Cutting a step into other micro-batches then cannot change its gradient.
"""

from torch import Tensor

from .checks import (
    check_choice,
    check_count,
    check_dims,
    check_floating,
    check_mask,
    check_positive,
    check_same_shape,
    wide,
)

MODES = ("token_mean", "sequence_mean", "sequence_sum", "constant")


def aggregate(values: Tensor, mask: Tensor, *, mode: str, denom: float) -> Tensor:
    """The one way from per-token values to a scalar: a masked sum over a denominator of the whole step.

        token_mean      L = Σ_b Σ_t m_bt v_bt / denom               denom = supervised tokens
        sequence_mean   L = Σ_b (Σ_t m_bt v_bt / Σ_t m_bt) / denom  denom = sequences
        sequence_sum    L = Σ_b Σ_t m_bt v_bt / denom               denom = sequences
        constant        L = Σ_b Σ_t m_bt v_bt / denom               denom = sequences × a constant length

    v is what a loss returned, m the completion mask, and denom the sum of `local_denom` over all
    micro-batches and processes of the step, never a count of this micro-batch alone. What lies outside the
    mask may be NaN or infinite: it is filled before the sum and its gradient is exactly 0. A row without a
    supervised token adds nothing.

    Args:
        values: (B, T), any floating dtype; carries the gradient.
        mask: (B, T), bool or 0/1; no gradient.
        mode: one of the four above.
        denom: a positive number, not a tensor; no gradient.

    Returns:
        Scalar in promote_types(dtype, float32), in the unit of `values`. With every value v = c in the mask:
        c under token_mean and sequence_mean.

    Raises:
        ValueError: shapes differ or are not (B, T), values not floating point, a mask that is not 0/1, an
            unknown mode, a denom that is no number, ≤ 0 or not finite.

    Reference:
        token_mean: Yu et al. 2025 (DAPO), eq. 12. sequence_mean: Shao et al. 2024 (GRPO), eq. 3.
        constant: Liu et al. 2025 (Dr. GRPO), §3. sequence_sum: the sum over tokens of Williams 1992.

    Page: docs/losses/aggregate.md

    >>> import torch
    >>> values = torch.tensor([[4.0, float("nan")], [1.0, 2.0]])
    >>> mask = torch.tensor([[True, False], [True, True]])
    >>> aggregate(values, mask, mode="token_mean", denom=3)
    tensor(2.3333)
    >>> aggregate(values, mask, mode="sequence_mean", denom=2)
    tensor(2.7500)
    """
    check_floating(values=values)
    check_same_shape(values=values, mask=mask)
    check_dims("values", values, 2)
    check_choice("mode", mode, MODES)
    check_positive("denom", denom)
    mask = check_mask("mask", mask)
    values = wide(values).masked_fill(~mask, 0.0)
    if mode == "sequence_mean":
        values = values / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return values.sum() / denom


def local_denom(mask: Tensor, *, mode: str, max_tokens: int | None = None) -> float:
    """What one micro-batch adds to the denominator that `aggregate` divides by.

        token_mean                    d = Σ_b Σ_t m_bt
        sequence_mean, sequence_sum   d = Σ_b 1[Σ_t m_bt > 0]
        constant                      d = max_tokens · Σ_b 1[Σ_t m_bt > 0]

    m is the completion mask of this micro-batch. Sum d over every micro-batch and process of the step before
    the first backward pass. A row without a supervised token is no sequence, so a dropped row changes nothing
    but its own share.

    Args:
        mask: (B, T), bool or 0/1.
        mode: a mode of `aggregate`.
        max_tokens: the constant length that "constant" multiplies with; the other modes do not read it.

    Returns:
        A float ≥ 0; 3.0 tokens or 2.0 sequences for lengths 1 and 2. It is 0.0 when nothing is supervised,
        and `aggregate` refuses a step whose total is 0.

    Raises:
        ValueError: a mask that is not (B, T) or not 0/1, an unknown mode, "constant" without max_tokens ≥ 1.

    Reference:
        The denominators of `aggregate`: Yu et al. 2025, eq. 12; Shao et al. 2024, eq. 3; Liu et al. 2025, §3.

    Page: docs/losses/local_denom.md

    >>> import torch
    >>> mask = torch.tensor([[True, False], [True, True], [False, False]])
    >>> local_denom(mask, mode="token_mean"), local_denom(mask, mode="sequence_mean")
    (3.0, 2.0)
    """
    check_dims("mask", mask, 2)
    check_choice("mode", mode, MODES)
    mask = check_mask("mask", mask)
    if mode == "token_mean":
        return float(mask.sum())
    sequences = float(mask.any(dim=1).sum())
    if mode != "constant":
        return sequences
    if max_tokens is None:
        raise ValueError("max_tokens must be given with mode 'constant', got None")
    check_count("max_tokens", max_tokens, 1)
    return sequences * max_tokens
