"""Reward models: pairs, rankings, attribute ratings and step labels, and how step scores become one number.

The model's outputs carry the gradient; labels and ratings are constants. What a mask leaves out may hold
anything. Absent is not zero: a missing rating or candidate is masked, and a row without any is refused.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import (
    check_choice,
    check_dims,
    check_floats,
    check_mask,
    check_number,
    check_rows,
    check_scores,
    held,
    squared,
    wide,
)

STEP_MODES = ("sum", "product", "min", "last")
MAX_RATING = 4.0  # ratings run from 0 to 4


def _leads(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """r_i − r_j as (B, K, K), and where both candidates exist and i stands before j."""
    check_floats(rewards=rewards)
    mask = check_rows(mask, 2, rewards=rewards)
    rewards = wide(rewards).masked_fill(~mask, 0.0)
    pairs = (mask.unsqueeze(2) & mask.unsqueeze(1)).triu(1)
    return held(rewards.unsqueeze(2) - rewards.unsqueeze(1)), pairs


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, *, margin: float = 0.0) -> Tensor:
    """Negative log-probability that the chosen answer beats the rejected one.

        L = −log σ(r⁺ − r⁻ − m),  without a margin p(y⁺ ≻ y⁻) = σ(r⁺ − r⁻) = e^{−L}

    r⁺ and r⁻ are the rewards of two answers to the same prompt. With margin m a pair counts as won only when
    r⁺ leads by more than m; for a margin of its own per pair, pass `chosen_rewards − margins`.

    Args:
        chosen_rewards: (B,); carries the gradient, ∂L/∂r⁺ = −σ(m − (r⁺ − r⁻)).
        rejected_rewards: (B,); carries the opposite gradient.
        margin: m, finite; 0 is the model of Bradley and Terry.

    Returns:
        Losses, shape (B,), nats, ≥ 0; log 2 for equal rewards and margin 0. At ±1e4 it is finite.

    Raises:
        ValueError: shapes differ or are not (B,), not floating point, a margin that is not finite.

    Reference:
        Bradley & Terry 1952; as a loss: Ouyang et al. 2022, eq. 1 (K = 2); margin: Touvron et al. 2023
        (Llama 2), eq. 2.

    Page: docs/losses/bradley_terry_loss.md

    >>> bradley_terry_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([0.6931, 0.3133])
    """
    check_floats(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    check_dims("chosen_rewards", chosen_rewards, 1)
    check_number("margin", margin)
    return -F.logsigmoid(held(wide(chosen_rewards) - wide(rejected_rewards) - margin))


def ranking_loss(rewards: Tensor, mask: Tensor) -> Tensor:
    """Bradley–Terry over all pairs of a ranking, as their mean.

        L = −(1/P) Σ_{i before j} log σ(r_i − r_j),  P = K(K − 1)/2

    r are the rewards of one prompt's candidates, best first. A prompt counts once however many candidates it
    has, because its pairs are not independent of each other.

    Args:
        rewards: (B, K); carries the gradient, 0 where masked.
        mask: (B, K), bool or 0/1: which candidates exist, in any pattern; K counts only them.

    Returns:
        Losses, shape (B,), nats, ≥ 0; log 2 for equal rewards; `bradley_terry_loss` for two candidates.

    Raises:
        ValueError: shapes differ or are not (B, K), rewards not floating, a row with fewer than 2 candidates.

    Reference:
        Ouyang et al. 2022 (InstructGPT), eq. 1.

    Page: docs/losses/ranking_loss.md

    >>> ranking_loss(torch.tensor([[2.0, 1.0, -1.0], [2.0, 9.0, 1.0]]), torch.tensor([[1, 1, 1], [1, 0, 1]]))
    tensor([0.1629, 0.3133])
    """
    leads, pairs = _leads(rewards, mask)
    losses = F.logsigmoid(leads).masked_fill(~pairs, 0.0)
    return -losses.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2))


def plackett_luce_loss(rewards: Tensor, mask: Tensor) -> Tensor:
    """Negative log-probability of a whole ranking: the best chosen of all, the next of the rest, and so on.

        L = −Σ_k log( e^{r_k} / Σ_{j ≥ k} e^{r_j} ) = Σ_k log Σ_{j ≥ k} e^{r_j − r_k}

    r are the rewards of one prompt's candidates, best first. The probabilities of all K! orders sum to 1.

    Args:
        rewards: (B, K); carries the gradient, 0 where masked.
        mask: (B, K), bool or 0/1: which candidates exist, in any pattern; the others are skipped.

    Returns:
        Losses, shape (B,), nats, ≥ 0; log K! for equal rewards; `bradley_terry_loss` for two candidates.

    Raises:
        ValueError: shapes differ or are not (B, K), rewards not floating, a row with fewer than 2 candidates.

    Reference:
        Luce 1959; Plackett 1975; in post-training: Rafailov et al. 2023 (DPO), appendix A.3.

    Page: docs/losses/plackett_luce_loss.md

    >>> plackett_luce_loss(torch.tensor([[2.0, 1.0, -1.0]]), torch.ones(1, 3))
    tensor([0.4759])
    """
    leads, pairs = _leads(rewards, mask)
    itself = torch.eye(leads.shape[1], dtype=torch.bool, device=leads.device)
    behind = (-leads).masked_fill(~(pairs | itself), -torch.inf)
    return behind.logsumexp(dim=2).sum(dim=1)  # a masked candidate has itself alone: log e⁰ = 0


def attribute_loss(predictions: Tensor, ratings: Tensor, mask: Tensor) -> Tensor:
    """Squared error on rated attributes (helpfulness, correctness, coherence, complexity, verbosity).

        L_a = (ŷ_a − y_a)²

    ŷ are the outputs of a regression reward model, y people's ratings from 0 to 4. An attribute nobody rated
    is masked; a rating of 0 is a rating.

    Args:
        predictions: (B, A); carries the gradient 2(ŷ_a − y_a), 0 where masked.
        ratings: (B, A), in [0, 4] where the mask is 1, anything elsewhere; detached.
        mask: (B, A), bool or 0/1: which attributes are rated.

    Returns:
        Losses, shape (B, A), ≥ 0, and 0 outside the mask; `aggregate(mode="token_mean")` with the same mask
        makes it the mean over what was rated. A prediction of 2.5 for a rating of 4 gives 2.25.

    Raises:
        ValueError: shapes differ or are not (B, A), predictions not floating, ratings bool or
            complex, or a present one outside [0, 4].

    Reference:
        Wang et al. 2024 (HelpSteer2), the regression reward model.

    Page: docs/losses/attribute_loss.md

    >>> attribute_loss(torch.tensor([[2.5, 1.0]]), torch.tensor([[4.0, 0.0]]), torch.tensor([[1, 0]]))
    tensor([[2.2500, 0.0000]])
    """
    check_floats(predictions=predictions)
    check_scores("ratings", ratings)
    mask = check_rows(mask, predictions=predictions, ratings=ratings)
    ratings = wide(ratings).detach().masked_fill(~mask, 0.0)
    outside = ratings[~((ratings >= 0.0) & (ratings <= MAX_RATING))]
    if outside.numel():
        raise ValueError(f"ratings must lie in [0, 4] where the mask is 1, got {outside[0].item()}")
    return squared(wide(predictions).masked_fill(~mask, 0.0) - ratings)


def process_reward_loss(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy of a process reward model, at the ends of steps.

        L_t = −[c_t log σ(z_t) + (1 − c_t) log(1 − σ(z_t))] = −log σ((2c_t − 1) z_t)

    z is the logit that the step ending at t is correct, c its label.

    Args:
        logits: (B, T); carries the gradient σ(z_t) − c_t, 0 where masked.
        labels: (B, T), 0 or 1 where the mask is 1, anything elsewhere; no gradient.
        mask: (B, T), bool or 0/1: the last token of every labelled step.

    Returns:
        Losses, shape (B, T), nats, ≥ 0, and 0 outside the mask; log 2 at z = 0. At ±1e4 it is finite.

    Raises:
        ValueError: shapes differ or are not (B, T), logits not floating, a label under the mask not 0/1.

    Reference:
        Uesato et al. 2022; Lightman et al. 2023, §2.6.

    Page: docs/losses/process_reward_loss.md

    >>> process_reward_loss(torch.tensor([[2.0, 0.3]]), torch.tensor([[0, 1]]), torch.tensor([[1, 0]]))
    tensor([[2.1269, 0.0000]])
    """
    check_floats(logits=logits)
    mask = check_rows(mask, logits=logits, labels=labels)
    correct = check_mask("labels where the mask is 1", labels.masked_fill(~mask, 0))
    logits = held(wide(logits)).masked_fill(~mask, 0.0)
    losses = -F.logsigmoid(torch.where(correct, logits, -logits))
    return losses.masked_fill(~mask, 0.0)


def aggregate_steps(step_rewards: Tensor, mask: Tensor, *, mode: str) -> Tensor:
    """The scores of a solution's steps as one number.

        sum  R = Σ_t r_t      product  R = Π_t r_t      min  R = min_t r_t      last  R = r at the last step

    r_t is the score of the step that ends at t. If it is the probability that the step is right, the product
    is that of the whole solution. It falls with every further step, as the minimum may; a sum rises.

    Args:
        step_rewards: (B, T); carries the gradient, 0 where masked. Steps that tie for the minimum share its
            gradient equally; the product's is right with zeros among the scores.
        mask: (B, T), bool or 0/1: the last token of every step.
        mode: "sum", "product", "min" or "last" (the last masked column, not the last column).

    Returns:
        Shape (B,), in promote_types(dtype, float32). Scores .9, .5, .8: 2.2, .36, .5 and .8.

    Raises:
        ValueError: shapes differ or are not (B, T), not floating point, a row without a step, unknown mode.

    Reference:
        product: Lightman et al. 2023, §2.6. min: Wang et al. 2024 (Math-Shepherd). last: Snell et al. 2024.

    Page: docs/losses/aggregate_steps.md

    >>> aggregate_steps(torch.tensor([[0.9, 0.5, 0.8, 0.0]]), torch.tensor([[1, 1, 1, 0]]), mode="product")
    tensor([0.3600])
    """
    check_floats(step_rewards=step_rewards)
    check_choice("mode", mode, STEP_MODES)
    mask = check_rows(mask, 1, step_rewards=step_rewards)
    filled = wide(step_rewards).masked_fill(~mask, {"product": 1.0, "min": torch.inf}.get(mode, 0.0))
    if mode == "product":
        return filled.prod(dim=1)
    if mode == "min":
        return filled.amin(dim=1)
    if mode == "last":
        places = mask * torch.arange(mask.shape[1], device=mask.device)
        filled = filled.gather(1, places.amax(dim=1, keepdim=True))
    return filled.sum(dim=1)
