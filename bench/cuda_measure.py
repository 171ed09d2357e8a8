"""What the CUDA table is measured with: events, the two ceilings, the bytes and products of every row.

A row's numbers are marks: what it came to, what the bar is, and whether the bar is a least or a most. Shares
are of a ceiling that was measured in the same command, the bandwidth of a copy or the rate of a bfloat16
product. Bytes are those that no program can do without, so a share is never flattered by traffic of our own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.machine import version
from bench.measure import quantile
from nanopost.models.config import LlamaConfig

Ceilings = dict[str, Any]  # copy: bytes/s, gemm: operations/s, and what they were measured on
Left = Callable[[], float]  # seconds that are left to a row
Mark = dict[str, Any]
SAMPLES, LEAST = 25, 5  # of a number; the least where a call is so long that the row's time runs out
SLEEP = 2_000_000  # cycles, about a millisecond: time to enqueue what is measured
DEVICE = "cuda"
COPY = 1 << 30  # bytes read, and as many written
HALF = 2  # bytes of a bfloat16


class Wrong(Exception):
    """Our kernel gives something else than the slow path: no number."""


# ---- time and memory ---------------------------------------------------------------------------------------
def sampled(
    calls: Sequence[Callable[[], object]], left: Left, *, samples: int = SAMPLES, ahead: bool = True
) -> list[float]:
    """Seconds of the calls, which take turns, by CUDA events.

    Args:
        calls: the same work on buffers of their own, so that no cache holds what a call reads.
        left: when it is below 0 there are no more than `LEAST` samples.
        samples: how many there are otherwise, after three warm-ups at least.
        ahead: let the GPU wait first while the call is enqueued, so that its kernels are measured and not
            Python's launches. Off for whole programs, which pay for both.
    """
    for i in range(max(3, len(calls))):
        calls[i % len(calls)]()
    found: list[float] = []
    for i in range(samples):
        if i >= LEAST and left() < 0:
            break
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(SLEEP)
        begin.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return found


def extra_memory(call: Callable[[], Sequence[Tensor]]) -> int:
    """The most bytes that a call holds at a time, less those held before and those of its results."""
    call()  # workspaces that are allocated once and kept are no call's
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in outputs)


def ceilings() -> Ceilings:
    """Bandwidth of a copy and rate of a bfloat16 product, the best of a few shapes, on random data."""
    forever, rates = (lambda: 1.0), dict[str, float]()
    for n, d, v in ((8192, 8192, 8192), (8192, 4096, 16384), (16384, 4096, 16384)):
        pairs = [(random(n, d), random(v, d)) for _ in range(2)]
        seconds = sampled([lambda a=a, b=b: a @ b.T for a, b in pairs], forever, samples=20)
        rates[f"{n} × {d} × {v}"] = linear_flops(n, d, v) / statistics.median(seconds)
    buffers = [torch.empty(2, COPY, dtype=torch.uint8, device=DEVICE).random_() for _ in range(2)]
    seconds = sampled([lambda a=a, b=b: b.copy_(a) for a, b in buffers], forever)
    shape = max(rates, key=lambda name: rates[name])
    found = torch.cuda.get_device_properties(0)
    return {
        "gpu": found.name,
        "memory_gb": found.total_memory / 1e9,
        "copy": 2 * COPY / statistics.median(seconds),
        "gemm": rates[shape],
        "gemm_shape": shape,
        "gemm_rates": rates,
        "cuda": torch.version.cuda,
    }


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """N(0, scale²) on the GPU."""
    return torch.randn(*shape, device=DEVICE, dtype=dtype).mul_(scale)


# ---- marks -------------------------------------------------------------------------------------------------
def mark(
    label: str,
    values: Sequence[float],
    unit: str,
    *,
    bar: float | None = None,
    most: bool = False,
    **more: Any,
) -> Mark:
    """The median of some values with p10 and p90; more: what else is kept with it (`seconds`, `note`)."""
    found = {"value": quantile(values, 0.5), "p10": quantile(values, 0.1), "p90": quantile(values, 0.9)}
    return {"label": label, **found, "samples": len(values), "unit": unit, "bar": bar, "most": most, **more}


def share(
    label: str, work: float, seconds: Sequence[float], ceiling: float, unit: str, *, bar: float | None = None
) -> Mark:
    """What share of a ceiling `work` (bytes or operations) came to in those seconds."""
    reached = [work / (taken * ceiling) for taken in seconds]
    return mark(label, reached, unit, bar=bar, seconds=quantile(seconds, 0.5))


def against(label: str, package: str, bar: float, run: Callable[[], Mark]) -> Mark:
    """How many times as fast as a peer; one that is not there or fails costs this mark and no other."""
    why = f"{package} is not installed"
    if version(package):
        try:
            return run()
        except Exception as error:
            why = f"{package} failed: {first_line(error)}"
    return {"label": label, "skipped": why, "unit": "×", "bar": bar, "most": False}


def first_line(error: Exception) -> str:
    """Type and message, without what follows."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


# ---- correctness -------------------------------------------------------------------------------------------
def close(name: str, found: Tensor, exact: Tensor, *, rtol: float, atol: float) -> None:
    """Refuse a result of which an entry is further from the slow path's than atol + rtol·|entry|."""
    exact = exact.double()
    excess = float(((found.double() - exact).abs() - rtol * exact.abs()).max())
    if found.shape != exact.shape or not excess <= atol:
        raise Wrong(
            f"{name}: an entry is off by {excess:.1e} beyond {rtol:.0e} of itself, {atol:.0e} allowed"
        )


def no_worse(name: str, found: Tensor, naive: Tensor, exact: Tensor, *, floor: float = 1e-3) -> None:
    """Refuse a result that is more than twice as far from the exact one as the naive bfloat16 program's."""
    exact = exact.double()
    largest = exact.abs().max().clamp(min=1e-30)
    ours, theirs = (float((x.double() - exact).abs().max() / largest) for x in (found, naive))
    if not ours <= 2 * theirs + floor:
        raise Wrong(f"{name}: off by {ours:.1e} of its largest entry, the naive program by {theirs:.1e}")


# ---- what cannot be done without ---------------------------------------------------------------------------
def linear_flops(rows: int, width: int, vocabulary: int, *, products: int = 1) -> float:
    """Multiplications and additions of h Wᵀ, and of as many products of its size."""
    return 2.0 * products * rows * width * vocabulary


def logps_bytes(rows: int, vocabulary: int) -> int:
    """Logits read once; a target (8 bytes) in and three float32 numbers out a row."""
    return rows * (HALF * vocabulary + 8 + 3 * 4)


def in_place_bytes(rows: int, vocabulary: int) -> int:
    """Logits read and their gradient written; a target, a logsumexp and an upstream gradient a row."""
    return rows * (2 * HALF * vocabulary + 8 + 2 * 4)


def norm_bytes(rows: int, width: int) -> tuple[int, int]:
    """RMSNorm forward: x in, y out, a float32 scale a row; backward: x and ∂L/∂y in, ∂L/∂x out, the scale."""
    weight = HALF * width
    return rows * (2 * weight + 4) + weight, rows * (3 * weight + 4) + 2 * weight


def gate_bytes(count: int) -> tuple[int, int]:
    """SwiGLU forward: two in, one out; backward: three in, two out."""
    return 3 * HALF * count, 5 * HALF * count


def rope_bytes(tokens: int, heads: int, head_dim: int) -> tuple[int, int]:
    """RoPE: a tensor in and out, cosines and sines of half a head a token; the same backward."""
    once = HALF * tokens * (2 * heads * head_dim + head_dim)
    return once, once


def multiplied(config: LlamaConfig) -> int:
    """Weights that every token meets in a product: the layers' matrices and the head."""
    heads, few = config.num_attention_heads, config.num_key_value_heads
    attention = config.hidden_size * config.head_dim * (2 * heads + 2 * few)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def training_flops(config: LlamaConfig, lengths: Sequence[int]) -> float:
    """6 a weight and token; causal attention: 4·E a pair of tokens and head forward, twice that backward."""
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6.0 * multiplied(config) * sum(lengths) + 12.0 * heads * pairs


def decode_bytes(config: LlamaConfig, *, rows: int, said: float, prompts: int, prompt: int) -> float:
    """Of one decode step: every weight once, keys and values of the prompts and of what rows have said."""
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return HALF * (multiplied(config) + cached * (prompts * prompt + rows * said))
