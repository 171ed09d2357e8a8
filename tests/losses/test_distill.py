"""From a teacher to a student: the KLs, the divergence between them, a list of top tokens, hidden states."""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor

from nanopost.losses import (
    aggregate,
    forward_kl,
    generalized_jsd,
    hidden_state_loss,
    local_denom,
    reverse_kl,
    token_logps,
    top_k_forward_kl,
)
from tests.oracle import (
    Samples,
    compare,
    distribution,
    expected_gradient,
    forward_kl_gradient,
    grow,
    kl_gradient,
)
from tests.pages import namespace, scalar
from tests.properties import (
    Loss,
    check_half,
    check_only_gradient,
    check_split,
    slope,
)
from tests.ragged import JUNK, normal, ragged

Batch = tuple[Tensor, Generator]
INF = float("inf")
FEWER = settings(max_examples=settings().max_examples // 3)  # where the junk is what varies
V = 5
PAGE_OF: dict[str, tuple[Loss, dict[str, float]]] = {
    "forward_kl": (forward_kl, {}),
    "reverse_kl": (reverse_kl, {}),
    "generalized_jsd": (generalized_jsd, {"beta": 0.3}),
}
TAU = pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def pair(batch: Batch, *, scale: float = 2.0, width: int = V) -> tuple[Tensor, Tensor]:
    """Logits of a student and a teacher that differ a good deal."""
    mask, generator = batch
    student = normal(generator, *mask.shape, width, scale=scale)
    return student, normal(generator, *mask.shape, width, scale=scale)


def cut(logits: Tensor, generator: Generator, *, keep: int = 0) -> Tensor:
    """Some logits −∞, the one at `keep` never."""
    gone = torch.rand(logits.shape, generator=generator) < 0.3
    gone[..., keep] = False
    return logits.masked_fill(gone, -INF)


def by_page(name: str, student: Tensor, teacher: Tensor, **arguments: float) -> Tensor:
    """The page's scalar function over every row."""
    rows = zip(
        student.reshape(-1, student.shape[-1]).tolist(),
        teacher.reshape(student.shape[0] * student.shape[1], -1).tolist(),
        strict=True,
    )
    values = [scalar(name)(*row, **arguments) for row in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(student.shape[:-1])


def masked(loss: Loss, inputs: list[Tensor], mask: Tensor, soiled: int, junk: float) -> None:
    """Junk in all features of the masked tokens of inputs[soiled], then in one: value and gradient stay."""

    def run(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        leaf = tensors[0].clone().requires_grad_()
        value = aggregate(loss(leaf, *tensors[1:]), mask, mode="sequence_mean", denom=1.7)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    value, gradient = run(inputs)
    assert gradient.isfinite().all() and gradient.any()
    feature = torch.arange(inputs[soiled].shape[-1])
    for kept in (mask[..., None], mask[..., None] | (feature > 0)):
        tensors = [*inputs]
        tensors[soiled] = torch.where(kept, inputs[soiled], junk)
        found, found_gradient = run(tensors)
        assert torch.equal(found, value) and torch.equal(found_gradient, gradient)
        assert not found_gradient[~mask].any()


def split(loss: Loss, inputs: list[Tensor], mask: Tensor, data: st.DataObject) -> None:
    """Any micro-batches give the gradient of the step, with respect to the first input."""
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in mask])
    denom = local_denom(mask, mode="token_mean")

    def step(*rows: Tensor) -> Tensor:
        return aggregate(loss(*rows[:-1]), rows[-1], mode="token_mean", denom=denom)

    check_split(step, [*inputs, mask], owner)


# ---- forward and reverse KL


@TAU
@given(batch=ragged())
def test_FK1_value_equals_the_page(temperature: float, batch: Batch) -> None:
    check_value("forward_kl", temperature, batch)


@TAU
@given(batch=ragged())
def test_RK1_value_equals_the_page(temperature: float, batch: Batch) -> None:
    check_value("reverse_kl", temperature, batch)


def check_value(name: str, temperature: float, batch: Batch) -> None:
    """The page's value, with −∞ anywhere: +∞ included, and never NaN."""
    loss, more = PAGE_OF[name]
    for student, teacher in (pair(batch), tuple(cut(logits, batch[1]) for logits in pair(batch))):
        found = loss(student, teacher, temperature=temperature, **more)
        expected = by_page(name, student, teacher, temperature=temperature, **more)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@TAU
@given(batch=ragged())
def test_FK2_gradient_in_closed_form(temperature: float, batch: Batch) -> None:
    student, teacher = pair(batch)
    student.requires_grad_()
    p_s, p_t = (logits.detach() / temperature for logits in (student, teacher))
    expected = temperature * (p_s.softmax(-1) - p_t.softmax(-1))
    found = slope(forward_kl(student, teacher, temperature=temperature), student)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-13)


@TAU
@given(batch=ragged())
def test_RK2_gradient_in_closed_form(temperature: float, batch: Batch) -> None:
    student, teacher = pair(batch)
    student.requires_grad_()
    p_s, p_t = ((logits.detach() / temperature).softmax(-1) for logits in (student, teacher))
    gap = (p_s / p_t).log()
    expected = temperature * p_s * (gap - (p_s * gap).sum(-1, keepdim=True))
    found = slope(reverse_kl(student, teacher, temperature=temperature), student)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("name", PAGE_OF)
def test_gradcheck(name: str) -> None:
    loss, more = PAGE_OF[name]
    student, teacher = pair((torch.ones(2, 2), torch.Generator().manual_seed(3)))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, teacher, temperature=1.7, **more), student)


@TAU
@given(batch=ragged())
def test_FK3_never_negative_and_zero_for_the_teacher_itself(temperature: float, batch: Batch) -> None:
    check_divergence(forward_kl, temperature, batch)


@TAU
@given(batch=ragged())
def test_RK3_never_negative_and_zero_for_the_teacher_itself(temperature: float, batch: Batch) -> None:
    check_divergence(reverse_kl, temperature, batch)


def check_divergence(loss: Loss, temperature: float, batch: Batch) -> None:
    student, teacher = pair(batch)
    assert (loss(student, teacher, temperature=temperature) > 0).all()
    for logits in (teacher, cut(teacher, batch[1]), teacher.float()):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, logits, temperature=temperature)
        rounding = 1e-14 if logits.dtype == torch.float64 else 1e-6
        assert not value.any() and slope(value, leaf).abs().max() < rounding


def test_FK4_the_teacher_gets_no_gradient() -> None:
    check_only_gradient(forward_kl, pair((torch.ones(2, 3), torch.Generator().manual_seed(1))), to=[0])


def test_RK4_the_teacher_gets_no_gradient() -> None:
    check_only_gradient(reverse_kl, pair((torch.ones(2, 3), torch.Generator().manual_seed(1))), to=[0])


def test_FK5_minus_infinity() -> None:
    check_absent(forward_kl, lambda missing, whole: (missing, whole))


def test_RK5_minus_infinity() -> None:
    check_absent(reverse_kl, lambda missing, whole: (whole, missing))


def check_absent(loss: Loss, order: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Absent in both: as if the token did not exist. Mass that is missed: +∞ and a gradient of exactly 0."""
    student, teacher = pair((torch.ones(2, 3), torch.Generator().manual_seed(2)))
    for extra in (student, teacher):
        assert extra.shape[-1] == V
    wider = [
        torch.cat([z[..., :2], torch.full_like(z[..., :2], -INF), z[..., 2:]], -1) for z in (student, teacher)
    ]
    leaf, plain = wider[0].requires_grad_(), student.clone().requires_grad_()
    found, expected = loss(leaf, wider[1], temperature=1.3), loss(plain, teacher, temperature=1.3)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0.0)
    gradient = slope(found, leaf)
    assert not gradient[..., 2:4].any()
    torch.testing.assert_close(gradient[..., [0, 1, 4, 5, 6]], slope(expected, plain), rtol=1e-12, atol=1e-14)
    missing, whole = teacher.clone(), student.clone()
    missing[0, 1, 3] = -INF
    inputs = order(missing, whole)
    leaf = inputs[0].clone().requires_grad_()
    value = loss(leaf, inputs[1])
    assert value[0, 1] == INF and value.isfinite().sum() == 5
    gradient = slope(value, leaf)
    assert gradient.isfinite().all() and not gradient[0, 1].any() and gradient[0, 0].all()


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@FEWER
@given(batch=ragged())
def test_FK6_masked_slots_may_hold_anything(soiled: int, junk: float, batch: Batch) -> None:
    masked(forward_kl, list(pair(batch)), batch[0], soiled, junk)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@FEWER
@given(batch=ragged())
def test_RK6_masked_slots_may_hold_anything(soiled: int, junk: float, batch: Batch) -> None:
    masked(reverse_kl, list(pair(batch)), batch[0], soiled, junk)


BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@BOTH
def test_FK7_extreme_logits_are_finite(dtype: torch.dtype) -> None:
    assert check_extremes("forward_kl", dtype) == pytest.approx(2e4)


@BOTH
def test_RK7_extreme_logits_are_finite(dtype: torch.dtype) -> None:
    assert check_extremes("reverse_kl", dtype) == pytest.approx(2e4)


@BOTH
def test_JS9_extreme_logits_are_finite(dtype: torch.dtype) -> None:
    entropy = -sum(share * math.log(share) for share in (0.3, 0.7))
    assert check_extremes("generalized_jsd", dtype) == pytest.approx(entropy)


def check_extremes(name: str, dtype: torch.dtype) -> float:
    """±1e4 and one-hot rows: finite where no mass is missed; the value of [1e4, −1e4] against −itself."""
    loss, more = PAGE_OF[name]
    rows = [[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [0.0, 0.0, 0.0], [1e4, 1e4, 1e4], [0.0, -INF, -INF]]
    table = torch.tensor(rows, dtype=dtype)
    student, teacher = table.repeat_interleave(5, 0).requires_grad_(), table.repeat(5, 1)
    first, second = (teacher, student) if name == "forward_kl" else (student, teacher)
    missed = ((first.softmax(-1) > 0) & (second == -INF)).any(-1) & (name != "generalized_jsd")
    value = loss(student, teacher, **more)
    assert torch.equal(value == INF, missed) and value[~missed].isfinite().all()
    assert slope(value, student).isfinite().all()
    apart = torch.tensor([1e4, -1e4], dtype=dtype)
    return loss(apart, -apart, **more).item()


@DTYPES
def test_FK7_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    check_half_of("forward_kl", dtype)


@DTYPES
def test_RK7_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    check_half_of("reverse_kl", dtype)


@DTYPES
def test_JS9_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    check_half_of("generalized_jsd", dtype)


def check_half_of(name: str, dtype: torch.dtype) -> None:
    loss, more = PAGE_OF[name]
    inputs = pair((torch.ones(3, 4), torch.Generator().manual_seed(4)))
    check_half(functools.partial(loss, temperature=1.5, **more), inputs, dtype)


@given(batch=ragged())
def test_FK8_a_high_temperature_matches_centred_logits(batch: Batch) -> None:
    student, teacher = pair(batch)
    student.requires_grad_()
    value = forward_kl(student, teacher, temperature=1e4)
    gap = (student - teacher).detach()
    centred = gap - gap.mean(-1, keepdim=True)
    torch.testing.assert_close(value, centred.square().mean(-1) / 2, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(slope(value, student), centred / V, rtol=0.0, atol=1e-3)


@given(batch=ragged())
def test_RK8_at_a_high_temperature_both_directions_agree(batch: Batch) -> None:
    student, teacher = pair(batch)
    student.requires_grad_()
    values = [loss(student, teacher, temperature=1e4) for loss in (reverse_kl, forward_kl)]
    torch.testing.assert_close(*values, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(*(slope(value, student) for value in values), rtol=0.0, atol=1e-3)
    apart = [loss(student, teacher) for loss in (reverse_kl, forward_kl)]
    assert (apart[0] - apart[1]).abs().max() > 1e-4


@given(batch=ragged(), data=st.data())
def test_FK9_any_split_gives_the_gradient_of_the_step(batch: Batch, data: st.DataObject) -> None:
    split(functools.partial(forward_kl, temperature=1.4), list(pair(batch)), batch[0], data)


@given(batch=ragged(), data=st.data())
def test_RK9_any_split_gives_the_gradient_of_the_step(batch: Batch, data: st.DataObject) -> None:
    split(functools.partial(reverse_kl, temperature=1.4), list(pair(batch)), batch[0], data)


@given(batch=ragged(), data=st.data())
def test_JS10_any_split_gives_the_gradient_of_the_step(batch: Batch, data: st.DataObject) -> None:
    split(functools.partial(generalized_jsd, temperature=1.4, beta=0.3), list(pair(batch)), batch[0], data)


@given(batch=ragged())
def test_FK9_every_token_twice_is_the_same_loss(batch: Batch) -> None:
    mask, _ = batch
    student, teacher = pair(batch)

    def mean(times: int) -> Tensor:
        logits = (tensor.repeat_interleave(times, dim=1) for tensor in (student, teacher))
        longer = mask.repeat_interleave(times, dim=1)
        denom = local_denom(longer, mode="token_mean")
        return aggregate(forward_kl(*logits), longer, mode="token_mean", denom=denom)

    torch.testing.assert_close(mean(3), mean(1), rtol=1e-14, atol=0.0)
    rows = by_page("forward_kl", student, teacher)[mask]
    assert mean(1).item() == pytest.approx(sum(rows.tolist()) / len(rows), rel=1e-12)


# ---- what they give on average, over every completion of a small policy

TREE, STEP = grow(vocabulary=3, steps=3), grow(vocabulary=3, steps=1)
STUDENT, TEACHER = (np.random.default_rng(11).normal(size=(2, TREE.size, 3)) * 1.5).copy()


def token_losses(samples: Samples, loss: Loss, tree_states: Tensor) -> Tensor:
    """The loss of every token against the teacher of its state, 0 behind the end."""
    teacher = torch.tensor(TEACHER)[tree_states[torch.tensor(samples.rows)]]
    return loss(samples.logits, teacher).masked_fill(~samples.mask, 0.0)


def test_FK10_on_teacher_samples_it_is_the_kl_of_whole_sequences() -> None:
    q = distribution(TEACHER)
    states = torch.tensor(TREE.states)

    def loss(samples: Samples) -> Tensor:
        return (samples.weight * token_losses(samples, forward_kl, states)).sum()

    truth = forward_kl_gradient(TREE, distribution(STUDENT), q)
    found = expected_gradient(TREE, STUDENT, np.zeros(len(TREE.actions)), loss, drawn_from=q)
    np.testing.assert_allclose(found, truth, rtol=0.0, atol=1e-14)
    assert np.abs(truth).max() > 0.1


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_RK10_on_student_samples_it_lacks_what_a_token_leads_to(steps: int, with_states: bool) -> None:
    tree = TREE if steps == 3 else STEP
    logits, states = STUDENT[: tree.size], torch.tensor(tree.states)

    def loss(samples: Samples) -> Tensor:
        losses = token_losses(samples, reverse_kl, states)
        if with_states:
            later = losses.detach().flip(-1).cumsum(-1).flip(-1) - losses.detach()
            losses = losses + token_logps(samples.logits, samples.target_ids) * later * samples.mask
        return (samples.weight * losses).sum()

    truth = kl_gradient(tree, distribution(logits), distribution(TEACHER[: tree.size]))
    found = expected_gradient(tree, logits, np.zeros(len(tree.actions)), loss)
    cosine, ratio = compare(found, truth)
    if with_states or steps == 1:
        np.testing.assert_allclose(found, truth, rtol=0.0, atol=1e-14)
    else:
        assert 0.0 < cosine < 0.999 and abs(ratio - 1.0) > 0.001


# ---- the generalised Jensen–Shannon divergence


@TAU
@given(batch=ragged())
def test_JS1_value_equals_the_page(temperature: float, batch: Batch) -> None:
    check_value("generalized_jsd", temperature, batch)


@TAU
@given(batch=ragged())
def test_JS2_the_ends_are_the_two_kls(temperature: float, batch: Batch) -> None:
    student, teacher = pair(batch, scale=1.0)
    student.requires_grad_()
    for beta, size, kl in ((1e-9, 1e-9, forward_kl), (1.0 - 1e-9, 1e-9, reverse_kl)):
        value = generalized_jsd(student, teacher, beta=beta, temperature=temperature) / size
        expected = kl(student, teacher, temperature=temperature)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(slope(value, student), slope(expected, student), rtol=1e-3, atol=1e-4)


@TAU
@given(batch=ragged(), beta=st.floats(0.02, 0.98))
def test_JS3_between_zero_and_the_entropy_of_beta(temperature: float, batch: Batch, beta: float) -> None:
    bound = -(beta * math.log(beta) + (1.0 - beta) * math.log(1.0 - beta)) * temperature**2
    assert bound <= (math.log(2.0) + 1e-15) * temperature**2
    student, teacher = pair(batch, scale=20.0)
    value = generalized_jsd(student, teacher, beta=beta, temperature=temperature)
    assert (value > -1e-14).all() and (value <= bound * (1.0 + 1e-14)).all() and value.any()
    share = torch.arange(V) < 2
    apart = student.masked_fill(share, -INF), teacher.masked_fill(~share, -INF)
    value = generalized_jsd(*apart, beta=beta, temperature=temperature)
    torch.testing.assert_close(value, torch.full_like(value, bound), rtol=1e-12, atol=0.0)


@TAU
@given(batch=ragged(), beta=st.floats(0.05, 0.95))
def test_JS4_teacher_and_student_change_places(temperature: float, batch: Batch, beta: float) -> None:
    student, teacher = pair(batch)
    found = generalized_jsd(student, teacher, beta=beta, temperature=temperature)
    other = generalized_jsd(teacher, student, beta=1.0 - beta, temperature=temperature)
    torch.testing.assert_close(found, other, rtol=1e-11, atol=1e-14)
    if abs(beta - 0.5) > 0.1:
        assert (found - generalized_jsd(teacher, student, beta=beta, temperature=temperature)).any()


@TAU
@given(batch=ragged(), beta=st.floats(0.05, 0.95))
def test_JS5_gradient_in_closed_form(temperature: float, batch: Batch, beta: float) -> None:
    student, teacher = pair(batch)
    student.requires_grad_()
    p_s, p_t = ((logits.detach() / temperature).softmax(-1) for logits in (student, teacher))
    gap = (p_s / (beta * p_t + (1.0 - beta) * p_s)).log()
    expected = temperature * (1.0 - beta) * p_s * (gap - (p_s * gap).sum(-1, keepdim=True))
    found = slope(generalized_jsd(student, teacher, beta=beta, temperature=temperature), student)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-13)


@TAU
@given(batch=ragged())
def test_JS6_zero_for_the_teacher_itself(temperature: float, batch: Batch) -> None:
    _, teacher = pair(batch)
    leaf = teacher.clone().requires_grad_()
    value = generalized_jsd(leaf, teacher, beta=0.3, temperature=temperature)
    assert value.abs().max() < 1e-14 and slope(value, leaf).abs().max() < 1e-14
    check_only_gradient(functools.partial(generalized_jsd, beta=0.3), pair(batch), to=[0])


@given(batch=ragged())
def test_JS7_minus_infinity_anywhere_is_finite(batch: Batch) -> None:
    student, teacher = pair(batch)
    student, teacher = cut(student, batch[1], keep=0), cut(teacher, batch[1], keep=1)
    student[..., 2] = teacher[..., 2] = -INF
    student.requires_grad_()
    value = generalized_jsd(student, teacher, beta=0.3)
    gradient = slope(value, student)
    assert value.isfinite().all() and gradient.isfinite().all()
    assert not gradient[student == -INF].any() and gradient.any()


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@FEWER
@given(batch=ragged())
def test_JS8_masked_slots_may_hold_anything(soiled: int, junk: float, batch: Batch) -> None:
    masked(functools.partial(generalized_jsd, beta=0.3), list(pair(batch)), batch[0], soiled, junk)


# ---- a list of the teacher's top tokens


def top(teacher: Tensor, count: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The teacher's `count` likeliest tokens: log-probabilities at the temperature, and ids."""
    logps, ids = (teacher / temperature).log_softmax(-1).topk(count, dim=-1)
    return logps, ids


@TAU
@given(batch=ragged(), count=st.integers(1, V))
def test_TK1_value_equals_the_page(temperature: float, batch: Batch, count: int) -> None:
    student, teacher = pair(batch)
    for logits in (teacher, cut(teacher, batch[1])):
        logps, ids = top(logits, count, temperature)
        rows = zip(*(tensor.flatten(0, 1).tolist() for tensor in (student, logps, ids)), strict=True)
        expected = [scalar("top_k_forward_kl")(*row, temperature) for row in rows]
        found = top_k_forward_kl(student, logps, ids, temperature=temperature)
        torch.testing.assert_close(found.flatten().tolist(), expected, rtol=1e-9, atol=1e-9)


@TAU
@given(batch=ragged())
def test_TK2_the_whole_vocabulary_is_forward_kl(temperature: float, batch: Batch) -> None:
    student, teacher = pair(batch)
    student.requires_grad_()
    for logits in (teacher, cut(teacher, batch[1])):
        logps, ids = top(logits, V, temperature)
        order = torch.rand(ids.shape, generator=batch[1]).argsort(-1)
        found = top_k_forward_kl(
            student, logps.gather(-1, order), ids.gather(-1, order), temperature=temperature
        )
        expected = forward_kl(student, logits, temperature=temperature)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
        torch.testing.assert_close(slope(found, student), slope(expected, student), rtol=0.0, atol=1e-12)


@TAU
@given(batch=ragged())
def test_TK3_a_lower_bound_that_grows_with_the_list(temperature: float, batch: Batch) -> None:
    student, teacher = pair(batch, width=8)
    bounds = [
        top_k_forward_kl(student, *top(teacher, count, temperature), temperature=temperature)
        for count in range(1, 9)
    ]
    whole = forward_kl(student, teacher, temperature=temperature)
    for less, more in zip(bounds, [*bounds[1:], whole], strict=True):
        assert (less >= -1e-14).all() and (less <= more + 1e-13).all()
    assert (bounds[0] < whole - 1e-9).any()


@TAU
@given(batch=ragged(), count=st.integers(1, V - 1))
def test_TK4_gradient_in_closed_form_and_none_to_the_teacher(
    temperature: float, batch: Batch, count: int
) -> None:
    student, teacher = pair(batch)
    student.requires_grad_()
    logps, ids = top(teacher, count, temperature)
    p_s = (student.detach() / temperature).softmax(-1)
    listed = torch.zeros_like(p_s).scatter(-1, ids, logps.exp())
    tails = [((listed == 0) * p).sum(-1, keepdim=True) for p in ((teacher / temperature).softmax(-1), p_s)]
    expected = temperature * torch.where(listed > 0, p_s - listed, p_s * (1.0 - tails[0] / tails[1]))
    found = slope(top_k_forward_kl(student, logps, ids, temperature=temperature), student)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)
    loss = functools.partial(top_k_forward_kl, temperature=temperature)
    check_only_gradient(loss, [student.detach(), logps, ids], to=[0])


@TAU
@given(batch=ragged(), count=st.integers(1, V))
def test_TK5_zero_for_the_teacher_itself(temperature: float, batch: Batch, count: int) -> None:
    _, teacher = pair(batch)
    leaf = teacher.clone().requires_grad_()
    value = top_k_forward_kl(leaf, *top(teacher, count, temperature), temperature=temperature)
    assert value.abs().max() < 1e-13 and slope(value, leaf).abs().max() < 1e-13


def log_row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


STUDENT_ROW, SURE = log_row(0.5, 0.25, 0.25), log_row(0.75, 0.25, 0.0)


@pytest.mark.parametrize(
    ("student", "logps", "ids", "expected"),
    [
        (STUDENT_ROW, log_row(0.75, 0.25), [0, 1], 0.75 * math.log(1.5)),  # no tail at the teacher
        (STUDENT_ROW, log_row(0.75, 0.25 + 1e-12), [0, 1], 0.75 * math.log(1.5)),  # rounding above 1
        (SURE, log_row(0.5, 0.5), [1, 0], 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),  # none at either
        (SURE, log_row(0.5, 0.499), [1, 0], 0.5 * math.log(2) + 0.499 * math.log(0.499 / 0.75)),  # rounding
        (SURE, log_row(0.5, 0.25), [1, 0], INF),  # a quarter is no rounding
        (
            STUDENT_ROW,
            log_row(0.8, 0.0, 0.0),
            [0, 0, 0],
            0.8 * math.log(1.6) + 0.2 * math.log(0.4),
        ),  # filled up
        (STUDENT_ROW, log_row(0.8, 0.0, 0.0), [0, 2, 1], 0.8 * math.log(1.6) + 0.2 * math.log(0.4)),
        (SURE, log_row(0.9, 0.1), [0, 2], INF),  # the student cannot say a token of the list
        (STUDENT_ROW, log_row(0.6, 0.5), [0, 1], math.nan),
        (STUDENT_ROW, log_row(1.0, 1.0), [0, 0], math.nan),  # padding with zeros
    ],
)
def test_TK6_lists_that_are_not_clean(
    student: Tensor, logps: Tensor, ids: list[int], expected: float
) -> None:
    leaf = student.clone().requires_grad_()
    value = top_k_forward_kl(leaf, logps, torch.tensor([ids]))
    assert value.item() == pytest.approx(expected, abs=1e-10, nan_ok=True)
    gradient = slope(value, leaf)
    assert gradient.isfinite().all() and gradient.any() == math.isfinite(expected)


def test_TK6_a_half_precision_list_of_the_whole_vocabulary() -> None:
    student, teacher = pair((torch.ones(20, 3), torch.Generator().manual_seed(6)), width=40)
    logps, ids = top(teacher, 40)
    for dtype in (torch.float16, torch.bfloat16):
        found = top_k_forward_kl(student, logps.to(dtype), ids)
        assert (logps.to(dtype).double().exp().sum(-1) != 1.0).all()
        torch.testing.assert_close(found, forward_kl(student, teacher), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("junk", [*JUNK, 0.0])
@pytest.mark.parametrize("soiled", [0, 1])
@FEWER
@given(batch=ragged(), count=st.integers(2, V))
def test_TK7_masked_slots_may_hold_anything(soiled: int, junk: float, batch: Batch, count: int) -> None:
    student, teacher = pair(batch)
    logps, ids = top(teacher, count)
    padded = ids.masked_fill(~batch[0][..., None], 0)  # the padding of ids is one id, K times

    def loss(logits: Tensor, listed: Tensor) -> Tensor:
        zeros = (listed == 0.0).all(-1, keepdim=True)
        return top_k_forward_kl(logits, listed, torch.where(zeros, padded, ids))

    masked(loss, [student, logps], batch[0], soiled, junk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_TK8_extreme_logits_are_finite(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [0.0, 0.0, 0.0]], dtype=dtype)
    student, teacher = rows.repeat_interleave(3, 0), rows.repeat(3, 1)
    for count in (1, 2, 3):
        leaf = student.clone().requires_grad_()
        value = top_k_forward_kl(leaf, *top(teacher, count, 0.5), temperature=0.5)
        assert value.isfinite().all() and slope(value, leaf).isfinite().all() and (value >= 0).all()
    certain = top_k_forward_kl(rows[:1], torch.zeros(1, 1, dtype=dtype), torch.tensor([[1]]))
    assert certain.item() == pytest.approx(2e4)


@DTYPES
def test_TK8_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = pair((torch.ones(3, 4), torch.Generator().manual_seed(4)))
    check_half(functools.partial(top_k_forward_kl, temperature=1.5), [student, *top(teacher, 2, 1.5)], dtype)


@given(batch=ragged(), data=st.data())
def test_TK9_any_split_gives_the_gradient_of_the_step(batch: Batch, data: st.DataObject) -> None:
    student, teacher = pair(batch)
    split(functools.partial(top_k_forward_kl, temperature=1.0), [student, *top(teacher, 2)], batch[0], data)


# ---- hidden states

D_S, D_T = 3, 4


def states(batch: Batch) -> list[Tensor]:
    """Hidden states of a student, of a wider teacher, and a map between them."""
    mask, generator = batch
    student, teacher = normal(generator, *mask.shape, D_S), normal(generator, *mask.shape, D_T)
    return [student, teacher, normal(generator, D_S, D_T)]


@given(batch=ragged())
def test_HS1_value_equals_the_page(batch: Batch) -> None:
    student, teacher, projection = states(batch)
    rows = zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True)
    expected = [scalar("hidden_state_loss")(*row, projection.tolist()) for row in rows]
    found = hidden_state_loss(student, teacher, projection)
    assert found.shape == batch[0].shape
    torch.testing.assert_close(found.flatten().tolist(), expected, rtol=1e-9, atol=1e-9)


@given(batch=ragged())
def test_HS2_gradients_in_closed_form_and_none_to_the_teacher(batch: Batch) -> None:
    student, teacher, projection = states(batch)
    gap = student @ projection - teacher
    leaves = student.clone().requires_grad_(), projection.clone().requires_grad_()
    value = hidden_state_loss(leaves[0], teacher, leaves[1])
    of_student, of_projection = torch.autograd.grad(value.sum(), leaves)
    torch.testing.assert_close(of_student, 2 / D_T * gap @ projection.T, rtol=1e-12, atol=1e-13)
    expected = 2 / D_T * torch.einsum("bts,btd->sd", student, gap)
    torch.testing.assert_close(of_projection, expected, rtol=1e-12, atol=1e-12)
    check_only_gradient(hidden_state_loss, states(batch), to=[0, 2])


def test_HS2_gradcheck() -> None:
    student, teacher, projection = states((torch.ones(2, 3), torch.Generator().manual_seed(8)))
    leaves = student.requires_grad_(), projection.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: hidden_state_loss(h, teacher, w), leaves)


@given(batch=ragged())
def test_HS3_equal_states_give_zero(batch: Batch) -> None:
    _, teacher, _ = states(batch)
    leaf, projection = teacher.clone().requires_grad_(), torch.eye(D_T, dtype=torch.float64).requires_grad_()
    value = hidden_state_loss(leaf, teacher, projection)
    assert (
        not value.any()
        and not slope(value, leaf).any()
        and not slope(hidden_state_loss(leaf, teacher, projection), projection).any()
    )


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("soiled", [0, 1])
@FEWER
@given(batch=ragged())
def test_HS4_masked_slots_may_hold_anything(soiled: int, junk: float, batch: Batch) -> None:
    mask, _ = batch
    inputs = states(batch)
    masked(lambda h, g: hidden_state_loss(h, g, inputs[2]), inputs[:2], mask, soiled, junk)

    def of_projection(tensors: list[Tensor]) -> Tensor:
        leaf = tensors[2].clone().requires_grad_()
        value = aggregate(hidden_state_loss(*tensors[:2], leaf), mask, mode="token_mean", denom=1.7)
        return torch.autograd.grad(value, leaf)[0]

    clean = of_projection(inputs)
    inputs[soiled] = torch.where(mask[..., None], inputs[soiled], torch.full_like(inputs[soiled], junk))
    assert torch.equal(of_projection(inputs), clean) and clean.any()


@pytest.mark.parametrize("leaf", [0, 2])
@given(batch=ragged(), data=st.data())
def test_HS5_any_split_gives_the_gradient_of_the_step(leaf: int, batch: Batch, data: st.DataObject) -> None:
    mask, _ = batch
    student, teacher, projection = states(batch)
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in mask])
    if leaf == 0:
        split(lambda h, g: hidden_state_loss(h, g, projection), [student, teacher], mask, data)
        return
    weights = projection.requires_grad_()

    def gradient(rows: Tensor) -> Tensor:
        values = hidden_state_loss(student[rows], teacher[rows], weights)
        return torch.autograd.grad(aggregate(values, mask[rows], mode="token_mean", denom=7.0), weights)[0]

    whole = gradient(torch.arange(len(mask)))
    parts = sum(gradient((owner == part).nonzero()[:, 0]) for part in range(3))
    torch.testing.assert_close(parts, whole, rtol=0.0, atol=1e-14 * max(float(whole.abs().max()), 1.0))


@pytest.mark.parametrize("wide", [0, 1, 2])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
def test_HS6_mixed_dtypes_promote(wide: int, narrow: torch.dtype) -> None:
    exact = [tensor.to(narrow).double() for tensor in states((torch.ones(2, 3), torch.Generator()))]
    mixed = [tensor if place == wide else tensor.to(narrow) for place, tensor in enumerate(exact)]
    assert torch.equal(hidden_state_loss(*mixed), hidden_state_loss(*exact))


@DTYPES
def test_HS6_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    check_half(hidden_state_loss, states((torch.ones(3, 4), torch.Generator().manual_seed(9))), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_HS6_large_states_are_finite(dtype: torch.dtype) -> None:
    student = torch.full((1, 2, D_S), 1e4, dtype=dtype, requires_grad=True)
    projection = torch.ones(D_S, D_T, dtype=dtype, requires_grad=True)
    value = hidden_state_loss(student, torch.full((1, 2, D_T), -1e4, dtype=dtype), projection)
    assert value.tolist() == [[pytest.approx(1.6e9)] * 2]
    mean = slope(value / 2, student).float()  # float16 ends at 65504
    torch.testing.assert_close(mean, torch.full_like(mean, 4e4), rtol=1e-3, atol=0.0)


@given(batch=ragged())
def test_HS7_units_that_come_twice_change_nothing(batch: Batch) -> None:
    student, teacher, projection = states(batch)
    found = hidden_state_loss(student, torch.cat([teacher] * 2, -1), torch.cat([projection] * 2, -1))
    torch.testing.assert_close(found, hidden_state_loss(student, teacher, projection), rtol=1e-13, atol=0.0)


# ---- shapes and refusals


@pytest.mark.parametrize("name", PAGE_OF)
def test_any_number_of_dimensions_before_the_vocabulary(name: str) -> None:
    loss, more = PAGE_OF[name]
    student, teacher = pair((torch.ones(2, 3), torch.Generator().manual_seed(5)))
    whole = loss(student, teacher, **more)
    assert whole.shape == (2, 3)
    assert torch.equal(loss(student[0, 1], teacher[0, 1], **more), whole[0, 1])
    assert loss(student[:0], teacher[:0], **more).shape == (0, 3)


def test_worked_numbers_of_the_formula_collection() -> None:
    teacher = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    for student, value in (([0.6, 0.4], 0.2263), ([0.85, 0.15], 0.0109)):
        assert forward_kl(torch.tensor(student).log().double(), teacher).item() == pytest.approx(
            value, abs=5e-5
        )
    assert namespace("forward_kl")["part"](0.0, 0.0) == 0


Z, IDS = torch.zeros(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.long)
LIST = torch.full((2, 3, 1), -1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: forward_kl(Z, Z[:, :2]), r"student_logits \(2, 3, 4\), teacher_logits \(2, 2, 4\)"),
        (lambda: reverse_kl(Z, Z[..., :3]), r"student_logits \(2, 3, 4\), teacher_logits \(2, 3, 3\)"),
        (lambda: forward_kl(Z, Z.long()), "teacher_logits must be floating point, got torch.int64"),
        (lambda: forward_kl(Z[..., :0], Z[..., :0]), r"vocabulary dimension, got shape \(2, 3, 0\)"),
        (lambda: forward_kl(Z, Z, temperature=0.0), "temperature must be positive and finite, got 0.0"),
        (lambda: reverse_kl(Z, Z, temperature=-1.0), "temperature must be positive and finite, got -1.0"),
        (lambda: generalized_jsd(Z, Z, beta=0.0), r"beta must lie in \(0, 1\), got 0.0"),
        (lambda: generalized_jsd(Z, Z, beta=1.0), r"beta must lie in \(0, 1\), got 1.0"),
        (lambda: generalized_jsd(Z, Z, beta=math.nan), r"beta must lie in \(0, 1\), got nan"),
        (lambda: generalized_jsd(Z, Z, beta=0.5, temperature=INF), "temperature must be .* got inf"),
        (lambda: top_k_forward_kl(Z, LIST, IDS[..., 0]), r"teacher_logps \(2, 3, 1\), teacher_ids \(2, 3\)"),
        (
            lambda: top_k_forward_kl(Z, LIST[..., 0], IDS[..., 0]),
            r"teacher_ids must be \(..., K\) over student_logits \(..., V\): \(2, 3\) over \(2, 3, 4\)",
        ),
        (lambda: top_k_forward_kl(Z, LIST[..., :0], IDS[..., :0]), r"\(2, 3, 0\) over \(2, 3, 4\)"),
        (lambda: top_k_forward_kl(Z, LIST, IDS + 4), r"teacher_ids must lie in \[0, 4\), got 4"),
        (lambda: top_k_forward_kl(Z, LIST, IDS - 1), r"teacher_ids must lie in \[0, 4\), got -1"),
        (lambda: top_k_forward_kl(Z, LIST, LIST), "teacher_ids must hold integers, got torch.float32"),
        (
            lambda: top_k_forward_kl(Z, LIST.expand(2, 3, 2), IDS.expand(2, 3, 2) + 3),
            "teacher_ids must be distinct, got 3 twice",
        ),
        (lambda: top_k_forward_kl(Z, LIST, IDS, temperature=0.0), "temperature must be positive"),
        (
            lambda: hidden_state_loss(Z, Z, torch.zeros(3, 4)),
            r"student_hidden \(2, 3, 4\) times projection \(3, 4\) must be as teacher_hidden \(2, 3, 4\)",
        ),
        (lambda: hidden_state_loss(Z, Z[:1], torch.eye(4)), r"as teacher_hidden \(1, 3, 4\)"),
        (lambda: hidden_state_loss(Z, Z, torch.zeros(4)), r"projection must have 2 dimension\(s\)"),
        (lambda: hidden_state_loss(Z.sum(), Z, torch.eye(4)), r"student_hidden \(\) times"),
        (
            lambda: hidden_state_loss(Z, Z[..., :0], torch.zeros(4, 0)),
            r"teacher_hidden \(2, 3, 0\), with D_T ≥ 1",
        ),
    ],
)
def test_bad_input_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
