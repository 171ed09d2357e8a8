"""The table of cases: what is run, against whom, under which settings, and the bar.

The models are Llamas with 8 query heads, 4 key/value heads and a SwiGLU three times as wide as the model;
without other numbers D 256, 4 layers, 4,096 tokens. A peer's settings are in `bench/settings.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.inputs import ragged_lengths, ragged_rows
from bench.settings import FLOAT32, GENERATE, LIGER, NAIVE, RAGGED_SFT, SFT, TORCH, TRAINER, TRL_HEAD

Passes = list[tuple[int, int, bool]]


@dataclass(frozen=True)
class Peer:
    """One project on the other side; a setting is options for its builder."""

    name: str
    package: str  # what must be installed
    build: str
    settings: dict[str, dict[str, Any]]
    default_bar: float | None = None  # times as fast as its default we want to be
    best_bar: float | None = None  # and as its best setting: the gate
    memory_bar: float | None = None  # the most of its memory we may take, as a share


@dataclass(frozen=True)
class Case:
    """One row of the table; `shape` goes to every builder."""

    name: str
    title: str
    ours: str
    shape: dict[str, Any]
    peers: list[Peer]
    passes: Passes  # the products that no program can do without: see bench/floor.py
    floor_bar: float | None = None  # the share of the floor we want
    files: tuple[str, ...] = ("model",)  # what is written before the processes start: model, prompts, pairs
    tolerance: float = 1e-5  # of gradients, relative to the largest entry of a tensor
    loss_tolerance: float = 1e-5
    memory: bool = False  # whether memory is compared too
    ways: tuple[str, ...] = ("default", "oneDNN", "tiled")  # how the floor's products may be made
    own: dict[str, Any] = field(default_factory=dict)  # options of our side alone


SMALL = {"width": 256, "layers": 4, "vocabulary": 4096}
TRANSFORMERS, TRL = "bench.peer_transformers", "bench.peer_trl"


# ---- supervised fine-tuning
LONG = {"batch": 32, "mean": 95.0, "length": 256}
LONG_TOKENS = sum(len(row) - 1 for row in ragged_rows(LONG["batch"], LONG["mean"], LONG["length"], 2))


def transformers(build: str, settings: dict[str, dict[str, Any]], **bars: float) -> Peer:
    return Peer("transformers", "transformers", f"{TRANSFORMERS}:{build}", settings, **bars)


BOTH = 2e-5  # ours and theirs in float32 are each within 1e-5 of the gradients in float64

SFT_CASES = [
    Case(
        "sft",
        "SFT forward + backward, 32 × 128 tokens, float32",
        "bench.ours:sft",
        SMALL | {"batch": 32, "length": 128},
        [transformers("sft", SFT, default_bar=2.0, best_bar=1.5)],
        [(4096, 4096, True)],
        floor_bar=0.7,
        tolerance=BOTH,
    ),
    Case(
        "sft-bf16",
        "the same in bf16 autocast, D 512, 6 layers, V 8,192, against float32",
        "bench.ours:sft",
        {"width": 512, "layers": 6, "vocabulary": 8192, "batch": 32, "length": 128},
        [transformers("sft", FLOAT32, best_bar=3.2)],
        [(4096, 4096, True)],
        own={"bf16": True},
        tolerance=0.1,  # twice what transformers' own bf16 autocast differs from its float32 by
        loss_tolerance=1e-3,
    ),
    Case(
        "sft-ragged",
        "SFT forward + backward, 32 rows of at most 256 tokens, 65 % padding",
        "bench.ours:sft_ragged",
        SMALL | LONG,
        [transformers("sft_ragged", RAGGED_SFT, default_bar=5.5, best_bar=3.7)],
        [(LONG_TOKENS, LONG_TOKENS, True)],
        tolerance=BOTH,
    ),
    Case(
        "lora",
        "LoRA of rank 16 on 7 projections, forward + backward, 32 × 128 tokens, float32",
        "bench.ours:lora",
        SMALL | {"batch": 32, "length": 128},
        [Peer("peft", "peft", f"{TRANSFORMERS}:lora", SFT, default_bar=2.2, best_bar=1.8)],
        [(4096, 4096, False)] * 2,  # forward, and back to the inputs: the weights have no gradient
        files=("model", "adapter"),
        tolerance=2 * BOTH,  # of those in float64 ours are within 1.8e-5 and peft's within 1.1e-5 (measured)
    ),
]


# ---- the head
def head_peer(
    build: str, name: str, package: str, settings: dict[str, dict[str, Any]], **bars: float
) -> Peer:
    chosen = {setting: {"head": name} | options for setting, options in settings.items()}
    return Peer(name, package, f"bench.peer_linear:{build}", chosen, **bars)


HEAD_CASES = [
    Case(
        "linear-ce",
        "linear cross-entropy, forward + backward, N 8,192, D 256, V 32,768",
        "bench.ours:linear_ce",
        {"count": 8192, "width": 256, "vocabulary": 32768},
        [
            head_peer("linear_ce", "naive", "torch", NAIVE, best_bar=1 / 0.6, memory_bar=0.015),
            head_peer("linear_ce", "torch", "torch", TORCH, best_bar=1.0),
            head_peer("linear_ce", "trl", "trl", TRL_HEAD, best_bar=1.0),
            head_peer("linear_ce", "liger", "liger_kernel", LIGER, best_bar=1.0),
        ],
        [(8192, 8192, True)],
        files=(),
        memory=True,
    ),
    Case(
        "linear-logps",
        "linear log-probabilities, forward, N 2,048, D 256, V 131,072",
        "bench.ours:linear_logps",
        {"count": 2048, "width": 256, "vocabulary": 131072, "backward": False},
        [
            head_peer("linear_logps", "naive", "torch", NAIVE, best_bar=1 / 0.35, memory_bar=0.002),
            head_peer("linear_logps", "trl", "trl", TRL_HEAD),
            head_peer("linear_logps", "liger", "liger_kernel", LIGER),
        ],
        [(2048, 2048, False)],
        files=(),
        memory=True,
    ),
    Case(
        "linear-logps-train",
        "linear log-probabilities, forward + backward, N 8,192, D 256, V 32,768",
        "bench.ours:linear_logps",
        {"count": 8192, "width": 256, "vocabulary": 32768, "backward": True},
        [
            head_peer("linear_logps", "naive", "torch", NAIVE, best_bar=1 / 0.8, memory_bar=0.01),
            head_peer("linear_logps", "trl", "trl", TRL_HEAD),
            head_peer("linear_logps", "liger", "liger_kernel", LIGER, best_bar=1 / 0.5),
        ],
        [(8192, 8192, True)],
        files=(),
        memory=True,
    ),
]

# ---- the sampler
GROUPS = {"prompts": 8, "group": 8}
RAGGED = {"mean": 32.0, "new": 256}
STEPS = [sum(n > step for n in ragged_lengths(64, RAGGED["mean"], RAGGED["new"])) for step in range(256)]


def decoded(prompt: int, new: int) -> Passes:
    """Every prompt once, then a step for each token but the first, which the prompt gives."""
    return [(8 * prompt, 8, False)] + [(64, 64, False)] * (new - 1)


def sampler_case(
    name: str, title: str, prompt: int, shape: dict[str, Any], passes: Passes, bar: float
) -> Case:
    shape = SMALL | GROUPS | {"prompt": prompt} | shape
    peers = [transformers("generate", GENERATE, best_bar=bar)]
    ways = ("default", "oneDNN", "packed MKL", "packed oneDNN")
    return Case(name, title, "bench.ours:sampler", shape, peers, passes, floor_bar=0.6, ways=ways)


SAMPLER_CASES = [
    sampler_case(
        f"sampler-{prompt}",
        f"sampler, 8 prompts × 8, prompt {prompt}, 64 new tokens",
        prompt,
        {"new": 64},
        decoded(prompt, 64),
        bar,
    )
    for prompt, bar in ((32, 4.0), (128, 5.5))
] + [
    sampler_case(
        "sampler-ragged",
        "sampler, 8 prompts × 8, prompt 32, completions of 32 tokens in the mean, at most 256",
        32,
        RAGGED,
        [(8 * 32, 8, False)] + [(live, live, False) for live in STEPS[1:] if live],
        8.0,
    )
]

# ---- whole steps
TINY = {"width": 128, "layers": 2, "vocabulary": 512}


def trl(build: str, bar: float) -> list[Peer]:
    return [Peer("TRL", "trl", f"{TRL}:{build}", TRAINER, best_bar=bar)]


def grpo_case(name: str, title: str, shape: dict[str, Any], tokens: int, passes: Passes, bar: float) -> Case:
    """`tokens` sampled; then trained on behind their prompts, once each; a last token is not read."""
    shape = SMALL | GROUPS | shape
    trained = [(8 * shape["prompt"] + tokens - 64, tokens, True)]
    return Case(
        name, title, "bench.ours:grpo", shape, trl("grpo", bar), passes + trained, files=("model", "prompts")
    )


def grpo_64(name: str, title: str, prompt: int, bar: float, **model: int) -> Case:
    return grpo_case(name, title, {"prompt": prompt, "new": 64} | model, 64 * 64, decoded(prompt, 64), bar)


DPO = SMALL | {"pairs": 16, "prompt": 128, "mean": 32.0, "longest": 128}
DPO_TOKENS = sum(max(2, n) for n in ragged_lengths(32, DPO["mean"], DPO["longest"]))
STEP_CASES = [
    grpo_64("grpo-32", "GRPO step, 8 prompts × 8, prompt 32, 64 new tokens, float32", 32, 4.0),
    grpo_64("grpo-128", "GRPO step, 8 prompts × 8, prompt 128, 64 new tokens, float32", 128, 5.5),
    grpo_64("grpo-tiny", "GRPO step, tiny: D 128, 2 layers, V 512, prompt 32", 32, 3.0, **TINY),
    grpo_case(
        "grpo-ragged",
        "GRPO step, prompt 32, completions of 32 tokens in the mean, at most 256",
        {"prompt": 32} | RAGGED,
        sum(STEPS),
        SAMPLER_CASES[-1].passes,
        7.0,
    ),
    Case(
        "dpo",
        "DPO step, 16 pairs that share a prompt of 128, completions of 32 tokens in the mean",
        "bench.ours:dpo",
        DPO,
        trl("dpo", 3.0),
        [(16 * 128 + DPO_TOKENS - 32, DPO_TOKENS, True)],
        files=("model", "pairs"),
    ),
]

CASES = {case.name: case for case in SFT_CASES + HEAD_CASES + SAMPLER_CASES + STEP_CASES}
