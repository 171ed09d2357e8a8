"""The exact oracle: a policy so small that every completion, and every group of completions, can be listed.

Three actions (0 stops), at most a few steps, one table of logits with a row for each prefix. The gradient of
an objective is written by hand in NumPy from ∇ log π = onehot − p. The expected gradient of an estimator is
its gradient summed over every group of completions with the group's probability, so neither has sampling
noise and the two can be compared to rounding: cosine 1 and norm ratio 1 mean unbiased.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

STOP = 0


@dataclass(frozen=True)
class Tree:
    """Every completion of a vocabulary and a number of steps: N rows of T actions, padded after the stop."""

    actions: NDArray[np.int64]  # (N, T)
    states: NDArray[np.int64]  # (N, T): the row of the logits table that each action was drawn from
    mask: NDArray[np.bool_]  # (N, T)
    size: int  # number of states


def grow(vocabulary: int, steps: int) -> Tree:
    """All completions: they end with the stop action or after the last step."""
    others = range(1, vocabulary)
    prefixes = [prefix for length in range(steps) for prefix in itertools.product(others, repeat=length)]
    number = {prefix: index for index, prefix in enumerate(prefixes)}
    completions = [(*prefix, STOP) for prefix in prefixes] + list(itertools.product(others, repeat=steps))
    actions = np.zeros((len(completions), steps), dtype=np.int64)
    states, mask = actions.copy(), np.zeros_like(actions, dtype=np.bool_)
    for row, completion in enumerate(completions):
        for step, action in enumerate(completion):
            actions[row, step], states[row, step] = action, number[completion[:step]]
            mask[row, step] = True
    return Tree(actions, states, mask, len(prefixes))


def distribution(logits: Array, temperature: float = 1.0, top_k: int | None = None) -> Array:
    """Next-action probabilities of each state, (S, V): softmax at a temperature over the top_k logits."""
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    if top_k is not None:
        for row, state in enumerate(logits):
            weights[row, np.argsort(-state, kind="stable")[top_k:]] = 0.0
    return weights / weights.sum(axis=1, keepdims=True)


def probabilities(tree: Tree, p: Array) -> Array:
    """The probability of each completion, (N,)."""
    return np.where(tree.mask, p[tree.states, tree.actions], 1.0).prod(axis=1)


def scores(tree: Tree, p: Array, temperature: float = 1.0) -> Array:
    """∇ log π(y) with respect to the logits table for each completion, (N, S, V)."""
    result = np.zeros((len(tree.actions), *p.shape))
    for row, step in zip(*np.nonzero(tree.mask), strict=True):
        state = tree.states[row, step]
        result[row, state] -= p[state] / temperature
        result[row, state, tree.actions[row, step]] += 1.0 / temperature
    return result


def value_gradient(tree: Tree, p: Array, values: Array, temperature: float = 1.0) -> Array:
    """∇ E_π[f(y)] = Σ_y π(y) f(y) ∇ log π(y) for a fixed f, (S, V)."""
    return np.einsum("n,nsv->sv", probabilities(tree, p) * values, scores(tree, p, temperature))


def kl(tree: Tree, p: Array, q: Array) -> float:
    """KL(p‖q) between whole completions."""
    prob, other = probabilities(tree, p), probabilities(tree, q)
    return float(np.sum(prob * np.log(prob / other)))


def kl_gradient(tree: Tree, p: Array, q: Array) -> Array:
    """∇ KL(p‖q) with respect to the logits of p; the 1 of d(π log π) drops out, as E_π[∇ log π] = 0."""
    return value_gradient(tree, p, np.log(probabilities(tree, p) / probabilities(tree, q)))


def forward_kl_gradient(tree: Tree, p: Array, q: Array) -> Array:
    """∇ KL(q‖p) with respect to the logits of p: −Σ_y q(y) ∇ log p(y)."""
    return -np.einsum("n,nsv->sv", probabilities(tree, q), scores(tree, p))


@dataclass(frozen=True)
class Samples:
    """Every G-tuple of completions, laid out as a batch: M · G rows, the G of a tuple adjacent."""

    rows: NDArray[np.int64]  # (B,): which completion each row is
    logits: Tensor  # (B, T, V); carries the gradient to the table
    target_ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    rewards: Tensor  # (B,)
    weight: Tensor  # (B, 1): the probability of the row's tuple
    group_size: int


Loss = Callable[[Samples], Tensor]


def expected_gradient(
    tree: Tree,
    logits: Array,
    rewards: Array,
    loss: Loss,
    *,
    group_size: int = 1,
    drawn_from: Array | None = None,
) -> Array:
    """E[∇ loss] over every G-tuple of completions drawn from `drawn_from` (default: the policy), (S, V).

    `loss` gets all tuples at once and returns the sum over tuples of weight × the loss of the tuple.
    """
    tuples = np.array(list(itertools.product(range(len(tree.actions)), repeat=group_size)))
    chances = probabilities(tree, distribution(logits) if drawn_from is None else drawn_from)
    rows = tuples.flatten()
    table = torch.tensor(logits, requires_grad=True)
    samples = Samples(
        rows=rows,
        logits=table[torch.tensor(tree.states[rows])],
        target_ids=torch.tensor(tree.actions[rows]),
        mask=torch.tensor(tree.mask[rows]),
        rewards=torch.tensor(rewards[rows]),
        weight=torch.tensor(chances[tuples].prod(axis=1)).repeat_interleave(group_size)[:, None],
        group_size=group_size,
    )
    (gradient,) = torch.autograd.grad(loss(samples), table)
    return gradient.numpy()


def compare(estimate: Array, truth: Array) -> tuple[float, float]:
    """Cosine (NaN for a zero estimate) and norm ratio of an expected gradient to the true one."""
    size, scale = float(np.linalg.norm(estimate)), float(np.linalg.norm(truth))
    cosine = float((estimate * truth).sum()) / (size * scale) if size > 1e-12 * scale else float("nan")
    return cosine, size / scale
