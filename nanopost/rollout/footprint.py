"""What the sampler takes in memory: formulas of a `Job` (`models/footprint.py`), bytes of one rank.

Letters beside those there: n rows decoded at a time, G prompts that they continue, of T tokens each.
"""

from __future__ import annotations

from math import ceil

from nanopost.models.footprint import Job, block_size, gathered, heads, root_size, size, width


def speaking(job: Job) -> tuple[int, int]:
    """Rows that are decoded at a time, n, and the groups G whose prompts they continue."""
    rows = min(job.slots, job.sampled)
    return rows, min(ceil(rows / job.group) + 1, ceil(job.sampled / job.group))


def whole(job: Job) -> int:
    """Weights beside a rank's part: under FSDP all of them; alone in bfloat16 a copy, 2·P."""
    c = job.config
    if gathered(job):
        return 4 * root_size(c) + width(job) * c.num_hidden_layers * block_size(c)
    return 2 * size(c) * job.bf16


def kv_cache(job: Job) -> int:
    """2·L·K·E·b·(G·T + n·S): a group's prompt once, and room for all that a row may say."""
    (n, groups), (_, KE) = speaking(job), heads(job.config)
    return 2 * job.config.num_hidden_layers * KE * width(job) * (groups * job.length + n * job.new)


def moving(job: Job) -> int:
    """When rows leave, those that stay are copied: 3/4 of the cache; 7/8 where others wait for the place."""
    rows, _ = speaking(job)
    return kv_cache(job) * (7 if job.sampled > rows else 6) // 8


def next_logits(job: Job) -> int:
    """4·V·(n + G): the logits of who speaks, and those at the ends of prompts."""
    return 4 * job.config.vocab_size * sum(speaking(job))


def drawing(job: Job) -> int:
    """4·V·3·n: scores, weights, their product; n more if 64 does not divide V, 3·n for top-k and top-p."""
    V = job.config.vocab_size
    return 4 * V * (3 + (V % 64 > 0) + 3 * (job.head == "logits")) * speaking(job)[0]


def reading(job: Job) -> int:
    """Prompts that are read, b·G·T·3·(D + I), or the scores of a token that is decoded, b·3·n·H·(T + S)."""
    c, (n, groups) = job.config, speaking(job)
    prompt = 3 * (c.hidden_size + c.intermediate_size)
    token = 3 * n * c.num_attention_heads * (job.length + job.new)
    return width(job) * max(groups * job.length * prompt, token)
