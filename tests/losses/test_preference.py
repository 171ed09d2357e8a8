"""Pairs and ratings: margins, DPO and its siblings; the optimum of DPO by enumeration."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from nanopost.losses import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    preference_margin,
    sequence_logps,
    sft_loss,
    simpo_loss,
)
from tests.pages import scalar
from tests.policies import each
from tests.properties import check_half, check_masked_slots, check_only_gradient, check_split, slope
from tests.ragged import JUNK, normal, ragged

Batch = tuple[Tensor, Generator]
HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, torch.float64]
BETAS = st.floats(0.05, 0.9) | st.floats(1.1, 4.0)
EPSILONS = st.floats(0.02, 0.45)
SIDES = st.integers(0, 1)  # 0 the chosen completion, 1 the rejected one
FORMS = [
    {"beta": 0.3},
    {"beta": 0.3, "label_smoothing": 0.15},
    {"beta": 1.7, "label_smoothing": 0.15, "robust": True},
]


def sums(batch: Batch, number: int, average: bool = False) -> list[Tensor]:
    """Log-probabilities of completions, (B,) each: ragged token log-probs, summed or averaged."""
    mask, generator = batch
    tokens = [-0.05 - normal(generator, *mask.shape, scale=1.5).abs() for _ in range(number)]
    return [sequence_logps(each, mask, average=average) for each in tokens]


def means(batch: Batch) -> list[Tensor]:
    """Mean log-probabilities below 0 of two completions; an empty row has some number too."""
    return [torch.where(each < 0, each, -0.7) for each in sums(batch, 2, average=True)]


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def gradients(loss: Callable[..., Tensor], inputs: list[Tensor], number: int = 2) -> list[Tensor]:
    """The gradients of the sum with respect to the first inputs."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:number]]
    return list(torch.autograd.grad(loss(*leaves, *inputs[number:]).sum(), leaves))


def check_rows(
    loss: Callable[..., Tensor], inputs: list[Tensor], batch: Batch, junk: float, leaf: int
) -> None:
    """A row that `aggregate` leaves out may hold junk in any floating-point input."""
    rows = batch[0].any(dim=1, keepdim=True)
    columns = [tensor[:, None] for tensor in inputs]
    column_loss = lambda *tensors: loss(*(tensor[:, 0] for tensor in tensors))[:, None]  # noqa: E731
    for soiled, tensor in enumerate(inputs):
        if tensor.dtype.is_floating_point:
            check_masked_slots(column_loss, columns, rows, soiled, junk, leaf)


def owners(data: st.DataObject, rows: int) -> Tensor:
    return torch.tensor([data.draw(st.integers(0, 2)) for _ in range(rows)])


# ---- the margin


@given(batch=ragged())
def test_PM1_value_equals_the_page(batch: Batch) -> None:
    pair = sums(batch, 2)
    assert preference_margin(*pair).tolist() == each(scalar("preference_margin"), *pair).tolist()


@given(batch=ragged())
def test_PM2_gradient_is_one_and_minus_one(batch: Batch) -> None:
    chosen, rejected = gradients(preference_margin, sums(batch, 2))
    assert (chosen == 1).all() and (rejected == -1).all()


@given(batch=ragged(), shift=st.floats(-50.0, 50.0))
def test_PM3_swapping_turns_the_sign_and_a_constant_drops_out(batch: Batch, shift: float) -> None:
    chosen, rejected = sums(batch, 2)
    margin = preference_margin(chosen, rejected)
    assert torch.equal(preference_margin(rejected, chosen), -margin)
    same(preference_margin(chosen + shift, rejected + shift), margin, 1e-12)


def test_PM4_point_6_against_point_2_is_log_3() -> None:
    chosen, rejected = torch.tensor([[0.6], [0.2]], dtype=torch.float64).log()
    assert preference_margin(chosen, rejected).item() == pytest.approx(math.log(3), abs=1e-15)


@pytest.mark.parametrize("junk", JUNK)
@given(batch=ragged(), leaf=SIDES)
def test_PM5_rows_left_out_get_no_gradient(junk: float, batch: Batch, leaf: int) -> None:
    check_rows(preference_margin, sums(batch, 2), batch, junk, leaf)


@given(batch=ragged())
def test_PM5_half_precision(batch: Batch) -> None:
    for dtype in HALVES:
        check_half(preference_margin, sums(batch, 2), dtype)


# ---- DPO


@pytest.mark.parametrize("robust", [False, True])
@given(batch=ragged(), beta=BETAS, epsilon=st.just(0.0) | EPSILONS)
def test_DP1_value_equals_the_page(robust: bool, batch: Batch, beta: float, epsilon: float) -> None:
    four = sums(batch, 4)
    options = {"beta": beta, "label_smoothing": epsilon, "robust": robust}
    same(dpo_loss(*four, **options), each(scalar("dpo_loss"), *four, **options))


@given(batch=ragged(), beta=BETAS)
def test_DP2_at_the_reference_it_is_log_2_with_gradient_half_beta(batch: Batch, beta: float) -> None:
    chosen, rejected = sums(batch, 2)
    four = [chosen, rejected, chosen, rejected]
    assert (dpo_loss(*four, beta=beta) == torch.tensor(2.0, dtype=torch.float64).log()).all()
    for_chosen, for_rejected = gradients(partial(dpo_loss, beta=beta), four)
    assert (for_chosen == -beta / 2).all() and (for_rejected == beta / 2).all()


@pytest.mark.parametrize("robust", [False, True])
@given(batch=ragged(), beta=BETAS, epsilon=st.just(0.0) | EPSILONS)
def test_DP3_gradient_in_closed_form(robust: bool, batch: Batch, beta: float, epsilon: float) -> None:
    four = sums(batch, 4)
    loss = partial(dpo_loss, beta=beta, label_smoothing=epsilon, robust=robust)
    for_chosen, for_rejected = gradients(loss, four)
    x = beta * ((four[0] - four[1]) - (four[2] - four[3]))
    clean, flipped = (1 - epsilon) / (1 + x.exp()), epsilon / (1 + (-x).exp())
    expected = -beta * ((clean + flipped) / (1 - 2 * epsilon) if robust else clean - flipped)
    same(for_chosen, expected, 1e-12)
    assert torch.equal(for_rejected, -for_chosen)


@pytest.mark.parametrize("options", FORMS)
def test_DP3_gradcheck_and_no_gradient_to_the_reference(options: dict[str, float]) -> None:
    four = list(normal(torch.Generator().manual_seed(5), 4, 3, scale=2.0))
    check_only_gradient(partial(dpo_loss, **options), four, to=[0, 1])
    leaves = [tensor.requires_grad_() for tensor in four[:2]]
    assert torch.autograd.gradcheck(lambda *pair: dpo_loss(*pair, *four[2:], **options), leaves)


def space(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """A reference over `size` completions of one prompt, as log-probabilities, and their rewards."""
    generator = torch.Generator().manual_seed(seed)
    return normal(generator, size).log_softmax(0), normal(generator, size, scale=1.5)


def optimum(ref_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log π*(y) = log π_ref(y) + r(y)/β − log Z."""
    powered = ref_logps.exp() * (rewards / beta).exp()
    return (powered / powered.sum()).log()


@given(seed=st.integers(0, 2**31), size=st.integers(2, 6), beta=st.floats(0.3, 3.0))
def test_DP4_the_implicit_reward_of_the_optimum_is_the_reward(seed: int, size: int, beta: float) -> None:
    ref_logps, rewards = space(seed, size)
    best = optimum(ref_logps, rewards, beta)
    i, j = torch.cartesian_prod(torch.arange(size), torch.arange(size)).T
    logit = dpo_loss(best[j], best[i], ref_logps[j], ref_logps[i], beta=beta).expm1().log()  # −log σ(−x) → x
    same(logit, rewards[i] - rewards[j])


@given(seed=st.integers(0, 2**31), size=st.integers(2, 6), beta=st.floats(0.3, 3.0))
def test_DP5_the_optimum_is_stationary_under_bradley_terry_labels(seed: int, size: int, beta: float) -> None:
    ref_logps, rewards = space(seed, size)
    i, j = torch.tensor([(a, b) for a in range(size) for b in range(size) if a != b]).T
    power = rewards.exp()
    chance = (ref_logps[i] + ref_logps[j]).exp() * power[i] / (power[i] + power[j])  # F9: i is the chosen one

    def gradient(logps: Tensor) -> Tensor:
        logits = logps.clone().requires_grad_()
        policy = logits.log_softmax(0)
        losses = dpo_loss(policy[i], policy[j], ref_logps[i], ref_logps[j], beta=beta)
        return slope(chance * losses, logits)

    scale = float(chance.sum()) * beta
    assert gradient(optimum(ref_logps, rewards, beta)).abs().max() < 1e-13 * scale
    assert gradient(ref_logps).abs().max() > 1e-4 * scale * float(rewards.max() - rewards.min())


@given(seed=st.integers(0, 2**31), size=st.integers(2, 6), beta=st.floats(0.3, 3.0))
def test_DP6_the_optimum_maximises_reward_minus_beta_kl(seed: int, size: int, beta: float) -> None:
    ref_logps, rewards = space(seed, size)
    best = optimum(ref_logps, rewards, beta)

    def objective(logps: Tensor) -> Tensor:
        return (logps.exp() * (rewards - beta * (logps - ref_logps))).sum()

    log_z = math.log(sum(math.exp(q + r / beta) for q, r in zip(ref_logps, rewards, strict=True)))
    assert objective(best).item() == pytest.approx(beta * log_z, rel=1e-12, abs=1e-12)
    others = normal(torch.Generator().manual_seed(seed + 1), 20, size).log_softmax(1)
    assert all(objective(other) < objective(best) for other in [*others, ref_logps])
    logits = best.clone().requires_grad_()
    assert slope(objective(logits.log_softmax(0)), logits).abs().max() < 1e-12


@given(batch=ragged(), beta=BETAS, epsilon=EPSILONS)
def test_DP7_robust_is_dpo_at_zero_and_on_average_over_flips(
    batch: Batch, beta: float, epsilon: float
) -> None:
    four = sums(batch, 4)
    flipped = [four[1], four[0], four[3], four[2]]
    clean = dpo_loss(*four, beta=beta)
    for robust in (False, True):
        assert torch.equal(dpo_loss(*four, beta=beta, label_smoothing=0.0, robust=robust), clean)
    robust_loss = partial(dpo_loss, beta=beta, label_smoothing=epsilon, robust=True)
    same((1 - epsilon) * robust_loss(*four) + epsilon * robust_loss(*flipped), clean, 1e-11)


@given(beta=BETAS, epsilon=EPSILONS)
def test_DP8_cdpo_is_smallest_where_sigma_is_one_minus_epsilon(beta: float, epsilon: float) -> None:
    best = math.log((1 - epsilon) / epsilon) / beta
    margins = torch.tensor([best, best - 0.3, best + 0.3], dtype=torch.float64).requires_grad_()
    zero = torch.zeros(3, dtype=torch.float64)
    losses = dpo_loss(margins, zero, zero, zero, beta=beta, label_smoothing=epsilon)
    at_best, below, above = slope(losses, margins).tolist()
    assert abs(at_best) < 1e-15 * max(1.0, beta) and below < 0 < above
    assert losses[0] < losses[1:].min()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("x", [-1e4, 1e4])
def test_DP9_extreme_margins_are_finite(x: float, options: dict[str, float], dtype: torch.dtype) -> None:
    beta, epsilon = options["beta"], options.get("label_smoothing", 0.0)
    pair = torch.tensor([[x / beta], [0.0]], dtype=dtype)
    four = [*pair, *torch.zeros(2, 1, dtype=dtype)]
    clean, flipped = (1 - epsilon) * max(-x, 0.0), epsilon * max(x, 0.0)
    over = 1 - 2 * epsilon if options.get("robust") else 1.0
    expected = (clean - flipped) / over if options.get("robust") else clean + flipped
    assert dpo_loss(*four, **options).item() == pytest.approx(expected, rel=1e-6)
    sign = 1.0 if options.get("robust") else -1.0
    limit = -beta * ((1 - epsilon) * (x < 0) + sign * epsilon * (x > 0)) / over
    found = [gradient.item() for gradient in gradients(partial(dpo_loss, **options), four)]
    assert found == pytest.approx([limit, -limit], rel=1e-6)


@given(batch=ragged(), beta=BETAS)
def test_DP10_averages_take_the_length_out(batch: Batch, beta: float) -> None:
    mask, generator = batch
    mask = mask[mask.any(dim=1)]
    ref_chosen, ref_rejected = normal(generator, 2, *mask.shape)
    longer = torch.ones_like(mask)  # the rejected one fills its row
    gain = normal(generator, len(mask), 1)  # the same log-ratio in each token of both
    losses = dpo_loss(
        sequence_logps(ref_chosen + gain, mask, average=True),
        sequence_logps(ref_rejected + gain, longer, average=True),
        sequence_logps(ref_chosen, mask, average=True),
        sequence_logps(ref_rejected, longer, average=True),
        beta=beta,
    )
    same(losses, torch.full_like(losses, math.log(2)), 1e-12)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("options", FORMS)
@given(batch=ragged(), leaf=SIDES)
def test_DP11_rows_left_out_get_no_gradient(
    options: dict[str, float], junk: float, batch: Batch, leaf: int
) -> None:
    check_rows(partial(dpo_loss, **options), sums(batch, 4), batch, junk, leaf)


@pytest.mark.parametrize("options", FORMS)
@given(batch=ragged(), data=st.data())
def test_DP11_splits_and_half_precision(options: dict[str, float], batch: Batch, data: st.DataObject) -> None:
    four = sums(batch, 4)
    check_split(partial(dpo_loss, **options), four, owners(data, len(four[0])), leaf=data.draw(SIDES))
    for dtype in HALVES:
        check_half(partial(dpo_loss, **options), four, dtype)


# ---- IPO


@given(batch=ragged(), beta=BETAS)
def test_IP1_value_equals_the_page(batch: Batch, beta: float) -> None:
    four = sums(batch, 4)
    same(ipo_loss(*four, beta=beta), each(scalar("ipo_loss"), *four, beta=beta))


@given(batch=ragged(), beta=BETAS)
def test_IP2_gradient_in_closed_form_and_none_to_the_reference(batch: Batch, beta: float) -> None:
    four = sums(batch, 4)
    for_chosen, for_rejected = gradients(partial(ipo_loss, beta=beta), four)
    same(for_chosen, 2 * ((four[0] - four[1]) - (four[2] - four[3])) - 1 / beta, 1e-11)
    assert torch.equal(for_rejected, -for_chosen)
    check_only_gradient(partial(ipo_loss, beta=beta), four, to=[0, 1])


@pytest.mark.parametrize("beta", [0.125, 0.25, 2.0])
def test_IP3_smallest_at_half_over_beta(beta: float) -> None:
    target = 1 / (2 * beta)
    margins = torch.tensor([target, target - 0.5, target + 0.5], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    losses = ipo_loss(margins, zero, zero, zero, beta=beta)
    assert losses.tolist() == [0.0, 0.25, 0.25] and slope(losses, margins).tolist() == [0.0, -1.0, 1.0]


@given(batch=ragged(), beta=BETAS)
def test_IP4_at_the_reference(batch: Batch, beta: float) -> None:
    chosen, rejected = sums(batch, 2)
    losses = ipo_loss(chosen, rejected, chosen, rejected, beta=beta)
    same(losses, torch.full_like(losses, 1 / (4 * beta**2)), 1e-14)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("h", [-1e4, 1e4])
def test_IP5_extreme_margins_are_finite(h: float, dtype: torch.dtype) -> None:
    four = [torch.tensor([value], dtype=dtype) for value in (h, 0.0, 0.0, 0.0)]
    assert ipo_loss(*four, beta=0.1).item() == pytest.approx((h - 5) ** 2, rel=1e-6)
    found = [gradient.item() for gradient in gradients(partial(ipo_loss, beta=0.1), four)]
    assert found == pytest.approx([2 * (h - 5), -2 * (h - 5)], rel=1e-6)


@pytest.mark.parametrize("junk", JUNK)
@given(batch=ragged(), leaf=SIDES)
def test_IP6_rows_left_out_get_no_gradient(junk: float, batch: Batch, leaf: int) -> None:
    check_rows(partial(ipo_loss, beta=0.3), sums(batch, 4), batch, junk, leaf)


@given(batch=ragged(), data=st.data())
def test_IP6_splits_and_half_precision(batch: Batch, data: st.DataObject) -> None:
    four = sums(batch, 4)
    check_split(partial(ipo_loss, beta=0.3), four, owners(data, len(four[0])), leaf=data.draw(SIDES))
    for dtype in HALVES:
        check_half(partial(ipo_loss, beta=0.3), four, dtype)


# ---- KTO

KTO = {"beta": 0.6, "desirable_weight": 1.3, "undesirable_weight": 0.7}


def ratings(batch: Batch) -> list[Tensor]:
    """logps, ref_logps and which rows are desirable."""
    labels = torch.randint(2, batch[0].shape[:1], generator=batch[1]).bool()
    return [*sums(batch, 2), labels]


def number(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@given(
    batch=ragged(),
    kl=st.floats(-3.0, 3.0),
    beta=BETAS,
    desirable_weight=st.floats(0.2, 0.9),
    undesirable_weight=st.floats(1.1, 3.0),
)
def test_KT1_value_equals_the_page(batch: Batch, kl: float, **options: float) -> None:
    rated = ratings(batch)
    found = kto_loss(*rated, number(kl), **options)
    same(found, each(scalar("kto_loss"), *rated, kl=kl, **options))
    assert torch.equal(kto_loss(*rated[:2], rated[2].long(), number(kl), **options), found)


@given(batch=ragged(), kl=st.floats(0.0, 3.0))
def test_KT2_gradient_in_closed_form(batch: Batch, kl: float) -> None:
    logps, ref_logps, desirable = ratings(batch)
    (found,) = gradients(partial(kto_loss, **KTO), [logps, ref_logps, desirable, number(kl)], number=1)
    x = 0.6 * (logps - ref_logps - kl)
    bend = 0.6 / ((1 + x.exp()) * (1 + (-x).exp()))
    same(found, torch.where(desirable, -1.3 * bend, 0.7 * bend), 1e-12)


def test_KT2_gradcheck_and_no_gradient_to_reference_and_kl() -> None:
    logps, ref_logps = normal(torch.Generator().manual_seed(7), 2, 4)
    desirable = torch.tensor([True, False, False, True])
    check_only_gradient(partial(kto_loss, **KTO), [logps, ref_logps, desirable, number(0.4)], to=[0])
    loss = lambda leaf: kto_loss(leaf, ref_logps, desirable, number(0.4), **KTO)  # noqa: E731
    assert torch.autograd.gradcheck(loss, logps.requires_grad_())


@given(batch=ragged(), kl=st.floats(-9.0, -0.1))
def test_KT3_a_negative_kl_counts_as_zero(batch: Batch, kl: float) -> None:
    rated = ratings(batch)
    assert torch.equal(kto_loss(*rated, number(kl), **KTO), kto_loss(*rated, number(0.0), **KTO))
    assert not torch.equal(kto_loss(*rated, number(-kl), **KTO), kto_loss(*rated, number(0.0), **KTO))


@pytest.mark.parametrize(("desirable", "weight", "sign"), [(True, 1.3, -1), (False, 0.7, 1)])
def test_KT4_half_and_steepest_where_the_log_ratio_is_z(desirable: bool, weight: float, sign: int) -> None:
    logps = torch.linspace(-3, 4, 15, dtype=torch.float64).requires_grad_()  # z = .5 is the eighth of them
    labels = torch.full((15,), desirable)
    losses = kto_loss(logps, torch.zeros_like(logps), labels, number(0.5), **KTO)
    steepness = sign * slope(losses, logps)
    assert losses[7].item() == pytest.approx(weight / 2, abs=1e-15) and steepness.argmax() == 7
    assert steepness[7].item() == pytest.approx(weight * 0.6 / 4, rel=1e-12) and (steepness > 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("desirable", "weight"), [(True, 1.3), (False, 0.7)])
@pytest.mark.parametrize("r", [-1e4, 1e4])
def test_KT5_saturates(r: float, desirable: bool, weight: float, dtype: torch.dtype) -> None:
    inputs = [torch.tensor([r], dtype=dtype), torch.zeros(1, dtype=dtype), torch.tensor([desirable])]
    value = kto_loss(*inputs, number(1.0, dtype), **KTO).item()
    assert value == pytest.approx(weight if (r < 0) == desirable else 0.0, rel=1e-6)
    assert gradients(partial(kto_loss, **KTO), [*inputs, number(1.0, dtype)], number=1)[0].item() == 0.0


@given(seed=st.integers(0, 2**31), size=st.integers(1, 5), data=st.data())
def test_KT6_z_is_that_of_the_mismatched_pairs_and_rows_do_not_mix(
    seed: int, size: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    table, ref_table = normal(generator, 2, size, size)  # log π(y_j | x_i): row i, column j
    desirable = torch.randint(2, (size,), generator=generator).bool()
    turned = [(i, (i + 1) % size) for i in range(size)]  # each prompt with the next one's completion
    kl = sum(table[i, j].item() - ref_table[i, j].item() for i, j in turned) / size
    own, ref_own = table.diagonal(), ref_table.diagonal()
    found = kto_loss(own, ref_own, desirable, number(kl), **KTO)
    same(found, each(scalar("kto_loss"), own, ref_own, desirable, kl=kl, **KTO))
    for row in range(size):
        alone = kto_loss(own[row, None], ref_own[row, None], desirable[row, None], number(kl), **KTO)
        same(alone, found[row, None], 1e-14)
    loss = lambda *rows: kto_loss(*rows, number(kl), **KTO)  # noqa: E731
    check_split(loss, [own, ref_own, desirable], owners(data, size))


@pytest.mark.parametrize("junk", JUNK)
@given(batch=ragged())
def test_KT7_rows_left_out_get_no_gradient(junk: float, batch: Batch) -> None:
    loss = lambda *rows: kto_loss(*rows, number(0.4), **KTO)  # noqa: E731
    check_rows(loss, ratings(batch), batch, junk, leaf=0)


@given(batch=ragged())
def test_KT7_half_precision(batch: Batch) -> None:
    for dtype in HALVES:
        check_half(partial(kto_loss, **KTO), [*ratings(batch), number(0.375)], dtype)


# ---- ORPO


@given(batch=ragged(), odds_weight=st.floats(0.05, 3.0))
def test_OR1_value_equals_the_page(batch: Batch, odds_weight: float) -> None:
    pair = means(batch)
    found = orpo_loss(*pair, odds_weight=odds_weight)
    same(found, each(scalar("orpo_loss"), *pair, odds_weight=odds_weight))


@given(batch=ragged(), odds_weight=st.floats(0.05, 3.0))
def test_OR2_gradient_in_closed_form(batch: Batch, odds_weight: float) -> None:
    pair = means(batch)
    for_chosen, for_rejected = gradients(partial(orpo_loss, odds_weight=odds_weight), pair)
    odds = [each(lambda p: math.exp(p) / (1 - math.exp(p)), logps) for logps in pair]
    push = odds_weight / (1 + odds[0] / odds[1])  # λ σ(−x), e^x the ratio of the odds
    same(for_chosen, -1 - push * (1 + odds[0]), 1e-10)  # 1/(1 − p) = 1 + odds
    same(for_rejected, push * (1 + odds[1]), 1e-10)


def test_OR2_gradcheck() -> None:
    pair = [-normal(torch.Generator().manual_seed(s), 4).abs().add(0.1).requires_grad_() for s in (1, 2)]
    assert torch.autograd.gradcheck(partial(orpo_loss, odds_weight=0.4), pair)


@given(batch=ragged())
def test_OR3_without_the_odds_it_is_sft(batch: Batch) -> None:
    pair = means(batch)
    assert torch.equal(orpo_loss(*pair, odds_weight=0.0), sft_loss(pair[0]))
    assert not gradients(partial(orpo_loss, odds_weight=0.0), pair)[1].any()


@given(batch=ragged(), odds_weight=st.floats(0.05, 3.0))
def test_OR4_equal_completions(batch: Batch, odds_weight: float) -> None:
    logps = means(batch)[0]
    same(orpo_loss(logps, logps, odds_weight=odds_weight), -logps + odds_weight * math.log(2), 1e-12)


EDGES = [0.0, -1e-30, -1e-7, -1e-6, -1.0, -1e4]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bfloat16])
@pytest.mark.parametrize("chosen", EDGES)
@pytest.mark.parametrize("rejected", EDGES)
def test_OR5_certain_and_impossible_completions_are_finite(
    rejected: float, chosen: float, dtype: torch.dtype
) -> None:
    pair = [torch.tensor([value], dtype=dtype) for value in (chosen, rejected)]
    found = orpo_loss(*pair, odds_weight=0.3)
    exact = scalar("orpo_loss")(pair[0].item(), pair[1].item(), 0.3)
    assert found.isfinite().all() and found.item() == pytest.approx(exact, rel=1e-5, abs=1e-6)
    for_chosen, for_rejected = gradients(partial(orpo_loss, odds_weight=0.3), pair)
    assert for_chosen.isfinite().all() and for_chosen <= -1
    assert for_rejected.isfinite().all() and for_rejected >= 0
    if rejected > -1e-7 and dtype in FLOATS:
        assert for_rejected == 0  # held: no gradient


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("logp", [-2e-7, -3e-6, -1e-4])
def test_OR6_odds_keep_their_precision_near_certainty(logp: float, dtype: torch.dtype) -> None:
    held = torch.tensor([logp], dtype=dtype).double().item()
    rest = sum(-(held**n) / math.factorial(n) for n in range(1, 6))  # 1 − e^ℓ as a series
    chosen, rejected = torch.tensor([[-1.0], [logp]], dtype=dtype)
    x = math.log(1 / (math.e - 1)) - (held - math.log(rest))
    value = orpo_loss(chosen, rejected, odds_weight=1.0).item() - 1.0
    assert value == pytest.approx(math.log1p(math.exp(-x)), rel=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("value", [2e-6, 0.5, 1e30, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_OR7_what_is_no_log_probability_is_a_loud_nan_without_gradient(side: int, value: float) -> None:
    pair = [torch.tensor([-0.5, -0.7]), torch.tensor([-0.9, -0.4])]
    clean = orpo_loss(*pair, odds_weight=0.3)
    pair[side][1] = value
    found = orpo_loss(*pair, odds_weight=0.3)
    assert found[0] == clean[0] and found[1].isnan()
    leaves = gradients(lambda *both: orpo_loss(*both, odds_weight=0.3)[:1], pair)
    assert leaves[side][1] == 0.0 and leaves[side][0] != 0.0
    direct = gradients(partial(orpo_loss, odds_weight=0.3), pair)
    assert direct[side][1] == 0.0
    rounded = [torch.tensor([5e-7]), torch.tensor([-0.5])][:: 1 - 2 * side]
    assert orpo_loss(*rounded, odds_weight=0.3).isfinite()


@pytest.mark.parametrize("junk", JUNK)
@given(batch=ragged(), leaf=SIDES)
def test_OR7_rows_left_out_get_no_gradient(junk: float, batch: Batch, leaf: int) -> None:
    check_rows(partial(orpo_loss, odds_weight=0.3), means(batch), batch, junk, leaf)


@given(batch=ragged(), leaf=SIDES, data=st.data())
def test_OR7_splits_and_half_precision(batch: Batch, leaf: int, data: st.DataObject) -> None:
    pair, loss = means(batch), partial(orpo_loss, odds_weight=0.3)
    check_split(loss, pair, owners(data, len(pair[0])), leaf)
    for dtype in HALVES:
        check_half(loss, pair, dtype)


# ---- SimPO


@given(batch=ragged(), beta=BETAS, margin=st.floats(0.0, 0.9) | st.floats(1.1, 3.0))
def test_SI1_value_equals_the_page(batch: Batch, beta: float, margin: float) -> None:
    pair = means(batch)
    found = simpo_loss(*pair, beta=beta, margin=margin)
    same(found, each(scalar("simpo_loss"), *pair, beta=beta, margin=margin))


@given(batch=ragged(), beta=BETAS, margin=st.floats(0.1, 3.0))
def test_SI2_gradient_in_closed_form(batch: Batch, beta: float, margin: float) -> None:
    pair = means(batch)
    for_chosen, for_rejected = gradients(partial(simpo_loss, beta=beta, margin=margin), pair)
    x = beta * (pair[0] - pair[1]) - margin
    same(for_chosen, -beta / (1 + x.exp()), 1e-12)
    assert torch.equal(for_rejected, -for_chosen)


@pytest.mark.parametrize(("beta", "margin"), [(2.0, 0.5), (0.5, 3.0)])
def test_SI3_log_2_where_the_margin_is_just_met(beta: float, margin: float) -> None:
    rejected = torch.tensor([-7.0, -6.25], dtype=torch.float64)
    losses = simpo_loss(rejected + margin / beta, rejected, beta=beta, margin=margin)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-15)


@given(batch=ragged(), beta=BETAS)
def test_SI4_without_a_margin_it_is_dpo_against_an_even_reference(batch: Batch, beta: float) -> None:
    pair = means(batch)
    even = [torch.full_like(pair[0], -math.log(50257))] * 2
    same(simpo_loss(*pair, beta=beta, margin=0.0), dpo_loss(*pair, *even, beta=beta), 1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("x", [-1e4, 1e4])
def test_SI5_extreme_margins_are_finite(x: float, dtype: torch.dtype) -> None:
    pair = [torch.tensor([value], dtype=dtype) for value in (x / 2.5, 0.0)]
    assert simpo_loss(*pair, beta=2.5, margin=0.5).item() == pytest.approx(max(0.5 - x, 0.0), rel=1e-6)
    found = [gradient.item() for gradient in gradients(partial(simpo_loss, beta=2.5, margin=0.5), pair)]
    assert found == pytest.approx([-2.5 * (x < 0), 2.5 * (x < 0)], rel=1e-6)


@pytest.mark.parametrize("junk", JUNK)
@given(batch=ragged(), leaf=SIDES)
def test_SI6_rows_left_out_get_no_gradient(junk: float, batch: Batch, leaf: int) -> None:
    check_rows(partial(simpo_loss, beta=2.5, margin=0.5), means(batch), batch, junk, leaf)


@given(batch=ragged(), leaf=SIDES, data=st.data())
def test_SI6_splits_and_half_precision(batch: Batch, leaf: int, data: st.DataObject) -> None:
    pair, loss = means(batch), partial(simpo_loss, beta=2.5, margin=0.5)
    check_split(loss, pair, owners(data, len(pair[0])), leaf)
    for dtype in HALVES:
        check_half(loss, pair, dtype)


# ---- the door

ROW, LONG, GRID, WHOLE = torch.zeros(2), torch.zeros(3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
LIKED, KL = torch.tensor([True, False]), torch.tensor(0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: preference_margin(ROW, LONG), r"chosen_logps \(2,\), rejected_logps \(3,\)"),
        (
            lambda: preference_margin(GRID, GRID),
            r"chosen_logps must have 1 dimension\(s\), got shape \(2, 3\)",
        ),
        (lambda: preference_margin(ROW, WHOLE), "rejected_logps must be floating point, got torch.int64"),
        (lambda: dpo_loss(ROW, ROW, ROW, LONG, beta=0.1), r"ref_rejected_logps \(3,\)"),
        (lambda: dpo_loss(ROW, ROW, WHOLE, ROW, beta=0.1), "ref_chosen_logps must be floating point"),
        (lambda: dpo_loss(GRID, GRID, GRID, GRID, beta=0.1), r"chosen_logps must have 1 dimension"),
        (lambda: dpo_loss(ROW, ROW, ROW, ROW, beta=0.0), "beta must be positive and finite, got 0.0"),
        (
            lambda: dpo_loss(ROW, ROW, ROW, ROW, beta=0.1, label_smoothing=0.5),
            r"label_smoothing must lie in \[0, 0.5\), got 0.5",
        ),
        (lambda: dpo_loss(ROW, ROW, ROW, ROW, beta=0.1, label_smoothing=-0.1), "label_smoothing must lie in"),
        (lambda: ipo_loss(ROW, ROW, LONG, ROW, beta=0.1), r"ref_chosen_logps \(3,\)"),
        (
            lambda: ipo_loss(ROW, ROW, ROW, ROW, beta=float("nan")),
            "beta must be positive and finite, got nan",
        ),
        (lambda: kto_loss(ROW, LONG, LIKED, KL, beta=0.1), r"logps \(2,\), ref_logps \(3,\)"),
        (lambda: kto_loss(GRID, GRID, LIKED, KL, beta=0.1), r"logps must have 1 dimension\(s\)"),
        (lambda: kto_loss(ROW, ROW, LIKED[:1], KL, beta=0.1), r"logps \(2,\), desirable \(1,\)"),
        (lambda: kto_loss(ROW, ROW, ROW - 1.0, KL, beta=0.1), "desirable must be bool .* got the value -1.0"),
        (lambda: kto_loss(ROW, ROW, LIKED, ROW, beta=0.1), r"kl must have 0 dimension\(s\)"),
        (lambda: kto_loss(ROW, ROW, LIKED, KL + torch.inf, beta=0.1), "kl must be finite, got inf"),
        (lambda: kto_loss(ROW, ROW, LIKED, KL, beta=-1.0), "beta must be positive and finite, got -1.0"),
        (
            lambda: kto_loss(ROW, ROW, LIKED, KL, beta=0.1, desirable_weight=0.0),
            "desirable_weight must be positive and finite, got 0.0",
        ),
        (
            lambda: kto_loss(ROW, ROW, LIKED, KL, beta=0.1, undesirable_weight=-2.0),
            "undesirable_weight must be positive and finite, got -2.0",
        ),
        (lambda: orpo_loss(ROW, LONG, odds_weight=0.1), r"chosen_logps \(2,\), rejected_logps \(3,\)"),
        (lambda: orpo_loss(GRID, GRID, odds_weight=0.1), r"chosen_logps must have 1 dimension\(s\)"),
        (lambda: orpo_loss(ROW, ROW, odds_weight=-0.1), r"odds_weight must lie in \[0, inf\), got -0.1"),
        (lambda: simpo_loss(ROW, LONG, beta=2.0, margin=0.5), r"chosen_logps \(2,\), rejected_logps \(3,\)"),
        (lambda: simpo_loss(ROW, ROW, beta=0.0, margin=0.5), "beta must be positive and finite, got 0.0"),
        (lambda: simpo_loss(ROW, ROW, beta=2.0, margin=-0.5), r"margin must lie in \[0, inf\), got -0.5"),
    ],
)
def test_the_door_refuses(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
