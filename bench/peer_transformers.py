"""Hugging Face transformers' side: LlamaForCausalLM on the same weights, and generate.

A setting is a choice that its users have: attention, matmul precision, torch.compile, how ragged rows are
laid out, which cache. The first setting of a case is what one gets without choosing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from bench.inputs import STOP, ragged_lengths, ragged_rows, token_rows
from bench.worker import Turn, loop

IGNORED = -100  # a label that is not trained on


def load(
    work: Path,
    *,
    attention: str = "sdpa",
    precision: str = "highest",
    compiled: bool = False,
    adapter: bool = False,
) -> Any:
    """The model in float32, with the choices that all cases share; as peft has it with work/adapter."""
    torch.set_float32_matmul_precision(precision)
    model = LlamaForCausalLM.from_pretrained(
        work / "model", attn_implementation=attention, dtype=torch.float32
    )
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, work / "adapter", is_trainable=True)
    if compiled:
        model.forward = torch.compile(model.forward)
    return model


def train(turn: Turn, model: Any, batches: list[dict[str, Tensor]]) -> None:
    """Forward and backward of the mean loss over all labelled tokens of the batches; model(**batch).loss."""
    count = sum(int((batch["shift_labels"] != IGNORED).sum()) for batch in batches)
    model.train()

    def iterate() -> Tensor:
        model.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for batch in batches:
            loss = model(
                **batch, labels=batch["shift_labels"], num_items_in_batch=count, use_cache=False
            ).loss
            loss.backward()
            total += loss.detach()
        return total

    def digest(loss: Tensor) -> dict[str, Tensor]:
        """Loss and gradients by our names: peft's are longer."""
        named = {
            re.sub(r"^base_model\.model\.|\.default\.weight$", "", n): p for n, p in model.named_parameters()
        }
        return {"loss": loss} | {name: p.grad for name, p in named.items() if p.grad is not None}

    loop(turn, iterate, digest)


def sft(work: Path, turn: Turn, *, batch: int, length: int, vocabulary: int, **options: Any) -> None:
    rows = torch.tensor(token_rows(batch, length + 1, vocabulary))
    train(
        turn,
        load(work, **choices(options)),
        [{"input_ids": rows[:, :-1], "shift_labels": rows[:, 1:].contiguous()}],
    )


def lora(work: Path, turn: Turn, **options: Any) -> None:
    sft(work, turn, adapter=True, **options)


def sft_ragged(
    work: Path,
    turn: Turn,
    *,
    batch: int,
    mean: float,
    length: int,
    vocabulary: int,
    layout: str = "padded",
    parts: int = 1,
    **options: Any,
) -> None:
    """The same with ragged rows.

    padded: one batch with an attention mask. sorted: `parts` batches of rows alike in length, no mask (a
    causal query never sees the padding on its right). packed: rows end to end, position_ids say where one
    starts; with `parts` 0 all in one row.
    """
    rows = [torch.tensor(row) for row in ragged_rows(batch, mean, length, vocabulary)]
    if layout == "packed":
        rows.sort(key=len, reverse=True)
        batches = [packed(part) for part in bins(rows, length if parts else sum(map(len, rows)))]
        batches = [{name: torch.cat([b[name] for b in batches]) for name in batches[0]}]
    else:
        rows.sort(key=len)
        size = -(-batch // parts)
        batches = [padded(rows[i : i + size], mask=layout == "padded") for i in range(0, batch, size)]
    train(turn, load(work, **choices(options)), batches)


def padded(rows: list[Tensor], *, mask: bool) -> dict[str, Tensor]:
    """Rows side by side, padded on the right."""
    ids = pad_sequence([row[:-1] for row in rows], batch_first=True)
    labels = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORED)
    return {"input_ids": ids, "shift_labels": labels} | (
        {"attention_mask": (labels != IGNORED).long()} if mask else {}
    )


def bins(rows: list[Tensor], room: int) -> list[list[Tensor]]:
    """Rows put where they fit first, the longest first; the last entry of `room` pads every bin alike."""
    found: list[list[Tensor]] = []
    for row in rows:
        fits = (b for b in found if sum(len(r) - 1 for r in b) + len(row) - 1 <= room)
        if (place := next(fits, None)) is None:
            found.append(place := [])
        place.append(row)
    width = max(sum(len(r) - 1 for r in b) for b in found)
    return [[*b, torch.zeros(width - sum(len(r) - 1 for r in b) + 1, dtype=torch.long)] for b in found]


def packed(rows: list[Tensor]) -> dict[str, Tensor]:
    """One long row; its last part is padding, a sequence of its own without labels."""
    *real, filler = rows
    labels = torch.cat([row[1:] for row in real] + [torch.full((len(filler) - 1,), IGNORED)])
    positions = torch.cat([torch.arange(len(row) - 1) for row in rows])
    ids = torch.cat([row[:-1] for row in rows])
    return {"input_ids": ids[None], "shift_labels": labels[None], "position_ids": positions[None]}


# ---- generate ----------------------------------------------------------------------------------------------
class Prescribed(StoppingCriteria):
    """Row r is done when it has as many new tokens as its length says: raggedness that both sides share."""

    def __init__(self, prompt: int, lengths: list[int]):
        self.ends = torch.tensor(lengths) + prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.shape[1] >= self.ends


@torch.no_grad()
def generate(
    work: Path,
    turn: Turn,
    *,
    prompts: int,
    group: int,
    prompt: int,
    new: int,
    vocabulary: int,
    mean: float = 0,
    cache: str | None = None,
    prefix: bool = False,
    **options: Any,
) -> None:
    """`group` samples a prompt.

    prefix: the prompt's keys and values are made once and repeated for its samples, as the guide on caches
    shows for a shared prefix; otherwise generate runs every prompt `group` times.
    """
    model = load(work, **choices(options)).eval()
    ids = torch.tensor(token_rows(prompts, prompt, vocabulary))
    shape = {"min_new_tokens": None, "max_new_tokens": new, "pad_token_id": STOP, "top_k": 0}
    lengths = ragged_lengths(prompts * group, mean, new) if mean else None
    if cache:
        shape["cache_implementation"] = cache

    def sample() -> Tensor:
        stop = StoppingCriteriaList([Prescribed(prompt, lengths)] if lengths else [])
        inputs, more = ids.repeat_interleave(group, dim=0), {}
        if prefix:
            more["past_key_values"] = DynamicCache(config=model.config)
            model(ids[:, :-1], past_key_values=more["past_key_values"], logits_to_keep=1)
            more["past_key_values"].batch_repeat_interleave(group)
        mask = torch.ones_like(inputs)
        return model.generate(
            inputs, attention_mask=mask, do_sample=True, stopping_criteria=stop, **shape, **more
        )

    def digest(out: Tensor) -> dict[str, Tensor]:
        more = {"attention_mask": torch.ones_like(ids), "do_sample": False}
        greedy = model.generate(ids, **more, **shape | {"max_new_tokens": 64, "top_k": None})
        useful = (out[:, prompt:] != STOP).sum()
        return {"greedy tokens": greedy[:, prompt:], "useful tokens": useful}

    loop(turn, sample, digest)


def choices(options: dict[str, Any]) -> dict[str, Any]:
    """Of a case's options, those that `load` reads."""
    return {
        name: options[name] for name in ("attention", "precision", "compiled", "adapter") if name in options
    }
