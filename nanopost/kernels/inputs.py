"""The door of every kernel: shapes, dtypes and layout are checked here, and no value is read.

A kernel walks over memory by plain offsets, so its tensors are contiguous; its arithmetic is float32, so
what is wider is refused. Reading a value would make the host wait for the GPU: a target id outside the
vocabulary is therefore no error here, it is NaN in its row.
"""

from typing import Any

import torch
from torch import Tensor

Pointer = Any  # in a kernel, where a tensor's numbers begin; quoted there, as Triton looks bare names up
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_dense(**tensors: Tensor) -> None:
    """All tensors are contiguous and of a dtype that float32 holds."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if not tensor.is_contiguous():
            shape, strides = tuple(tensor.shape), tensor.stride()
            raise ValueError(f"{name} must be contiguous, got shape {shape} with strides {strides}")


def check_targets(target_ids: Tensor, rows: int) -> None:
    """One integer a row, side by side in memory."""
    if target_ids.shape != (rows,) or target_ids.dtype not in (torch.int32, torch.int64):
        found = f"{tuple(target_ids.shape)} of {target_ids.dtype}"
        raise ValueError(f"target_ids must be ({rows},) of torch.int32 or torch.int64, got {found}")
    if not target_ids.is_contiguous():
        raise ValueError(f"target_ids must be contiguous, got strides {target_ids.stride()}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor of exactly this shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
