"""What training does with completions once they are there: score them under a model, write them down."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanopost.data.chat import Chat, decode, record_samples
from nanopost.data.collate import collate, pad_ids
from nanopost.data.schema import Record, Sample
from nanopost.models.heads import ScoreModel
from nanopost.models.llama import Llama
from nanopost.rewards.verdict import Verdict
from nanopost.rollout.types import Rollout


@torch.no_grad()
def completion_logps(
    model: Llama,
    samples: Sequence[Sample],
    *,
    micro_batch: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[Tensor]:
    """The log-prob of every supervised token of each sample, in nats, on the CPU; samples keep their order.

    Args:
        model: a policy or a reference. Over several processes each must have as many samples as the others.
        samples: ids and mask, as a rollout or a record has them.
        micro_batch: samples a forward pass. Neighbours with the same prompt compute it once.
        temperature, top_k, top_p: the distribution to score under: the one that was sampled from.

    Returns:
        One tensor a sample, as long as its mask has ones.

    Raises:
        ValueError: a sample that `collate` refuses, or a distribution that `token_logps` refuses.
    """
    device, logps = next(model.parameters()).device, list[Tensor]()
    for part in (samples[i : i + micro_batch] for i in range(0, len(samples), micro_batch)):
        batch = collate(part, device=device)
        mask, ids = batch.completion_mask, (batch.input_ids, batch.target_ids)
        options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        scored = model.logps(*ids, mask=mask, spans=batch.spans, **options)
        rows = scored[mask].cpu().split(mask.sum(dim=1).tolist())
        logps += [row.clone() for row in rows]  # a view drags its whole batch along
    return logps


@torch.no_grad()
def completion_scores(
    model: ScoreModel, sequences: Sequence[Sequence[int]], *, micro_batch: int = 64
) -> Tensor:
    """What a score model says about whole sequences, prompt and completion, read at each one's last token.

    Args:
        model: a reward model. Over several processes each must have as many sequences as the others.
        sequences: token ids, at least one sequence.
        micro_batch: sequences a forward pass.

    Returns:
        Scores (N, labels), float32, on the CPU, in the order of the sequences.

    Raises:
        ValueError: there is no sequence, or one without a token.
    """
    if not sequences:
        raise ValueError("sequences is empty: there is nothing to score")
    device = next(model.parameters()).device
    parts = [sequences[i : i + micro_batch] for i in range(0, len(sequences), micro_batch)]
    return torch.cat([model.scores(*pad_ids(part, device=device)).float().cpu() for part in parts])


def trace(chat: Chat, record: Record, prompt: Sequence[int], *, longest: int) -> Rollout:
    """A record's own answer as a rollout, though no policy of ours sampled it: π_old is taken as 1 (LUFFY).

    Args:
        prompt: the tokens that the other samples of the group continue; the answer must continue them too.
        longest: tokens that fit into the model, prompt included.

    Returns:
        A rollout whose old log-probs are 0, stop token included.

    Raises:
        ValueError: with file and line: no assistant turn, an answer to another prompt, one that is too long.
    """
    sample = record_samples(chat, record)[-1]
    if list(sample.ids[: sample.mask.index(True)]) != list(prompt):
        raise ValueError(
            f"{record.file}:{record.line}: the last answer is not one to the prompt sampled from"
        )
    if len(sample.ids) > longest:
        length = len(sample.ids)
        raise ValueError(
            f"{record.file}:{record.line}: prompt and answer have {length} tokens, {longest} fit"
        )
    ids = tuple(token for token, trained in zip(sample.ids, sample.mask, strict=True) if trained)
    old_logps, entropies = torch.zeros(2, len(ids))
    return Rollout(sample.ids[: sample.mask.index(True)], ids, old_logps, entropies, "stop")


def rollout_record(
    chat: Chat, record: Record, rollout: Rollout, text: str, verdict: Verdict, advantage: float
) -> dict[str, Any]:
    """A completion as a run folder keeps it: text, tokens, log-probs, verdict and mean advantage."""
    return {
        "line": record.line,
        "prompt": decode(chat, rollout.prompt_ids),
        "completion": text,
        "tokens": [decode(chat, [token]) for token in rollout.completion_ids],
        "old_logps": [round(logp, 5) for logp in rollout.old_logps.tolist()],
        "finish": rollout.finish_reason,
        "score": verdict.score,
        "parts": dict(verdict.parts),
        "reason": verdict.reason,
        "advantage": advantage,
    }
