"""A reward model beside the verifier it stands for: on one policy's samples, and along a run against it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanopost.data.chat import decode, load_chat
from nanopost.data.schema import Record
from nanopost.evals.ppo import load_scorer, rescored
from nanopost.evals.stages import complete, judged
from nanopost.evals.verifier import Verifier
from nanopost.models.weights import load_model


def proxy_row(
    folder: str | Path,
    records: Sequence[Record],
    verify: Verifier,
    *,
    reward_model: str | Path,
    max_new_tokens: int,
    seed: int,
) -> dict[str, float]:
    """What a reward model and a verifier say of one completion a prompt, sampled at temperature 1.

    Args:
        folder: the policy, in hub format.
        records: prompts with answers.
        verify: called with a completion and the record's answer.
        reward_model: a folder of train_reward.py; its tokenizer is the policy's.
        max_new_tokens, seed: of the completions; with a stage's numbers they are those of `stage_row`.
    Returns: reward_model and verified, the mean scores.
    Raises: ValueError for a folder that cannot be read, or another tokenizer.
    """
    model, chat = load_model(folder), load_chat(folder)
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": max_new_tokens, "seed": seed}
    rollouts = complete(model, chat, records, **settings)
    verdicts = judged(chat, records, rollouts, verify)
    texts = [decode(chat, rollout.completion_ids) for rollout in rollouts]
    rows = list(zip(records, rollouts, texts, verdicts, strict=True))
    said = rescored(rows, load_scorer(reward_model, chat))
    scores = [verdict.score for *_, verdict in said if verdict.score is not None]
    return {
        "reward_model": sum(scores) / len(scores),
        "verified": sum(verdict.score for verdict in verdicts) / len(verdicts),
    }


def parting(records: Sequence[dict[str, Any]], *, width: int = 5) -> dict[str, float]:
    """Where a run's reward and the verifier's score part: the step at which `verified` was at its best.

    Both are averaged over `width` steps, so that a step's luck in prompts decides little; the first and the
    last such mean stand for the beginning and the end.

    Args:
        records: of a run's metrics.jsonl, with `step`, `reward` and `verified`.
        width: steps a mean; a shorter run has means over all of it.
    Returns: step, the last of the best mean's; and of `reward` and `verified` each the first, at (that of
        the best mean) and last, as reward_first, verified_at, …
    Raises: ValueError for no records, or a record without the two.

    >>> run = [{"step": i, "reward": i / 10, "verified": v} for i, v in enumerate([0.4, 0.6, 0.2])]
    >>> parting(run, width=1)["step"], parting(run, width=1)["reward_at"]
    (1, 0.1)
    """
    if not records:
        raise ValueError("parting: no records")
    if missing := [r["step"] for r in records if not {"reward", "verified"} <= r.keys()]:
        raise ValueError(f"parting: step {missing[0]} has no reward and verified: a run with both is needed")
    width = min(width, len(records))
    spans = [records[i : i + width] for i in range(len(records) - width + 1)]
    means = {key: [sum(r[key] for r in span) / width for span in spans] for key in ("reward", "verified")}
    best = max(range(len(spans)), key=means["verified"].__getitem__)
    found: dict[str, float] = {"step": spans[best][-1]["step"]}
    for key, values in means.items():
        found |= {f"{key}_first": values[0], f"{key}_at": values[best], f"{key}_last": values[-1]}
    return found
