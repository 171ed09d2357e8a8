"""Preference between two models: win rates over their completions of the same prompts.

A judgement is 1 when the first model's completion wins, 0 when the second's does, ½ for a tie. The judge
here is a rule, not a model: right beats wrong, and of two right ones the more concise wins. Nothing to count
is an error, not 0 and not 1 (F46).
"""

import math
from collections.abc import Sequence

from nanopost.data.schema import Candidate

RIDGE = 0.1  # weight of ½φ² beside the log-likelihood of all judgements: φ is expected within ±3 or so
STEPS, TOLERANCE = 200, 1e-12  # Newton's: a handful of steps is usual; the gradient's largest entry
ROUNDING = 1e-12  # of the loss, far above float64's: near the minimum it may not halve a step


def judge(first: Candidate, second: Candidate) -> float:
    """1 if the first completion wins, 0 if the second does, ½ for a tie.

    Right beats wrong. Of two right ones the one with fewer tokens wins, and equal lengths tie. Two wrong
    ones tie, however long they are. What was cut is never right.

    Raises: ValueError for a completion that was not judged, or two right ones without a length.

    >>> judge(Candidate("18", correct=True, tokens=2), Candidate("It is 18", correct=True, tokens=5))
    1.0
    """
    if first.correct is None or second.correct is None:
        raise ValueError("both completions need `correct`: nobody has judged them")
    right, other = first.correct and not first.cut, second.correct and not second.cut
    if not (right and other):
        return (1 + right - other) / 2
    if first.tokens is None or second.tokens is None:
        raise ValueError("two right completions are told apart by `tokens`, and one has none")
    return (1 + (first.tokens < second.tokens) - (first.tokens > second.tokens)) / 2


def win_rate(wins: Sequence[float]) -> float:
    """The mean judgement: wins and half the ties over all pairs (F46).

    Returns: a number in [0, 1]; 1, 1, ½, 0 give .625; the other model's is what is missing to 1.
    Raises: ValueError for no pairs, or a judgement outside [0, 1].
    """
    if not wins:
        raise ValueError("win_rate: no pairs to count")
    for i, win in enumerate(wins):
        if not 0.0 <= win <= 1.0:
            raise ValueError(f"wins[{i}] must lie in [0, 1], got {win}")
    return math.fsum(wins) / len(wins)


def length_controlled_win_rate(
    wins: Sequence[float], lengths: Sequence[int], other_lengths: Sequence[int]
) -> float:
    """The win rate there would be if both models' completions were of the same length.

        P(win_i) = σ(θ + φ·tanh(Δ_i / s)),  Δ_i = length_i − other_length_i,  s = √(mean of (Δ_i − Δ̄)²)
        minimise  −Σ_i [win_i log P_i + (1 − win_i) log(1 − P_i)] + ½·0.1·φ²
        rate = σ(θ): the fitted chance at Δ = 0

    It is AlpacaEval 2's regression without its term for how hard a prompt is, fitted to the judgements of one
    pair of models alone. θ is the models' difference and is not penalised; φ is what length does, and the
    ridge keeps it finite where length alone separates wins from losses. Where Δ is the same for all pairs
    (s = 0), or all judgements are, the minimum is at φ = 0 and the rate is the plain one.

    Args:
        wins: judgements of the first model's completions, in [0, 1].
        lengths: tokens of the first model's completions. other_lengths: of the second's; the same order.
    Returns: a number in [0, 1]; swapping the models gives what is missing to 1.
    Raises: ValueError for no pairs, a judgement outside [0, 1], lists of unequal length.
    Reference: Dubois et al. 2024 (Length-Controlled AlpacaEval), eq. 3, simplified as said above.
    """
    rate, count = win_rate(wins), len(wins)
    for name, values in (("lengths", lengths), ("other_lengths", other_lengths)):
        if len(values) != count:
            raise ValueError(f"{name} has {len(values)} entries, wins has {count}")
    deltas = [length - other for length, other in zip(lengths, other_lengths, strict=True)]
    mean = sum(deltas) / count
    spread = math.sqrt(math.fsum((delta - mean) ** 2 for delta in deltas) / count)
    if spread == 0 or min(wins) == max(wins):
        return rate
    theta, _ = fit_logistic(wins, [math.tanh(delta / spread) for delta in deltas])
    return _sigmoid(theta)


def fit_logistic(wins: Sequence[float], features: Sequence[float]) -> tuple[float, float]:
    """θ and φ of the ridge regression in `length_controlled_win_rate`, by Newton's method with halved steps.

    Args:
        wins: in [0, 1], not all 0 and not all 1: θ is then finite.
        features: what φ weighs, one for each judgement.
    Raises: ValueError where the gradient does not vanish.
    """

    def loss(theta: float, phi: float) -> float:
        rows = zip(wins, features, strict=True)
        return (
            math.fsum(_softplus(z) - w * z for w, x in rows for z in [theta + phi * x]) / n
            + ridge * phi**2 / 2
        )

    n, rate, ridge = len(wins), win_rate(wins), RIDGE / len(wins)
    theta, phi = math.log(rate / (1 - rate)), 0.0
    for _ in range(STEPS):
        chances = [_sigmoid(theta + phi * x) for x in features]
        errors = [p - w for p, w in zip(chances, wins, strict=True)]
        slopes = math.fsum(errors) / n, math.fsum(e * x for e, x in zip(errors, features, strict=True)) / n
        g, h = slopes[0], slopes[1] + ridge * phi
        if max(abs(g), abs(h)) < TOLERANCE:
            return theta, phi
        weights = [p * (1 - p) for p in chances]
        a, b, c = (math.fsum(w * x**k for w, x in zip(weights, features, strict=True)) / n for k in range(3))
        c += ridge
        size, determinant = 1.0, a * c - b * b
        step = (c * g - b * h) / determinant, (a * h - b * g) / determinant
        while (
            loss(theta - size * step[0], phi - size * step[1]) > loss(theta, phi) + ROUNDING and size > 1e-6
        ):
            size /= 2
        theta, phi = theta - size * step[0], phi - size * step[1]
    raise ValueError(f"no minimum within {STEPS} steps: gradient ({g}, {h}) at θ = {theta}, φ = {phi}")


def head_to_head(first: Sequence[Candidate], second: Sequence[Candidate]) -> dict[str, float]:
    """Two models on the same prompts: judged pair by pair, counted.

    Args:
        first, second: one completion a prompt, in the same order.
    Returns: pairs, wins, ties, losses (counts), win_rate, length_controlled_win_rate, and the mean tokens of
        each: length, other_length.
    Raises: ValueError for no pairs, lists of unequal length, completions without `correct` or `tokens`.
    """
    if len(first) != len(second):
        raise ValueError(
            f"first has {len(first)} completions, second has {len(second)}: not the same prompts"
        )
    wins = [judge(a, b) for a, b in zip(first, second, strict=True)]
    lengths = [
        [_tokens(name, i, c) for i, c in enumerate(side)]
        for name, side in (("first", first), ("second", second))
    ]
    return {
        "pairs": len(wins),
        "wins": wins.count(1.0),
        "ties": wins.count(0.5),
        "losses": wins.count(0.0),
        "win_rate": win_rate(wins),
        "length_controlled_win_rate": length_controlled_win_rate(wins, *lengths),
        "length": sum(lengths[0]) / len(wins),
        "other_length": sum(lengths[1]) / len(wins),
    }


def _tokens(name: str, place: int, candidate: Candidate) -> int:
    if candidate.tokens is None:
        raise ValueError(f"{name}[{place}] has no tokens: its length is not known")
    return candidate.tokens


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def _softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))
