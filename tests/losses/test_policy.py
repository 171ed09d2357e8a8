"""The ratio, the clipped surrogate, the KL estimates and the entropy."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from nanopost.losses import (
    aggregate,
    clipped_surrogate_loss,
    entropy,
    kl_estimate,
    local_denom,
    policy_ratio,
    token_logps,
    truncate_logits,
)
from tests.pages import scalar
from tests.ragged import JUNK, junk_outside, normal, ragged

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
KINDS = ("k1", "k2", "k3")


def pair(batch: tuple[Tensor, Generator], scale: float = 1.5) -> tuple[Tensor, Tensor]:
    """Log-probabilities of two policies that differ a good deal."""
    mask, generator = batch
    return -normal(generator, *mask.shape).abs(), -normal(generator, *mask.shape, scale=scale).abs()


def each(function: Callable[..., float], *tensors: Tensor, **arguments: object) -> Tensor:
    """A page's scalar function over every slot."""
    flat = zip(*(tensor.flatten().tolist() for tensor in tensors), strict=True)
    values = [function(*slot, **arguments) for slot in flat]
    return torch.tensor(values, dtype=torch.float64).reshape(tensors[0].shape)


def slope(loss: Tensor, logps: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    return gradient


@given(batch=ragged())
def test_R1_value_equals_the_page(batch: tuple[Tensor, Generator]) -> None:
    logps, old_logps = pair(batch, scale=30.0)
    expected = each(scalar("policy_ratio"), logps, old_logps)
    torch.testing.assert_close(policy_ratio(logps, old_logps), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@given(batch=ragged())
def test_R2_ratio_is_one_before_the_first_update(
    temperature: float, top_k: int, top_p: float, batch: tuple[Tensor, Generator]
) -> None:
    mask, generator = batch
    logits = normal(generator, *mask.shape, 5, scale=2.0)
    rows = [[z / temperature for z in row] for row in logits.reshape(-1, 5).tolist()]
    tokens, recorded = [], []
    for number, row in enumerate(rows):  # a sampler by the pages alone: truncate, normalise, take some token
        support = [math.exp(z) for z in scalar("truncate_logits")(row, top_k, top_p)]
        allowed = [token for token, power in enumerate(support) if power > 0.0]
        tokens.append(allowed[number % len(allowed)])
        recorded.append(math.log(support[tokens[-1]] / sum(support)))
    ids = torch.tensor(tokens).reshape(mask.shape)
    old_logps = torch.tensor(recorded, dtype=torch.float64).reshape(mask.shape)
    logps = token_logps(logits, ids, temperature=temperature, top_k=top_k, top_p=top_p)
    torch.testing.assert_close(
        policy_ratio(logps, old_logps), torch.ones_like(old_logps), rtol=0.0, atol=1e-12
    )


@given(batch=ragged())
def test_R3_gradient_is_the_ratio_and_the_old_policy_gets_none(batch: tuple[Tensor, Generator]) -> None:
    logps, old_logps = (tensor.requires_grad_() for tensor in pair(batch))
    ratio = policy_ratio(logps, old_logps)
    gradient, old = torch.autograd.grad(ratio.sum(), (logps, old_logps), allow_unused=True)
    assert old is None
    torch.testing.assert_close(gradient, (logps - old_logps).exp(), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_R4_masked_slots_may_hold_anything(soiled: int, junk: float, batch: tuple[Tensor, Generator]) -> None:
    check_masked_slots(policy_ratio, list(pair(batch)), batch[0], soiled, junk)


def check_masked_slots(
    loss: Callable[..., Tensor], inputs: list[Tensor], mask: Tensor, soiled: int, junk: float
) -> None:
    """Value and gradient of the aggregate are those of the clean input; outside the mask it has none."""

    def run(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        leaf = tensors[0].clone().requires_grad_()
        value = aggregate(loss(leaf, *tensors[1:]), mask, mode="sequence_mean", denom=1.7)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    value, gradient = run(inputs)
    inputs[soiled] = junk_outside(inputs[soiled], mask, junk)
    soiled_value, soiled_gradient = run(inputs)
    assert torch.equal(soiled_value, value)
    assert torch.equal(soiled_gradient, gradient)
    assert not soiled_gradient[~mask].any() and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [61.0, 1e4, float("inf")])
def test_R5_extreme_log_ratios_are_finite_with_gradient_zero(size: float, dtype: torch.dtype) -> None:
    logps = torch.tensor([[size, -size, 0.5]], dtype=dtype, requires_grad=True)
    ratio = policy_ratio(logps, torch.zeros(1, 3, dtype=dtype))
    assert ratio.isfinite().all() and (ratio > 0).all()
    above, below, inside = slope(ratio, logps)[0].tolist()
    assert above == below == 0.0 and inside == pytest.approx(math.exp(0.5), rel=1e-6)


@given(batch=ragged(), clip_low=st.floats(0.05, 0.4), clip_high=st.floats(0.41, 0.9))
def test_C1_value_equals_the_page(batch: tuple[Tensor, Generator], clip_low: float, clip_high: float) -> None:
    logps, old_logps = pair(batch)
    advantages = normal(batch[1], *logps.shape)
    found = clipped_surrogate_loss(logps, old_logps, advantages, clip_low=clip_low, clip_high=clip_high)
    page = scalar("clipped_surrogate_loss")
    expected = each(page, logps, old_logps, advantages, clip_low=clip_low, clip_high=clip_high)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("advantage", "ratio", "active"),
    [
        (1.5, 0.6, True),
        (1.5, 0.85, True),
        (1.5, 1.25, True),  # inside only because clip_high is the larger one
        (1.5, 1.6, False),
        (-1.5, 0.6, False),
        (-1.5, 0.75, False),  # outside only because clip_low is the smaller one
        (-1.5, 1.25, True),
        (-1.5, 1.6, True),
    ],
)
def test_C2_gradient_follows_the_table_of_signs(advantage: float, ratio: float, active: bool) -> None:
    logps = torch.tensor([[math.log(ratio) - 0.9]], dtype=torch.float64, requires_grad=True)
    old_logps, advantages = torch.full_like(logps, -0.9), torch.full_like(logps, advantage)
    gradient = slope(clipped_surrogate_loss(logps, old_logps, advantages, **CLIP), logps).item()
    assert gradient == (pytest.approx(-ratio * advantage, rel=1e-12) if active else 0.0)


@given(batch=ragged())
def test_C3_at_ratio_one_it_is_reinforce(batch: tuple[Tensor, Generator]) -> None:
    logps, _ = pair(batch)
    advantages = normal(batch[1], *logps.shape)
    logps.requires_grad_()
    loss = clipped_surrogate_loss(logps, logps.detach(), advantages, **CLIP)
    assert torch.equal(loss, -advantages) and torch.equal(slope(loss, logps), -advantages)


@given(batch=ragged())
def test_C4_old_policy_and_advantages_get_no_gradient(batch: tuple[Tensor, Generator]) -> None:
    logps, old_logps = pair(batch)
    inputs = [tensor.requires_grad_() for tensor in (logps, old_logps, normal(batch[1], *logps.shape))]
    gradients = torch.autograd.grad(clipped_surrogate_loss(*inputs, **CLIP).sum(), inputs, allow_unused=True)
    assert gradients[0] is not None and gradients[1:] == (None, None)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1, 2])
@given(batch=ragged())
def test_C5_masked_slots_may_hold_anything(soiled: int, junk: float, batch: tuple[Tensor, Generator]) -> None:
    mask, generator = batch
    logps = -normal(generator, *mask.shape).abs()
    near = logps + normal(generator, *mask.shape, scale=0.05)  # inside the clip
    inputs = [logps, near, normal(generator, *mask.shape)]
    check_masked_slots(lambda *tensors: clipped_surrogate_loss(*tensors, **CLIP), inputs, mask, soiled, junk)


@pytest.mark.parametrize("log_ratio", [-1e4, -2.0, 0.0, 2.0, 1e4])
def test_C6_advantage_zero_gives_loss_and_gradient_zero(log_ratio: float) -> None:
    logps = torch.tensor([[log_ratio]], requires_grad=True)
    loss = clipped_surrogate_loss(logps, torch.zeros(1, 1), torch.zeros(1, 1), **CLIP)
    assert loss.item() == 0.0 and slope(loss, logps).item() == 0.0


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_C7_extreme_log_ratios_are_finite(dtype: torch.dtype, log_ratio: float, advantage: float) -> None:
    logps = torch.tensor([[log_ratio]], dtype=dtype, requires_grad=True)
    advantages = torch.full((1, 1), advantage, dtype=dtype)
    loss = clipped_surrogate_loss(logps, torch.zeros(1, 1, dtype=dtype), advantages, **CLIP)
    assert loss.isfinite().all() and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert slope(loss, logps).item() == 0.0
    if log_ratio * advantage > 0:  # the clip holds: A > 0 above, A < 0 below
        assert loss.item() == pytest.approx(-1.28 * advantage if advantage > 0 else -0.8 * advantage)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "sequence_sum", "constant"])
@given(batch=ragged(), data=st.data())
def test_C8_any_split_gives_the_gradient_of_the_step(
    mode: str, batch: tuple[Tensor, Generator], data: st.DataObject
) -> None:
    mask, generator = batch
    features, old_logps = (
        normal(generator, *mask.shape, 4, scale=0.1),
        normal(generator, *mask.shape, scale=0.1),
    )
    advantages = normal(generator, *mask.shape)
    denom = local_denom(mask, mode=mode, max_tokens=9)
    weights = normal(generator, 4).requires_grad_()
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in mask])

    def gradient(rows: Tensor) -> Tensor:
        values = clipped_surrogate_loss(features[rows] @ weights, old_logps[rows], advantages[rows], **CLIP)
        return torch.autograd.grad(aggregate(values, mask[rows], mode=mode, denom=denom), weights)[0]

    whole = gradient(torch.arange(len(mask)))
    parts = [gradient((owner == part).nonzero()[:, 0]) for part in range(3)]
    size = float((features.abs() * advantages.abs()[..., None] * mask[..., None]).sum()) * 2 / denom
    torch.testing.assert_close(sum(parts), whole, rtol=0.0, atol=1e-14 * size)


@pytest.mark.parametrize("kind", KINDS)
@given(batch=ragged())
def test_K1_value_equals_the_page(kind: str, batch: tuple[Tensor, Generator]) -> None:
    logps, ref_logps = pair(batch, scale=6.0)
    expected = each(scalar("kl_estimate"), logps, ref_logps, kind=kind)
    torch.testing.assert_close(kl_estimate(logps, ref_logps, kind=kind), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@given(seed=st.integers(0, 2**31), vocabulary=st.integers(2, 6))
def test_K2_the_mean_under_the_policy_is_the_kl(kind: str, seed: int, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = normal(generator, 2, vocabulary, scale=2.0).softmax(-1)
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    found = (p * kl_estimate(p.log(), q.log(), kind=kind)).sum().item()
    assert found == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("kind", ["k2", "k3"])
@given(batch=ragged())
def test_K3_never_negative_and_zero_at_the_reference(kind: str, batch: tuple[Tensor, Generator]) -> None:
    logps, ref_logps = pair(batch)
    assert (kl_estimate(logps, ref_logps, kind=kind) > 0).all()
    assert not kl_estimate(logps, logps, kind=kind).any()


@pytest.mark.parametrize("kind", KINDS)
@given(batch=ragged())
def test_K4_gradients_in_closed_form_and_none_to_the_reference(
    kind: str, batch: tuple[Tensor, Generator]
) -> None:
    logps, ref_logps = (tensor.requires_grad_() for tensor in pair(batch))
    estimate = kl_estimate(logps, ref_logps, kind=kind)
    gradient, reference = torch.autograd.grad(estimate.sum(), (logps, ref_logps), allow_unused=True)
    assert reference is None
    k1 = logps.detach() - ref_logps.detach()
    expected = {"k1": torch.ones_like(k1), "k2": k1, "k3": 1 - (-k1).exp()}[kind]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@given(batch=ragged())
def test_K5_masked_slots_may_hold_anything(
    kind: str, soiled: int, junk: float, batch: tuple[Tensor, Generator]
) -> None:
    loss = lambda *tensors: kl_estimate(*tensors, kind=kind)  # noqa: E731
    check_masked_slots(loss, list(pair(batch)), batch[0], soiled, junk)


@pytest.mark.parametrize("kind", ["k2", "k3"])
@given(seed=st.integers(0, 2**31))
def test_K6_one_step_down_the_estimate_lowers_the_exact_kl(kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, reference = normal(generator, 2, 4)
    logits.requires_grad_()
    p, q = logits.softmax(-1), reference.softmax(-1)
    expected_loss = (p.detach() * kl_estimate(logits.log_softmax(-1), q.log(), kind=kind)).sum()
    (gradient,) = torch.autograd.grad(expected_loss, logits)
    moved = (logits - 0.01 * gradient).softmax(-1)
    assert (moved * (moved / q).log()).sum() < (p * (p / q).log()).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k1", [1e-4, -1e-4, 3e-3])
def test_K7_k3_is_precise_at_small_differences(k1: float, dtype: torch.dtype) -> None:
    logps = torch.tensor([[k1]], dtype=dtype)
    exact = sum((-k1) ** n / math.factorial(n) for n in range(2, 9))  # the series of e^{−k1} − 1 + k1
    relative = 5e-3 if dtype == torch.float32 else 1e-10  # the naive float32 form is off by a factor at 1e-4
    assert kl_estimate(logps, torch.zeros_like(logps), kind="k3").item() == pytest.approx(exact, rel=relative)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k1", [-1e4, 1e4])
def test_K7_extreme_differences_are_finite(k1: float, kind: str) -> None:
    logps = torch.tensor([[k1]], requires_grad=True)
    estimate = kl_estimate(logps, torch.zeros(1, 1), kind=kind)
    assert estimate.isfinite().all() and slope(estimate, logps).isfinite().all()
    if kind != "k3":
        assert estimate.item() == {"k1": k1, "k2": k1**2 / 2}[kind]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@given(batch=ragged(), top_k=st.integers(1, 5))
def test_H1_value_equals_the_page(temperature: float, batch: tuple[Tensor, Generator], top_k: int) -> None:
    mask, generator = batch
    logits = truncate_logits(normal(generator, *mask.shape, 5, scale=3.0), top_k=top_k, top_p=1.0)
    found = entropy(logits, temperature=temperature)
    expected = [scalar("entropy")(row, temperature) for row in logits.reshape(-1, 5).tolist()]
    torch.testing.assert_close(found.flatten().tolist(), expected, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@given(batch=ragged(), top_k=st.integers(2, 5))
def test_H2_gradient_in_closed_form_and_zero_at_minus_infinity(
    temperature: float, batch: tuple[Tensor, Generator], top_k: int
) -> None:
    mask, generator = batch
    logits = truncate_logits(normal(generator, *mask.shape, 5), top_k=top_k, top_p=1.0).requires_grad_()
    gradient = slope(entropy(logits, temperature=temperature), logits)
    probs = (logits.detach() / temperature).softmax(-1)
    log_probs = probs.clamp(min=1e-300).log()
    value = -(probs * log_probs).sum(-1, keepdim=True)
    torch.testing.assert_close(gradient, -probs * (log_probs + value) / temperature, rtol=0.0, atol=1e-12)
    assert not gradient[probs == 0].any() and gradient[probs > 0].any()


def test_H2_gradcheck() -> None:
    logits = normal(torch.Generator().manual_seed(5), 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: entropy(z, temperature=0.7), logits)


@pytest.mark.parametrize("vocabulary", [1, 2, 7])
def test_H3_between_zero_and_log_vocabulary(vocabulary: int) -> None:
    assert entropy(torch.full((vocabulary,), -2.5)).item() == pytest.approx(math.log(vocabulary), abs=1e-6)
    single = torch.full((vocabulary,), -torch.inf)
    single[-1] = 3.0
    assert entropy(single).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_H4_constants_and_extremes(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 1e4], [1e4 + 1, 1e4, -torch.inf]], dtype=dtype, requires_grad=True)
    found = entropy(logits)
    expected = [math.log(2), scalar("entropy")([1.0, 0.0])]
    assert found.tolist() == pytest.approx(expected, rel=1e-6) and slope(found, logits).isfinite().all()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8)])
@given(seed=st.integers(0, 2**31))
def test_H5_it_is_the_mean_negative_log_probability(top_k: int, top_p: float, seed: int) -> None:
    logits = normal(torch.Generator().manual_seed(seed), 5, scale=2.0)
    scaled = truncate_logits(logits / 1.7, top_k=top_k, top_p=top_p)
    ids = (scaled > -torch.inf).nonzero()[:, 0]
    logps = token_logps(logits.expand(len(ids), 5), ids, temperature=1.7, top_k=top_k, top_p=top_p)
    assert entropy(scaled).item() == pytest.approx(-(logps.exp() * logps).sum().item(), abs=1e-12)


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: policy_ratio(ONES, ONES[:1]), r"logps \(2, 3\), old_logps \(1, 3\)"),
        (lambda: clipped_surrogate_loss(ONES, ONES, ONES[:, :1], **CLIP), r"advantages \(2, 1\)"),
        (
            lambda: clipped_surrogate_loss(ONES, ONES, ONES, clip_low=0.0, clip_high=0.2),
            r"clip_low must lie in \(0.0, 1.0\], got 0.0",
        ),
        (
            lambda: clipped_surrogate_loss(ONES, ONES, ONES, clip_low=1.2, clip_high=0.2),
            r"clip_low must lie in \(0.0, 1.0\], got 1.2",
        ),
        (
            lambda: clipped_surrogate_loss(ONES, ONES, ONES, clip_low=0.2, clip_high=-0.2),
            r"clip_high must be positive and finite, got -0.2",
        ),
        (lambda: kl_estimate(ONES, ONES[:, :2], kind="k1"), r"logps \(2, 3\), ref_logps \(2, 2\)"),
        (lambda: kl_estimate(ONES, ONES, kind="k4"), r"kind must be one of 'k1', 'k2', 'k3', got 'k4'"),
        (lambda: entropy(ONES, temperature=-1.0), r"temperature must be positive and finite, got -1.0"),
        (
            lambda: entropy(torch.zeros(2, 0)),
            r"logits must end in a vocabulary dimension, got shape \(2, 0\)",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
