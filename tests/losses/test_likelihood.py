"""`token_logps`, `truncate_logits`, `sequence_logps` and `sft_loss`: the sampler's distribution, scored."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from nanopost.losses import aggregate, local_denom, sequence_logps, sft_loss, token_logps, truncate_logits
from tests.oracle import (
    Samples,
    compare,
    distribution,
    expected_gradient,
    forward_kl_gradient,
    grow,
    probabilities,
    value_gradient,
)
from tests.pages import scalar
from tests.properties import check_half, check_split, slope
from tests.ragged import JUNK, junk_outside, normal, ragged

VOCABULARY = 5
SCORINGS = [
    (0.5, 0, 1.0),
    (1.0, 0, 1.0),
    (2.0, 0, 1.0),
    (0.7, 2, 1.0),
    (1.3, 0, 0.6),
    (1.7, 4, 0.8),
    (1.0, 9, 0.05),
]
ROW = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()


def positions(batch: tuple[Tensor, Generator], scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits (B, T, V) and targets (B, T) of a ragged batch's shape."""
    mask, generator = batch
    logits = normal(generator, *mask.shape, VOCABULARY, scale=scale)
    return logits, torch.randint(VOCABULARY, mask.shape, generator=generator)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SCORINGS)
@given(batch=ragged())
def test_T1_value_equals_the_page(
    temperature: float, top_k: int, top_p: float, batch: tuple[Tensor, Generator]
) -> None:
    logits, targets = positions(batch)
    found = token_logps(logits, targets, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = [
        [scalar("token_logps")(z, y, temperature, top_k, top_p) for z, y in zip(row, ids, strict=True)]
        for row, ids in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SCORINGS)
@given(batch=ragged())
def test_T2_probabilities_of_the_support_sum_to_one(
    temperature: float, top_k: int, top_p: float, batch: tuple[Tensor, Generator]
) -> None:
    logits, _ = positions(batch)
    inside = truncate_logits(logits / temperature, top_k=top_k, top_p=top_p) > -torch.inf
    total = torch.zeros(logits.shape[:-1], dtype=torch.float64)
    for token in range(VOCABULARY):
        ids = torch.full(logits.shape[:-1], token)
        logps = token_logps(logits, ids, temperature=temperature, top_k=top_k, top_p=top_p)
        total += torch.where(inside[..., token], logps.exp(), 0.0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SCORINGS)
@given(batch=ragged())
def test_T3_gradient_is_one_hot_minus_probability_over_temperature(
    temperature: float, top_k: int, top_p: float, batch: tuple[Tensor, Generator]
) -> None:
    logits, targets = positions(batch)
    logits.requires_grad_()
    weights = torch.linspace(-1.5, 2.0, targets.numel(), dtype=torch.float64).reshape(targets.shape)
    logps = token_logps(logits, targets, temperature=temperature, top_k=top_k, top_p=top_p)
    (found,) = torch.autograd.grad((logps * weights).sum(), logits)
    page = scalar("truncate_logits")
    for place in torch.cartesian_prod(*map(torch.arange, targets.shape)).tolist():
        row = [z / temperature for z in logits[tuple(place)].tolist()]
        target, weight = int(targets[tuple(place)]), float(weights[tuple(place)])
        powers = [math.exp(z - max(row)) for z in page(row, top_k, top_p, target)]
        for token, power in enumerate(powers):
            slope = weight * ((token == target) - power / sum(powers)) / temperature
            value = found[(*place, token)].item()
            assert value == pytest.approx(slope, abs=1e-12)
            assert (value == 0.0) or power > 0.0


def test_T3_gradcheck() -> None:
    logits = normal(torch.Generator().manual_seed(3), 2, 3, VOCABULARY).requires_grad_()
    targets = torch.tensor([[0, 4, 2], [1, 1, 3]])
    assert torch.autograd.gradcheck(lambda z: token_logps(z, targets, temperature=1.7, top_k=3), logits)


@given(batch=ragged(), top_k=st.integers(1, 2), top_p=st.floats(0.01, 0.4))
def test_T4_a_target_outside_the_support_stays_finite(
    batch: tuple[Tensor, Generator], top_k: int, top_p: float
) -> None:
    logits, _ = positions(batch)
    least = logits.argmin(-1)
    logits.requires_grad_()
    logps = token_logps(logits, least, top_k=top_k, top_p=top_p)
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    assert logps.isfinite().all() and gradient.isfinite().all() and (logps < 0).all()


@given(batch=ragged(), data=st.data())
def test_T5_a_position_depends_on_its_own_logits_alone(
    batch: tuple[Tensor, Generator], data: st.DataObject
) -> None:
    logits, targets = positions(batch)
    place = tuple(data.draw(st.integers(0, size - 1)) for size in targets.shape)
    before = token_logps(logits, targets, temperature=1.3)
    logits[(*place, int(targets[place]))] += 1.0
    changed = token_logps(logits, targets, temperature=1.3) != before
    expected = torch.zeros_like(changed)
    expected[place] = True
    assert torch.equal(changed, expected)
    alone = token_logps(logits[place], targets[place], temperature=1.3)
    torch.testing.assert_close(
        alone, token_logps(logits, targets, temperature=1.3)[place], rtol=0, atol=1e-15
    )


@given(batch=ragged(), shift=st.floats(-50.0, 50.0))
def test_T6_adding_a_constant_to_the_logits_changes_nothing(
    batch: tuple[Tensor, Generator], shift: float
) -> None:
    logits, targets = positions(batch)
    moved = token_logps(logits + shift, targets, temperature=0.7, top_k=3)
    expected = token_logps(logits, targets, temperature=0.7, top_k=3)
    torch.testing.assert_close(moved, expected, rtol=0.0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_T6_extreme_logits_are_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], dtype=dtype, requires_grad=True)
    logps = token_logps(logits, torch.tensor([1, 2]))
    (gradient,) = torch.autograd.grad(logps.sum(), logits)
    assert logps.tolist() == pytest.approx([-2e4, -math.log(3)]) and gradient.isfinite().all()


@pytest.mark.parametrize("truncation", [{}, {"top_k": 3}, {"top_p": 0.7}], ids=["full", "top_k", "top_p"])
@pytest.mark.parametrize("junk", JUNK)
@given(batch=ragged())
def test_T8_masked_rows_may_hold_anything(
    junk: float, truncation: dict[str, float], batch: tuple[Tensor, Generator]
) -> None:
    mask, generator = batch
    logits, ids = normal(generator, *mask.shape, 5), torch.zeros(mask.shape, dtype=torch.long)
    soiled = torch.where(mask[..., None], logits, junk)
    soiled[..., 1] = torch.where(mask, logits[..., 1], 0.5)  # one sound logit does not save the row
    gradients = []
    for tensor in (logits, soiled):
        leaf = tensor.clone().requires_grad_()
        values = token_logps(leaf, ids, temperature=0.7, **truncation)  # type: ignore[arg-type]
        loss = aggregate(values, mask, mode="token_mean", denom=3.0)
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*gradients) and not gradients[1][~mask].any()
    assert truncation or gradients[0].any()  # a support of one token has no gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_T7_half_precision_logits_are_scored_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = normal(generator, 4, 9, 100, scale=4.0).to(dtype)
    targets = torch.randint(100, (4, 9), generator=generator)
    found = token_logps(logits, targets, temperature=0.7)
    assert found.dtype == torch.float32
    expected = token_logps(logits.double(), targets, temperature=0.7)
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=2e-5)


def kept(logits: Tensor) -> Tensor:
    return logits > -torch.inf


@given(batch=ragged(), top_k=st.integers(0, 7), top_p=st.floats(0.05, 1.0), keep=st.booleans())
def test_U1_value_equals_the_page(
    batch: tuple[Tensor, Generator], top_k: int, top_p: float, keep: bool
) -> None:
    logits, ids = positions(batch)
    found = truncate_logits(logits, top_k=top_k, top_p=top_p, keep_ids=ids if keep else None)
    expected = [
        [
            scalar("truncate_logits")(z, top_k, top_p, y if keep else None)
            for z, y in zip(row, y_row, strict=True)
        ]
        for row, y_row in zip(logits.tolist(), ids.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=0.0)


@given(levels=st.lists(st.integers(0, 2), min_size=1, max_size=8), top_k=st.integers(1, 9))
def test_U2_ties_go_to_the_lower_id(levels: list[int], top_k: int) -> None:
    row = torch.tensor([levels], dtype=torch.float64)
    found = kept(truncate_logits(row, top_k=top_k, top_p=1.0))[0].tolist()
    ranked = sorted(range(len(levels)), key=lambda token: (-levels[token], token))[:top_k]
    assert [token for token, inside in enumerate(found) if inside] == sorted(ranked)


@given(batch=ragged(), top_p=st.floats(0.05, 0.99), top_k=st.sampled_from([0, 3]))
def test_U3_the_nucleus_is_the_shortest_with_its_mass(
    batch: tuple[Tensor, Generator], top_p: float, top_k: int
) -> None:
    logits, _ = positions(batch)
    base = truncate_logits(logits, top_k=top_k, top_p=1.0).softmax(-1)
    inside = kept(truncate_logits(logits, top_k=top_k, top_p=top_p))
    mass = torch.where(inside, base, 0.0).sum(-1)
    least = torch.where(inside, base, 2.0).amin(-1)
    assert (mass >= top_p - 1e-12).all() and (mass - least < top_p + 1e-12).all()
    assert (torch.where(inside, 0.0, base).amax(-1) <= least).all()


def test_U3_the_worked_row() -> None:
    assert kept(truncate_logits(ROW, top_k=0, top_p=0.75)).tolist() == [True, True, False, False]
    assert kept(truncate_logits(ROW, top_k=0, top_p=0.76)).tolist() == [True, True, True, False]
    assert kept(truncate_logits(ROW, top_k=2, top_p=0.6)).tolist() == [True, False, False, False]


@given(batch=ragged(), top_k=st.integers(1, 4), top_p=st.floats(0.05, 0.9))
def test_U4_keep_ids_join_the_support_alone(
    batch: tuple[Tensor, Generator], top_k: int, top_p: float
) -> None:
    logits, ids = positions(batch)
    without = kept(truncate_logits(logits, top_k=top_k, top_p=top_p))
    found = kept(truncate_logits(logits, top_k=top_k, top_p=top_p, keep_ids=ids))
    assert torch.equal(found, without | torch.nn.functional.one_hot(ids, VOCABULARY).bool())


@given(batch=ragged())
def test_U5_gradient_passes_inside_and_is_zero_outside(batch: tuple[Tensor, Generator]) -> None:
    logits, ids = positions(batch)
    logits.requires_grad_()
    truncated = truncate_logits(logits, top_k=3, top_p=0.7, keep_ids=ids)
    (gradient,) = torch.autograd.grad(truncated.masked_fill(~kept(truncated), 0.0).sum(), logits)
    assert torch.equal(gradient, kept(truncated).double()) and not gradient.bool().all()


@pytest.mark.parametrize("top_k", [0, VOCABULARY, VOCABULARY + 3])
@given(batch=ragged())
def test_U6_off_changes_nothing(top_k: int, batch: tuple[Tensor, Generator]) -> None:
    logits, _ = positions(batch)
    assert torch.equal(truncate_logits(logits, top_k=top_k, top_p=1.0), logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_U7_a_row_is_never_empty(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 2.0, 2.0], [-1e4, 1e4, 0.0]], dtype=dtype)
    found = truncate_logits(logits, top_k=0, top_p=1e-6)
    assert kept(found).tolist() == [[False, True, False], [True, False, False], [False, True, False]]
    assert found.dtype == torch.promote_types(dtype, torch.float32)


@given(batch=ragged())
def test_S1_value_equals_the_page(batch: tuple[Tensor, Generator]) -> None:
    mask, generator = batch
    logps = -normal(generator, *mask.shape).abs()
    expected = [[scalar("sft_loss")(value) for value in row] for row in logps.tolist()]
    assert sft_loss(logps).tolist() == expected
    assert sft_loss(logps.bfloat16()).dtype == torch.float32


def test_S2_probabilities_of_point_8_and_point_4() -> None:
    logits = torch.tensor([[[0.8, 0.2], [0.4, 0.6]]], dtype=torch.float64).log()
    loss = sft_loss(token_logps(logits, torch.tensor([[0, 0]])))
    assert loss.sum().item() == pytest.approx(-math.log(0.32), abs=1e-15)
    assert loss.sum().item() == pytest.approx(1.1394, abs=5e-5)


def test_S3_six_of_ten_masked_leave_four_gradients() -> None:
    logps = torch.full((1, 10), -0.5, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(10)[None] >= 6
    loss = aggregate(sft_loss(logps), mask, mode="token_mean", denom=local_denom(mask, mode="token_mean"))
    (gradient,) = torch.autograd.grad(loss, logps)
    assert gradient.tolist() == [[0.0] * 6 + [-0.25] * 4]


@given(batch=ragged(), data=st.data())
def test_S4_any_split_gives_the_gradient_of_the_step(
    batch: tuple[Tensor, Generator], data: st.DataObject
) -> None:
    mask, _ = batch
    logits, targets = positions(batch)
    denom = local_denom(mask, mode="token_mean")

    def step(head: Tensor, rows: Tensor) -> Tensor:
        losses = sft_loss(token_logps(logits[rows] @ head, targets[rows]))
        return aggregate(losses, mask[rows], mode="token_mean", denom=denom)

    head = torch.eye(VOCABULARY, dtype=torch.float64, requires_grad=True)
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in mask])
    (whole,) = torch.autograd.grad(step(head, torch.arange(len(mask))), head)
    parts = [torch.autograd.grad(step(head, (owner == part).nonzero()[:, 0]), head)[0] for part in range(3)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-14, atol=1e-14 * float(whole.norm()))


def scored(batch: tuple[Tensor, Generator]) -> tuple[Tensor, Tensor]:
    """Token log-probabilities of a ragged batch and its mask."""
    mask, generator = batch
    return -normal(generator, *mask.shape, scale=2.0).abs(), mask


@pytest.mark.parametrize("average", [False, True])
@given(batch=ragged())
def test_SL1_value_equals_the_page(average: bool, batch: tuple[Tensor, Generator]) -> None:
    logps, mask = scored(batch)
    rows = zip(logps.tolist(), mask.tolist(), strict=True)
    expected = [scalar("sequence_logps")(row, kept, average) for row, kept in rows]
    for form in (mask, mask.long(), mask.float()):
        found = sequence_logps(logps, form, average=average)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("average", [False, True])
@given(batch=ragged())
def test_SL2_gradient_is_the_mask(average: bool, batch: tuple[Tensor, Generator]) -> None:
    logps, mask = scored(batch)
    weights = torch.arange(1.0, len(mask) + 1, dtype=torch.float64)  # each row its own upstream gradient
    found = slope(weights * sequence_logps(logps.requires_grad_(), mask, average=average), logps)
    sizes = mask.sum(1, keepdim=True).clamp(min=1) if average else 1
    assert torch.equal(found, mask * (weights[:, None] / sizes))


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("average", [False, True])
@given(batch=ragged())
def test_SL3_outside_the_mask_nothing_counts(
    average: bool, junk: float, batch: tuple[Tensor, Generator]
) -> None:
    logps, mask = scored(batch)
    soiled = junk_outside(logps, mask, junk).requires_grad_()
    found = sequence_logps(soiled, mask, average=average)
    assert torch.equal(found, sequence_logps(logps, mask, average=average))
    gradient = slope(found.square(), soiled)
    assert not gradient[~mask].any() and gradient[mask].all() and gradient.isfinite().all()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("width", [0, 3])
def test_SL4_a_row_without_a_token_is_zero(width: int, average: bool) -> None:
    logps = torch.full((2, width), -torch.inf, requires_grad=True)
    found = sequence_logps(logps, torch.zeros(2, width, dtype=torch.bool), average=average)
    assert found.tolist() == [0.0, 0.0] and not slope(found, logps).any()


@pytest.mark.parametrize("average", [False, True])
@given(batch=ragged(), left=st.integers(0, 3), right=st.integers(0, 3), data=st.data())
def test_SL5_padding_order_and_split_change_nothing(
    average: bool, batch: tuple[Tensor, Generator], left: int, right: int, data: st.DataObject
) -> None:
    logps, mask = scored(batch)
    whole = sequence_logps(logps, mask, average=average)
    pad = torch.nn.functional.pad
    padded = sequence_logps(pad(logps, (left, right), value=-7.0), pad(mask, (left, right)), average=average)
    torch.testing.assert_close(padded, whole, rtol=1e-14, atol=0.0)
    order = torch.tensor(data.draw(st.permutations(range(len(mask)))))
    assert torch.equal(sequence_logps(logps[order], mask[order], average=average), whole[order])
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in mask])
    check_split(lambda *rows: sequence_logps(*rows, average=average).square(), [logps, mask], owner)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("average", [False, True])
@given(batch=ragged())
def test_SL6_half_precision_is_summed_in_float32(
    average: bool, dtype: torch.dtype, batch: tuple[Tensor, Generator]
) -> None:
    check_half(lambda *rows: sequence_logps(*rows, average=average), scored(batch), dtype)
    long = torch.full((1, 4096), -1e4, dtype=dtype)
    found = sequence_logps(long, torch.ones_like(long), average=average)
    assert found.item() == long[0, 0].item() * (1 if average else 4096)


def test_S5_on_teacher_samples_it_is_the_kl_of_whole_sequences() -> None:
    tree = grow(vocabulary=3, steps=3)
    student, teacher = np.random.default_rng(5).normal(size=(2, tree.size, 3)) * 1.5
    q = distribution(teacher)

    def loss(samples: Samples) -> Tensor:
        losses = sft_loss(token_logps(samples.logits, samples.target_ids))
        return (samples.weight * losses.masked_fill(~samples.mask, 0.0)).sum()

    nothing = np.zeros(len(tree.actions))
    found = expected_gradient(tree, student, nothing, loss, drawn_from=q)
    truth = forward_kl_gradient(tree, distribution(student), q)
    np.testing.assert_allclose(found, truth, rtol=0.0, atol=1e-14)
    assert np.abs(truth).max() > 0.1
    best = np.arange(len(nothing)) == probabilities(tree, q).argmax()  # what beam search would give
    certain = -1.0 * best / probabilities(tree, distribution(student))
    cosine, _ = compare(value_gradient(tree, distribution(student), certain), truth)
    assert cosine < 0.99


LOGITS, IDS = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("logits", "ids", "arguments", "message"),
    [
        (LOGITS, IDS[:, :2], {}, r"target_ids has shape \(2, 2\), logits \(2, 3, 4\)"),
        (LOGITS, IDS + 4, {}, r"target_ids must lie in \[0, 4\), got 4"),
        (LOGITS, IDS - 100, {}, r"target_ids must lie in \[0, 4\), got -100"),
        (LOGITS, IDS.float(), {}, "target_ids must hold integers, got torch.float32"),
        (LOGITS, IDS, {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        (LOGITS, IDS, {"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
        (LOGITS, IDS, {"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        (LOGITS, IDS, {"top_p": 0.0}, r"top_p must lie in \(0.0, 1.0\], got 0.0"),
        (LOGITS, IDS, {"top_p": 1.1}, r"top_p must lie in \(0.0, 1.0\], got 1.1"),
        (torch.zeros(()), torch.zeros((), dtype=torch.long), {}, "logits must end in a vocabulary dimension"),
    ],
)
def test_token_logps_refuses(logits: Tensor, ids: Tensor, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_logps(logits, ids, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 2.0, "top_p": 1.0}, "top_k must be a whole number of at least 0, got 2.0"),
        ({"top_k": 0, "top_p": float("nan")}, r"top_p must lie in .* got nan"),
        ({"top_k": 1, "top_p": 1.0, "keep_ids": IDS[0]}, r"keep_ids has shape \(3,\)"),
        ({"top_k": 1, "top_p": 1.0, "keep_ids": IDS + 9}, r"keep_ids must lie in \[0, 4\), got 9"),
    ],
)
def test_truncate_logits_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        truncate_logits(LOGITS, **arguments)  # type: ignore[arg-type]


def test_sft_loss_refuses_integers() -> None:
    with pytest.raises(ValueError, match=r"logps must be floating point, got torch.int64"):
        sft_loss(IDS)


@pytest.mark.parametrize(
    ("logps", "mask", "message"),
    [
        (LOGITS[0], IDS, r"logps \(3, 4\), mask \(2, 3\)"),
        (LOGITS, LOGITS, r"logps must have 2 dimension\(s\), got shape \(2, 3, 4\)"),
        (IDS, IDS, "logps must be floating point, got torch.int64"),
        (LOGITS[0], LOGITS[0] + 0.5, "mask must be bool or hold only 0 and 1, got the value 0.5"),
    ],
)
def test_sequence_logps_refuses(logps: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_logps(logps, mask)
