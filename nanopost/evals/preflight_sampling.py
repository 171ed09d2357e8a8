"""Preflight on the first answers of a policy: their log-probs, their rewards, the loss that they make.

On several ranks all of them call a function together, and it says the same on each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanopost import distributed
from nanopost.data.chat import Chat
from nanopost.data.collate import collate, spread
from nanopost.evals.preflight_data import Check, stop_tokens, supervised
from nanopost.evals.preflight_model import Loss
from nanopost.evals.rollouts import completion_logps
from nanopost.evals.verifier import failures, rewards_of
from nanopost.losses import aggregate, kl_estimate, policy_ratio
from nanopost.losses.advantages import informative_groups
from nanopost.losses.variants import Variant, policy_values
from nanopost.models.llama import Llama
from nanopost.rewards.verdict import Unverified, Verdict
from nanopost.rollout.types import Rollout

Row = tuple[Any, Rollout, str, Any]  # record, answer, text and verdict; None where there is none
AGREEMENT = 1e-3, 1.0  # nats that log-probs may be apart, in float32 and in bfloat16


@dataclass(frozen=True)
class Sampling:
    """How a script samples, and what it does with answers."""

    draw: Callable[[list[int]], Any]  # to prompts at these places of step 0: groups by place, or rollouts
    scope: Mapping[str, Any]  # the distribution: temperature, top_k, top_p
    variant: Variant | None = None  # a row of the table, where rewards are given
    reference: Llama | None = None  # the frozen model


def own_size(cfg: Any, variant: Variant) -> int:
    """Answers a prompt that the policy gives; the last one of a group with traces is the record's."""
    return cfg.group_size - (variant.surrogate == "traces")


def first_answers(cfg: Any, sampling: Sampling, count: int) -> list[Row]:
    """This rank's first answers of step 0, the policy's own: whole groups, at least `count` if there are."""
    if sampling.variant is None:
        return [(None, rollout, "", None) for rollout in sampling.draw([])]
    size = own_size(cfg, sampling.variant)
    places = distributed.shard_rows(range(cfg.prompts_per_step))[: -(-count // size)]
    return [row for rows in sampling.draw(places).values() for row in rows[:size]]


def answer_checks(
    cfg: Any, chat: Chat, policy: Llama, sampling: Sampling, answers: Sequence[Row]
) -> tuple[list[Check], dict[str, tuple[float, float]]]:
    """What first answers say, and the numbers of a step's card."""
    rollouts = [rollout for _, rollout, *_ in answers]
    samples = [rollout.sample for rollout in rollouts]
    ended = [rollout.sample for rollout in rollouts if rollout.finish_reason == "stop"]
    found, said = [supervised(samples), stop_tokens(chat, ended)], dict[str, tuple[float, float]]()
    if sampling.scope["temperature"] > 0:
        options = {**sampling.scope, "micro_batch": cfg.micro_batch}
        old, new = [r.old_logps for r in rollouts], completion_logps(policy, samples, **options)
        same = sampling.reference if sampling.variant and cfg.ref_model is None else None
        ref = completion_logps(same, samples, **options) if same else None
        found, said = [*found, agreement(old, new)], start_numbers(old, new, ref)
    if sampling.variant:
        verdicts, size = [verdict for *_, verdict in answers], own_size(cfg, sampling.variant)
        found.append(rewards(verdicts))
        if found[-1].outcome != "fail":
            found.append(groups(rewards_of(verdicts, group_size=size), size, rollouts))
    return found, said


def agreement(old: Sequence[Tensor], new: Sequence[Tensor]) -> Check:
    """The trainer gives the tokens that were sampled the log-probs that the sampler drew them with."""
    apart = [float((a - b).abs().max()) for a, b in zip(old, new, strict=True)]
    farthest, tokens = max(distributed.join_rows(apart)), distributed.all_sum(sum(map(len, old)))
    told = f"at most {farthest:.2g} nats apart on {tokens:.0f} tokens"
    if not farthest <= AGREEMENT[distributed.bf16()]:
        fix = "score under the temperature, top-k and top-p that were sampled with, by the same weights"
        return Check("log-probs", "fail", told, fix)
    return Check("log-probs", "pass", told)


def start_numbers(
    old: Sequence[Tensor], new: Sequence[Tensor], ref: Sequence[Tensor] | None
) -> dict[str, tuple[float, float]]:
    """What a step must say of answers before an update: a mean ratio of 1, a KL to the reference (k3) of 0.

    Args:
        old, new, ref: log-probs of each answer's tokens under sampler, trainer and reference.
    """
    pairs = list(zip(old, new, new if ref is None else ref, strict=True))
    ratios = sum(float(policy_ratio(b[None], a[None], torch.ones(1, len(a))).sum()) for a, b, _ in pairs)
    kl = sum(float(kl_estimate(b[None], c[None], kind="k3").sum()) for _, b, c in pairs)
    ratios, kl, tokens = distributed.all_sum([ratios, kl, sum(map(len, new))])
    said = {"ratio": (ratios / tokens, 1.0)}
    return said if ref is None else said | {"kl_ref": (kl / tokens, 0.0)}


def rewards(verdicts: Sequence[Verdict | Unverified]) -> Check:
    """A reward for each answer: a verifier that raises or hangs gives none, and the run goes on without."""
    asked, missing, first = failures(verdicts)
    told = f"{asked:.0f} answers, {asked - missing:.0f} rewards" + (f", not one: {first}" if first else "")
    if missing == asked:
        return Check("rewards", "fail", told, "mend the verifier: it has no verdict on any answer")
    if missing:
        return Check("rewards", "warn", told, "such answers are left out; more than 5 % of them end the run")
    return Check("rewards", "pass", told)


def groups(scores: Tensor, size: int, rollouts: Sequence[Rollout]) -> Check:
    """Some group has unequal rewards, some answer ends before it is cut."""
    flat = ~informative_groups(scores, group_size=size)[::size]
    cut = sum(rollout.finish_reason == "length" for rollout in rollouts)
    equal, count, cuts, answers = distributed.all_sum([int(flat.sum()), len(flat), cut, len(rollouts)])
    told = (
        f"{equal:.0f} of {count:.0f} groups have equal rewards, {cuts:.0f} of {answers:.0f} answers are cut"
    )
    if cuts == answers:
        fix = "the model never stops: train its stop token (SFT) before, or raise --max-new-tokens"
        return Check("groups", "warn", told, fix)
    if equal == count and size > 1:
        fix = "no gradient comes from these: look for easier or harder prompts, more samples, --resample"
        return Check("groups", "warn", told, fix)
    return Check("groups", "pass", told)


def rollout_loss(policy: Llama, variant: Variant, scope: Mapping[str, Any]) -> Loss:
    """The loss of a variant on rollouts, with advantages 1 and −1 in turn: real ones may all be 0."""

    def loss(part: list[tuple[int, Rollout]], whole: list[Any]) -> Tensor:
        device = next(policy.parameters()).device
        batch = collate([rollout.sample for _, rollout in part], device=device)
        mask, old = batch.completion_mask, [rollout.old_logps for _, rollout in part]
        logps = policy.logps(batch.input_ids, batch.target_ids, mask=mask, spans=batch.spans, **scope)
        pull = spread([torch.full_like(row, (-1) ** i) for (i, _), row in zip(part, old, strict=True)], mask)
        before = spread(old, mask).to(logps)
        values = policy_values(variant, logps, before, before, pull.to(logps), mask)
        denom = sum(len(rollout.completion_ids) for _, rollout in whole)
        return aggregate(values, mask, mode="token_mean", denom=denom)

    return loss
