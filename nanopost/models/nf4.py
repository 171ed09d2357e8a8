"""A frozen linear layer whose weight is kept in four bits and made anew wherever it is needed (QLoRA).

The weight exists in full only while a product with it runs, forward and backward; what stays are its codes,
4.127 bits a weight (`quant.py`). A gradient goes through to the input and none to the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nanopost.kernels.linear import linear
from nanopost.models.quant import dequantize_nf4, dequantize_scales, quantize_nf4, quantize_scales

PART = 2**18  # weights quantised at a time: what that needs beside them is ten times their size


class NF4Linear(nn.Module):
    """x Ŵᵀ + b: Ŵ is the weight after NF4 with double quantisation, blocks of 64 and 256.

    No state dict holds the codes: they follow from the folder that the weight came from.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None):
        """
        Args:
            weight: W, (out, in), finite; not kept.
            bias: b, (out,), as it is.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias, self.dtype = bias, weight.dtype
        parts = [quantize_nf4(part) for part in weight.detach().reshape(-1).split(PART)]
        codes, scales = (torch.cat(column) for column in zip(*parts, strict=True))
        kept = (codes, *quantize_scales(scales))
        for name, tensor in zip(("codes", "scale_codes", "seconds", "mean"), kept, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    codes: Tensor
    scale_codes: Tensor
    seconds: Tensor
    mean: Tensor

    @property
    def weight(self) -> Tensor:
        """Ŵ, (out, in), in the dtype of W; a new tensor each time."""
        scales = dequantize_scales(self.scale_codes, self.seconds, self.mean)
        shape = (self.out_features, self.in_features)
        return dequantize_nf4(self.codes, scales, shape=shape, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Product(torch.autograd.Function):
    """x Ŵᵀ, which keeps no Ŵ for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return linear(x, layer.weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        weight = ctx.layer.weight.to(grad.dtype)
        return linear(grad, weight.T).to(ctx.dtype), None
