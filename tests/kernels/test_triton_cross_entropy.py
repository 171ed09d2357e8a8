"""cross_entropy against −token_logps in float64, and its gradient in the place of the logits."""

import pytest
import torch
from torch import Generator, Tensor

from nanopost.losses import token_logps
from tests.kernels.exact import farthest, upstream

pytest.importorskip("triton", reason="the kernels need triton (the extra `kernels`)")

from nanopost.kernels.cross_entropy import FORWARD, cross_entropy

pytestmark = pytest.mark.usefixtures("interpreted")

BLOCK = FORWARD["BLOCK"]


def drawn(rows: int, vocabulary: int, seed: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, vocabulary, generator=generator)
    return logits, torch.randint(vocabulary, (rows,), generator=generator)


def run(logits: Tensor, targets: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and the gradient of the logits, which are copied first: they will be overwritten."""
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf.clone(), targets)
    return losses.detach(), torch.autograd.grad(losses, leaf, grads)[0]


def exactly(logits: Tensor, targets: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """The same from −token_logps, in float64."""
    leaf = logits.double().requires_grad_()
    losses = -token_logps(leaf, targets)
    return losses.detach(), torch.autograd.grad(losses, leaf, grads.double())[0]


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 3), (5, 37), (2, BLOCK), (4, 2 * BLOCK + 37)])
def test_value_and_gradient_equal_the_loss(rows: int, vocabulary: int) -> None:
    logits, targets = drawn(rows, vocabulary, seed=vocabulary)
    (grads,) = upstream(rows, 3, outputs=1)
    grads = torch.where(torch.arange(rows) % 3 == 1, 0.0, grads + 0.375)  # no two alike, some 0
    (losses, slope), (true, true_slope) = (f(logits, targets, grads) for f in (run, exactly))
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), true, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(slope.double(), true_slope, rtol=1e-5, atol=1e-6)
    assert not slope[1::3].any()


def test_half_precision_errs_no_more_than_the_naive_program() -> None:
    logits, targets = drawn(5, BLOCK + 37, seed=2)
    logits, grads = logits.half(), torch.tensor([0.5, 0.0, -1.25, 2.0, 0.125])
    (losses, slope), (true, true_slope) = (f(logits, targets, grads) for f in (run, exactly))
    leaf = logits.clone().requires_grad_()
    rough = -leaf.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    (rough_slope,) = torch.autograd.grad(rough, leaf, grads.half())
    assert farthest(losses, true) <= farthest(rough, true)
    assert slope.dtype == torch.float16 and farthest(slope, true_slope) <= farthest(rough_slope, true_slope)


def test_the_gradient_of_a_likely_target_survives_half_precision() -> None:
    logits = torch.zeros(2, 37, dtype=torch.float16)
    logits[:, 5] = torch.tensor([9.0, 12.0])
    _, slope = run(logits, torch.full((2,), 5), torch.ones(2))
    missing = -36 / (36 + logits[:, 5].double().exp())
    assert ((slope[:, 5] - missing).abs() <= 2.0**-10 * missing.abs()).all()


def test_minus_infinity_and_large_logits() -> None:
    logits, targets = drawn(5, BLOCK + 37, seed=4, scale=1.0)
    logits[0, 1:] = -torch.inf
    logits[1, : BLOCK + 30] = -torch.inf
    logits[2] += 1e4
    logits[3] *= 1e4
    targets[:3] = torch.tensor([0, BLOCK + 36, 7])
    grads = torch.tensor([0.5, -1.25, 2.0, 0.125, 0.75])
    (losses, slope), (true, true_slope) = (f(logits, targets, grads) for f in (run, exactly))
    torch.testing.assert_close(losses.double(), true, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(slope.double(), true_slope, rtol=2e-3, atol=1e-6)  # of lse = 10,000: 0.0005
    assert losses[0] == 0.0


def test_a_broken_row_stays_alone_and_a_foreign_id_is_nan() -> None:
    logits, targets = drawn(6, 37, seed=5)
    logits[0, 3], logits[1, 4], logits[2] = torch.nan, torch.inf, -torch.inf
    targets[3:5] = torch.tensor([37, -1])
    losses, slope = run(logits, targets, torch.full((6,), torch.nan).where(torch.arange(6) < 3, 0.5))
    assert losses.isnan().tolist() == [True] * 5 + [False]
    assert not slope[:3].any() and slope[3:].isfinite().all()


def test_the_gradient_takes_the_place_of_the_logits() -> None:
    logits, targets = drawn(4, 37, seed=6)
    leaf = logits.clone().requires_grad_()
    computed = leaf.clone()
    seen: list[Tensor] = []
    computed.register_hook(seen.append)
    losses = cross_entropy(computed, targets)
    assert torch.equal(computed, logits)  # forward only reads
    losses.sum().backward()
    (true,) = (exactly(logits, targets, torch.ones(4))[1],)
    assert seen[0].data_ptr() == computed.data_ptr()
    torch.testing.assert_close(computed.detach().double(), true, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), true, rtol=1e-5, atol=1e-6)


def test_a_second_backward_is_refused() -> None:
    logits, targets = drawn(2, 5, seed=7)
    losses = cross_entropy(logits.requires_grad_().clone(), targets).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has written its gradient over the logits: no second backward"):
        losses.backward()


def test_whoever_else_needs_the_logits_is_told() -> None:
    logits, targets = drawn(2, 5, seed=8)
    computed = logits.requires_grad_().clone()
    squares = computed.square().sum()  # keeps the logits for its own backward pass
    cross_entropy(computed, targets).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.parametrize(
    ("logits", "target_ids", "message"),
    [
        (torch.zeros(2, 3, requires_grad=True), torch.zeros(2).long(), "logits must not be a leaf"),
        (torch.zeros(2, 3).double(), torch.zeros(2).long(), "logits must be float32, .* torch.float64"),
        (torch.zeros(1, 3).expand(2, 3), torch.zeros(2).long(), "logits must be contiguous"),
        (torch.zeros(3), torch.zeros(1).long(), "logits must have 2 dimension"),
        (torch.zeros(2, 3), torch.zeros(2, 1).long(), r"target_ids must be \(2,\) .* got \(2, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(logits: Tensor, target_ids: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, target_ids)
