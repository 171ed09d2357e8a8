"""Batched sampling with a KV cache: one prefill a prompt, groups that share it, rows that come and go.

Randomness is an argument: row r takes its t-th draw from `uniforms[r, t]`, so a rollout is a pure function
of weights, prompts and uniforms, whatever rows share its batch. The log-prob of a token is read from the
very distribution it was drawn from (temperature, top-k, top-p), which is what `Llama.logps` scores with the
same three arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanopost.kernels import dispatch
from nanopost.losses.checks import wide
from nanopost.models.attention import layout
from nanopost.models.bank import Seating, seat, seating
from nanopost.models.cache import KVCache
from nanopost.models.llama import Llama
from nanopost.rollout.draw import draw
from nanopost.rollout.graph import kept_casts, replayed
from nanopost.rollout.types import Rollout


def row_uniforms(*, seed: int, step: int, prompts: Sequence[int], group_size: int, count: int) -> Tensor:
    """`count` uniforms in [0, 1) for each sample of each prompt, (len(prompts) · group_size, count) float64.

    `prompts` number the places of a step, not the records: a record drawn twice in a step is sampled twice.

    A row depends on (seed, step, prompt, sample) alone: which rank or batch samples it cannot change it.
    """
    rows = [(prompt, sample) for prompt in prompts for sample in range(group_size)]
    draws = [np.random.default_rng([seed, step, prompt, sample]).random(count) for prompt, sample in rows]
    return torch.from_numpy(np.array(draws).reshape(len(rows), count))


@torch.no_grad()
@kept_casts()
def sample(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int = 1,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    uniforms: Tensor,
    slots: int = 256,
    adapters: Sequence[str] | None = None,
    finished: Callable[[int], object] = lambda count: None,
) -> list[Rollout]:
    """Sample `group_size` completions of every prompt, each up to a stop id or `max_new_tokens`.

    Args:
        model: the policy; its weights must all be here (`distributed.gathered`).
        prompts: token ids, ragged, none empty.
        stop_ids: every one of them ends a completion, and is part of it.
        temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off.
        uniforms: (len(prompts) · group_size, max_new_tokens), see `row_uniforms`.
        slots: rows decoded at a time; finished rows give their slot to waiting ones.
        adapters: where the model is a bank (`models/bank.py`): the name of each prompt's adapter.
        finished: called with how many rows have just ended, for a progress bar.

    Returns:
        len(prompts) · group_size rollouts in the order of the prompts, the rows of a group adjacent.

    Raises:
        ValueError: an argument out of range, by name; a prompt that leaves no room for `max_new_tokens`; not
            an adapter a prompt, or one that the bank does not have.
    """
    check_arguments(model, prompts, group_size, max_new_tokens, stop_ids, temperature, slots, uniforms)
    if adapters is not None and len(adapters) != len(prompts):
        raise ValueError(f"adapters must name one for each of {len(prompts)} prompts, got {len(adapters)}")
    if not prompts:
        return []
    weight, device, count = model.lm_head.weight, model.lm_head.weight.device, len(prompts) * group_size
    uniforms, stops = uniforms.to(device), torch.tensor(list(stop_ids), device=device)
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)
    # What the rows say. One that is done goes on until it leaves, behind its end, where nobody reads.
    tokens = torch.zeros(count, max_new_tokens + 1, dtype=torch.long, device=device)
    old_logps, entropies = wide(weight.new_zeros(2, *tokens.shape))
    said, ended = sizes.new_zeros(count), torch.zeros(count, dtype=torch.bool, device=device)

    half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
    cache = KVCache(model.config, max_new_tokens, weight.new_empty(0, dtype=half))
    rows, logits = sizes.new_zeros(0), weight.new_zeros(0, model.words)  # of those who speak
    opened = list[int]()  # the prompts in the cache
    first = dict[int, Tensor]()  # the logits at the ends of prompts that rows may still begin with
    entered = told = deepest = columns = 0
    seated: Seating | None = None  # whose adapter each of those who speak has

    def step(columns: int) -> None:
        """Every row says a token, and reads it."""
        held, done = said[rows], ended[rows]
        at = held.clamp(max=max_new_tokens - 1)
        uniform = uniforms[rows, at]
        token, logp, spread = draw(logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p)
        tokens[rows, held], old_logps[rows, held], entropies[rows, held] = token, logp, spread
        said[rows] = held + ~done
        ended[rows] = done | (token[:, None] == stops).any(1) | (held + 1 == max_new_tokens)
        if not steady and bool(ended[rows].all()):
            return
        look = cache.decode(at, columns)
        if seated:
            seat(model, seated)
        logits.copy_(model.next_logits(token, sizes[rows // group_size] + at, look, None))

    # Where a step is replayed, nobody asks after each one who is done, and its shapes stay for long.
    steady = dispatch.replays(model)
    ahead = 8 if steady else 1
    while True:
        gone = int(ended[rows].sum())
        finished(gone - told)
        told = gone
        room = slots - len(rows) + gone
        if 4 * gone >= len(rows) or (entered < count and 8 * room >= slots):
            # Who is done leaves, who waits comes in, and with them the prompts that they alone need.
            stay = (~ended[rows]).nonzero().squeeze(1)
            new = range(entered, min(entered + room, count))
            if not len(stay) and not new:
                break
            entered, told = new.stop, 0
            needed = {row // group_size for row in (*rows[stay].tolist(), *new)}
            kept = [place for place, prompt in enumerate(opened) if prompt in needed]
            cache.keep(stay, sizes.new_tensor(kept))
            fresh = sorted(needed.difference(opened))
            opened = [opened[place] for place in kept] + fresh
            places = [opened.index(row // group_size) for row in new]
            cache.grow(sizes[fresh], sizes.new_tensor(places))
            first = {prompt: first[prompt] for prompt in first if prompt in needed}
            if adapters and fresh:
                seat(model, [adapters[prompt] for prompt in fresh for _ in prompts[prompt]])
            first |= zip(fresh, prefill(model, [prompts[prompt] for prompt in fresh], cache), strict=True)
            rows = torch.cat([rows[stay], torch.arange(new.start, new.stop, device=device)])
            logits = torch.cat([logits[stay], *(first[row // group_size][None] for row in new)])
            deepest, columns = int(said[rows].max()), 0
            if adapters:
                seated = seating([adapters[row // group_size] for row in rows.tolist()], device)
        if columns < min(deepest + ahead, max_new_tokens):
            columns = deepest + ahead if not steady else max(64, 1 << (deepest + ahead - 1).bit_length())
            columns = min(columns, max_new_tokens)
            advance = replayed(partial(step, columns)) if steady else partial(step, columns)
        for _ in range(ahead):
            advance()
        deepest += ahead

    stopped = torch.isin(tokens.gather(1, said[:, None] - 1).squeeze(1), stops).tolist()
    spoke = [bool(row[:n].isfinite().all()) for row, n in zip(old_logps.cpu(), said.tolist(), strict=True)]
    return [
        Rollout(
            prompt_ids=tuple(prompts[r // group_size]),
            completion_ids=tuple(tokens[r, :n].tolist()),
            old_logps=old_logps[r, :n].cpu(),
            entropies=entropies[r, :n].cpu(),
            finish_reason=("stop" if stopped[r] else "length") if spoke[r] else "error",
        )
        for r, n in enumerate(said.tolist())
    ]


def prefill(model: Llama, prompts: Sequence[Sequence[int]], cache: KVCache) -> list[Tensor]:
    """Read prompts into the cache as its last groups; the logits at the end of each, (W,)."""
    if not prompts:
        return []
    device, width = model.lm_head.weight.device, max(len(prompt) for prompt in prompts)
    padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
    spans = [(0, len(prompt)) for prompt in prompts]
    plan = layout(spans, width, device, model.config.sliding_window)
    last = plan.places[torch.arange(len(prompts)), [len(prompt) - 1 for prompt in prompts]]
    look = cache.prefill(plan)
    return list(model.next_logits(padded.flatten()[plan.tokens], plan.positions, look, last))


def check_arguments(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    group_size: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    temperature: float,
    slots: int,
    uniforms: Tensor,
) -> None:
    """Refuse what cannot be sampled, naming argument and value."""
    for name, value in (("group_size", group_size), ("max_new_tokens", max_new_tokens), ("slots", slots)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    if not stop_ids:
        raise ValueError("stop_ids is empty: no completion could ever stop")
    longest = model.config.max_position_embeddings - max_new_tokens
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest:
            limit = f"with max_new_tokens={max_new_tokens} it must have 1 to {longest}"
            raise ValueError(f"prompts[{i}] has {len(prompt)} tokens; {limit}")
    expected = (len(prompts) * group_size, max_new_tokens)
    if uniforms.shape != expected:
        raise ValueError(f"uniforms has shape {tuple(uniforms.shape)}, expected {expected}")
