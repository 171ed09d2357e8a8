"""The rows of the CUDA table about decoding: tokens a second, weights in bfloat16, against transformers too.

A step's time is what a long rollout takes more than a short one, over the steps it has more: no prefill is in
it, but all that recurs, such as recording a graph for more columns. The roofline is the time that a copy of
as many bytes would take: every weight, the keys and values of the prompts, and those of what rows have said.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.cuda_measure import (
    Ceilings,
    Left,
    Mark,
    Wrong,
    against,
    close,
    decode_bytes,
    mark,
    no_worse,
    share,
)
from bench.cuda_models import (
    HALF_B,
    ONE_B,
    SMALL,
    batch_of,
    copied,
    fresh_rows,
    random_llama,
    scored,
    seconds,
)
from bench.machine import version
from bench.measure import quantile
from nanopost.models.config import LlamaConfig
from nanopost.models.llama import Llama
from nanopost.rollout.sampler import sample
from nanopost.rollout.types import Rollout

PROMPT = 128  # tokens
SHORT, LONG = 64, 320  # tokens said at both ends of the window
WHOLE, GENERATE_BAR = 128, 8.0  # new tokens of a whole call, which generate is compared on
AGAINST = "against generate"


def draw(model: Llama, rows: int, prompts: int, new: int, **options: Any) -> list[Rollout]:
    """`rows` completions of `new` tokens: only the last word stops, and uniforms below .99 never draw it."""
    stop = model.config.vocab_size - 1
    uniforms = 0.99 * torch.rand(rows, new, dtype=torch.float64)
    options = {"group_size": rows // prompts, "max_new_tokens": new, "stop_ids": [stop]} | options
    return sample(model, fresh_rows(prompts, PROMPT, stop), uniforms=uniforms, **options)


def said(rollouts: list[Rollout]) -> torch.Tensor:
    return torch.cat([rollout.old_logps for rollout in rollouts])


def check_small() -> None:
    """A small model in float32 whose rows leave and make room: as float64 scores it on a CPU."""
    model = random_llama(SMALL, torch.float32)
    rollouts = draw(model, 12, 3, 40, slots=8, stop_ids=list(range(6)))
    exact = scored(model.double().cpu(), batch_of([rollout.sample for rollout in rollouts], "cpu"))
    close("log-probs of a small model", said(rollouts), exact, rtol=0.0, atol=1e-3)


def check_timed(model: Llama, rows: int, prompts: int) -> None:
    """The timed model: the sampler no further from float32 than the trainer in bfloat16 is."""
    rollouts = draw(model, rows, prompts, 24)[:4]
    batch = batch_of([rollout.sample for rollout in rollouts])
    exact = scored(copied(model, torch.float32), batch)
    no_worse(f"log-probs of {rows} rows", said(rollouts), scored(model, batch), exact, floor=5e-3)


def both(model: Llama, rows: int, prompts: int) -> tuple[float, float]:
    """Seconds of a short and of a long rollout, one after the other."""
    short, long = (seconds(lambda new=new: draw(model, rows, prompts, new)) for new in (SHORT, LONG))
    return short, long


def decode(
    config: LlamaConfig, rows: int, prompts: int, bar: float, ceilings: Ceilings, left: Left
) -> list[Mark]:
    """Rows that share some prompts; 64 of them against generate too."""
    check_small()
    model = random_llama(config, torch.bfloat16).requires_grad_(False)
    check_timed(model, rows, prompts)
    both(model, rows, prompts)  # compiles what it needs, fills the allocator
    found = list[tuple[float, float]]()
    while len(found) < 20 and (len(found) < 5 or left() > 0):
        found.append(both(model, rows, prompts))
    steps = [(long - short) / (LONG - SHORT) for short, long in found]
    work = decode_bytes(config, rows=rows, said=(SHORT + LONG) / 2, prompts=prompts, prompt=PROMPT)
    row = share("a step", work, steps, ceilings["copy"], "of roofline", bar=bar)
    whole = rows * LONG / quantile([long for _, long in found], 0.5)
    row["note"] = f"{rows / row['seconds']:,.0f} tokens/s; {whole:,.0f} in a whole call of {LONG}"
    if rows == 1:
        return [row]
    peer = partial(generate, model, rows, prompts, left)
    return [row, against(AGAINST, "transformers", GENERATE_BAR, peer)]


def half_b(*options: Any) -> list[Mark]:
    return decode(HALF_B, *options)


def one_b(*options: Any) -> list[Mark]:
    return decode(ONE_B, *options)


# ---- transformers ------------------------------------------------------------------------------------------
def generate(model: Llama, rows: int, prompts: int, left: Left) -> Mark:
    """Whole calls in turns, prefill included: 128 new tokens a row, all in bfloat16."""
    sides = [lambda: draw(model, rows, prompts, WHOLE), generator(model, rows, prompts)]
    for side in sides:
        side()
    ratios = list[float]()
    while len(ratios) < 20 and (len(ratios) < 3 or left() > 0):
        ours, theirs = map(seconds, sides) if len(ratios) % 2 else reversed([*map(seconds, sides[::-1])])
        ratios.append(theirs / ours)
    note = f"whole calls of {WHOLE}; transformers {version('transformers')}, its default"
    return mark(AGAINST, ratios, "×", bar=GENERATE_BAR, note=note)


def generator(model: Llama, rows: int, prompts: int) -> Callable[[], torch.Tensor]:
    """transformers' generate on the same weights; its logits must be those of our model."""
    import transformers

    config = transformers.LlamaConfig(
        **{name: value for name, value in vars(model.config).items() if name != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    device = model.lm_head.weight.device
    with device:
        peer = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    peer.load_state_dict(model.state_dict())
    ids = torch.tensor(fresh_rows(prompts, PROMPT, model.config.vocab_size), device=device)
    with torch.no_grad():
        ours, theirs = model(ids).float(), peer(ids).logits.float()
    if not float((ours - theirs).abs().max()) < 0.05 * float(theirs.abs().max()):
        raise Wrong("transformers' model with the same weights has other logits")
    asked = ids.repeat_interleave(rows // prompts, dim=0)
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": WHOLE, "min_new_tokens": WHOLE}
    return lambda: peer.generate(asked, attention_mask=torch.ones_like(asked), **options)
