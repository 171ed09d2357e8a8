"""The policy-gradient losses: REINFORCE, the clipped surrogate, CISPO and the shaped off-policy loss."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanopost.losses import (
    aggregate,
    cispo_loss,
    clipped_surrogate_loss,
    local_denom,
    off_policy_shaped_loss,
    policy_ratio,
    reinforce_loss,
)
from tests.pages import scalar
from tests.policies import CLIP, Batch, each, pair
from tests.properties import check_half, check_masked_slots, check_only_gradient, check_split, slope
from tests.ragged import JUNK, normal, ragged

MODES = ["token_mean", "sequence_mean", "sequence_sum", "constant"]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32, torch.float64]


def drawn(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, ratios and advantages of a batch, every slot of them."""
    logps, old_logps = pair(batch)
    return logps, (logps - old_logps).exp(), normal(batch[1], *logps.shape)


@given(batch=ragged())
def test_RF1_value_equals_the_page(batch: Batch) -> None:
    logps, _, advantages = drawn(batch)
    expected = each(scalar("reinforce_loss"), logps, advantages)
    torch.testing.assert_close(reinforce_loss(logps, advantages), expected, rtol=1e-9, atol=1e-9)


@given(batch=ragged())
def test_RF2_gradient_is_minus_the_advantage(batch: Batch) -> None:
    logps, _, advantages = drawn(batch)
    check_only_gradient(reinforce_loss, (logps, advantages), to=[0])
    leaf = logps.requires_grad_()
    assert torch.equal(slope(reinforce_loss(leaf, advantages), leaf), -advantages)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_RF3_masked_slots_may_hold_anything(soiled: int, junk: float, batch: Batch) -> None:
    logps, _, advantages = drawn(batch)
    check_masked_slots(reinforce_loss, [logps, advantages], batch[0], soiled, junk)


def test_RF3_an_advantage_that_is_not_finite_stays_loud_inside_the_mask() -> None:
    bad = torch.tensor([math.nan, math.inf])
    assert reinforce_loss(-torch.ones(2), bad).isnan().all()
    assert clipped_surrogate_loss(torch.ones(2), bad, **CLIP).isnan().all()
    assert cispo_loss(-torch.ones(2), torch.ones(2), bad, **CLIP).isnan().all()
    assert off_policy_shaped_loss(-torch.ones(2), bad).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_RF4_extreme_log_probabilities_are_finite(dtype: torch.dtype) -> None:
    logps = torch.tensor([-1e4, -1e4], dtype=dtype, requires_grad=True)
    advantages = torch.tensor([2.0, -2.0], dtype=dtype)
    loss = reinforce_loss(logps, advantages)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.tolist() == pytest.approx([2e4, -2e4], rel=4e-3) and slope(loss, logps).tolist() == [
        -2.0,
        2.0,
    ]


@pytest.mark.parametrize("dtype", HALVES)
@given(batch=ragged())
def test_RF4_half_precision_is_computed_in_float32(dtype: torch.dtype, batch: Batch) -> None:
    logps, _, advantages = drawn(batch)
    check_half(reinforce_loss, (logps, advantages), dtype)


@given(batch=ragged())
def test_RF5_on_policy_it_has_the_gradient_of_the_surrogate(batch: Batch) -> None:
    logps, _, advantages = drawn(batch)
    logps.requires_grad_()
    ratio = policy_ratio(logps, logps.detach(), torch.ones_like(logps))
    surrogate = slope(clipped_surrogate_loss(ratio, advantages, **CLIP), logps)
    assert torch.equal(slope(reinforce_loss(logps, advantages), logps), surrogate)


@given(seed=st.integers(0, 2**31), vocabulary=st.integers(2, 6), baseline=st.floats(-3.0, 3.0))
def test_RF6_the_mean_gradient_is_that_of_the_expected_reward(
    seed: int, vocabulary: int, baseline: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, rewards = normal(generator, vocabulary).requires_grad_(), normal(generator, vocabulary)
    true = slope(logits.softmax(-1) * rewards, logits)
    mean_loss = logits.softmax(-1).detach() * reinforce_loss(logits.log_softmax(-1), rewards - baseline)
    torch.testing.assert_close(-slope(mean_loss, logits), true, rtol=0.0, atol=1e-12)
    assert true.abs().max() > 0.0


@given(batch=ragged(), data=st.data())
def test_RF7_any_split_gives_the_gradient_of_the_step(batch: Batch, data: st.DataObject) -> None:
    logps, _, advantages = drawn(batch)
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in logps])
    check_split(reinforce_loss, (logps, advantages), owner)


@pytest.mark.parametrize("dual_clip", [None, 1.7])
@given(batch=ragged(), clip_low=st.floats(0.05, 0.4), clip_high=st.floats(0.41, 0.9))
def test_C1_value_equals_the_page(
    dual_clip: float | None, batch: Batch, clip_low: float, clip_high: float
) -> None:
    _, ratio, advantages = drawn(batch)
    options = {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip}
    expected = each(scalar("clipped_surrogate_loss"), ratio, advantages, **options)
    found = clipped_surrogate_loss(ratio, advantages, **options)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


SIGNS = [  # advantage, ratio, whether the token has a gradient, and whether it has under a dual clip of 3
    (1.5, 0.6, True, True),
    (1.5, 0.85, True, True),
    (1.5, 1.25, True, True),  # inside only because clip_high is the larger one
    (1.5, 1.6, False, False),
    (1.5, 4.0, False, False),
    (-1.5, 0.6, False, False),
    (-1.5, 0.75, False, False),  # outside only because clip_low is the smaller one
    (-1.5, 1.25, True, True),
    (-1.5, 1.6, True, True),
    (-1.5, 4.0, True, False),
]


@pytest.mark.parametrize(("advantage", "ratio", "active", "active_dual"), SIGNS)
def test_C2_gradient_follows_the_table_of_signs(
    advantage: float, ratio: float, active: bool, active_dual: bool
) -> None:
    for dual_clip, flows in ((None, active), (3.0, active_dual)):
        logps = torch.tensor([[math.log(ratio) - 0.9]], dtype=torch.float64, requires_grad=True)
        leaf = policy_ratio(logps, torch.full_like(logps, -0.9), torch.ones(1, 1))
        loss = clipped_surrogate_loss(leaf, torch.full_like(leaf, advantage), **CLIP, dual_clip=dual_clip)
        (by_ratio,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
        assert by_ratio.item() == (-advantage if flows else 0.0)
        expected = pytest.approx(-ratio * advantage, rel=1e-12) if flows else 0.0
        assert slope(loss, logps).item() == expected


@given(batch=ragged())
def test_C3_at_ratio_one_it_is_reinforce(batch: Batch) -> None:
    logps, _, advantages = drawn(batch)
    logps.requires_grad_()
    for level in ("token", "sequence"):
        ratio = policy_ratio(logps, logps.detach(), batch[0], level=level)
        for dual_clip in (None, 3.0):
            loss = clipped_surrogate_loss(ratio, advantages, **CLIP, dual_clip=dual_clip)
            assert torch.equal(loss, -advantages)
            if level == "token":
                gradient = torch.autograd.grad(loss.sum(), logps, retain_graph=True)[0]
                assert torch.equal(gradient, -advantages * batch[0])


@given(batch=ragged())
def test_C4_old_policy_and_advantages_get_no_gradient(batch: Batch) -> None:
    (logps, old_logps), mask = pair(batch), batch[0]

    def loss(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
        ratio = policy_ratio(logps, old_logps, mask)
        return clipped_surrogate_loss(ratio, advantages, **CLIP, dual_clip=3.0)

    check_only_gradient(loss, (logps, old_logps, normal(batch[1], *mask.shape)), to=[0])


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_C5_masked_slots_may_hold_anything(
    soiled: int, junk: float, dual_clip: float | None, batch: Batch
) -> None:
    mask, generator = batch
    near = normal(generator, *mask.shape, scale=0.05).exp()  # inside the clip
    inputs = [near, normal(generator, *mask.shape)]
    loss = lambda *both: clipped_surrogate_loss(*both, **CLIP, dual_clip=dual_clip)  # noqa: E731
    check_masked_slots(loss, inputs, mask, soiled, junk)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1, 2])
@given(batch=ragged())
def test_C5_masked_slots_may_hold_anything_from_the_log_probabilities_on(
    soiled: int, junk: float, level: str, batch: Batch
) -> None:
    mask, generator = batch
    logps = -normal(generator, *mask.shape).abs()
    near = logps + normal(generator, *mask.shape, scale=0.05)

    def loss(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
        return clipped_surrogate_loss(policy_ratio(logps, old_logps, mask, level=level), advantages, **CLIP)

    check_masked_slots(loss, [logps, near, normal(generator, *mask.shape)], mask, soiled, junk)


@pytest.mark.parametrize("log_ratio", [-1e4, -2.0, 0.0, 2.0, 1e4])
def test_C6_advantage_zero_gives_loss_and_gradient_zero(log_ratio: float) -> None:
    logps = torch.tensor([[log_ratio]], requires_grad=True)
    ratio = policy_ratio(logps, torch.zeros(1, 1), torch.ones(1, 1))
    for dual_clip in (None, 3.0, math.inf):
        loss = clipped_surrogate_loss(ratio, torch.zeros(1, 1), **CLIP, dual_clip=dual_clip)
        (gradient,) = torch.autograd.grad(loss.sum(), logps, retain_graph=True)
        assert loss.item() == 0.0 and gradient.item() == 0.0


@pytest.mark.parametrize("advantage", [-2.0, 2.0])
@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_C7_extreme_log_ratios_are_finite(dtype: torch.dtype, log_ratio: float, advantage: float) -> None:
    logps = torch.tensor([[log_ratio]], dtype=dtype, requires_grad=True)
    advantages = torch.full((1, 1), advantage, dtype=dtype)
    ratio = policy_ratio(logps, torch.zeros(1, 1, dtype=dtype), torch.ones(1, 1))
    loss = clipped_surrogate_loss(ratio, advantages, **CLIP)
    assert loss.isfinite().all() and loss.dtype == torch.promote_types(dtype, torch.float32)
    assert slope(loss, logps).item() == 0.0
    if log_ratio * advantage > 0:  # the clip holds: A > 0 above, A < 0 below
        assert loss.item() == pytest.approx(-1.28 * advantage if advantage > 0 else -0.8 * advantage)


@pytest.mark.parametrize("dtype", HALVES)
@given(batch=ragged())
def test_C7_half_precision_is_computed_in_float32(dtype: torch.dtype, batch: Batch) -> None:
    ratio = normal(batch[1], *batch[0].shape, scale=0.5).exp()
    loss = lambda *both: clipped_surrogate_loss(*both, **CLIP, dual_clip=2.0)  # noqa: E731
    check_half(loss, (ratio, normal(batch[1], *batch[0].shape)), dtype)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", MODES)
@given(batch=ragged(), data=st.data())
def test_C8_any_split_gives_the_gradient_of_the_step(
    mode: str, level: str, batch: Batch, data: st.DataObject
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
        ratio = policy_ratio(features[rows] @ weights, old_logps[rows], mask[rows], level=level)
        values = clipped_surrogate_loss(ratio, advantages[rows], **CLIP)
        return torch.autograd.grad(aggregate(values, mask[rows], mode=mode, denom=denom), weights)[0]

    whole = gradient(torch.arange(len(mask)))
    parts = [gradient((owner == part).nonzero()[:, 0]) for part in range(3)]
    tokens = mask.sum(dim=1).clamp(min=1).max() if level == "sequence" else 1
    size = float((features.abs() * advantages.abs()[..., None] * mask[..., None]).sum() * tokens) * 2 / denom
    torch.testing.assert_close(sum(parts), whole, rtol=0.0, atol=1e-14 * size)


@given(batch=ragged(), dual_clip=st.floats(1.05, 4.0))
def test_C9_dual_clip_bounds_negative_advantages_alone(batch: Batch, dual_clip: float) -> None:
    _, ratio, advantages = drawn(batch)
    plain = clipped_surrogate_loss(ratio, advantages, **CLIP)
    bounded = clipped_surrogate_loss(ratio, advantages, **CLIP, dual_clip=dual_clip)
    negative = advantages < 0
    assert torch.equal(bounded[~negative], plain[~negative])
    limit = dual_clip * advantages[negative].abs()
    assert torch.equal(bounded[negative], torch.minimum(plain[negative], limit))
    unlimited = clipped_surrogate_loss(ratio, advantages, **CLIP, dual_clip=math.inf)
    assert torch.equal(unlimited, plain)


@pytest.mark.parametrize("advantage", [-1.5, 1.5])
def test_C10_a_sequence_is_clipped_as_a_whole(advantage: float) -> None:
    """Token ratios 2, ½, 1 (geometric mean 1) and 3, 3, ½: only the second row is clipped, for A > 0."""
    tokens = torch.tensor([[2.0, 0.5, 1.0], [3.0, 3.0, 0.5]], dtype=torch.float64)
    logps = (tokens.log() - 1.0).requires_grad_()
    ratio = policy_ratio(logps, torch.full_like(tokens, -1.0), torch.ones(2, 3), level="sequence")
    loss = clipped_surrogate_loss(ratio, torch.full_like(tokens, advantage), **CLIP)
    gradient = slope(loss, logps)
    geometric = 4.5 ** (1 / 3)  # 3 · 3 · ½, three tokens; above 1.28
    assert gradient[0].tolist() == pytest.approx([-advantage] * 3)
    assert gradient[1].tolist() == pytest.approx([0.0 if advantage > 0 else -advantage * geometric] * 3)


@given(batch=ragged(), clip_low=st.floats(0.05, 0.4), clip_high=st.floats(0.41, 0.9))
def test_CI1_value_equals_the_page(batch: Batch, clip_low: float, clip_high: float) -> None:
    inputs, bounds = drawn(batch), {"clip_low": clip_low, "clip_high": clip_high}
    expected = each(scalar("cispo_loss"), *inputs, **bounds)
    torch.testing.assert_close(cispo_loss(*inputs, **bounds), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("advantage", [-1.5, 1.5])
@pytest.mark.parametrize(
    ("ratio", "weight"), [(0.6, 0.8), (0.85, 0.85), (1.0, 1.0), (1.25, 1.25), (4.0, 1.28)]
)
def test_CI2_gradient_follows_the_table_and_is_never_zero(
    ratio: float, weight: float, advantage: float
) -> None:
    logps = torch.tensor([[math.log(ratio) - 2.9]], dtype=torch.float64, requires_grad=True)
    found = policy_ratio(logps, torch.full_like(logps, -2.9), torch.ones(1, 1))
    loss = cispo_loss(logps, found, torch.full_like(found, advantage), **CLIP)
    assert slope(loss, logps).item() == pytest.approx(-weight * advantage, rel=1e-12)


@given(batch=ragged())
def test_CI3_ratio_and_advantages_get_no_gradient(batch: Batch) -> None:
    check_only_gradient(lambda *inputs: cispo_loss(*inputs, **CLIP), drawn(batch), to=[0])


@given(batch=ragged())
def test_CI4_at_ratio_one_it_is_reinforce(batch: Batch) -> None:
    logps, _, advantages = drawn(batch)
    logps.requires_grad_()
    loss = cispo_loss(logps, torch.ones_like(logps), advantages, **CLIP)
    assert torch.equal(loss, reinforce_loss(logps, advantages)) and torch.equal(
        slope(loss, logps), -advantages
    )


@given(batch=ragged())
def test_CI5_without_bounds_it_has_the_gradient_of_the_unclipped_ratio(batch: Batch) -> None:
    (logps, old_logps), advantages = pair(batch), normal(batch[1], *batch[0].shape)
    logps.requires_grad_()
    ratio, unbounded = policy_ratio(logps, old_logps, batch[0]), {"clip_low": 1.0, "clip_high": math.inf}
    values = [
        cispo_loss(logps, ratio, advantages, **unbounded),
        clipped_surrogate_loss(ratio, advantages, **unbounded),
    ]
    found, expected = (
        torch.autograd.grad(value[batch[0]].sum(), logps, retain_graph=True)[0] for value in values
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1, 2])
@given(batch=ragged())
def test_CI6_masked_slots_may_hold_anything(soiled: int, junk: float, batch: Batch) -> None:
    loss = lambda *inputs: cispo_loss(*inputs, **CLIP)  # noqa: E731
    check_masked_slots(loss, drawn(batch), batch[0], soiled, junk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_ratio", [-60.0, 60.0])
def test_CI7_extremes_are_finite(log_ratio: float, dtype: torch.dtype) -> None:
    logps = torch.tensor([[-1e4]], dtype=dtype, requires_grad=True)
    ratio = policy_ratio(torch.full((1, 1), log_ratio), torch.zeros(1, 1), torch.ones(1, 1))
    loss = cispo_loss(logps, ratio, torch.ones(1, 1, dtype=dtype), clip_low=0.2, clip_high=math.inf)
    weight = 0.8 if log_ratio < 0 else math.exp(60.0)
    assert loss.isfinite().all() and loss.dtype == torch.promote_types(dtype, torch.float32)
    if dtype != torch.float16:  # in which e^60 has no gradient to be stored in
        assert slope(loss, logps).item() == pytest.approx(-weight, rel=4e-3)


@pytest.mark.parametrize("dtype", HALVES)
@given(batch=ragged())
def test_CI7_half_precision_is_computed_in_float32(dtype: torch.dtype, batch: Batch) -> None:
    check_half(lambda *inputs: cispo_loss(*inputs, **CLIP), drawn(batch), dtype)


@given(batch=ragged(), data=st.data())
def test_CI8_any_split_gives_the_gradient_of_the_step(batch: Batch, data: st.DataObject) -> None:
    inputs = drawn(batch)
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in inputs[0]])
    check_split(lambda *parts: cispo_loss(*parts, **CLIP), inputs, owner)


@given(batch=ragged(), gamma=st.floats(0.02, 5.0))
def test_OS1_value_equals_the_page(batch: Batch, gamma: float) -> None:
    logps, _, advantages = drawn(batch)
    expected = each(scalar("off_policy_shaped_loss"), logps, advantages, shaping_gamma=gamma)
    found = off_policy_shaped_loss(logps, advantages, shaping_gamma=gamma)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(batch=ragged(), gamma=st.floats(0.02, 5.0))
def test_OS2_gradient_in_closed_form(batch: Batch, gamma: float) -> None:
    logps, _, advantages = drawn(batch)
    loss = lambda *both: off_policy_shaped_loss(*both, shaping_gamma=gamma)  # noqa: E731
    check_only_gradient(loss, (logps, advantages), to=[0])
    probs = logps.exp()
    expected = -advantages * probs * gamma / (probs + gamma) ** 2
    leaf = logps.requires_grad_()
    torch.testing.assert_close(slope(loss(leaf, advantages), leaf), expected, rtol=1e-12, atol=1e-15)


@given(gamma=st.floats(0.02, 0.9), advantage=st.sampled_from([-1.5, 1.5]))
def test_OS3_largest_at_gamma_and_zero_nowhere(gamma: float, advantage: float) -> None:
    probs = torch.cat([torch.linspace(0.001, 1.0, 60, dtype=torch.float64), torch.tensor([gamma]).double()])
    logps = probs.log().requires_grad_()
    loss = off_policy_shaped_loss(logps, torch.full_like(probs, advantage), shaping_gamma=gamma)
    gradient = slope(loss, logps)
    assert gradient.ne(0).all() and (gradient.sign() == -math.copysign(1.0, advantage)).all()
    peak = gradient.abs().max().item()
    assert peak == pytest.approx(abs(gradient.tolist()[60]), rel=1e-12) == pytest.approx(0.375, rel=1e-12)


@given(batch=ragged())
def test_OS4_limits_of_gamma(batch: Batch) -> None:
    logps, _, advantages = drawn(batch)
    logps.requires_grad_()
    small = off_policy_shaped_loss(logps, advantages, shaping_gamma=1e-12)
    torch.testing.assert_close(small, -advantages, rtol=1e-9, atol=1e-9)
    assert slope(small, logps).abs().max() < 1e-9
    large = 1e12 * off_policy_shaped_loss(logps, advantages, shaping_gamma=1e12)
    plain = -advantages * logps.exp()
    torch.testing.assert_close(large, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slope(large, logps), slope(plain, logps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@given(batch=ragged())
def test_OS5_masked_slots_may_hold_anything(soiled: int, junk: float, batch: Batch) -> None:
    logps, _, advantages = drawn(batch)
    check_masked_slots(off_policy_shaped_loss, [logps, advantages], batch[0], soiled, junk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("logp", "value"), [(-1e4, 0.0), (-math.inf, 0.0), (1e4, 1.0)])
def test_OS6_extremes_are_finite(logp: float, value: float, dtype: torch.dtype) -> None:
    logps = torch.tensor([logp, logp], dtype=dtype, requires_grad=True)
    loss = off_policy_shaped_loss(logps, torch.tensor([-2.0, 2.0], dtype=dtype))
    assert loss.tolist() == [2.0 * value, -2.0 * value] and slope(loss, logps).tolist() == [0.0, 0.0]
    assert loss.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
@given(batch=ragged())
def test_OS6_half_precision_is_computed_in_float32(dtype: torch.dtype, batch: Batch) -> None:
    logps, _, advantages = drawn(batch)
    check_half(off_policy_shaped_loss, (logps, advantages), dtype)


@given(batch=ragged(), data=st.data())
def test_OS7_any_split_gives_the_gradient_of_the_step(batch: Batch, data: st.DataObject) -> None:
    logps, _, advantages = drawn(batch)
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in logps])
    check_split(off_policy_shaped_loss, (logps, advantages), owner)


ONES = torch.ones(2, 3)


def surrogate(ratio: Tensor = ONES, advantages: Tensor = ONES, **options: float) -> Tensor:
    return clipped_surrogate_loss(ratio, advantages, **(CLIP | options))


def weighted(logps: Tensor = ONES, ratio: Tensor = ONES, **options: float) -> Tensor:
    return cispo_loss(logps, ratio, ONES, **(CLIP | options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reinforce_loss(ONES, ONES[:1]), r"logps \(2, 3\), advantages \(1, 3\)"),
        (lambda: reinforce_loss(ONES.long(), ONES), "logps must be floating point, got torch.int64"),
        (lambda: surrogate(advantages=ONES[:, :1]), r"ratio \(2, 3\), advantages \(2, 1\)"),
        (lambda: surrogate(ONES.bool()), "ratio must be floating point, got torch.bool"),
        (lambda: surrogate(clip_low=0.0), r"clip_low must lie in \(0.0, 1.0\], got 0.0"),
        (lambda: surrogate(clip_low=1.2), r"clip_low must lie in \(0.0, 1.0\], got 1.2"),
        (lambda: surrogate(clip_high=-0.2), r"clip_high must lie in \(0.0, inf\], got -0.2"),
        (lambda: surrogate(clip_high=math.nan), r"clip_high must lie in \(0.0, inf\], got nan"),
        (lambda: surrogate(dual_clip=1.0), r"dual_clip must lie in \(1.0, inf\], got 1.0"),
        (lambda: surrogate(dual_clip=0.0), r"dual_clip must lie in \(1.0, inf\], got 0.0"),
        (lambda: weighted(ratio=ONES[:1]), r"logps \(2, 3\), ratio \(1, 3\)"),
        (lambda: weighted(ONES.long()), "logps must be floating point, got torch.int64"),
        (lambda: weighted(clip_low=0.0), r"clip_low must lie in \(0.0, 1.0\], got 0.0"),
        (lambda: weighted(clip_high=0.0), r"clip_high must lie in \(0.0, inf\], got 0.0"),
        (lambda: off_policy_shaped_loss(ONES, ONES[:, :2]), r"logps \(2, 3\), advantages \(2, 2\)"),
        (lambda: off_policy_shaped_loss(ONES.long(), ONES), "logps must be floating point, got torch.int64"),
        (
            lambda: off_policy_shaped_loss(ONES, ONES, shaping_gamma=0.0),
            "shaping_gamma must be positive and finite, got 0.0",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
