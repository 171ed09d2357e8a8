"""Batched sampling with a KV cache: ragged prompts, one prefill a prompt, slots that refill as rows finish.

Randomness is an argument: row r takes its t-th draw from `uniforms[r, t]`, so a rollout is a pure function
of weights, prompts and uniforms, whatever rows share its batch. The log-prob of a token is read from the
very distribution it was drawn from (temperature, top-k, top-p), which is what `Llama.logps` scores with the
same three arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nanopost.losses.kl import entropy
from nanopost.losses.likelihood import truncate_logits
from nanopost.models.llama import KVCache, Llama
from nanopost.rollout.types import Rollout

Prefixes = dict[int, tuple[KVCache, int, Tensor]]  # prompt -> its cache, its row there, the logits at its end


def row_uniforms(*, seed: int, step: int, prompts: Sequence[int], group_size: int, count: int) -> Tensor:
    """`count` uniforms in [0, 1) for each sample of each prompt, (len(prompts) · group_size, count) float64.

    `prompts` number the places of a step, not the records: a record drawn twice in a step is sampled twice.

    A row depends on (seed, step, prompt, sample) alone: which rank or batch samples it cannot change it.
    """
    rows = [(prompt, sample) for prompt in prompts for sample in range(group_size)]
    draws = [np.random.default_rng([seed, step, prompt, sample]).random(count) for prompt, sample in rows]
    return torch.from_numpy(np.array(draws).reshape(len(rows), count))


def draw(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row by the inverse of the cumulative distribution: token, log-prob, entropy, each (B,).

    Temperature 0 is the arg max, a point mass: log-prob 0, entropy 0.
    """
    if temperature == 0:
        zeros = torch.zeros_like(uniforms, dtype=torch.promote_types(logits.dtype, torch.float32))
        return logits.argmax(-1), zeros, zeros
    logits = logits.to(
        torch.promote_types(logits.dtype, torch.float32)
    )  # before the division, as the trainer
    support = truncate_logits(logits / temperature, top_k=top_k, top_p=top_p)
    logps = support.log_softmax(-1)
    cumulative = logps.double().exp().cumsum(-1)
    target = uniforms[:, None].to(cumulative) * cumulative[:, -1:]
    # the first token whose cumulative mass exceeds the target: never one of probability 0
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return tokens, logps.gather(-1, tokens[:, None]).squeeze(-1), entropy(support)


@torch.no_grad()
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
        finished: called with how many rows have just ended, for a progress bar.

    Returns:
        len(prompts) · group_size rollouts in the order of the prompts, the rows of a group adjacent.

    Raises:
        ValueError: an argument out of range, by name; a prompt that leaves no room for `max_new_tokens`.
    """
    check_arguments(model, prompts, group_size, max_new_tokens, stop_ids, temperature, slots, uniforms)
    if not prompts:
        return []
    rows, device = len(prompts) * group_size, model.lm_head.weight.device
    uniforms = uniforms.to(device)
    tokens = torch.zeros(rows, max_new_tokens, dtype=torch.long, device=device)
    wide = torch.promote_types(model.lm_head.weight.dtype, torch.float32)
    old_logps = torch.zeros(rows, max_new_tokens, dtype=wide, device=device)
    entropies = torch.zeros_like(old_logps)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    stops = torch.tensor(list(stop_ids), device=device)
    sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)

    waiting = deque(range(rows))
    prefixes: Prefixes = {}
    cache = KVCache(model.config, min(slots, rows), int(sizes.max()) + max_new_tokens, model.lm_head.weight)
    live = torch.full((min(slots, rows),), -1, device=device)  # the row in each slot; -1 is a free slot
    logits = model.lm_head.weight.new_zeros(len(live), model.config.vocab_size)
    while True:
        free = (live < 0).nonzero().flatten()
        if waiting and 8 * len(free) >= len(live):  # an eighth of the slots is free: let waiting rows in
            new = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
            slot = free[: len(new)]
            live[slot] = torch.tensor(new, device=device)
            logits[slot] = admit(model, prompts, [row // group_size for row in new], cache, slot, prefixes)
        elif 2 * len(free) >= len(live):  # nobody waits and half the slots idle: close the ranks
            keep = (live >= 0).nonzero().flatten()
            if not len(keep):
                break
            live, logits = live[keep], logits[keep]
            cache.keep(keep)
        busy = (live >= 0).nonzero().flatten()
        row = live[busy]
        step = lengths[row]
        token, logp, spread = draw(
            logits[busy], uniforms[row, step], temperature=temperature, top_k=top_k, top_p=top_p
        )
        tokens[row, step], old_logps[row, step], entropies[row, step] = token, logp, spread
        lengths[row] += 1
        done = torch.isin(token, stops) | (lengths[row] == max_new_tokens)
        live[busy[done]] = -1
        finished(int(done.sum()))
        if bool(done.all()):
            continue
        held = live.clamp(min=0)  # a free slot decodes along with row 0's numbers; nobody reads it
        at = (lengths[held] - 1).clamp(min=0)
        position_ids = sizes[held // group_size] + at
        logits = model(tokens[held, at][:, None], position_ids[:, None], cache=cache)[:, -1]

    stopped = torch.isin(tokens.gather(1, lengths[:, None] - 1).squeeze(1), stops).tolist()
    return [
        Rollout(
            prompt_ids=tuple(prompts[r // group_size]),
            completion_ids=tuple(tokens[r, :n].tolist()),
            old_logps=old_logps[r, :n].cpu(),
            entropies=entropies[r, :n].cpu(),
            finish_reason="stop" if stopped[r] else "length",
        )
        for r, n in enumerate(lengths.tolist())
    ]


def admit(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    wanted: list[int],
    cache: KVCache,
    slots: Tensor,
    prefixes: Prefixes,
) -> Tensor:
    """Prefill each prompt once, copy its keys and values into its slots; the logits at its end, (B, V).

    `wanted[i]` is the prompt of `slots[i]`. Rows come in prompt order, so only the last prompt can have
    samples still waiting: `prefixes` keeps that one for the next call.
    """
    missing = [prompt for prompt in dict.fromkeys(wanted) if prompt not in prefixes]
    if missing:
        width, device = max(len(prompts[prompt]) for prompt in missing), slots.device
        padded = [[*prompts[prompt], *[0] * (width - len(prompts[prompt]))] for prompt in missing]
        last = torch.tensor([len(prompts[prompt]) - 1 for prompt in missing], device=device)
        position_ids = torch.arange(width, device=device).expand(len(missing), -1)
        prefix = KVCache(model.config, len(missing), width, model.lm_head.weight)
        logits = model(torch.tensor(padded, device=device), position_ids, cache=prefix, last=last)
        prefixes.update({prompt: (prefix, i, logits[i]) for i, prompt in enumerate(missing)})
    for prompt in dict.fromkeys(wanted):
        source, row, _ = prefixes[prompt]
        cache.copy_row(source, row, slots[[i for i, other in enumerate(wanted) if other == prompt]])
    out = torch.stack([prefixes[prompt][2] for prompt in wanted])
    for prompt in [prompt for prompt in prefixes if prompt != wanted[-1]]:
        del prefixes[prompt]
    return out


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
