"""A stage's row: a model folder sampled on held-out prompts, verified and counted.

The same prompts, seeds and lengths for every stage, so that rows of a table differ by the model alone.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanopost.data.chat import Chat, decode, load_chat, prompt_ids, prompt_messages
from nanopost.data.schema import Record
from nanopost.evals.accuracy import mean_length, rate, refusal_precision, refusal_recall
from nanopost.evals.rollouts import completion_logps
from nanopost.models.llama import Llama
from nanopost.models.weights import load_model
from nanopost.rewards.verdict import Verdict
from nanopost.rollout.sampler import row_uniforms, sample
from nanopost.rollout.types import Rollout

Verifier = Callable[[str, Any], Verdict]


def complete(
    model: Llama, chat: Chat, records: Sequence[Record], *, temperature: float, max_new_tokens: int, seed: int
) -> list[Rollout]:
    """One completion for each record's prompt; temperature 0 is greedy."""
    prompts = [prompt_ids(chat, prompt_messages(record)) for record in records]
    return sample(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=chat.stop_ids,
        temperature=temperature,
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
        previous: the folder of the stage before, for the KL; None for the first stage.
        max_new_tokens: completions are cut there.
        seed: of the sampled completions.
    Returns:
        strict_json, exact_sampled, refusal_precision, refusal_recall, worked and mean_length of completions
        sampled at temperature 1; exact_greedy; kl to the previous stage, nats a completion, None without
        one; and the first sampled completions under "samples". refusal_precision is None when the model
        refused nothing.
    Raises:
        ValueError: a folder that cannot be read; no prompt whose refusal is due.
    """
    model, chat = load_model(folder), load_chat(folder)
    settings = {"max_new_tokens": max_new_tokens, "seed": seed}
    greedy = complete(model, chat, records, temperature=0.0, **settings)
    sampled = complete(model, chat, records, temperature=1.0, **settings)

    def verdicts(rollouts: Sequence[Rollout]) -> list[Verdict]:
        texts = [decode(chat, rollout.completion_ids) for rollout in rollouts]
        return [verify(text, record.answer) for text, record in zip(texts, records, strict=True)]

    found = verdicts(sampled)
    refused = any(verdict.parts["refused"] for verdict in found)
    return {
        "strict_json": rate(found, "json"),
        "exact_greedy": rate(verdicts(greedy), "exact"),
        "exact_sampled": rate(found, "exact"),
        "refusal_precision": refusal_precision(found) if refused else None,
        "refusal_recall": refusal_recall(found),
        "worked": rate(found, "worked"),
        "mean_length": mean_length(sampled),
        "kl": None if previous is None else sequence_kl(load_model(previous), sampled),
        "samples": [
            {
                "prompt": record.messages[-1].content,
                "completion": decode(chat, rollout.completion_ids),
                "exact": verdict.parts["exact"],
            }
            for record, rollout, verdict in list(zip(records, sampled, found, strict=True))[:8]
        ],
    }
