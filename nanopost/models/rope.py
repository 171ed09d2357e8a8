"""Rotary positions: how far each pair of a head's numbers is turned, and how a model is stretched.

    angle(p, i) = p · f_i,   f_i = θ^(−2i/E),   i = 0 … E/2 − 1

A stretched model turns slow pairs s times slower and leaves fast ones alone; g says how much a pair is left:

    f'_i = f_i · (g_i + (1 − g_i) / s)

    linear   g_i = 0
    llama3   g_i = clamp((n_i − low) / (high − low), 0, 1),   n_i = L f_i / 2π, the turns within L positions
    yarn     g_i = 1 − clamp((i − c(β_fast)) / (c(β_slow) − c(β_fast)), 0, 1), c rounded outwards,
             c(β) = E ln(L / 2πβ) / (2 ln θ), the pair of β turns; cos and sin are multiplied by .1 ln s + 1

with L the length that the model knew before. References: Su et al. 2021 (RoPE), Chen et al. 2023 (linear),
Llama Team 2024 §3.4.2 (llama3; the formula is that of the published configuration), Peng et al. 2023 (YaRN).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCALINGS = {  # rope types, and what each has to say
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"},
}
Pair = tuple[Tensor, Tensor]  # cosines and sines, (N, E/2) each


@dataclass(frozen=True)
class RopeScaling:
    """The stretching of a model, under the names of the hub's rope parameters."""

    rope_type: str  # of SCALINGS
    factor: float  # s
    original_max_position_embeddings: int = 0  # L; of llama3 and yarn
    low_freq_factor: float = 1.0  # of llama3
    high_freq_factor: float = 4.0  # of llama3
    beta_fast: float = 32.0  # of yarn
    beta_slow: float = 1.0  # of yarn
    attention_factor: float | None = None  # of yarn: what cos and sin are multiplied by; None: .1 ln s + 1

    def __post_init__(self) -> None:
        if self.rope_type not in SCALINGS:
            raise ValueError(
                f"rope type is {self.rope_type!r}; nanopost reads default, {', '.join(SCALINGS)}"
            )
        if not self.factor >= 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        if self.rope_type != "linear" and not self.original_max_position_embeddings > 0:
            got = self.original_max_position_embeddings
            raise ValueError(f"{self.rope_type} needs original_max_position_embeddings above 0, got {got}")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < (a := getattr(self, low)) < (b := getattr(self, high)):
                raise ValueError(f"{low} must lie between 0 and {high}, got {a} and {b}")


def named(scaling: RopeScaling) -> dict[str, str | float]:
    """What the hub's files say of a scaling."""
    found = {name: getattr(scaling, name) for name in sorted(SCALINGS[scaling.rope_type])}
    return {"rope_type": scaling.rope_type} | {k: v for k, v in found.items() if v is not None}


def kept(scaling: RopeScaling, frequencies: Tensor, theta: float) -> Tensor:
    """g (E/2,): 1 leaves a pair as it is, 0 turns it s times slower."""
    size, length = 2 * len(frequencies), scaling.original_max_position_embeddings
    if scaling.rope_type == "linear":
        return torch.zeros_like(frequencies)
    if scaling.rope_type == "llama3":
        low, turns = scaling.low_freq_factor, length * frequencies / (2 * math.pi)
        return ((turns - low) / (scaling.high_freq_factor - low)).clamp(0, 1)
    first, last = (
        size * math.log(length / (2 * math.pi * beta)) / (2 * math.log(theta))
        for beta in (scaling.beta_fast, scaling.beta_slow)
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
    pair = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
    return 1 - ((pair - first) / (max(last - first, 0) or 0.001)).clamp(0, 1)


def gain(scaling: RopeScaling) -> float:
    """What cosines and sines are multiplied by."""
    if scaling.rope_type != "yarn":
        return 1.0
    return (
        0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else scaling.attention_factor
    )


def rope_table(
    positions: Tensor, width: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> Pair:
    """cos and sin of the angles at `positions` (N,): each (N, E/2), E the head width.

    The angles are made in float64, so that position 100,000 is as exact as position 1.
    """
    steps = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device)
    frequencies, by = theta ** (-steps / width), 1.0
    if scaling is not None:
        left, by = kept(scaling, frequencies, theta), gain(scaling)
        frequencies = frequencies * (left + (1 - left) / scaling.factor)
    angles = positions[:, None] * frequencies
    return (angles.cos() * by).to(dtype), (angles.sin() * by).to(dtype)
