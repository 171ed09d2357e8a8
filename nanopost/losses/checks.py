"""The door of every loss: arguments are checked here once and trusted afterwards.

Each helper raises a `ValueError` that names the argument and shows its value. Nothing broadcasts in silence,
and no number outside its range gets as far as a formula.
"""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype losses compute in, promote_types(dtype, float32): float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def held(values: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """The values inside [low, high] and inside the finite floats; a NaN stays.

    Outside and at a NaN the gradient is 0: a loss that is masked later sends no 0 · NaN or 0 · ∞ back.
    """
    largest = torch.finfo(values.dtype).max
    return values.clamp(max(low, -largest), min(high, largest))


def squared(errors: Tensor) -> Tensor:
    """The squares. Beyond ½√(the largest float) the square is +∞ and a NaN stays: loud, with gradient 0."""
    bound = 0.5 * torch.finfo(errors.dtype).max ** 0.5
    return held(errors, -bound, bound).square().masked_fill(errors.abs() > bound, torch.inf)


def sound_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits with 0 in every broken row, and which rows (...) are broken: a NaN, +∞, or nothing finite.

    A softmax over such a row would send NaN back even where a mask discards the row.
    """
    broken = ~logits.detach().amax(dim=-1).isfinite()
    if broken.any():  # a copy of all logits only where it is needed
        logits = logits.masked_fill(broken.unsqueeze(-1), 0.0)
    return logits, broken


def check_same_shape(**tensors: Tensor) -> None:
    """All tensors have one shape: `check_same_shape(logps=logps, old_logps=old_logps)`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be equal (nothing broadcasts): {listed}")


def check_floating(**tensors: Tensor) -> None:
    """All tensors are floating point: no integers, booleans or complex numbers."""
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")


def check_floats(**tensors: Tensor) -> None:
    """All tensors are floating point and have one shape."""
    check_floating(**tensors)
    check_same_shape(**tensors)


def check_scores(name: str, scores: Tensor) -> None:
    """Scores people or programs gave: floating point or integers, no booleans and no complex numbers."""
    if scores.dtype.is_complex or scores.dtype == torch.bool:
        raise ValueError(f"{name} must be floating point or integers, got {scores.dtype}")


def check_dims(name: str, tensor: Tensor, dims: int) -> None:
    """A tensor, and with exactly this many dimensions."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of {dims} dimension(s), got {tensor!r}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimension(s), got shape {tuple(tensor.shape)}")


def check_mask(name: str, mask: Tensor) -> Tensor:
    """The mask as booleans: bool, or numbers that are all 0 or 1."""
    if mask.dtype == torch.bool:
        return mask
    binary = mask.ne(0)
    if not torch.equal(binary.to(mask.dtype), mask):
        wrong = mask[binary.to(mask.dtype) != mask].flatten()[0].item()
        raise ValueError(f"{name} must be bool or hold only 0 and 1, got the value {wrong}")
    return binary


def check_rows(mask: Tensor, least: int = 0, **tensors: Tensor) -> Tensor:
    """The mask as booleans: two dimensions, the tensors' shape, and in every row at least `least` kept."""
    check_same_shape(**tensors, mask=mask)
    check_dims("mask", mask, 2)
    mask = check_mask("mask", mask)
    kept = mask.sum(dim=1)
    if (kept < least).any():
        row = int((kept < least).nonzero()[0])
        raise ValueError(f"mask must keep at least {least} in every row, got {int(kept[row])} in row {row}")
    return mask


def check_finite(name: str, tensor: Tensor) -> None:
    """No NaN and no infinity."""
    bad = ~tensor.isfinite()
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name} must be finite, got {tensor[where].item()} at index {where}")


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Logits are floating point and have a last dimension with at least one entry."""
    check_floating(**{name: logits})
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{name} must end in a vocabulary dimension, got shape {tuple(logits.shape)}")


def check_ids(name: str, ids: Tensor, logits: Tensor) -> None:
    """Ids are integers below the vocabulary size, one for each row of logits."""
    if tuple(ids.shape) != tuple(logits.shape[:-1]):
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}, logits {tuple(logits.shape)}: one id a row of logits"
        )
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {ids.dtype}")
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < logits.shape[-1]):
        worst = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise ValueError(
            f"{name} must lie in [0, {logits.shape[-1]}), got {worst}; what is not trained on is masked"
        )


def _check_number(name: str, value: float, rule: str, holds: Callable[[float], bool]) -> None:
    """A Python number, not a bool, a string or a tensor, for which the rule holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number (int or float), got {value!r}")
    if not holds(value):
        raise ValueError(f"{name} must {rule}, got {value!r}")


def check_positive(name: str, value: float) -> None:
    """A finite number above zero."""
    _check_number(name, value, "be positive and finite", lambda x: x > 0 and math.isfinite(x))


def check_range(name: str, value: float, low: float, high: float) -> None:
    """A number with low < value ≤ high."""
    _check_number(name, value, f"lie in ({low}, {high}]", lambda x: low < x <= high)


def check_fraction(name: str, value: float, high: float) -> None:
    """A number with 0 ≤ value < high."""
    _check_number(name, value, f"lie in [0, {high})", lambda x: 0.0 <= x < high)


def check_open(name: str, value: float) -> None:
    """A number with 0 < value < 1."""
    _check_number(name, value, "lie in (0, 1)", lambda x: 0.0 < x < 1.0)


def check_unit(name: str, value: float, high: float = 1) -> None:
    """A number with 0 ≤ value ≤ high."""
    _check_number(name, value, f"lie in [0, {high}]", lambda x: 0.0 <= x <= high)


def check_number(name: str, value: float) -> None:
    """A finite number of any sign."""
    _check_number(name, value, "be finite", math.isfinite)


def check_count(name: str, value: int, least: int) -> None:
    """A whole number, at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """One of the listed values."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_groups(name: str, rewards: Tensor, group_size: int) -> None:
    """A non-empty vector of finite rewards that splits into groups of `group_size`."""
    check_scores(name, rewards)
    check_dims(name, rewards, 1)
    if not rewards.numel() or rewards.numel() % group_size:
        raise ValueError(
            f"group_size {group_size} must divide the number of {name}, got {rewards.numel()} of them"
        )
    check_finite(name, rewards)
