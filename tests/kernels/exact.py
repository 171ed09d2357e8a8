"""What the softmax kernels must equal: the losses in float64. And what one would write without them."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from nanopost.losses import entropy, token_logps

Numbers = tuple[Tensor, Tensor, Tensor]


def exact_numbers(logits: Tensor, target_ids: Tensor, temperature: float) -> Numbers:
    """Log-probability of the target, entropy and logsumexp of every row, in float64."""
    logits = logits.double()
    logps = token_logps(logits, target_ids, temperature=temperature)
    return logps, entropy(logits, temperature=temperature), (logits / temperature).logsumexp(-1)


def naive_numbers(logits: Tensor, target_ids: Tensor, temperature: float) -> Numbers:
    """The same, written down as one would, every step in the dtype of the logits."""
    log_probs = (logits / temperature).log_softmax(-1)
    logps = log_probs.gather(-1, target_ids.long()[:, None])[:, 0]
    return logps, -(log_probs.exp() * log_probs).sum(-1), (logits / temperature).logsumexp(-1)


def gradients(outputs: Sequence[Tensor], upstream: Sequence[Tensor], *leaves: Tensor) -> list[Tensor]:
    """The gradients of the leaves, each output weighted by its upstream gradient."""
    weights = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
    return [*torch.autograd.grad([*outputs], leaves, weights, retain_graph=True)]


def upstream(rows: int, seed: int, outputs: int = 3) -> list[Tensor]:
    """Different from row to row, eighths (float16 holds them), some of them 0, and row 1 without any."""
    found = torch.randint(-16, 17, (outputs, rows), generator=Generator().manual_seed(seed)) / 8
    found[torch.arange(rows) % outputs, torch.arange(rows)] = 0.0
    found[:, 1:2] = 0.0
    return [*found]


def farthest(found: Tensor, exact: Tensor) -> float:
    """The largest absolute error."""
    return float((found.detach().double() - exact.detach()).abs().max())
