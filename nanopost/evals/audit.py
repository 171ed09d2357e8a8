"""What a reward model's scores are worth on answers it has not seen, and what they follow instead.

Worth: accuracy, loss and calibration on held-out labels. Instead: the correlation with length, accuracy where
the better answer is the shorter or the longer one, and the audit, fixed pairs in categories of their own:

    short_right      short and right over long and empty
    fitting_refusal  refuse what must be refused, and only that, over refusing everything or nothing
    plain_right      right and plain over wrong and polished

They are kept in audit.jsonl, preference records for a finance assistant with a `category` each. A reward
model that is tuned on them has seen them: they are looked at after a run, never chosen by. All numbers are
counted in float64; a tie is half a win. Scores of nothing have no accuracy: None, beside a count of 0.
"""

from collections.abc import Sequence
from math import inf, isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopost.data.preference import read_preferences
from nanopost.data.schema import Preference
from nanopost.losses import (
    attribute_loss,
    bradley_terry_loss,
    calibration,
    elo_from_reward,
    process_reward_loss,
)

AUDIT = Path(__file__).with_name("audit.jsonl")
NOTE = "The audit pairs are fixed and not for tuning: look at them after a run, choose nothing by them."
EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, inf)  # of the bins of |Δ|


def read_audit(path: str | Path | None = None) -> list[Preference]:
    """The audit pairs of a file; None: those that ship with the package.

    Args:
        path: JSONL of preference records (prompt, chosen, rejected), each with a text `category`.
    Returns: at least one record; its category is `record.provenance.meta["category"]`.
    Raises: ValueError naming file and line for a record of another kind or without a category.
    """
    pairs = []
    for record in read_preferences(path or AUDIT):
        where = f"{record.file}:{record.line}"
        if not isinstance(record, Preference):
            raise ValueError(f"{where}: an audit takes pairs, this record is {type(record).__name__}")
        if not isinstance(record.provenance.meta.get("category"), str):
            raise ValueError(f"{where}: an audit pair has no text 'category'")
        pairs.append(record)
    return pairs


def audit_accuracy(pairs: Sequence[Preference], scores: Tensor) -> dict[str, dict[str, Any]]:
    """Pairs and accuracy of each category, in the order of the file.

    Args:
        pairs: what `read_audit` returns.
        scores: (pairs, 2), of the chosen and the rejected answer.
    """
    categories = [pair.provenance.meta["category"] for pair in pairs]
    if scores.shape != (len(pairs), 2):
        raise ValueError(f"scores must be two a pair, ({len(pairs)}, 2), got {tuple(scores.shape)}")
    leads = scores[:, 0] - scores[:, 1]
    rows = {name: [i for i, own in enumerate(categories) if own == name] for name in categories}
    return {name: {"pairs": len(own), "accuracy": _won(leads[own])} for name, own in rows.items()}


def pair_evaluation(scores: Tensor, tokens: Tensor, *, margin: float = 0.0) -> dict[str, Any]:
    """Held-out pairs: are they told apart, is σ(Δ) the chance of it, and does length decide?

    Args:
        scores: (N, 2), of the chosen and the rejected answer.
        tokens: (N, 2), lengths of those answers.
        margin: of the loss.

    Returns:
        accuracy, loss, margin (mean Δ), elo (of the mean Δ), length_correlation (Pearson's, of all answers'
        scores and lengths), accuracy and pairs where the chosen answer is the shorter and the longer one,
        calibration_error Σ_b |wins_b − expected_b| / N, and the bins of `calibration` with their counts.

    Raises:
        ValueError: shapes that differ or are not (N, 2), N = 0, or a score that is not finite.
    """
    _check("scores", scores, tokens)
    chosen, rejected = scores.double().unbind(1)
    leads, longer = chosen - rejected, (tokens[:, 0] - tokens[:, 1]).sign()
    counts, wins, expected = calibration(chosen, rejected, edges=EDGES)
    edges = [edge if isfinite(edge) else None for edge in EDGES]
    sizes = (longer < 0, longer > 0)
    return {
        "pairs": len(scores),
        "accuracy": _won(leads),
        "loss": float(bradley_terry_loss(chosen, rejected, margin=margin).mean()),
        "margin": float(leads.mean()),
        "elo": float(elo_from_reward(leads.mean())),
        "length_correlation": correlation(scores.flatten(), tokens.flatten()),
        "accuracy_chosen_shorter": _won(leads[sizes[0]]),
        "accuracy_chosen_longer": _won(leads[sizes[1]]),
        "pairs_chosen_shorter": int(sizes[0].sum()),
        "pairs_chosen_longer": int(sizes[1].sum()),
        "calibration_error": float((wins - expected).abs().sum()) / len(scores),
        "calibration": [
            {
                "from": edges[b],
                "to": edges[b + 1],
                "pairs": int(n),
                "wins": float(won),
                "expected": float(due),
            }
            for b, (n, won, due) in enumerate(zip(counts, wins, expected, strict=True))
        ],
    }


def label_evaluation(logits: Tensor, labels: Tensor, tokens: Tensor) -> dict[str, Any]:
    """Held-out step or outcome labels.

    Args:
        logits: (P,), one a labelled place.
        labels: (P,), 1 right and 0 wrong.
        tokens: (P,), of the answer up to that place.

    Returns:
        places, accuracy (logit above 0 iff right), loss, right (the share of right labels: whoever always
        says right has that accuracy), margin (mean of the logit towards the label) and length_correlation.

    Raises:
        ValueError: shapes that differ, no place, a label that is neither 0 nor 1.
    """
    _check("logits", logits, labels, tokens)
    logits, labels = logits.double(), labels.double()
    leads = (2.0 * labels - 1.0) * logits
    whole = torch.ones_like(labels)[:, None]
    return {
        "places": len(logits),
        "accuracy": _won(leads),
        "loss": float(process_reward_loss(logits[:, None], labels[:, None], whole).mean()),
        "right": float(labels.mean()),
        "margin": float(leads.mean()),
        "length_correlation": correlation(logits, tokens),
    }


def rating_evaluation(
    predictions: Tensor, ratings: Tensor, tokens: Tensor, *, names: Sequence[str]
) -> dict[str, Any]:
    """Held-out ratings, each attribute by itself.

    Args:
        predictions: (N, A).
        ratings: (N, A), NaN where there is none.
        tokens: (N,), lengths of the answers.
        names: of the A attributes.

    Returns:
        loss (mean squared error over all ratings), error_NAME (mean absolute error), rated_NAME (how many),
        spread_NAME (the mean absolute error of always saying the mean of these ratings) and
        length_correlation_NAME.

    Raises:
        ValueError: shapes that differ, no rating at all, or one outside [0, 4].
    """
    _check("predictions", predictions, ratings)
    rated = ~ratings.isnan()
    if not rated.any():
        raise ValueError("ratings: there is none to compare with")
    losses = attribute_loss(predictions.double(), ratings.double(), rated)
    found: dict[str, Any] = {"answers": len(ratings), "loss": float(losses.sum()) / int(rated.sum())}
    for name, said, due, own in zip(names, predictions.T, ratings.T, rated.T, strict=True):
        there = due[own].double()
        found[f"rated_{name}"] = len(there)
        found[f"error_{name}"] = float((said[own] - there).abs().mean()) if len(there) else None
        found[f"spread_{name}"] = float((there - there.mean()).abs().mean()) if len(there) else None
        found[f"length_correlation_{name}"] = correlation(said, tokens)
    return found


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation of two (N,) tensors; None where one of them does not vary.

    >>> round(correlation(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([10, 20, 30])), 4)
    0.982
    """
    if len(x) == 0 or (x == x[0]).all() or (y == y[0]).all():
        return None
    x, y = (z.double() - z.double().mean() for z in (x, y))
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt())


def _won(leads: Tensor) -> float | None:
    """The share of leads above 0, ties half; None of none."""
    return float(((1.0 + leads.double().sign()) / 2.0).mean()) if len(leads) else None


def _check(name: str, scores: Tensor, *others: Tensor) -> None:
    """Same first dimensions, and at least one score."""
    shapes = [tuple(other.shape) for other in others]
    if any(shape != tuple(scores.shape)[: len(shape)] for shape in shapes) or not len(scores):
        told = f"{tuple(scores.shape)} against {shapes}"
        raise ValueError(f"{name} must be as many as what they are compared with, at least one: {told}")
