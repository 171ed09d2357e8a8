"""The two GPU paths of linear_logps against the losses of the whole logits, in float64."""

from types import ModuleType

import pytest
import torch
from torch import Generator, Tensor

from tests.kernels.exact import exact_numbers, farthest, gradients, naive_numbers, upstream

pytest.importorskip("triton", reason="the kernels need triton (the extra `kernels`)")

from nanopost.kernels import linear_logps_chunked as chunked
from nanopost.kernels import linear_logps_single as single

pytestmark = pytest.mark.usefixtures("interpreted")

TILE, BLOCK_N, BLOCK_V, BLOCK_D = (
    chunked.TILE,
    *(single.LAUNCH[name] for name in ("BLOCK_N", "BLOCK_V", "BLOCK_D")),
)


def drawn(
    rows: int, vocabulary: int, width: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and matrix with logits of about ±3, and targets; the last two are the two end ids."""
    generator = Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = 3.0 * width**-0.5 * torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[-2:] = torch.tensor([0, vocabulary - 1])[-min(rows, 2) :]
    return hidden.to(dtype), weight.to(dtype), targets


def exactly(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, grads: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The three outputs and the gradients of hidden and weight, in float64."""
    hidden, weight = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    outputs = exact_numbers(hidden @ weight.T, targets, temperature)
    return [output.detach() for output in outputs], gradients(outputs, grads, hidden, weight)


# ---- linear_logps_chunked


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 3), (5, 50), (3, 2 * TILE), (6, TILE + 37)])
def test_chunked_values_and_gradients_equal_the_losses(
    rows: int, vocabulary: int, temperature: float
) -> None:
    inputs, grads = drawn(rows, vocabulary, 20, seed=vocabulary), upstream(rows, 3)
    found = chunked.forward(*inputs, temperature)
    slopes = chunked.backward(*inputs, temperature, found[2], found[1], (grads[0], grads[1], grads[2]))
    exact, true_slopes = exactly(*inputs, temperature, grads)
    for output, true in zip(found, exact, strict=True):
        assert output.dtype == torch.float32 and output.shape == (rows,)
        torch.testing.assert_close(output.double(), true, rtol=2e-6, atol=5e-6)
    for slope, true in zip(slopes, true_slopes, strict=True):
        torch.testing.assert_close(slope.double(), true, rtol=1e-4, atol=5e-6)
    assert not slopes[0][1:2].any()


def test_chunked_half_precision_errs_no_more_than_the_naive_program() -> None:
    hidden, weight, targets = drawn(7, TILE + 37, 24, seed=2, dtype=torch.float16)
    grads = upstream(7, 5)
    found = chunked.forward(hidden, weight, targets, 0.7)
    slopes = chunked.backward(
        hidden, weight, targets, 0.7, found[2], found[1], (grads[0], grads[1], grads[2])
    )
    exact, true_slopes = exactly(hidden, weight, targets, 0.7, grads)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    naive = naive_numbers(leaves[0] @ leaves[1].T, targets, 0.7)
    for output, rough, true in zip(found, naive, exact, strict=True):
        assert farthest(output, true) <= farthest(rough, true)
    for slope, rough, true in zip(slopes, gradients(naive, grads, *leaves), true_slopes, strict=True):
        assert slope.dtype == torch.float16 and farthest(slope, true) <= farthest(rough, true)


def test_chunked_the_gradient_of_hidden_adds_up_in_float32() -> None:
    hidden, weight = torch.zeros(1, 8).half(), torch.zeros(4 * TILE, 8).half()
    weight[::TILE] = torch.tensor([2048.0, 1.0, -2048.0, 0.0])[:, None].half()  # one row of every tile
    found = chunked.forward(hidden, weight, torch.tensor([7]), 1.0)
    each = torch.tensor([4.0 * TILE])  # all tokens are alike: the logsumexp's gradient is 1 for every logit
    zero = torch.zeros(1)
    slope, _ = chunked.backward(
        hidden, weight, torch.tensor([7]), 1.0, found[2], found[1], (zero, zero, each)
    )
    assert slope.tolist() == [[1.0] * 8]  # 2048 + 1 − 2048; in float16 2048 + 1 is 2048


def test_chunked_the_gradient_of_a_likely_target_survives_half_precision() -> None:
    weight = torch.zeros(TILE + 37, 8).half()
    weight[5, 0] = 1.0
    hidden = torch.zeros(2, 8).half()
    hidden[:, 0] = torch.tensor([14.0, 16.0])
    targets, zeros = torch.full((2,), 5), torch.zeros(2)
    found = chunked.forward(hidden, weight, targets, 1.0)
    _, slope = chunked.backward(
        hidden, weight, targets, 1.0, found[2], found[1], (torch.tensor([1.0, 0.0]), zeros, zeros)
    )
    others = float(TILE + 36)
    missing = others / (others + torch.tensor(14.0).double().exp())
    assert abs(slope[5, 0].item() / 14 - missing) <= 2.0**-10 * missing


def test_chunked_rows_without_a_softmax_are_nan_and_send_nothing_back() -> None:
    hidden, weight, targets = drawn(4, 50, 8, seed=4)
    hidden[0], hidden[1, 2] = torch.nan, torch.inf
    targets[2] = 50
    found = chunked.forward(hidden, weight, targets, 1.0)
    assert found[0].isnan().tolist() == [True, True, True, False]
    grads = torch.tensor([torch.nan, 1.0, 0.0, 1.0])
    slope, _ = chunked.backward(hidden, weight, targets, 1.0, found[2], found[1], (grads, grads, grads))
    assert not slope[:3].any() and slope[3].isfinite().all()


def test_chunked_gradients_may_be_expanded_and_there_may_be_no_rows() -> None:
    hidden, weight, targets = drawn(4, 50, 8, seed=5)
    _, entropy, logsumexp = chunked.forward(hidden, weight, targets, 0.8)
    one, zero = torch.ones(1).expand(4), torch.zeros(1).expand(4)
    slopes = chunked.backward(hidden, weight, targets, 0.8, logsumexp, entropy, (one, zero, zero))
    _, exact = exactly(hidden, weight, targets, 0.8, [one, zero, zero])
    for slope, true in zip(slopes, exact, strict=True):
        torch.testing.assert_close(slope.double(), true, rtol=1e-4, atol=5e-6)
    none = chunked.forward(hidden[:0], weight, targets[:0], 0.8)
    slopes = chunked.backward(hidden[:0], weight, targets[:0], 0.8, none[2], none[1], none)
    assert slopes[0].shape == (0, 8) and not slopes[1].any()


# ---- linear_logps_single


@pytest.mark.parametrize("temperature", [0.6, 1.7])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "width"),
    [(1, 3, 8), (BLOCK_N + 3, BLOCK_V, BLOCK_D), (5, 2 * BLOCK_V + 37, BLOCK_D + 8)],
)
def test_single_equals_the_losses_of_unrounded_logits(
    rows: int, vocabulary: int, width: int, temperature: float
) -> None:
    inputs = drawn(rows, vocabulary, width, seed=width, dtype=torch.float16)
    exact = exactly(*inputs, temperature, upstream(rows, 1))[0]
    for output, true in zip(single.forward(*inputs, temperature), exact, strict=True):
        assert output.dtype == torch.float32 and output.shape == (rows,)
        torch.testing.assert_close(output.double(), true, rtol=5e-6, atol=5e-6)


def test_single_rows_without_a_softmax_are_nan() -> None:
    hidden, weight, targets = drawn(6, 50, 8, seed=6, dtype=torch.float16)
    hidden[0], hidden[1, 2] = torch.nan, torch.inf
    targets[2:4] = torch.tensor([50, -1])
    assert single.forward(hidden, weight, targets, 1.0)[0].isnan().tolist() == [True] * 4 + [False] * 2
    assert [output.shape for output in single.forward(hidden[:0], weight, targets[:0], 1.0)] == [(0,)] * 3


# ---- both


@pytest.mark.parametrize("path", [chunked, single], ids=["chunked", "single"])
def test_both_large_logits(path: ModuleType) -> None:
    hidden, weight, targets = drawn(4, 300, 8, seed=7, dtype=torch.float16)
    hidden[0], hidden[1] = 1000 * hidden[0], -1000 * hidden[1]
    logits = (hidden @ weight.T).double() if path is chunked else hidden.double() @ weight.double().T
    assert logits.abs().max() > 5000
    exact = exact_numbers(logits, targets, 0.7)
    for output, true in zip(path.forward(hidden, weight, targets, 0.7), exact, strict=True):
        torch.testing.assert_close(output.double(), true, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("path", [chunked, single], ids=["chunked", "single"])
@pytest.mark.parametrize(
    ("hidden", "weight", "rows", "temperature", "message"),
    [
        (
            torch.ones(2, 8).half(),
            torch.ones(3, 16).half(),
            2,
            1.0,
            r"one dtype, got \(2, 8\) of torch.float16",
        ),
        (torch.ones(2, 8).half(), torch.ones(3, 8), 2, 1.0, r"one dtype, .* \(3, 8\) of torch.float32"),
        (torch.ones(2, 8).double(), torch.ones(3, 8).double(), 2, 1.0, "hidden must be float32, bfloat16"),
        (torch.ones(8, 2).half().T, torch.ones(3, 8).half(), 2, 1.0, "hidden must be contiguous"),
        (torch.ones(2, 8).half(), torch.ones(3, 8).half(), 3, 1.0, r"target_ids must be \(2,\)"),
        (torch.ones(2, 8).half(), torch.ones(3, 8).half(), 2, -0.5, "temperature must be positive .* -0.5"),
    ],
)
def test_both_refuse_what_does_not_fit(
    path: ModuleType, hidden: Tensor, weight: Tensor, rows: int, temperature: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        path.forward(hidden, weight, torch.zeros(rows).long(), temperature)


@pytest.mark.parametrize(("width", "dtype"), [(8, torch.float32), (12, torch.float16)])
def test_single_refuses_float32_and_odd_widths(width: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"half precision and D a multiple of 8, got \(2, "):
        single.forward(
            torch.ones(2, width, dtype=dtype), torch.ones(3, width, dtype=dtype), torch.zeros(2).long(), 1.0
        )
