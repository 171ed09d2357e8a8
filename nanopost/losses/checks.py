"""The door of every loss: arguments are checked here once and trusted afterwards.

Each helper raises a `ValueError` that names the argument and shows its value. Nothing broadcasts in silence,
and no number outside its range gets as far as a formula.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype losses compute in, promote_types(dtype, float32): float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_same_shape(**tensors: Tensor) -> None:
    """All tensors have one shape: `check_same_shape(logps=logps, old_logps=old_logps)`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"shapes must be equal (nothing broadcasts): {listed}")


def check_floats(**tensors: Tensor) -> None:
    """All tensors are floating point and have one shape."""
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    check_same_shape(**tensors)


def check_dims(name: str, tensor: Tensor, dims: int) -> None:
    """The tensor has exactly this many dimensions."""
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


def check_finite(name: str, tensor: Tensor) -> None:
    """No NaN and no infinity."""
    bad = ~tensor.isfinite()
    if bad.any():
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name} must be finite, got {tensor[where].item()} at index {where}")


def check_logits(logits: Tensor) -> None:
    """Logits have a last dimension with at least one entry."""
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must end in a vocabulary dimension, got shape {tuple(logits.shape)}")


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


def check_positive(name: str, value: float) -> None:
    """A finite number above zero."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """A number with low < value ≤ high."""
    if not low < value <= high:
        raise ValueError(f"{name} must lie in ({low}, {high}], got {value!r}")


def check_fraction(name: str, value: float, high: float) -> None:
    """A number with 0 ≤ value < high."""
    if not 0.0 <= value < high:
        raise ValueError(f"{name} must lie in [0, {high}), got {value!r}")


def check_unit(name: str, value: float) -> None:
    """A number with 0 ≤ value ≤ 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")


def check_number(name: str, value: float) -> None:
    """A finite number of any sign."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


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
    check_dims(name, rewards, 1)
    if not rewards.numel() or rewards.numel() % group_size:
        raise ValueError(
            f"group_size {group_size} must divide the number of {name}, got {rewards.numel()} of them"
        )
    check_finite(name, rewards)
