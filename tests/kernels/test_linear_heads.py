"""The tiled heads against the losses of the logits they never store: values, gradients, memory, refusals."""

import doctest
import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanopost import losses
from nanopost.kernels import dispatch, linear_logps_tiled
from nanopost.kernels.linear_cross_entropy import linear_cross_entropy
from nanopost.kernels.linear_divergence import linear_divergence
from nanopost.kernels.linear_logps import linear_logps

sizes = st.tuples(st.integers(0, 17), st.integers(1, 5), st.integers(1, 23))  # N, D, V
TILE = (4, 6)  # tokens × words: every size above is ragged somewhere


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(dispatch, "tile", lambda hidden: TILE)
    monkeypatch.setattr(dispatch, "chunk", lambda hidden, words: 4)


def head(n: int, d: int, v: int, *, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    hidden, weight = (scale * torch.randn(k, d, generator=draw, dtype=torch.float64) for k in (n, v))
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, v, (n,), generator=draw)


def upstream(n: int, count: int, seed: int) -> list[Tensor]:
    """Gradients that differ from token to token, a third of the tokens without any."""
    draw = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, generator=draw) > 1 / 3
    return [torch.randn(n, generator=draw, dtype=torch.float64) * keep for _ in range(count)]


def slow(hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """The docstring's program."""
    logits = hidden @ weight.T / temperature
    return losses.token_logps(logits, target_ids), losses.entropy(logits), logits.logsumexp(-1)


@given(sizes, st.integers(0, 10**6), st.sampled_from([0.3, 1.0, 2.5]), st.sets(st.integers(0, 2), min_size=1))
def test_linear_logps_are_those_of_the_logits(size, seed, temperature, read):
    """Values and gradients, for a loss that reads any of the three outputs."""
    hidden, weight, ids = head(*size, seed=seed)
    found, expected = linear_logps(hidden, weight, ids, temperature), slow(hidden, weight, ids, temperature)
    grads = upstream(size[0], 3, seed)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    gradients = [
        torch.autograd.grad([out[i] for i in read], (hidden, weight), [grads[i] for i in read])
        for out in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_head_worked_by_hand():
    """Two words with logits ln 3 and 0 at τ = 1, 2 ln 3 and 0 at τ = ½: p = 3/4 and 9/10."""
    hidden, weight = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[math.log(3.0)], [0.0]])
    for temperature, p in ((1.0, 0.75), (0.5, 0.9)):
        logps, entropies, logsumexps = linear_logps(hidden, weight.double(), torch.tensor([0]), temperature)
        assert logps.item() == pytest.approx(math.log(p))
        assert entropies.item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))
        assert logsumexps.item() == pytest.approx(-math.log(1 - p))
    assert linear_cross_entropy(hidden, weight.double(), torch.tensor([1])).item() == pytest.approx(
        math.log(4.0)
    )


@given(sizes, st.integers(0, 10**6), st.floats(-2.0, 2.0))
def test_linear_cross_entropy_is_that_of_the_logits(size, seed, share):
    hidden, weight, ids = head(*size, seed=seed)
    found = linear_cross_entropy(hidden, weight, ids)
    expected = losses.sft_loss(losses.token_logps(hidden @ weight.T, ids))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(share * x.sum(), (hidden, weight)) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, ids), expected, rtol=1e-9, atol=1e-9)


def test_linear_cross_entropy_refuses_weights_of_tokens():
    hidden, weight, ids = head(5, 3, 7)
    with pytest.raises(
        ValueError, match=r"weighs all tokens alike, got upstream gradients from 0\.0 to 4\.0"
    ):
        (linear_cross_entropy(hidden, weight, ids) * torch.arange(5)).sum().backward()


def test_a_sum_over_tokens_does_not_overflow_half_precision():
    """8,192 tokens of mean loss: the sum of their gradients is beyond float16, the mean is not."""
    hidden, weight = torch.full((8192, 2), 20.0, dtype=torch.float16), torch.zeros(3, 2, dtype=torch.float16)
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, torch.zeros(8192, dtype=torch.long)).mean().backward()
    expected = torch.tensor([[-40 / 3] * 2, [20 / 3] * 2, [20 / 3] * 2])
    torch.testing.assert_close(weight.grad.float(), expected, rtol=1e-3, atol=0)


def test_a_broken_upstream_gradient_is_passed_on():
    """Not blamed on the weights of tokens: whoever measures the gradient's norm says what happened."""
    hidden, weight, ids = head(5, 3, 7)
    loss = linear_cross_entropy(hidden, weight, ids).sum()
    (loss * torch.nan).backward()
    assert hidden.grad.isnan().all() and weight.grad.isnan().all()


DIVERGENCES = {
    "forward": lambda s, t, temperature: losses.forward_kl(s, t, temperature=temperature),
    "reverse": lambda s, t, temperature: losses.reverse_kl(s, t, temperature=temperature),
    "jsd": lambda s, t, temperature: losses.generalized_jsd(s, t, beta=0.3, temperature=temperature),
}


@given(sizes, st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from(sorted(DIVERGENCES)))
def test_linear_divergence_is_that_of_the_logits(size, seed, temperature, kind):
    hidden, weight, _ = head(*size, seed=seed)
    taught, teacher, _ = head(size[0], 3, size[2], seed=seed + 1)  # a teacher of another width
    options = {"kind": kind, "temperature": temperature, "beta": 0.3}
    found = linear_divergence(hidden, weight, taught, teacher, **options)
    expected = DIVERGENCES[kind](hidden @ weight.T, taught @ teacher.T, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    (grad,) = upstream(size[0], 1, seed)
    gradients = [torch.autograd.grad(x, (hidden, weight), grad, retain_graph=True) for x in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    assert torch.autograd.grad(found, (taught, teacher), grad, allow_unused=True) == (None, None)


def test_a_divergence_worked_by_hand():
    """Teacher (.9, .1), student (.6, .4)."""
    heads = [torch.tensor([[math.log(p)], [math.log(1 - p)]]) for p in (0.6, 0.9)]
    one, found = torch.ones(1, 1), {}
    for kind in DIVERGENCES:
        found[kind] = linear_divergence(one, heads[0], one, heads[1], kind=kind, beta=0.5).item()
    forward = 0.9 * math.log(0.9 / 0.6) + 0.1 * math.log(0.1 / 0.4)
    reverse = 0.6 * math.log(0.6 / 0.9) + 0.4 * math.log(0.4 / 0.1)
    mixed = [0.9 * math.log(0.9 / 0.75) + 0.1 * math.log(0.1 / 0.25)]
    mixed += [0.6 * math.log(0.6 / 0.75) + 0.4 * math.log(0.4 / 0.25)]
    expected = {"forward": forward, "reverse": reverse, "jsd": sum(mixed) / 2}
    assert found == pytest.approx(expected, rel=1e-5)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.element_size()
            for x in tree_leaves(out)
            if isinstance(x, Tensor)
        ]
        Largest.most = max([Largest.most, *sizes])
        return out


def test_no_tensor_is_as_large_as_the_logits():
    """N = 40, V = 50, D = 3: nothing above the 150 entries of a gradient or the 200 of a chunk's logits."""
    hidden, weight, ids = head(40, 3, 50)
    taught, teacher, _ = head(40, 3, 50, seed=1)
    for made in (
        lambda: sum(out.sum() for out in linear_logps(hidden, weight, ids, 0.7)),
        lambda: linear_divergence(hidden, weight, taught, teacher, kind="jsd").sum(),
        lambda: linear_cross_entropy(hidden, weight, ids).sum(),
    ):
        Largest.most = 0
        with Largest():
            made().backward()
        assert 120 <= Largest.most <= 200, Largest.most
    Largest.most = 0
    with Largest():
        (hidden @ weight.T).sum()
    assert Largest.most == 2000  # it would show


def test_tokens_without_an_upstream_gradient_are_skipped(monkeypatch):
    """They cost nothing in backward, and what is broken in them stays there."""
    hidden, weight, ids = head(9, 3, 11)
    with torch.no_grad():
        hidden[4] = torch.nan
    seen, backward = [], linear_logps_tiled.backward
    monkeypatch.setattr(
        linear_logps_tiled,
        "backward",
        lambda *args, **how: seen.append(len(args[0])) or backward(*args, **how),
    )
    logps = linear_logps(hidden, weight, ids)[0]
    assert logps[4].isnan()
    logps[[1, 7]].sum().backward()
    assert seen == [2]
    assert (hidden.grad[[1, 7]] != 0).all() and (hidden.grad.sum(1) != 0).sum() == 2
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["logps", "cross_entropy"])
def test_a_frozen_head_gets_no_gradient_and_costs_none(kind):
    """The head of a model with an adapter: the states' gradient is the same, and the head's never made."""
    hidden, weight, ids = head(9, 3, 11)

    def loss(weight: Tensor) -> Tensor:
        return (
            -linear_logps(hidden, weight, ids)[0]
            if kind == "logps"
            else linear_cross_entropy(hidden, weight, ids)
        )

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            made.extend(tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor))
            return out

    gradients = []
    for frozen in (False, True):
        made, read = list[tuple[int, ...]](), weight.detach() if frozen else weight
        with Watch():
            value = loss(read).sum()
            gradients.append(
                torch.autograd.grad(value, hidden)[0]
                if frozen
                else torch.autograd.grad(value, (hidden, weight))[0]
            )
        assert made.count((11, 3)) == 0 if frozen else made.count((11, 3)) > 0
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["logps", "cross_entropy", "forward", "reverse", "jsd"])
def test_half_precision_is_no_worse_than_the_naive_program(kind):
    """Weights and states in bfloat16: values and gradients no farther from float64 than its own."""
    hidden, weight, ids = (x.detach() for x in head(64, 16, 97, scale=0.7))
    taught, teacher, _ = (x.detach() for x in head(64, 16, 97, seed=1, scale=0.7))
    half = [x.bfloat16() for x in (hidden, weight, taught, teacher)]
    grad = (
        torch.linspace(0.5, 1.5, 64, dtype=torch.float64)
        if kind != "cross_entropy"
        else torch.ones(64).double()
    )

    def run(program, dtype):
        h, w, t, u = (x.to(dtype) for x in half)
        h.requires_grad_(), w.requires_grad_()
        out = program(h, w, t, u)
        return [out.double(), *(x.double() for x in torch.autograd.grad(out, (h, w), grad.to(out.dtype)))]

    def naive(h, w, t, u):
        if kind in DIVERGENCES:
            return DIVERGENCES[kind](h @ w.T, t @ u.T, 0.7)
        logps = losses.token_logps(h @ w.T, ids, temperature=0.7 if kind == "logps" else 1.0)
        return logps if kind == "logps" else -logps

    def tiled(h, w, t, u):
        if kind in DIVERGENCES:
            return linear_divergence(h, w, t, u, kind=kind, temperature=0.7, beta=0.3)
        return linear_logps(h, w, ids, 0.7)[0] if kind == "logps" else linear_cross_entropy(h, w, ids)

    exact, rough, ours = run(naive, torch.float64), run(naive, torch.bfloat16), run(tiled, torch.bfloat16)
    for truth, theirs, mine in zip(exact, rough, ours, strict=True):
        assert (mine - truth).abs().max() <= (theirs - truth).abs().max()


def test_logits_far_apart_neither_overflow_nor_vanish():
    hidden, weight, ids = head(12, 2, 13, scale=100.0)
    found, expected = linear_logps(hidden, weight, ids), slow(hidden, weight, ids, 1.0)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-7)
    assert expected[0].min() < -1e4


def test_gradients_by_finite_differences():
    hidden, weight, ids = head(5, 2, 8)
    taught, teacher, _ = head(5, 2, 8, seed=1)
    for program in (
        lambda h, w: linear_logps(h, w, ids, 0.7),
        lambda h, w: linear_cross_entropy(h, w, ids).sum(),
        *(lambda h, w, k=k: linear_divergence(h, w, taught, teacher, kind=k, beta=0.3) for k in DIVERGENCES),
    ):
        assert torch.autograd.gradcheck(program, (hidden, weight))


BAD = [
    ({"hidden": torch.zeros(3, 2, dtype=torch.long)}, "hidden must be floating point"),
    ({"hidden": torch.zeros(2, 3, 2)}, r"hidden must have 2 dimension\(s\), got shape \(2, 3, 2\)"),
    ({"weight": torch.zeros(5, 4)}, r"got hidden \(3, 2\), weight \(5, 4\), target_ids \(3,\)"),
    ({"target_ids": torch.zeros(4, dtype=torch.long)}, r"target_ids \(4,\)"),
    ({"target_ids": torch.zeros(3)}, "target_ids must hold integers, got torch.float32"),
    ({"target_ids": torch.tensor([0, 5, 1])}, r"target_ids must lie in \[0, 5\), got 5"),
    ({"target_ids": torch.tensor([0, -1, 1])}, r"target_ids must lie in \[0, 5\), got -1"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_cannot_be_a_head_is_named(change, message):
    arguments = {
        "hidden": torch.zeros(3, 2),
        "weight": torch.zeros(5, 2),
        "target_ids": torch.tensor([0, 4, 1]),
    }
    arguments |= change
    arguments["weight"].requires_grad_()
    for program in (linear_logps, linear_cross_entropy):
        with pytest.raises(ValueError, match=message):
            program(**arguments)


def test_other_bad_numbers_are_named():
    one, head = torch.ones(2, 1), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got 0\.0"):
        linear_logps(one, head, torch.zeros(2, dtype=torch.long), 0.0)
    for change, message in (
        ({"kind": "l2"}, "kind must be one of 'forward', 'reverse', 'jsd', got 'l2'"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"beta": 1.0}, r"beta must lie in \(0, 1\), got 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_divergence(one, head, one, head, **{"kind": "jsd"} | change)
    with pytest.raises(ValueError, match="both heads must have as many words, got 3 and 4"):
        linear_divergence(one, head, one, torch.ones(4, 1), kind="forward")


@pytest.mark.parametrize("name", ["linear_logps", "linear_cross_entropy", "linear_divergence"])
def test_doctests_run(name):
    found = doctest.testmod(importlib.import_module(f"nanopost.kernels.{name}"))
    assert found.attempted and not found.failed
