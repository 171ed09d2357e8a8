"""The exact oracle: a policy so small that every completion, and every group of completions, can be listed.

Three or four actions (0 stops), at most a few steps, one table of logits with a row for each prefix. The
gradient of an objective is written by hand in NumPy from ∇ log π = onehot − p. The expected gradient of an
estimator is its gradient summed over every group of completions with the group's probability, so neither has
sampling noise and the two can be compared to rounding: cosine 1 and norm ratio 1 mean unbiased.

The expected gradient is computed on two ways that share nothing but the list of groups: here by autograd
through the functions of `nanopost.losses`, in tests/oracle_numpy.py by hand.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

STOP = 0
WARMTH = 0.7  # the temperature of `Case.warm`


@dataclass(frozen=True)
class Tree:
    """Every completion of a vocabulary, a number of steps and prompts: N rows of T actions, padded."""

    actions: NDArray[np.int64]  # (N, T)
    states: NDArray[np.int64]  # (N, T): the row of the logits table that each action was drawn from
    mask: NDArray[np.bool_]  # (N, T)
    size: int  # number of states
    prompts: int  # equally likely; the completions and the states of a prompt are adjacent


def grow(vocabulary: int, steps: int, prompts: int = 1) -> Tree:
    """All completions: they end with the stop action or after the last step. No prompt shares a state."""
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
    shifted = [states + len(prefixes) * prompt for prompt in range(prompts)]
    many = (prompts, 1)
    return Tree(
        np.tile(actions, many), np.concatenate(shifted), np.tile(mask, many), len(prefixes) * prompts, prompts
    )


def distribution(logits: Array, temperature: float = 1.0, top_k: int | None = None) -> Array:
    """Next-action probabilities of each state, (S, V): softmax at a temperature over the top_k logits."""
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    if top_k is not None:
        for row, state in enumerate(logits):
            weights[row, np.argsort(-state, kind="stable")[top_k:]] = 0.0
    return weights / weights.sum(axis=1, keepdims=True)


def per_token(tree: Tree, table: Array) -> Array:
    """The entry of a table (S, V) at each action, 0 in the padding, (N, T)."""
    return np.where(tree.mask, table[tree.states, tree.actions], 0.0)


def probabilities(tree: Tree, p: Array) -> Array:
    """The probability of each completion, and of its prompt before it, (N,)."""
    return np.where(tree.mask, p[tree.states, tree.actions], 1.0).prod(axis=1) / tree.prompts


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


def entropy_gradient(tree: Tree, p: Array) -> Array:
    """∇ H of whole completions, H = −Σ_y π(y) log π(y); one prompt."""
    return value_gradient(tree, p, -np.log(probabilities(tree, p)))


@dataclass(frozen=True)
class Case:
    """One policy to ask about, with what it is compared to. Two cases never share a table."""

    tree: Tree
    logits: Array  # (S, V): the policy
    reference: Array  # (S, V): reference or teacher
    old: Array  # (S, V): the policy that sampled, where it is another one
    rewards: Array  # (N,)
    guess: Array  # (S,): a value function that is wrong

    @cached_property
    def policy(self) -> Array:
        return distribution(self.logits)

    @cached_property
    def anchor(self) -> Array:
        """The reference, or the teacher."""
        return distribution(self.reference)

    @cached_property
    def sampler(self) -> Array:
        """The older policy."""
        return distribution(self.old)

    @cached_property
    def warm(self) -> Array:
        return distribution(self.logits, temperature=WARMTH)

    @cached_property
    def top(self) -> Array:
        return distribution(self.logits, top_k=2)

    @cached_property
    def values(self) -> Array:
        """V(s) = E[r | s] of each state, (S,): what a perfect value function says."""
        chance = probabilities(self.tree, self.policy)
        reach, worth = np.zeros(self.tree.size), np.zeros(self.tree.size)
        for row, step in zip(*np.nonzero(self.tree.mask), strict=True):
            reach[self.tree.states[row, step]] += chance[row]
            worth[self.tree.states[row, step]] += chance[row] * self.rewards[row]
        return worth / reach

    @cached_property
    def true(self) -> Array:
        """∇ E[r], the mean over the prompts."""
        return value_gradient(self.tree, self.policy, self.rewards)


def cases(vocabulary: int, steps: int, seed: int) -> dict[str, Case]:
    """Random policies of one seed: the tree, its first step alone, and two smaller worlds of rewards 0 and 1.

    "binary" is one prompt of two steps, "prompts" are two such prompts, a hard and an easier one.
    """
    random = np.random.default_rng(seed)

    def tables(tree: Tree) -> list[Array]:
        return [random.normal(size=(tree.size, vocabulary)) for _ in range(3)]

    tree, step = grow(vocabulary, steps), grow(vocabulary, 1)
    logits, reference, old = tables(tree)
    old = logits + 0.5 * old
    rewards = random.uniform(size=len(tree.actions)).round(2)
    result = {
        "tree": Case(tree, logits, reference, old, rewards, random.uniform(size=tree.size).round(2)),
        "step": Case(
            step, logits[:1], reference[:1], old[:1], rewards[: len(step.actions)], np.array([rewards.mean()])
        ),
    }
    for name, shares in (("binary", (0.4,)), ("prompts", (0.1, 0.6))):
        tree = grow(vocabulary, 2, len(shares))
        table, other, shift = tables(tree)
        chance = probabilities(tree, distribution(table)).reshape(len(shares), -1) * len(shares)
        good = np.zeros_like(chance)
        for prompt, share in enumerate(shares):  # what is right has at most this chance in all
            for place in random.permutation(chance.shape[1]):
                good[prompt, place] = chance[prompt, place] + chance[prompt] @ good[prompt] <= share
        guess = random.uniform(size=tree.size).round(2)
        result[name] = Case(tree, table, other, table + 0.5 * shift, good.flatten(), guess)
    return result


@dataclass(frozen=True)
class Draws:
    """Everything a step can draw: M tuples of G completions and their probabilities, which sum to 1."""

    rows: NDArray[np.int64]  # (M, G)
    chance: Array  # (M,)


def groups(tree: Tree, group_size: int, *drawn_from: Array) -> Draws:
    """Every G-tuple of completions of one prompt; member g is drawn from table g, the last one stays."""
    each = len(tree.actions) // tree.prompts
    tuples = np.indices((each,) * group_size).reshape(group_size, -1).T
    rows = np.concatenate([tuples + each * prompt for prompt in range(tree.prompts)])
    chance = np.full(len(rows), 1.0 / tree.prompts)
    for member in range(group_size):
        table = drawn_from[min(member, len(drawn_from) - 1)]
        chance *= probabilities(tree, table)[rows[:, member]] * tree.prompts
    return Draws(rows, chance)


def batches(tree: Tree, drawn_from: Array) -> Draws:
    """Every batch of one completion of each prompt."""
    each = len(tree.actions) // tree.prompts
    starts = each * np.arange(tree.prompts)
    rows = np.array(list(itertools.product(range(each), repeat=tree.prompts))) + starts
    return Draws(rows, (probabilities(tree, drawn_from)[rows] * tree.prompts).prod(axis=1))


@dataclass(frozen=True)
class Samples:
    """The same as a batch for the losses: M · G rows, the G of a tuple adjacent."""

    case: Case
    rows: NDArray[np.int64]  # (B,): which completion each row is
    logits: Tensor  # (B, T, V); carries the gradient to the table
    target_ids: Tensor  # (B, T)
    mask: Tensor  # (B, T)
    rewards: Tensor  # (B,)
    weight: Tensor  # (B, 1): the probability of the row's tuple
    group_size: int

    def look_up(self, array: Array) -> Tensor:
        """What an array over the completions says about each row of the batch."""
        return torch.tensor(array[self.rows])


def gradient_over(case: Case, draws: Draws, loss: Callable[[Samples], Tensor]) -> Array:
    """E[∇ loss] over everything a step can draw, with respect to the table of logits, (S, V).

    `loss` gets all tuples at once and returns the sum over tuples of weight × the loss of the tuple.
    """
    rows, group_size = draws.rows.flatten(), draws.rows.shape[1]
    table = torch.tensor(case.logits, requires_grad=True)
    samples = Samples(
        case=case,
        rows=rows,
        logits=table[torch.tensor(case.tree.states[rows])],
        target_ids=torch.tensor(case.tree.actions[rows]),
        mask=torch.tensor(case.tree.mask[rows]),
        rewards=torch.tensor(case.rewards[rows]),
        weight=torch.tensor(draws.chance).repeat_interleave(group_size)[:, None],
        group_size=group_size,
    )
    (gradient,) = torch.autograd.grad(loss(samples), table)
    return gradient.numpy()


def expected_gradient(
    tree: Tree,
    logits: Array,
    rewards: Array,
    loss: Callable[[Samples], Tensor],
    *,
    group_size: int = 1,
    drawn_from: Array | None = None,
) -> Array:
    """The same over every G-tuple drawn from a distribution (default: the policy), without a case."""
    case = Case(tree, logits, logits, logits, rewards, np.zeros(tree.size))
    draws = groups(tree, group_size, case.policy if drawn_from is None else drawn_from)
    return gradient_over(case, draws, loss)


def compare(estimate: Array, truth: Array) -> tuple[float, float]:
    """Cosine (NaN for a zero estimate) and norm ratio of an expected gradient to the true one."""
    size, scale = float(np.linalg.norm(estimate)), float(np.linalg.norm(truth))
    cosine = float((estimate * truth).sum()) / (size * scale) if size > 1e-12 * scale else float("nan")
    return cosine, size / scale
