"""Golden logits: what transformers says of small models whose weights are a formula. Written by

    python -m tests.models.golden        (with the extra `oracle`)

into golden.json, so that parity is tested where transformers is not installed.
"""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest.mock import patch

import torch
from torch import Tensor

from nanopost.models.config import FAMILIES, LlamaConfig
from nanopost.models.llama import Llama
from nanopost.models.rope import RopeScaling
from nanopost.models.weights import random_model, save_model, write_config

FILE = Path(__file__).with_name("golden.json")
SMALL = LlamaConfig(11, 12, 20, 2, 6, 2, 4, 64, rope_theta=500.0)
CONFIGS = {
    "llama": {},
    "llama, linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama, llama3": {"head_dim": 16, "rope_scaling": RopeScaling("llama3", 8.0, 16)},
    "llama, yarn": {"head_dim": 16, "rope_scaling": RopeScaling("yarn", 4.0, 16)},
    "llama, tied": {"tie_word_embeddings": True},
    "mistral": {"model_type": "mistral"},
    "mistral, window of 3": {"model_type": "mistral", "sliding_window": 3},
    "qwen2": {"model_type": "qwen2", "head_dim": 2},
    "qwen2, window of 5": {"model_type": "qwen2", "head_dim": 2, "sliding_window": 5},
    "qwen3": {"model_type": "qwen3", "rms_norm_eps": 1e-6},
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])


class Float64:
    """torch, where float32 means float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@contextmanager
def exact_transformers() -> Iterator[ModuleType]:
    """transformers in float64 throughout; its norms and rotations are in float32 whatever the weights are."""
    library = importlib.import_module("transformers")
    library.utils.logging.disable_progress_bar()
    modules = [f"transformers.models.{family}.modeling_{family}" for family in FAMILIES]
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        patches = [
            patch.object(importlib.import_module(name), "torch", Float64())
            for name in ("transformers.modeling_rope_utils", *modules)
        ]
        for each in patches:
            each.start()
        try:
            yield library
        finally:
            for each in patches:
                each.stop()


@torch.no_grad()
def lively(folder: Path, config: LlamaConfig) -> Llama:
    """A model whose weights are sines, biases and norms too; written to the folder in hub format."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder, dtype=torch.float64, stop_ids=(1,))
    model = random_model(folder, seed=0, dtype=torch.float64)
    for place, (name, parameter) in enumerate(model.named_parameters()):
        waves = torch.sin((0.7 + 0.1 * place) * torch.arange(1, parameter.numel() + 1, dtype=torch.float64))
        parameter.copy_(waves.view(parameter.shape) + name.endswith("norm.weight"))
    save_model(config, model.state_dict(), folder, stop_ids=(1,))
    return model


def last_logits(logits: Tensor) -> list[float]:
    return logits[0, -1].tolist()


def main() -> None:
    found = {}
    with exact_transformers() as transformers, TemporaryDirectory() as work:
        for name, changes in CONFIGS.items():
            folder = Path(work) / name
            lively(folder, LlamaConfig(**vars(SMALL) | changes))
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
            with torch.no_grad():
                found[name] = last_logits(theirs(IDS).logits)
    FILE.write_text(json.dumps({"transformers": transformers.__version__, "logits": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
