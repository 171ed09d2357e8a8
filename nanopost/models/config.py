"""The numbers of a decoder and its family, and the hub's `config.json` in and out.

Llama (SmolLM2 too), Mistral, Qwen2 and Qwen3 are one decoder: Qwen2 adds a bias to the queries', keys' and
values' projections, Qwen3 a norm to every query and key head, Mistral may look back a window only. A file is
read in either spelling of transformers (`rope_parameters`, `dtype` since version 5; `rope_theta`,
`rope_scaling`, `torch_dtype` before) and written in both: an older reader would silently fall back to
θ = 10000 without a scaling. What a file says beyond that is refused by name, never read approximately.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanopost.models.rope import SCALINGS, RopeScaling, named

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # of class names
REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
PLAIN = {  # what another model may say otherwise, and ours cannot
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "num_experts": None,
    "num_local_experts": None, "partial_rotary_factor": 1, "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "quantization_config": None, "rope_interleaved": False,
}  # fmt: skip


ASSUMED = {  # keys whose absence transformers reads as a number of its own
    "llama": (), "mistral": ("num_key_value_heads", "sliding_window"), "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
}  # fmt: skip
WHOLE = {*REQUIRED, "num_key_value_heads", "head_dim", "sliding_window"}
ROPES = ("rope_parameters", "rope_scaling")  # the new spelling and the old one


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a decoder, under the names of the hub's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # how many positions a token looks at, itself among them; None: all

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type is {self.model_type!r}; nanopost reads {', '.join(FAMILIES)}")
        for name, value in vars(self).items():
            if name in WHOLE and type(value) is not int and not (name == "sliding_window" and value is None):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if name in ("rms_norm_eps", "rope_theta") and type(value) not in (int, float):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        heads, few = self.num_attention_heads, self.num_key_value_heads
        if heads % few:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={few}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE turns pairs), got {self.head_dim}")
        if self.sliding_window is not None and self.model_type == "llama":
            raise ValueError(f"sliding_window={self.sliding_window}: a llama looks at everything before it")

    @property
    def qkv_bias(self) -> bool:
        """Queries', keys' and values' projections have a bias (the heads' output never has)."""
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        """Every query and key head is normed before it is turned."""
        return self.model_type == "qwen3"


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's pairs as a dict, for `json.loads`: a key that stands there twice is an error."""
    if len(found := dict(pairs)) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{twice!r} stands there twice")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file; errors name the file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def load_config(folder: str | Path) -> LlamaConfig:
    """Read `config.json` of a folder of one of the families.

    Raises:
        ValueError: another family, activation, bias or rope type, a window of some layers only, a missing
            key, two spellings that disagree: by name.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    try:
        return _config(raw)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _config(raw: dict[str, Any]) -> LlamaConfig:
    """`load_config` of what the file says."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}; nanopost reads {', '.join(FAMILIES)}")
    for name, expected in PLAIN.items():
        if (value := raw.get(name)) not in (expected, None):
            raise ValueError(f"{name} is {value!r}; nanopost reads {expected!r} only")
    if missing := [key for key in REQUIRED if raw.get(key) is None]:
        raise ValueError(f"missing {', '.join(missing)}")
    if missing := [key for key in ASSUMED[family] if key not in raw]:
        raise ValueError(f"missing {', '.join(missing)}, where readers of {family} assume their own number")
    dtypes = {str(raw[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if raw.get(key)}
    if len(dtypes) > 1:
        raise ValueError(f"dtype and torch_dtype disagree: {' and '.join(sorted(dtypes))}")
    heads = raw["num_attention_heads"]
    theta, scaling = _rope(raw)
    return LlamaConfig(
        **{key: raw[key] for key in REQUIRED},
        num_key_value_heads=heads if raw.get("num_key_value_heads") is None else raw["num_key_value_heads"],
        head_dim=raw["hidden_size"] // heads if raw.get("head_dim") is None else raw["head_dim"],
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=theta,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        model_type=family,
        rope_scaling=scaling,
        sliding_window=_window(raw),
    )


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """θ and the scaling, from either spelling or from both where they agree."""
    new, old = ({k: v for k, v in (raw.get(key) or {}).items() if v is not None} for key in ROPES)
    for given in (new, old):
        kinds = {given.pop(key) for key in ("type", "rope_type") if key in given}  # "type" is its oldest name
        if len(kinds) > 1:
            raise ValueError(f"the rope type is both {' and '.join(sorted(map(repr, kinds)))}")
        if kinds:
            given["rope_type"] = kinds.pop()
    thetas = {float(given["rope_theta"]) for given in (raw, new, old) if given.get("rope_theta") is not None}
    for given in (new, old):
        given.pop("rope_theta", None)
        if (part := given.pop("partial_rotary_factor", 1)) != 1:
            raise ValueError(f"partial_rotary_factor is {part!r}; nanopost reads 1 only")
    if len(thetas) > 1:
        raise ValueError(f"rope_theta is both {' and '.join(map(str, sorted(thetas)))}")
    theta = thetas.pop() if thetas else 10000.0
    if old and new and old != new:
        raise ValueError(f"rope_scaling {old} and rope_parameters {new} disagree")
    rope = new or old
    kind = rope.pop("rope_type", "default")
    if "original_max_position_embeddings" in SCALINGS.get(kind, ()):
        rope.setdefault("original_max_position_embeddings", raw["max_position_embeddings"])
    needed = {"default": set(), "llama3": {"factor", "low_freq_factor", "high_freq_factor"}}.get(
        kind, {"factor"}
    )
    if missing := sorted(needed - rope.keys()):
        raise ValueError(f"rope type {kind!r} without {', '.join(missing)}")
    if unknown := sorted(rope.keys() - SCALINGS.get(kind, set())):
        raise ValueError(f"{unknown[0]} is no part of the rope type {kind!r} that nanopost reads")
    return theta, None if kind == "default" else RopeScaling(kind, **rope)


def _window(raw: dict[str, Any]) -> int | None:
    """The window of all layers; Qwen's files may name one for some layers, which is refused, or for none."""
    window, layers = raw.get("sliding_window"), raw["num_hidden_layers"]
    if raw["model_type"].startswith("qwen"):
        first = raw.get("max_window_layers", 28)  # the first layer that has the window
        kinds = {"sliding" if i >= first else "full" for i in range(layers)}
        kinds = {kind.removesuffix("_attention") for kind in raw.get("layer_types") or kinds}
        window = window if raw.get("use_sliding_window") and kinds != {"full"} else None
        if raw.get("use_sliding_window") and kinds != {"full"} and window is None:
            raise ValueError("use_sliding_window without sliding_window, for which readers assume a number")
        if window is not None and len(kinds) > 1:
            raise ValueError(
                f"sliding_window={window} of some layers only; nanopost reads one of all or none"
            )
    return window


def write_config(
    config: LlamaConfig,
    folder: str | Path,
    *,
    dtype: torch.dtype,
    stop_ids: tuple[int, ...],
    kind: str = "ForCausalLM",
    **more: Any,
) -> None:
    """Write `config.json` in both spellings.

    `kind` ends the architecture's name; `more` are keys to add or to write otherwise.
    """
    name, family = str(dtype).removeprefix("torch."), config.model_type
    numbers = {
        key: value for key, value in vars(config).items() if key not in ("rope_scaling", "sliding_window")
    }
    scaling = None if config.rope_scaling is None else named(config.rope_scaling)
    window: dict[str, Any] = {"sliding_window": config.sliding_window}
    if family.startswith("qwen"):
        first = 0 if config.sliding_window else config.num_hidden_layers
        window |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": first}
    raw = {
        "architectures": [FAMILIES[family] + kind],
        "hidden_act": "silu",
        **({"attention_bias": False} if family in ("llama", "qwen3") else {}),
        **({"mlp_bias": False} if family == "llama" else window),
        **numbers,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "eos_token_id": list(stop_ids) if len(stop_ids) != 1 else stop_ids[0],
        "torch_dtype": name,
        "dtype": name,
        **more,
    }
    (Path(folder) / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
