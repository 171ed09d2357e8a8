"""Which path runs: the one place that chooses by the device, its libraries and its processor."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

WIDEST_NORM = 8192  # 16 numbers of a row in each of 512 threads: Triton's RMSNorm of more would spill


def head_path(hidden: Tensor, weight: Tensor) -> ModuleType:
    """The module that serves `linear_logps`: chunks with Triton, or tiles in torch."""
    name = "linear_logps_chunked" if fused(hidden, weight) else "linear_logps_tiled"
    return import_module(f"nanopost.kernels.{name}")


def tile(hidden: Tensor) -> tuple[int, int]:
    """Tokens and words of a tile of logits: on a CPU a mebibyte of float32, half of a core's L2 cache."""
    return (256, 1024) if hidden.device.type == "cpu" else (8192, 8192)


def chunk(hidden: Tensor, *, words: int) -> int:
    """Tokens whose logits over all words are held at a time; few of them touch the head's gradient often."""
    budget = 2**20 if hidden.device.type == "cpu" else 2**29
    return max(256, min(budget // words, len(hidden)))


def short_attention(q: Tensor, *, keys: int) -> bool:
    """Whether attention over so few keys is three plain products rather than a flash kernel."""
    return q.device.type == "cpu" and keys <= 64


def grouped_attention(q: Tensor) -> bool:
    """Whether torch's kernel knows that query heads share key/value heads: not on a GPU in float32."""
    return not q.is_cuda


def ragged_attention(q: Tensor) -> bool:
    """Whether FlashAttention's kernel for ragged rows can serve: half precision, a GPU of 2020 or later.

    Heads are a multiple of 8 wide, and torch is 2.11 or later, whose `varlen_attn` takes a window.
    """
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] % 8:
        return False
    from torch.nn.attention.varlen import varlen_attn

    recent = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return recent and "window_size" in signature(varlen_attn).parameters


def replays(model: nn.Module) -> bool:
    """Whether a decode step is recorded as a CUDA graph: on a GPU, unless FSDP has sharded the model."""
    return next(model.parameters()).is_cuda and not isinstance(model, FSDPModule)


def fused(*tensors: Tensor) -> bool:
    """Whether Triton's kernels can serve: on a GPU, where Triton is there, for dense tensors of one dtype."""
    dense = all(x.is_cuda and x.is_contiguous() and x.dtype == tensors[0].dtype for x in tensors)
    return dense and tensors[0].dtype != torch.float64 and find_spec("triton") is not None


def fast_linear(x: Tensor) -> bool:
    """Whether x Wᵀ is to go through oneDNN: float32, on a CPU where that is faster and as exact."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and onednn()
    )


@lru_cache
def onednn() -> bool:
    """Whether float32 products of this machine's CPU are to go through oneDNN (see `kernels/linear.py`).

    Probed once: MKL is at home on Intel's processors, and a product of 512³ must come out as exact as float32
    is, 2e-6 of its largest entry: on a CPU that multiplies bfloat16 instead it does not. Nothing is timed: a
    run that is resumed must find the same answer.
    """
    if vendor() == "GenuineIntel" or not torch.backends.mkldnn.is_available():
        return False
    a, b = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    with _precision("medium"):
        fast = a @ b
    exact = a.double() @ b.double()
    return bool((fast - exact).abs().max() < 2e-6 * exact.abs().max())


def vendor() -> str:
    """The processor's maker as Linux tells it; elsewhere "GenuineIntel", for which nothing is changed."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    makers = [line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")]
    return makers[0] if makers else "GenuineIntel"


@contextmanager
def fast_products(x: Tensor) -> Iterator[None]:
    """Float32 products of tensors like x at the CPU's full speed while the block runs."""
    with _precision(
        "medium" if x.device.type == "cpu" and onednn() else torch.get_float32_matmul_precision()
    ):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
