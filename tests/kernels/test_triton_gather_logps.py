"""gather_logps against the losses in float64: values, gradients of all three outputs, broken rows."""

import math

import pytest
import torch
from torch import Generator, Tensor

from tests.kernels.exact import exact_numbers, farthest, gradients, naive_numbers, upstream

pytest.importorskip("triton", reason="the kernels need triton (the extra `kernels`)")

from nanopost.kernels.gather_logps import BACKWARD, FORWARD, gather_logps

pytestmark = pytest.mark.usefixtures("interpreted")

BLOCK = FORWARD["BLOCK"]
SHAPES = [(1, 3), (5, 37), (2, BLOCK), (3, 2 * BLOCK + 37)]


def drawn(rows: int, vocabulary: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits in float32, a leaf, and targets; those of the last two rows are the first and the last id."""
    generator = Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[-2:] = torch.tensor([0, vocabulary - 1])[-min(rows, 2) :]
    return logits.requires_grad_(), targets


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
def test_values_and_gradients_equal_the_losses(rows: int, vocabulary: int, temperature: float) -> None:
    logits, targets = drawn(rows, vocabulary, seed=vocabulary)
    found = gather_logps(logits, targets, temperature=temperature)
    exact = exact_numbers(logits, targets, temperature)
    for output, true in zip(found, exact, strict=True):
        assert output.dtype == torch.float32 and output.shape == (rows,)
        torch.testing.assert_close(output.double(), true, rtol=2e-6, atol=2e-6)
    for seed in range(3):
        grads = upstream(rows, seed)
        (slope,), (true,) = gradients(found, grads, logits), gradients(exact, grads, logits)
        torch.testing.assert_close(slope, true, rtol=1e-5, atol=1e-6)
        assert not slope[1:2].any()


@pytest.mark.parametrize("output", range(3))
def test_each_output_sends_its_own_gradient(output: int) -> None:
    logits, targets = drawn(4, 37, seed=1)
    grads = [grad if index == output else torch.zeros(4) for index, grad in enumerate(upstream(4, 5))]
    (slope,) = gradients(gather_logps(logits, targets, temperature=0.8), grads, logits)
    (true,) = gradients(exact_numbers(logits, targets, 0.8), grads, logits)
    torch.testing.assert_close(slope, true, rtol=1e-5, atol=1e-6)
    assert slope.any()


def test_a_plain_sum_is_differentiated() -> None:
    logits, targets = drawn(4, 37, seed=2)
    gather_logps(logits, targets)[0].sum().backward()
    (true,) = gradients(exact_numbers(logits, targets, 1.0)[:1], [torch.ones(4)], logits)
    torch.testing.assert_close(logits.grad, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "vocabulary"), [(5, 37), (3, BACKWARD["BLOCK"] + 37)])
def test_half_precision_errs_no_more_than_the_naive_program(rows: int, vocabulary: int) -> None:
    full, targets = drawn(rows, vocabulary, seed=3)
    logits = full.detach().half().requires_grad_()
    grads = upstream(rows, 7)
    found, naive, exact = (
        run(logits, targets, temperature=0.7) for run in (gather_logps, naive_numbers, exact_numbers)
    )
    for output, rough, true in zip(found, naive, exact, strict=True):
        assert farthest(output, true) <= farthest(rough, true)
    (slope,), (rough,), (true,) = (gradients(outputs, grads, logits) for outputs in (found, naive, exact))
    assert slope.dtype == torch.float16
    assert farthest(slope, true.double()) <= farthest(rough, true.double())


def test_the_gradient_of_a_likely_target_survives_half_precision() -> None:
    logits = torch.zeros(3, 37, dtype=torch.float16)
    logits[:, 5] = torch.tensor([9.0, 11.0, 12.0])  # 1 − p = 0.4 %, 0.06 % and 0.02 %
    logits.requires_grad_()
    gather_logps(logits, torch.full((3,), 5))[0].sum().backward()
    missing = 36 / (36 + logits[:, 5].double().exp())
    assert ((logits.grad[:, 5] - missing).abs() <= 2.0**-10 * missing).all()


@pytest.mark.parametrize("vocabulary", [37, BLOCK + 37])
def test_logits_of_minus_infinity_are_outside(vocabulary: int) -> None:
    logits, targets = drawn(6, vocabulary, seed=4)
    with torch.no_grad():
        logits[0, 1:] = -torch.inf  # one token is left
        logits[1, : vocabulary - 3] = -torch.inf  # nothing finite in the first block
        logits[2, 3:] = -torch.inf  # and nothing in the last
        logits[3, ::2] = -torch.inf
    targets[:5] = torch.tensor([0, vocabulary - 1, 2, 1, 3])
    grads = upstream(6, 11)
    found = gather_logps(logits, targets, temperature=0.9)
    exact = exact_numbers(logits, targets, 0.9)
    for output, true in zip(found, exact, strict=True):
        torch.testing.assert_close(output.double(), true, rtol=2e-6, atol=2e-6)
    assert found[0][0] == 0.0 and found[1][0] == 0.0
    (slope,), (true,) = gradients(found, grads, logits), gradients(exact, grads, logits)
    torch.testing.assert_close(slope, true, rtol=1e-5, atol=1e-6)


def test_a_target_of_minus_infinity_has_a_gradient() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True)
    found = gather_logps(logits, torch.tensor([1]))
    assert found[0].item() == -math.inf
    (slope,) = gradients(found[:1], [torch.tensor([0.5])], logits)
    e = math.e
    torch.testing.assert_close(slope, 0.5 * torch.tensor([[-1 / (1 + e), 1.0, -e / (1 + e)]]))


def test_large_logits() -> None:
    logits, targets = drawn(4, BLOCK + 37, seed=6, scale=1.0)
    with torch.no_grad():
        logits[0] += 1e4
        logits[1] -= 1e4
        logits[2] *= 1e4
        logits[3, targets[3]] = 1e4
    found = gather_logps(logits, targets, temperature=0.7)
    exact = exact_numbers(logits, targets, 0.7)
    for output, true in zip(found, exact, strict=True):
        torch.testing.assert_close(output.double(), true, rtol=1e-6, atol=2e-6)
    assert found[0][3] == 0.0 and found[1][3] == 0.0
    grads = upstream(4, 13)
    (slope,), (true,) = gradients(found, grads, logits), gradients(exact, grads, logits)
    # float32 knows a logsumexp of 14,000 to 0.0005, so p to as much of itself
    torch.testing.assert_close(slope, true, rtol=2e-3, atol=1e-6)


def test_a_broken_row_stays_alone() -> None:
    logits, targets = drawn(6, 37, seed=8)
    with torch.no_grad():
        logits[0, 3], logits[1, 4], logits[2] = torch.nan, torch.inf, -torch.inf
    found = gather_logps(logits, targets, temperature=0.7)
    for output in found[:2]:
        assert output.isnan().tolist() == [True] * 3 + [False] * 3
    grads = [torch.full((6,), torch.nan).where(torch.arange(6) < 3, 0.5) for _ in range(3)]
    (slope,) = gradients(found, grads, logits)
    (true,) = gradients(exact_numbers(logits[3:], targets[3:], 0.7), [grad[3:] for grad in grads], logits)
    assert not slope[:3].any()
    torch.testing.assert_close(slope[3:], true[3:], rtol=1e-5, atol=1e-6)


def test_an_id_outside_the_vocabulary_is_nan() -> None:
    logits, _ = drawn(4, 37, seed=9)
    targets = torch.tensor([-1, 36, 37, -100], dtype=torch.int32)
    logps, entropies, logsumexps = gather_logps(logits, targets)
    assert logps.isnan().tolist() == [True, False, True, True]
    assert entropies.isfinite().all() and logsumexps.isfinite().all()


def test_no_rows() -> None:
    found = gather_logps(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert [output.shape for output in found] == [(0,)] * 3


@pytest.mark.parametrize(
    ("logits", "target_ids", "temperature", "message"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2), 1.0, "logits must have 2 dimension"),
        (torch.zeros(2, 3).double(), torch.zeros(2).long(), 1.0, "logits must be float32, .* torch.float64"),
        (torch.zeros(3, 2).T, torch.zeros(2).long(), 1.0, r"contiguous, got shape \(2, 3\) with strides"),
        (torch.zeros(2, 3), torch.zeros(3).long(), 1.0, r"target_ids must be \(2,\) of .* got \(3,\)"),
        (torch.zeros(2, 3), torch.zeros(2), 1.0, r"target_ids must be .* of torch.float32"),
        (torch.zeros(2, 3), torch.zeros(4).long()[::2], 1.0, "target_ids must be contiguous"),
        (torch.zeros(2, 3), torch.zeros(2).long(), 0.0, "temperature must be positive and finite, got 0.0"),
    ],
)
def test_what_does_not_fit_is_refused(
    logits: Tensor, target_ids: Tensor, temperature: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gather_logps(logits, target_ids, temperature=temperature)
