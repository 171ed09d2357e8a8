"""The KL estimates, the KL loss with the right gradient, and the entropy."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanopost.losses import (
    aggregate,
    entropy,
    kl_estimate,
    kl_loss_with_correct_gradient,
    local_denom,
    token_logps,
    truncate_logits,
)
from tests import oracle
from tests.pages import scalar
from tests.policies import Batch, each, pair
from tests.properties import check_half, check_masked_slots, check_only_gradient, check_split, slope
from tests.ragged import JUNK, junk_outside, normal, ragged

KINDS = ("k1", "k2", "k3")


@pytest.mark.parametrize("kind", KINDS)
@given(batch=ragged())
def test_K1_value_equals_the_page(kind: str, batch: Batch) -> None:
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
def test_K3_never_negative_and_zero_at_the_reference(kind: str, batch: Batch) -> None:
    logps, ref_logps = pair(batch)
    assert (kl_estimate(logps, ref_logps, kind=kind) > 0).all()
    assert not kl_estimate(logps, logps, kind=kind).any()


@pytest.mark.parametrize("kind", KINDS)
@given(batch=ragged())
def test_K4_gradients_in_closed_form_and_none_to_the_reference(kind: str, batch: Batch) -> None:
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
def test_K5_masked_slots_may_hold_anything(kind: str, soiled: int, junk: float, batch: Batch) -> None:
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
    assert estimate.isfinite().all()
    k3 = 9999.0 if k1 > 0 else pytest.approx(math.exp(60) - 61, rel=1e-6)
    assert estimate.item() == {"k1": k1, "k2": k1**2 / 2, "k3": k3}[kind]
    assert slope(estimate, logps).item() == {"k1": 1.0, "k2": k1, "k3": float(k1 > 0)}[kind]


@pytest.mark.parametrize("k1", [59.0, 61.0, -59.0])
def test_K7_k3_is_exact_above_its_lower_bound(k1: float) -> None:
    logps = torch.tensor([k1], dtype=torch.float64, requires_grad=True)
    estimate = kl_estimate(logps, torch.zeros(1, dtype=torch.float64), kind="k3")
    assert estimate.item() == pytest.approx(scalar("kl_estimate")(k1, 0.0, "k3"), rel=1e-12)
    assert slope(estimate, logps).item() == pytest.approx(1.0 - math.exp(-k1), rel=1e-12)


def by_page(logps: Tensor, ref_logps: Tensor, mask: Tensor, held: Tensor) -> Tensor:
    """The page's losses of each row's masked tokens, and 0 elsewhere."""
    loss = torch.zeros_like(logps)
    for row, kept in enumerate(mask):
        lists = (tensor[row, kept].tolist() for tensor in (logps, ref_logps, held))
        values = scalar("kl_loss_with_correct_gradient")(*lists)
        loss[row, kept] = torch.tensor(values, dtype=torch.float64)
    return loss


def charges(k1: Tensor, mask: Tensor) -> Tensor:
    """What each masked token is charged with: the k1 of the masked tokens of its row from itself on."""
    result = torch.zeros_like(k1)
    for row, column in mask.nonzero().tolist():
        later = [step for step in range(column, mask.shape[1]) if mask[row, step]]
        result[row, column] = sum(k1[row, step] for step in later)
    return result


@given(batch=ragged())
def test_KG1_value_and_gradient_equal_the_page(batch: Batch) -> None:
    mask, generator = batch
    logps, ref_logps = pair(batch)
    leaf = logps.clone().requires_grad_()
    loss = kl_loss_with_correct_gradient(leaf, ref_logps, mask)
    torch.testing.assert_close(loss, by_page(logps, ref_logps, mask, logps), rtol=1e-9, atol=1e-9)
    weights = normal(generator, *mask.shape)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), leaf)
    for row, column in mask.nonzero().tolist():  # the page is linear in logps: a difference is the slope
        moved = logps.clone()
        moved[row, column] += 1.0
        change = by_page(moved, ref_logps, mask, logps) - by_page(logps, ref_logps, mask, logps)
        assert gradient[row, column].item() == pytest.approx((change * weights).sum().item(), abs=1e-9)


@given(batch=ragged())
def test_KG2_value_is_k1_and_zero_outside_the_mask(batch: Batch) -> None:
    logps, ref_logps = pair(batch)
    expected = kl_estimate(logps, ref_logps, kind="k1") * batch[0]
    assert torch.equal(kl_loss_with_correct_gradient(logps, ref_logps, batch[0]), expected)
    assert not kl_loss_with_correct_gradient(logps, logps, batch[0].double()).any()


@given(batch=ragged())
def test_KG3_gradient_is_the_sum_from_here_on_and_the_reference_gets_none(batch: Batch) -> None:
    logps, ref_logps = pair(batch)
    check_only_gradient(kl_loss_with_correct_gradient, (logps, ref_logps, batch[0]), to=[0])
    leaf = logps.clone().requires_grad_()
    gradient = slope(kl_loss_with_correct_gradient(leaf, ref_logps, batch[0]), leaf)
    torch.testing.assert_close(gradient, charges(logps - ref_logps, batch[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_KG4_masked_slots_may_hold_anything(soiled: int, junk: float, batch: Batch) -> None:
    mask = batch[0]
    inputs = list(pair(batch))
    loss = lambda *both: kl_loss_with_correct_gradient(*both, mask)  # noqa: E731
    check_masked_slots(loss, inputs, mask, soiled, junk)
    inputs[soiled] = junk_outside(inputs[soiled], mask, junk)
    leaf = inputs[0].requires_grad_()
    values = loss(*inputs)
    assert not values[~mask].any() and not slope(values, leaf)[~mask].any()  # without `aggregate` as well


@given(batch=ragged())
def test_KG5_tool_tokens_are_skipped(batch: Batch) -> None:
    mask, _ = batch
    logps, ref_logps = pair(batch)
    leaf = logps.clone().requires_grad_()
    gradient = slope(kl_loss_with_correct_gradient(leaf, ref_logps, mask), leaf)
    for row, kept in enumerate(mask):
        short = logps[row, kept][None].requires_grad_()
        loss = kl_loss_with_correct_gradient(short, ref_logps[row, kept][None], torch.ones_like(short))
        torch.testing.assert_close(gradient[row, kept][None], slope(loss, short), rtol=1e-12, atol=1e-12)


@given(batch=ragged())
def test_KG6_a_single_token_has_the_gradient_of_k2(batch: Batch) -> None:
    logps, ref_logps = (tensor.flatten()[:, None] for tensor in pair(batch))
    logps.requires_grad_()
    single = slope(kl_loss_with_correct_gradient(logps, ref_logps, torch.ones_like(logps)), logps)
    assert torch.equal(single, slope(kl_estimate(logps, ref_logps, kind="k2"), logps))


@given(seed=st.integers(0, 2**31), first=st.integers(2, 3), second=st.integers(2, 4))
def test_KG7_the_expected_gradient_is_that_of_the_kl(seed: int, first: int, second: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    roots, leaves = normal(generator, first), normal(generator, first, second)  # logits of two steps
    other = (normal(generator, first).log_softmax(-1), normal(generator, first, second).log_softmax(-1))
    parameters = [roots.requires_grad_(), leaves.requires_grad_()]

    def rows(one: Tensor, two: Tensor) -> Tensor:
        """Log-probabilities of both tokens of every completion."""
        pairs = itertools.product(range(first), range(second))
        return torch.stack([torch.stack([one[a], two[a, b]]) for a, b in pairs])

    logps = rows(roots.log_softmax(-1), leaves.log_softmax(-1))
    ref_logps, mask = rows(*other), torch.ones(first * second, 2)
    weight = logps.sum(dim=1, keepdim=True).exp()
    exact = (weight * (logps - ref_logps)).sum()
    true = torch.cat([part.flatten() for part in torch.autograd.grad(exact, parameters, retain_graph=True)])

    def expected(values: Tensor) -> Tensor:
        parts = torch.autograd.grad((weight.detach() * values).sum(), parameters, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    found = expected(kl_loss_with_correct_gradient(logps, ref_logps, mask))
    torch.testing.assert_close(found, true, rtol=0.0, atol=1e-12)
    assert (expected(kl_estimate(logps, ref_logps, kind="k2")) - true).abs().max() > 1e-6
    assert (expected(kl_estimate(logps, ref_logps, kind="k1"))).abs().max() < 1e-12 < true.abs().max()


@pytest.mark.parametrize("seed", [1, 7])
def test_KG7_it_holds_for_a_sum_over_tokens_alone(seed: int) -> None:
    case = oracle.cases(3, 2, seed)["tree"]
    reference = oracle.per_token(case.tree, np.log(case.anchor))
    draws = oracle.groups(case.tree, 1, case.policy)

    def found(mode: str) -> tuple[float, float]:
        def loss(s: oracle.Samples) -> Tensor:
            logps = token_logps(s.logits, s.target_ids)
            values = kl_loss_with_correct_gradient(logps, s.look_up(reference), s.mask)
            return aggregate(values * s.weight, s.mask, mode=mode, denom=1.0)

        truth = oracle.kl_gradient(case.tree, case.policy, case.anchor)
        return oracle.compare(oracle.gradient_over(case, draws, loss), truth)

    assert found("sequence_sum") == pytest.approx((1.0, 1.0), abs=1e-12) == found("constant")
    assert found("sequence_mean")[0] < 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k1", [-1e4, 1e4])
def test_KG8_extreme_differences_are_finite(k1: float, dtype: torch.dtype) -> None:
    logps = torch.full((1, 3), k1, dtype=dtype, requires_grad=True)
    loss = kl_loss_with_correct_gradient(logps, torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3))
    assert loss.tolist() == [[k1] * 3] and slope(loss, logps).tolist() == [[3 * k1, 2 * k1, k1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(batch=ragged())
def test_KG8_half_precision_is_computed_in_float32(dtype: torch.dtype, batch: Batch) -> None:
    check_half(kl_loss_with_correct_gradient, (*pair(batch), batch[0]), dtype)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean", "constant"])
@given(batch=ragged(), left=st.integers(0, 3), right=st.integers(0, 3), data=st.data())
def test_KG9_padding_row_order_and_any_split_change_nothing(
    mode: str, batch: Batch, left: int, right: int, data: st.DataObject
) -> None:
    mask, _ = batch
    inputs = (*pair(batch), mask)
    denom = local_denom(mask, mode=mode, max_tokens=9)

    def gradient(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
        leaf = logps.clone().requires_grad_()
        values = kl_loss_with_correct_gradient(leaf, ref_logps, mask)
        return torch.autograd.grad(aggregate(values, mask, mode=mode, denom=denom), leaf)[0]

    whole = gradient(*inputs)
    padded = gradient(*(torch.nn.functional.pad(tensor, (left, right)) for tensor in inputs))
    torch.testing.assert_close(padded[:, left : left + mask.shape[1]], whole, rtol=1e-12, atol=1e-14)
    order = data.draw(st.permutations(range(len(mask))))
    torch.testing.assert_close(gradient(*(tensor[order] for tensor in inputs)), whole[order])
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in mask])
    check_split(kl_loss_with_correct_gradient, inputs, owner)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@given(batch=ragged(), top_k=st.integers(1, 5))
def test_H1_value_equals_the_page(temperature: float, batch: Batch, top_k: int) -> None:
    mask, generator = batch
    logits = truncate_logits(normal(generator, *mask.shape, 5, scale=3.0), top_k=top_k, top_p=1.0)
    found = entropy(logits, temperature=temperature)
    expected = [scalar("entropy")(row, temperature) for row in logits.reshape(-1, 5).tolist()]
    torch.testing.assert_close(found.flatten().tolist(), expected, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@given(batch=ragged(), top_k=st.integers(2, 5))
def test_H2_gradient_in_closed_form_and_zero_at_minus_infinity(
    temperature: float, batch: Batch, top_k: int
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


@pytest.mark.parametrize("junk", JUNK)
@given(batch=ragged())
def test_H6_masked_rows_may_hold_anything(junk: float, batch: Batch) -> None:
    mask, generator = batch
    logits = normal(generator, *mask.shape, 5)
    soiled = torch.where(mask[..., None], logits, junk)
    gradients = []
    for tensor in (logits, soiled):
        leaf = tensor.clone().requires_grad_()
        loss = aggregate(entropy(leaf, temperature=0.7), mask, mode="token_mean", denom=3.0)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*gradients) and gradients[0].any() and not gradients[1][~mask].any()


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
        (lambda: kl_estimate(ONES, ONES[:, :2], kind="k1"), r"logps \(2, 3\), ref_logps \(2, 2\)"),
        (lambda: kl_estimate(ONES, ONES, kind="k4"), r"kind must be one of 'k1', 'k2', 'k3', got 'k4'"),
        (lambda: kl_loss_with_correct_gradient(ONES, ONES[:1], ONES), r"ref_logps \(1, 3\)"),
        (lambda: kl_loss_with_correct_gradient(ONES, ONES, ONES[:, :2]), r"mask \(2, 2\)"),
        (lambda: kl_loss_with_correct_gradient(ONES, ONES, 2 * ONES), "mask must be bool.*got the value 2.0"),
        (
            lambda: kl_loss_with_correct_gradient(ONES.long(), ONES, ONES),
            "logps must be floating point, got torch.int64",
        ),
        (
            lambda: kl_loss_with_correct_gradient(ONES[0], ONES[0], ONES[0]),
            r"logps must have 2 dimension\(s\), got shape \(3,\)",
        ),
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
