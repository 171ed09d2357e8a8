"""A stage's row: a model folder sampled on held-out prompts, verified and counted.

The same prompts, seeds and lengths for every stage, so that rows of a table differ by the model alone.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanopost.data.chat import Chat, decode, load_chat, prompt_ids, prompt_messages
from nanopost.data.schema import Candidate, Record
from nanopost.evals.accuracy import mean_length, rate, refusal_precision, refusal_recall
from nanopost.evals.preference import head_to_head
from nanopost.evals.rollouts import completion_logps
from nanopost.models.llama import Llama
from nanopost.models.weights import load_model
from nanopost.rewards.verdict import Verdict
from nanopost.rollout.sampler import row_uniforms, sample
from nanopost.rollout.types import Rollout

Verifier = Callable[[str, Any], Verdict]


def complete(
    model: Llama,
    chat: Chat,
    records: Sequence[Record],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    adapters: Sequence[str] | None = None,
) -> list[Rollout]:
    """One completion for each record's prompt; temperature 0 is greedy, `adapters` are those of `sample`."""
    prompts = [prompt_ids(chat, prompt_messages(record)) for record in records]
    return sample(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=chat.stop_ids,
        temperature=temperature,
        adapters=adapters,
        uniforms=row_uniforms(
            seed=seed, step=0, prompts=range(len(prompts)), group_size=1, count=max_new_tokens
        ),
    )


def sequence_kl(model: Llama, rollouts: Sequence[Rollout]) -> float:
    """KL(π ‖ π_model) of whole completions, in nats; `rollouts` are what π sampled at temperature 1.

    Mean over completions of Σ_t k1 (F29): unbiased, so near 0 it may fall below 0 by chance.
    """
    logps = completion_logps(model, [rollout.sample for rollout in rollouts])
    pairs = zip(rollouts, logps, strict=True)
    return sum(float((rollout.old_logps - scored).sum()) for rollout, scored in pairs) / len(rollouts)


def stage_row(
    folder: str | Path,
    records: Sequence[Record],
    verify: Verifier,
    *,
    previous: str | Path | None,
    max_new_tokens: int,
    seed: int,
) -> dict[str, Any]:
    """Measure a model folder on held-out prompts.

    Args:
        folder: the model, in hub format.
        records: prompts with answers.
        verify: gives the parts json, exact, worked, refused and due.
        previous: the folder of the stage before, for KL and win rates; None for the first stage. Both models
            share template and tokenizer.
        max_new_tokens: completions are cut there.
        seed: of the sampled completions.
    Returns:
        strict_json, exact_sampled, refusal_precision, refusal_recall, worked and mean_length of completions
        sampled at temperature 1; exact_greedy; against the previous stage, None without one: kl in nats a
        completion, win_rate and length_controlled_win_rate of sampled completions (`preference.judge`);
        parameters; tokens_per_second of the sampling, counted in processor time so that what else runs on
        the machine does not matter; and the first sampled completions under "samples". refusal_precision is
        None when the model refused nothing.
    Raises:
        ValueError: a folder that cannot be read; no prompt whose refusal is due.
    """
    model, chat = load_model(folder), load_chat(folder)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    greedy = judged(chat, records, complete(model, chat, records, temperature=0.0, **settings), verify)
    start = time.process_time()
    sampled = complete(model, chat, records, temperature=1.0, **settings)
    seconds = time.process_time() - start
    found = judged(chat, records, sampled, verify)
    kl = win_rate = controlled = None
    if previous is not None:
        before = load_model(previous)
        kl = sequence_kl(before, sampled)
        theirs = complete(before, chat, records, temperature=1.0, **settings)
        others = judged(chat, records, theirs, verify)
        duel = head_to_head(candidates(chat, sampled, found), candidates(chat, theirs, others))
        win_rate, controlled = duel["win_rate"], duel["length_controlled_win_rate"]
    refused = any(verdict.parts["refused"] for verdict in found)
    return {
        "strict_json": rate(found, "json"),
        "exact_greedy": rate(greedy, "exact"),
        "exact_sampled": rate(found, "exact"),
        "refusal_precision": refusal_precision(found) if refused else None,
        "refusal_recall": refusal_recall(found),
        "worked": rate(found, "worked"),
        "mean_length": mean_length(sampled),
        "kl": kl,
        "win_rate": win_rate,
        "length_controlled_win_rate": controlled,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_second": sum(len(rollout.completion_ids) for rollout in sampled) / seconds,
        "samples": [
            {
                "prompt": record.messages[-1].content,
                "completion": decode(chat, rollout.completion_ids),
                "exact": verdict.parts["exact"],
            }
            for record, rollout, verdict in list(zip(records, sampled, found, strict=True))[:8]
        ],
    }


def judged(
    chat: Chat, records: Sequence[Record], rollouts: Sequence[Rollout], verify: Verifier
) -> list[Verdict]:
    """What the verifier says of one completion a record."""
    texts = [decode(chat, rollout.completion_ids) for rollout in rollouts]
    return [verify(text, record.answer) for text, record in zip(texts, records, strict=True)]


def candidates(chat: Chat, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> list[Candidate]:
    """Judged completions as `preference.judge` reads them; right is the verdict's part exact."""
    return [
        Candidate(
            text=decode(chat, rollout.completion_ids),
            score=verdict.score,
            correct=verdict.parts["exact"] == 1,
            tokens=len(rollout.completion_ids),
            reason=verdict.reason,
        )
        for rollout, verdict in zip(rollouts, verdicts, strict=True)
    ]
