"""The head's peers: the naive program, torch's own function, TRL's and Liger's chunked log-probabilities.

Liger's fused cross-entropy is a Triton kernel and needs a GPU. Its chunked losses are plain torch: what they
are built on gives log-probabilities with a gradient of their own each, so it can be asked for a cross-entropy
too. TRL is the same: its SFT loss is minus the mean of its chunked log-probabilities.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bench.head
from bench.head import Head
from bench.worker import Turn


def naive_logps(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    """What everyone writes first: logits, log_softmax, gather."""
    logps = F.linear(hidden, weight).log_softmax(-1)
    return logps.gather(-1, target_ids[:, None]).squeeze(-1)


def naive_ce(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), target_ids)


def torch_ce(rows: int | None = None) -> Head:
    """torch.nn.functional.linear_cross_entropy in its chunked form; `rows` of logits at a time."""
    method = {"chunking_method": "auto"} if rows is None else {"batch_chunk_size": rows}
    options = torch.nn.LinearCrossEntropyOptions(**method)
    return lambda hidden, weight, ids: F.linear_cross_entropy(hidden, weight, ids, options=options)


def trl_logps(columns: int = 32768) -> Head:
    """TRL's fused head; 32,768 columns a tile is what its trainers pass."""
    import trl.trainer.utils  # its backward imports it, which is not to be timed  # noqa: F401
    from trl.kernels import ChunkedLogProbFunction

    def logps(hidden: Tensor, weight: Tensor, target_ids: Tensor) -> Tensor:
        more = (None, 1.0, ("log_probs",))  # no soft cap, no scale, nothing but log-probs
        return ChunkedLogProbFunction.apply(hidden, weight, None, target_ids, 1.0, columns, *more)[0]

    return logps


def liger_logps(columns: int = 4096, rows: int = 2048) -> Head:
    """What Liger's chunked GRPO loss reads; 2,048 × 4,096 a tile is its own choice."""
    from liger_kernel.chunked_loss import fused_linear_ppo

    fused_linear_ppo._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE = columns
    fused_linear_ppo._SELECTIVE_LOGPROB_SEQ_CHUNK_SIZE = rows
    forward = fused_linear_ppo.LigerFusedLinearPPOBase.chunk_forward
    return lambda hidden, weight, target_ids: forward(hidden[None], weight, target_ids[None])[0]


def mean_of(logps: Head) -> Head:
    return lambda hidden, weight, target_ids: -logps(hidden, weight, target_ids).mean()


CE = {
    "naive": lambda: naive_ce,
    "torch": torch_ce,
    "trl": lambda **options: mean_of(trl_logps(**options)),
    "liger": lambda **options: mean_of(liger_logps(**options)),
}
LOGPS = {"naive": lambda: naive_logps, "trl": trl_logps, "liger": liger_logps}


def linear_ce(work: Path, turn: Turn, *, head: str, **options: Any) -> None:
    """The mean cross-entropy, forward and backward."""
    bench.head.time_loss(turn, CE[head](**tuned(options)), **options)


def linear_logps(work: Path, turn: Turn, *, head: str, **options: Any) -> None:
    """The log-probability of every target, and with `backward` an upstream gradient of its own for each."""
    bench.head.time_logps(turn, LOGPS[head](**tuned(options)), **options)


def tuned(options: dict[str, Any]) -> dict[str, Any]:
    """Of a case's options, those of the function; the matmul precision is set on the way."""
    torch.set_float32_matmul_precision(options.get("precision", "highest"))
    return {name: options[name] for name in ("rows", "columns") if name in options}
