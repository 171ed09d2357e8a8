"""The row of the CUDA table about training: a step of `train_sft.py` on packed documents.

Weights, optimiser, norms and losses in float32, products in bfloat16: the autocast of `distributed.setup`.
Counted is what the model must compute: 6 operations a weight and token, and causal attention inside of the
documents.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench.cuda_measure import Ceilings, Left, Mark, Wrong, no_worse, sampled, share, training_flops
from bench.cuda_models import ONE_B, SMALL, batch_of, copied, fresh_rows, random_llama, scored
from bench.inputs import ragged_lengths
from nanopost import distributed, optim
from nanopost.data.collate import Batch
from nanopost.data.schema import Sample
from nanopost.losses import aggregate, sft_loss
from nanopost.models.config import LlamaConfig
from nanopost.models.llama import Llama

PACKED, LONGEST = 4 * 4096, 4096  # tokens of a step, and of its longest document


@contextmanager
def as_scripts_do() -> Iterator[None]:
    """`distributed.setup`, undone afterwards."""
    distributed.setup()
    try:
        yield
    finally:
        torch.set_autocast_enabled(distributed.device().type, False)
        torch.set_autocast_cache_enabled(True)


def packed_lengths() -> list[int]:
    """Ragged documents of about 1,000 tokens that come to exactly `PACKED`; the first is `LONGEST` long."""
    lengths, room = [LONGEST], PACKED - LONGEST
    for length in ragged_lengths(64, 1000, LONGEST, seed=random.randrange(2**32)):
        lengths.append(min(length, room))
        room -= lengths[-1]
        if not room:
            break
    return lengths


def documents(lengths: list[int], vocabulary: int) -> list[Sample]:
    """Of so many tokens, and one more as a target; all but the first are trained on."""
    rows = fresh_rows(len(lengths), max(lengths) + 1, vocabulary)
    cut = [tuple(row[: n + 1]) for row, n in zip(rows, lengths, strict=True)]
    return [Sample(ids, (False,) + (True,) * (len(ids) - 1)) for ids in cut]


def loss_of(model: Llama, batch: Batch) -> Tensor:
    mask, ids = batch.completion_mask, (batch.input_ids, batch.target_ids)
    losses = sft_loss(model.logps(*ids, mask=mask, spans=batch.spans, alike=True))
    return aggregate(losses, mask, mode="token_mean", denom=float(mask.sum()))


def gradient(model: Llama, batch: Batch) -> Tensor:
    """All gradients in one vector, of a loss that weighs a ten-thousandth: one token among many."""
    model.zero_grad(set_to_none=True)
    (1e-4 * loss_of(model, batch)).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def check_gradient() -> None:
    """A small ragged step: within 3 % of float64's gradient, which is what bfloat16 leaves of it."""
    model, batch = random_llama(SMALL, torch.float32), batch_of(documents([40, 7, 33, 64], SMALL.vocab_size))
    exact = gradient(copied(model, torch.float64), batch)
    with as_scripts_do():
        found = gradient(model, batch)
    error = float((found - exact).norm() / exact.norm())
    if not error < 0.03:
        raise Wrong(f"gradient of a small step: off by {error:.1e} of its norm, 3e-02 allowed")


def check_scores(model: Llama, samples: list[Sample], batch: Batch) -> None:
    """Documents of the timed step: packed as near to float32 as the same model is with each of them alone."""
    rows = sorted(range(len(samples)), key=lambda row: len(samples[row].ids))[:3]
    alone = [batch_of([samples[row]]) for row in rows]
    exact = torch.cat([scored(model, one) for one in alone])
    with as_scripts_do():
        found, naive = scored(model, batch, rows), torch.cat([scored(model, one) for one in alone])
    no_worse("log-probs of packed documents", found, naive, exact, floor=5e-3)


def train(config: LlamaConfig, ceilings: Ceilings, left: Left) -> list[Mark]:
    """Loss, gradient, clipping, AdamW."""
    check_gradient()
    model, lengths = random_llama(config, torch.float32), packed_lengths()
    samples = [documents(lengths, config.vocab_size) for _ in range(2)]
    batches = [batch_of(documents) for documents in samples]
    check_scores(model, samples[0], batches[0])
    optimizer = optim.adamw(model, lr=1e-5, weight_decay=0.1)

    def step(batch: Batch) -> None:
        loss_of(model, batch).backward()
        optim.clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with as_scripts_do():
        taken = sampled([lambda batch=batch: step(batch) for batch in batches], left, ahead=False)
    row = share("step", training_flops(config, lengths), taken, ceilings["gemm"], "of GEMM", bar=0.52)
    return [row | {"note": f"{PACKED / row['seconds']:,.0f} tokens/s, {len(lengths)} documents"}]


def one_b(ceilings: Ceilings, left: Left) -> list[Mark]:
    return train(ONE_B, ceilings, left)
