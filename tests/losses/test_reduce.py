"""`aggregate` and `local_denom`: values, gradients, and a step that may be cut anywhere."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nanopost.losses import aggregate, local_denom
from tests.pages import scalar
from tests.ragged import JUNK, junk_outside, normal, ragged

MODES = ("token_mean", "sequence_mean", "sequence_sum", "constant")
SHORT_AND_LONG = torch.tensor([[1] + [0] * 6, [1] * 7])


def gradient(values: Tensor, mask: Tensor, mode: str, denom: float) -> Tensor:
    leaf = values.clone().requires_grad_()
    (result,) = torch.autograd.grad(aggregate(leaf, mask, mode=mode, denom=denom), leaf)
    return result


@pytest.mark.parametrize("mode", MODES)
@given(batch=ragged(), denom=st.floats(0.3, 40.0))
def test_A1_value_equals_the_page(mode: str, batch: tuple[Tensor, torch.Generator], denom: float) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape)
    expected = scalar("aggregate")(values.tolist(), mask.tolist(), mode, denom)
    assert aggregate(values, mask, mode=mode, denom=denom).item() == pytest.approx(expected, abs=1e-9)
    assert aggregate(values, mask.long(), mode=mode, denom=denom).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("mode", MODES)
@given(batch=ragged())
def test_A2_outside_the_mask_nothing_counts(
    mode: str, junk: float, batch: tuple[Tensor, torch.Generator]
) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape)
    soiled = junk_outside(values, mask, junk)
    clean = aggregate(values, mask, mode=mode, denom=2.5)
    assert torch.equal(aggregate(soiled, mask, mode=mode, denom=2.5), clean)
    per_row = (
        mask.sum(1, keepdim=True).double() if mode == "sequence_mean" else torch.ones(len(mask), 1).double()
    )
    closed_form = torch.where(mask, 1 / (2.5 * per_row), 0.0)
    found = gradient(soiled, mask, mode, 2.5)
    torch.testing.assert_close(found, closed_form, rtol=1e-15, atol=0.0)
    assert torch.equal(found != 0, mask)


@pytest.mark.parametrize("mode", MODES)
@given(batch=ragged(), data=st.data())
def test_A3_any_split_gives_the_gradient_of_the_step(
    mode: str, batch: tuple[Tensor, torch.Generator], data: st.DataObject
) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape)
    owner = torch.tensor([data.draw(st.integers(0, 2)) for _ in mask])
    denom = local_denom(mask, mode=mode, max_tokens=9)
    parts = [owner == part for part in range(3) if (owner == part).any()]
    assert sum(local_denom(mask[part], mode=mode, max_tokens=9) for part in parts) == denom
    whole, found = gradient(values, mask, mode, denom), torch.zeros_like(values)
    for part in parts:
        found[part] = gradient(values[part], mask[part], mode, denom)
    assert torch.equal(found, whole)
    total = sum(aggregate(values[part], mask[part], mode=mode, denom=denom).item() for part in parts)
    size = aggregate(values.abs(), mask, mode=mode, denom=denom).item()
    assert abs(total - aggregate(values, mask, mode=mode, denom=denom).item()) <= 1e-14 * size


def test_A3_the_mean_of_micro_batch_means_is_another_number() -> None:
    values, mask = SHORT_AND_LONG.cumsum(1).double(), SHORT_AND_LONG
    denom = local_denom(mask, mode="token_mean")
    whole = aggregate(values, mask, mode="token_mean", denom=denom).item()
    means = [
        aggregate(values[row], mask[row], mode="token_mean", denom=local_denom(mask[row], mode="token_mean"))
        for row in ([0], [1])
    ]
    assert denom == 8.0 and whole == 29 / 8  # 1 and 1 + 2 + … + 7
    assert (means[0] + means[1]).item() / 2 == 2.5  # (1 + 28/7) / 2


@pytest.mark.parametrize("mode", MODES)
@given(batch=ragged(), left=st.integers(0, 3), right=st.integers(0, 3), data=st.data())
def test_A4_padding_and_row_order_change_nothing(
    mode: str, batch: tuple[Tensor, torch.Generator], left: int, right: int, data: st.DataObject
) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape)
    order = torch.tensor(data.draw(st.permutations(range(len(mask)))))
    padded = torch.nn.functional.pad(values[order], (left, right), value=float("nan"))
    padded_mask = torch.nn.functional.pad(mask[order], (left, right))
    expected = aggregate(values, mask, mode=mode, denom=3.7)
    found = aggregate(padded, padded_mask, mode=mode, denom=3.7)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
@given(batch=ragged())
def test_A5_a_row_without_supervised_tokens_is_no_row(
    mode: str, batch: tuple[Tensor, torch.Generator]
) -> None:
    mask, generator = batch
    values = normal(generator, *mask.shape)
    more_values = torch.cat([values, torch.full_like(values[:1], torch.nan)])
    more_mask = torch.cat([mask, torch.zeros_like(mask[:1])])
    denom = local_denom(mask, mode=mode, max_tokens=9)
    assert local_denom(more_mask, mode=mode, max_tokens=9) == denom
    expected = aggregate(values, mask, mode=mode, denom=denom)
    found = aggregate(more_values, more_mask, mode=mode, denom=denom)
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-14)
    empty = aggregate(more_values[-1:], more_mask[-1:], mode=mode, denom=denom)
    assert empty.item() == 0.0 and not gradient(more_values[-1:], more_mask[-1:], mode, denom).any()


def test_A6_the_modes_differ_on_lengths_1_and_7() -> None:
    first_token, long_row = torch.zeros(2, 7, dtype=torch.float64), torch.zeros(2, 7, dtype=torch.float64)
    first_token[0, 0] = 1.0
    long_row[1] = 1.0
    assert aggregate(first_token, SHORT_AND_LONG, mode="token_mean", denom=8).item() == 1 / 8
    assert aggregate(first_token, SHORT_AND_LONG, mode="sequence_mean", denom=2).item() == 1 / 2
    assert aggregate(long_row, SHORT_AND_LONG, mode="sequence_sum", denom=2).item() == 7 / 2
    assert aggregate(long_row, SHORT_AND_LONG, mode="sequence_mean", denom=2).item() == pytest.approx(1 / 2)
    assert aggregate(long_row, SHORT_AND_LONG, mode="constant", denom=20).item() == 7 / 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_A7_half_precision_sums_in_float32(dtype: torch.dtype) -> None:
    values = torch.ones(3, 4001, dtype=dtype)
    result = aggregate(values, torch.ones(3, 4001, dtype=torch.bool), mode="sequence_sum", denom=1)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.item() == 12003.0  # neither half format holds this number


@pytest.mark.parametrize("mode", MODES)
@given(batch=ragged(), max_tokens=st.integers(1, 40))
def test_N1_value_equals_the_page(mode: str, batch: tuple[Tensor, torch.Generator], max_tokens: int) -> None:
    mask, _ = batch
    expected = scalar("local_denom")(mask.tolist(), mode, max_tokens)
    found = local_denom(mask, mode=mode, max_tokens=max_tokens)
    assert found == expected and isinstance(found, float)
    assert local_denom(mask.double(), mode=mode, max_tokens=max_tokens) == expected


@pytest.mark.parametrize("mode", MODES)
@given(batch=ragged(), cut=st.integers(0, 5))
def test_N2_denominators_of_micro_batches_add_up(
    mode: str, batch: tuple[Tensor, torch.Generator], cut: int
) -> None:
    mask, _ = batch
    parts = local_denom(mask[:cut], mode=mode, max_tokens=9) + local_denom(
        mask[cut:], mode=mode, max_tokens=9
    )
    assert parts == local_denom(mask, mode=mode, max_tokens=9)


@pytest.mark.parametrize("mode", MODES)
def test_N3_an_empty_row_counts_as_no_sequence(mode: str) -> None:
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [0, 1, 1]])
    expected = {"token_mean": 3.0, "sequence_mean": 2.0, "sequence_sum": 2.0, "constant": 20.0}[mode]
    assert local_denom(mask, mode=mode, max_tokens=10) == expected
    nothing = local_denom(torch.zeros_like(mask), mode=mode, max_tokens=10)
    assert nothing == 0.0
    with pytest.raises(ValueError, match=r"denom must be positive and finite, got 0\.0"):
        aggregate(torch.ones(3, 3), torch.zeros_like(mask), mode=mode, denom=nothing)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean"])
@given(batch=ragged(), constant=st.floats(-3.0, 3.0))
def test_N4_a_constant_loss_averages_to_itself(
    mode: str, batch: tuple[Tensor, torch.Generator], constant: float
) -> None:
    mask, _ = batch
    values = torch.full(mask.shape, constant, dtype=torch.float64)
    result = aggregate(values, mask, mode=mode, denom=local_denom(mask, mode=mode)).item()
    assert result == pytest.approx(constant, abs=1e-14)


GOOD = {
    "values": torch.ones(2, 3),
    "mask": torch.ones(2, 3, dtype=torch.bool),
    "mode": "token_mean",
    "denom": 6.0,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(2, 1, dtype=torch.bool)}, r"values \(2, 3\), mask \(2, 1\)"),
        ({"values": torch.ones(3), "mask": torch.ones(3, dtype=torch.bool)}, r"values must have 2 dimension"),
        ({"mask": torch.full((2, 3), 0.5)}, "mask must be bool or hold only 0 and 1, got the value 0.5"),
        (
            {"mask": torch.full((2, 3), torch.nan)},
            "mask must be bool or hold only 0 and 1, got the value nan",
        ),
        ({"mode": "mean"}, r"mode must be one of 'token_mean', .* got 'mean'"),
        ({"denom": 0}, "denom must be positive and finite, got 0"),
        ({"denom": -2.0}, "denom must be positive and finite, got -2.0"),
        ({"denom": float("nan")}, "denom must be positive and finite, got nan"),
        ({"denom": float("inf")}, "denom must be positive and finite, got inf"),
    ],
)
def test_aggregate_refuses(changes: dict[str, object], message: str) -> None:
    arguments = GOOD | changes
    values, mask = arguments.pop("values"), arguments.pop("mask")
    with pytest.raises(ValueError, match=message):
        aggregate(values, mask, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mask", "arguments", "message"),
    [
        (torch.ones(3), {"mode": "token_mean"}, "mask must have 2 dimension"),
        (
            torch.full((1, 2), 2),
            {"mode": "token_mean"},
            "mask must be bool or hold only 0 and 1, got the value 2",
        ),
        (torch.ones(1, 2), {"mode": "tokens"}, r"mode must be one of .* got 'tokens'"),
        (torch.ones(1, 2), {"mode": "constant"}, "max_tokens must be given with mode 'constant'"),
        (
            torch.ones(1, 2),
            {"mode": "constant", "max_tokens": 0},
            "max_tokens must be a whole number of at least 1",
        ),
    ],
)
def test_local_denom_refuses(mask: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        local_denom(mask, **arguments)  # type: ignore[arg-type]
