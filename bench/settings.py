"""The peers' settings: what their users can choose, the default first. All are tried, the fastest counts.

A setting is options for a builder of `bench.peer_transformers`, `peer_linear` or `peer_trl`. The comments say
what was seen on an Intel Xeon with AVX-512 and without AMX; a run says it anew, so that a best setting is
never a memory of another machine.
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, dict[str, Any]]
EAGER, MEDIUM, COMPILED = {"attention": "eager"}, {"precision": "medium"}, {"compiled": True}

# ---- transformers: model(...).loss
# "medium" reaches float32 products through oneDNN where there is no AMX. MKL, the default, is as fast here;
# on Zen 5 oneDNN is twice as fast. Compiled sdpa won, a sixth ahead of the default.
SFT: Settings = {
    "sdpa": {},
    "eager": EAGER,
    "sdpa, medium": MEDIUM,
    "eager, medium": EAGER | MEDIUM,
    "sdpa, torch.compile": COMPILED,
    "eager, torch.compile": EAGER | COMPILED,
}
FLOAT32: Settings = {name: SFT[name] for name in SFT if not name.startswith("eager, ")}

# Rows sorted into parts of their own width win, and rows packed to 256. One long row pays for a mask as wide
# as it is; flash attention, which would not, needs a GPU.
SORTED = {"layout": "sorted", "parts": 8}
RAGGED_SFT: Settings = {
    "padded": {},
    "padded, eager": EAGER,
    "sorted, 4 parts": SORTED | {"parts": 4},
    "sorted, 8 parts": SORTED,
    "sorted, 8 parts, medium": SORTED | MEDIUM,
    "sorted, 8 parts, eager": SORTED | EAGER,
    "packed into rows of 256": {"layout": "packed"},
    "packed into one row": {"layout": "packed", "parts": 0},
}

# ---- the head
# Small tiles win on a CPU: they stay in the cache between the product and what reads it. The defaults of TRL
# and Liger are made for GPUs.
NAIVE: Settings = {"default": {}, "medium": MEDIUM}
TORCH: Settings = {"auto": {}, "512 rows": {"rows": 512}, "2,048 rows": {"rows": 2048}}
TRL_HEAD: Settings = {
    "32,768 columns": {},
    "4,096 columns": {"columns": 4096},
    "1,024 columns": {"columns": 1024},
    "256 columns": {"columns": 256},
}
LIGER: Settings = {
    "2,048 × 4,096": {},
    "256 × 4,096": {"rows": 256},
    "512 × 1,024": {"rows": 512, "columns": 1024},
    "256 × 1,024": {"rows": 256, "columns": 1024},
}

# ---- transformers: generate
# A prefix that is run once and repeated for its samples won; without it a prompt is run eight times. Left
# out: generate_batch (continuous batching), which on a CPU took ten times as long as generate.
GENERATE: Settings = {
    "sdpa, dynamic cache": {},
    "eager": EAGER,
    "static cache": {"cache": "static"},
    "static cache, torch.compile": {"cache": "static"} | COMPILED,
    "shared prefix": {"prefix": True},
    "shared prefix, eager": {"prefix": True} | EAGER,
    "shared prefix, medium": {"prefix": True} | MEDIUM,
}

# ---- TRL's trainers
# Both checkpoint by default, which costs a second forward pass.
FAST = {"gradient_checkpointing": False, "pad_to_multiple_of": None}
TRAINER: Settings = {
    "as it comes": {},
    "no checkpointing": {"config": FAST},
    "no checkpointing, eager": {"config": FAST} | EAGER,
    "no checkpointing, medium": {"config": FAST} | MEDIUM,
    "no checkpointing, torch.compile": {"config": FAST | {"torch_compile": True}},
}
