"""peft's side of `bench.adapters`: adapters read beside one base, batches whose rows have different ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from bench.inputs import STOP
from bench.peer_transformers import load


def beside(work: Path, names: list[str]) -> Any:
    """transformers' model of work/model with the adapter of work/adapter under each of the names."""
    model = PeftModel.from_pretrained(load(work), work / "adapter", adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(work / "adapter", adapter_name=name)
    return model.eval()


def loads(model: Any, folder: Path, times: int, **options: Any) -> Callable[[], None]:
    """An adapter read from its folder and taken out again, so many times."""

    def run() -> None:
        for _ in range(times):
            model.load_adapter(folder, adapter_name="guest", **options)
            model.delete_adapter("guest")

    return run


def reads(model: Any, ids: Tensor, owners: list[str]) -> Callable[[], Tensor]:
    """The logits of rows that have an adapter each."""

    @torch.no_grad()
    def run() -> Tensor:
        return model(ids, adapter_names=owners).logits

    return run


def draws(model: Any, ids: Tensor, owners: list[str], new: int) -> Callable[[], None]:
    """So many new tokens for each row, under an adapter of its own."""
    shape = {"min_new_tokens": new, "max_new_tokens": new, "pad_token_id": STOP, "top_k": 0}

    @torch.no_grad()
    def run() -> None:
        mask = torch.ones_like(ids)
        out = model.generate(
            input_ids=ids, attention_mask=mask, adapter_names=owners, do_sample=True, **shape
        )
        if out.shape[1] != ids.shape[1] + new:
            raise ValueError(f"generate made {out.shape[1] - ids.shape[1]} tokens a row, {new} are asked for")

    return run
