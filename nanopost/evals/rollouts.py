"""What training does with completions once they are there: score them under a model, write them down."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nanopost.data.chat import Chat, decode, record_samples
from nanopost.data.collate import collate, pad_ids
from nanopost.data.schema import Record, Sample
from nanopost.evals.verifier import Verifier, judge
from nanopost.losses import kl_estimate, policy_ratio
from nanopost.losses.variants import Variant, clip_holds
from nanopost.micro_batches import in_parts
from nanopost.models.heads import ScoreModel
from nanopost.models.llama import Llama
from nanopost.rewards.verdict import Unverified, Verdict
from nanopost.rollout.types import Rollout

Judged = tuple[Record, Rollout, str, Verdict | Unverified]  # a completion, its text, what was said of it


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
    device = next(model.parameters()).device
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}

    def score(part: Sequence[Sample]) -> list[Tensor]:
        batch = collate(part, device=device)
        mask, ids = batch.completion_mask, (batch.input_ids, batch.target_ids)
        scored = model.logps(*ids, mask=mask, spans=batch.spans, **options)
        rows = scored[mask].cpu().split(mask.sum(dim=1).tolist())
        return [row.clone() for row in rows]  # a view drags its whole batch along

    parts = in_parts(model, samples, score, micro_batch, desc="score")
    return [row for part in parts for row in part]


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

    def score(part: Sequence[Sequence[int]]) -> Tensor:
        return model.scores(*pad_ids(part, device=device)).float().cpu()

    return torch.cat(in_parts(model, sequences, score, micro_batch, desc="score"))


@torch.no_grad()
def update_sums(
    variant: Variant,
    loss: Tensor,
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> dict[str, float]:
    """What a line tells of a micro-batch, as sums over its tokens.

    Args:
        variant: the row of the table that the loss is of.
        loss: this micro-batch's share.
        logps, old_logps, ref_logps, advantages: (B, T), what it is made of.
        mask: (B, T), the tokens that it tells of.
    Returns:
        loss, clipped, kl_old, kl_ref (k3, nats) and the number of tokens.
    """
    ratio = policy_ratio(logps, old_logps, mask, level=variant.ratio)
    return {
        "loss": float(loss),
        "clipped": float(clip_holds(variant, ratio, advantages)[mask].sum()),
        "kl_old": float(kl_estimate(old_logps, logps, kind="k3")[mask].sum()),
        "kl_ref": float(kl_estimate(logps, ref_logps, kind="k3")[mask].sum()),
        "tokens": float(mask.sum()),
    }


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


def with_traces(
    judged: Sequence[Judged], size: int, chat: Chat, verify: Verifier, *, longest: int
) -> list[Judged]:
    """Behind each group of `size` answers the record's own, as `trace` makes it.

    Where no answer of a group has a verdict its trace has none either: there is nothing to compare it with.
    """
    rows = list[Judged]()
    for start in range(0, len(judged), size):
        group = judged[start : start + size]
        record, first, *_ = group[0]
        own = trace(chat, record, first.prompt_ids, longest=longest)
        text, alone = decode(chat, own.completion_ids), Unverified("no other answer of its group has one")
        known = any(other.score is not None for *_, other in group)
        rows += [*group, (record, own, text, judge(verify, text, record.answer) if known else alone)]
    return rows


def trained_on(rollout: Rollout, verdict: Verdict | Unverified) -> tuple[Tensor, Sample]:
    """A rollout's old log-probs and its sample; without a verdict no token of it is trained on."""
    if verdict.score is not None:
        return rollout.old_logps, rollout.sample
    sample = rollout.sample
    return rollout.old_logps[:0], replace(sample, mask=(False,) * len(sample.ids))


def rollout_record(
    chat: Chat,
    record: Record,
    rollout: Rollout,
    text: str,
    verdict: Verdict | Unverified,
    advantages: Tensor,
) -> dict[str, Any]:
    """A completion as a run folder keeps it: text, tokens, log-probs, verdict and mean advantage, or None."""
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
        "advantage": float(advantages.mean()) if len(advantages) else None,
    }
