"""What the adapters share: arrays to leaves of autograd, one call an element, and the answer back as arrays.

An adapter hands each function of a framework the vector's inputs, never a formula of its own. A loss that a
framework only gives as a mean is called with one element at a time, or with all of them where `upstream` is
uniform and the mean is what is asked for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def leaves(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Floats as leaves that want a gradient, whole numbers as int64, the mask as booleans."""
    tensors = {}
    for name, value in inputs.items():
        array = np.asarray(value)
        if name == "mask":
            tensors[name] = torch.tensor(array.astype(bool))
        elif array.dtype.kind == "f":
            tensors[name] = torch.tensor(array, dtype=dtype, requires_grad=True)
        else:
            tensors[name] = torch.tensor(array.astype(np.int64))
    return tensors


def stack_calls(call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """One call an element of tensors of one shape; each call sees tensors of shape (1,)."""
    calls = [
        call(*(element.reshape(1) for element in row))
        for row in zip(*map(torch.flatten, tensors), strict=True)
    ]
    return torch.stack([value.reshape(()) for value in calls]).reshape(tensors[0].shape)


def answer(values: Tensor, tensors: dict[str, Tensor], upstream: Any) -> dict[str, Any]:
    """Values, Σ upstream · values and its gradients; where upstream is 0 a value may be infinite."""
    result: dict[str, Any] = {"values": values.detach().numpy()}
    if upstream is None or not values.requires_grad:
        return result
    weights = torch.tensor(np.asarray(upstream), dtype=values.dtype)
    return result | differentiate((weights * values.masked_fill(weights == 0, 0.0)).sum(), tensors)


def answer_mean(
    call: Callable[..., Tensor], names: list[str], tensors: dict[str, Tensor], upstream: Any
) -> dict:
    """`answer` for a framework's mean over a batch, given as a call on the tensors of these names."""
    picked = [tensors[name] for name in names]
    if upstream is None or np.ptp(upstream) > 0:
        return answer(stack_calls(call, *picked), tensors, upstream)
    return differentiate(call(*picked) * float(np.sum(upstream)), tensors)


def differentiate(scalar: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
    scalar.backward()
    found = {name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}
    return {"scalar": scalar.item(), "gradients": {name: grad.numpy() for name, grad in found.items()}}


def two_logits(logps: Tensor) -> Tensor:
    """Logits over two tokens of which the first has the log-probability given; shape (..., 2)."""
    if bool((logps >= 0).any()):
        raise NotImplementedError("takes logits, and no logits have a log-probability of 0 or more")
    return torch.stack([logps, torch.log(-torch.expm1(logps))], dim=-1)
