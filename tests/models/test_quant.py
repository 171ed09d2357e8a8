"""NF4 against its pages: the published levels, nearest codes, bytes counted, and scales in eight bits."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor

from nanopost.models.lora import lora_forward, lora_weight
from nanopost.models.quant import (
    LEVELS,
    bits_per_weight,
    dequantize_nf4,
    dequantize_scales,
    pack_nf4,
    quantize_nf4,
    quantize_scales,
    unpack_nf4,
)
from tests.pages import namespace, scalar
from tests.ragged import normal

PUBLISHED = [  # bitsandbytes, Dettmers et al. 2023, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
]
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
seeds = st.integers(0, 2**31)
blocks = st.integers(1, 70)


def drawn(shape: tuple[int, ...], seed: int, scale: float = 0.7) -> Tensor:
    return normal(Generator().manual_seed(seed), *shape, scale=scale)


def there_and_back(weight: Tensor, block_size: int = 64) -> Tensor:
    codes, scales = quantize_nf4(weight, block_size=block_size)
    return dequantize_nf4(codes, scales, shape=tuple(weight.shape), block_size=block_size)


def scale_of_each(weight: Tensor, block_size: int) -> Tensor:
    """The largest |w| of the block that each weight is in."""
    flat = weight.abs().flatten().tolist()
    largest = [max(flat[i - i % block_size : i - i % block_size + block_size]) for i in range(len(flat))]
    return torch.tensor(largest, dtype=torch.float64).reshape(weight.shape)


# ---- quantize_nf4


@given(shape=shapes, seed=seeds, block_size=blocks)
def test_NQ1_codes_and_scales_equal_the_page(shape: tuple[int, ...], seed: int, block_size: int) -> None:
    weight = drawn(shape, seed)
    codes, scales = quantize_nf4(weight, block_size=block_size)
    page_codes, page_scales = scalar("quantize_nf4")(weight.flatten().tolist(), block_size)
    assert unpack_nf4(codes, weight.numel()).tolist() == page_codes
    assert scales.tolist() == page_scales
    assert codes.dtype == torch.uint8 and codes.shape == ((weight.numel() + 1) // 2,)


def test_NQ1_codes_and_weights_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="the extra `oracle` is not installed")
    weight = drawn((131, 67), seed=3).float()  # the last block and the last byte are not full
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, scales = quantize_nf4(weight)
    theirs_codes = unpack_nf4(theirs.flatten(), weight.numel())
    assert torch.equal(theirs_codes, unpack_nf4(codes, weight.numel())) and torch.equal(state.absmax, scales)
    found = dequantize_nf4(codes, scales, shape=tuple(weight.shape))
    torch.testing.assert_close(found, functional.dequantize_4bit(theirs, state), rtol=0, atol=1e-6)


def test_NQ2_the_levels_are_the_published_ones() -> None:
    page = namespace("quantize_nf4")["LEVELS"]
    assert len(LEVELS) == 16 and list(LEVELS) == sorted(LEVELS)
    assert pytest.approx(PUBLISHED, abs=1e-6) == list(LEVELS)
    assert pytest.approx(page, abs=1e-14) == list(LEVELS)
    assert LEVELS[0] == -1.0 and LEVELS[7] == 0.0 and LEVELS[15] == 1.0
    assert namespace("dequantize_nf4")["LEVELS"] == page


@given(shape=shapes, seed=seeds, block_size=blocks)
def test_NQ3_the_error_is_at_most_half_the_widest_gap(
    shape: tuple[int, ...], seed: int, block_size: int
) -> None:
    weight = drawn(shape, seed)
    scale = scale_of_each(weight, block_size)
    error = (there_and_back(weight, block_size) - weight).abs()
    widest = max(high - low for low, high in pairwise(PUBLISHED)) / 2
    assert widest < 0.152 and (error <= scale * (widest + 1e-6)).all()
    others = torch.stack([(scale * level - weight).abs() for level in LEVELS])
    assert (error <= others.amin(0) + 1e-15).all()


@given(seed=seeds, block_size=blocks, zeros=st.floats(0.0, 1.0))
def test_NQ4_zeros_and_the_largest_come_back_exactly(seed: int, block_size: int, zeros: float) -> None:
    weight = drawn((7, 13), seed)
    weight[torch.rand(7, 13, generator=Generator().manual_seed(seed + 1)) < zeros] = 0.0
    back = there_and_back(weight, block_size)
    largest = weight.abs() == scale_of_each(weight, block_size)
    assert largest.any() and torch.equal(back[largest], weight[largest])
    assert not back[weight == 0].any()


def test_NQ5_blocks_run_over_rows_and_stand_alone() -> None:
    weight = drawn((5, 7), 3)
    codes, scales = quantize_nf4(weight, block_size=10)
    flat_codes, flat_scales = quantize_nf4(weight.flatten(), block_size=10)
    assert torch.equal(codes, flat_codes) and torch.equal(scales, flat_scales) and scales.shape == (4,)
    changed = weight.clone()
    changed.view(-1)[10:20] *= -3.7
    back, other = there_and_back(weight, 10).flatten(), there_and_back(changed, 10).flatten()
    same = torch.ones(35, dtype=torch.bool)
    same[10:20] = False
    assert torch.equal(back[same], other[same]) and not torch.equal(back[10:20], other[10:20])
    assert torch.equal(back[30:], there_and_back(weight.flatten()[30:], 10))
    transposed = there_and_back(weight.T, 10).T.flatten()
    assert not torch.equal(transposed, back)  # a tensor that is not contiguous is read by its own rows


def test_NQ6_bits_are_what_the_bytes_say() -> None:
    assert bits_per_weight() == 4.126953125 == namespace("quantize_nf4")["bits_per_weight"]()
    assert bits_per_weight(64, None) == 4.5 and bits_per_weight(32, 128) == 4 + 8 / 32 + 32 / (32 * 128)
    weight = drawn((512, 64), 4).float()
    codes, scales = quantize_nf4(weight)
    eight, seconds, mean = quantize_scales(scales)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (codes, eight, seconds))
    assert 8 * stored / weight.numel() == bits_per_weight() and mean.numel() == 1
    stored = sum(tensor.numel() * tensor.element_size() for tensor in (codes, scales))
    assert 8 * stored / weight.numel() == bits_per_weight(64, None)


@given(shape=shapes, seed=seeds, block_size=blocks)
def test_NQ7_quantising_again_changes_nothing(shape: tuple[int, ...], seed: int, block_size: int) -> None:
    once = there_and_back(drawn(shape, seed).float(), block_size)
    assert torch.equal(there_and_back(once, block_size), once)


@pytest.mark.parametrize("power", [-20, 3, 60])
def test_NQ8_a_power_of_two_moves_the_scales_alone(power: int) -> None:
    weight = drawn((6, 11), 5)
    codes, scales = quantize_nf4(weight, block_size=8)
    moved_codes, moved_scales = quantize_nf4(weight * 2.0**power, block_size=8)
    assert torch.equal(codes, moved_codes) and torch.equal(scales * 2.0**power, moved_scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_NQ8_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    weight = drawn((40, 30), 6).to(dtype)
    codes, scales = quantize_nf4(weight)
    wide_codes, wide_scales = quantize_nf4(weight.float())
    assert scales.dtype == torch.float32
    assert torch.equal(codes, wide_codes) and torch.equal(scales, wide_scales)


def test_NQ8_tiny_and_huge_numbers() -> None:
    weight = torch.tensor([1e-45, -1e-45, 0.0, 1e38, 3e38, -3e38])
    assert torch.equal(there_and_back(weight, 3)[:3], weight[:3])
    assert there_and_back(weight, 3).isfinite().all()


@pytest.mark.parametrize(
    ("weight", "block_size", "message"),
    [
        (torch.tensor([1.0, math.nan]), 64, r"weight must be finite, got nan at index \(1,\)"),
        (torch.tensor([[1.0], [-math.inf]]), 64, r"weight must be finite, got -inf at index \(1, 0\)"),
        (torch.zeros(0, 4), 64, r"weight must hold floating-point numbers, got \(0, 4\)"),
        (torch.ones(3, dtype=torch.int8), 64, "of torch.int8"),
        (torch.ones(3), 0, "block_size must be a whole number of at least 1, got 0"),
    ],
)
def test_NQ9_what_is_no_weight_is_refused(weight: Tensor, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_nf4(weight, block_size=block_size)


# ---- dequantize_nf4


@given(shape=shapes, seed=seeds, block_size=blocks)
def test_ND1_value_equals_the_page(shape: tuple[int, ...], seed: int, block_size: int) -> None:
    generator, count = Generator().manual_seed(seed), math.prod(shape)
    codes = torch.randint(16, (count,), generator=generator)
    scales = torch.rand(math.ceil(count / block_size), generator=generator, dtype=torch.float64)
    found = dequantize_nf4(pack_nf4(codes), scales, shape=shape, block_size=block_size)
    page = scalar("dequantize_nf4")(codes.tolist(), scales.tolist(), block_size)
    assert found.shape == shape
    torch.testing.assert_close(
        found.flatten(), torch.tensor(page, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


def test_ND1_every_code_has_its_level() -> None:
    found = dequantize_nf4(pack_nf4(torch.arange(16)), torch.ones(1, dtype=torch.float64), shape=(16,))
    assert found.tolist() == pytest.approx(PUBLISHED, abs=1e-6)


@given(codes=st.lists(st.integers(0, 15), min_size=1, max_size=20))
def test_ND2_two_codes_a_byte_the_first_in_the_high_half(codes: list[int]) -> None:
    packed = pack_nf4(torch.tensor(codes))
    assert packed.dtype == torch.uint8 and packed.shape == ((len(codes) + 1) // 2,)
    assert unpack_nf4(packed, len(codes)).tolist() == codes
    assert [byte >> 4 for byte in packed.tolist()] == codes[::2]
    assert [byte & 15 for byte in packed.tolist()][: len(codes) // 2] == codes[1::2]


@pytest.mark.parametrize("power", [-9, 1, 30])
def test_ND3_the_scales_are_a_factor(power: int) -> None:
    codes, scales = quantize_nf4(drawn((9, 7), 7), block_size=16)
    plain = dequantize_nf4(codes, scales, shape=(9, 7), block_size=16)
    moved = dequantize_nf4(codes, scales * 2.0**power, shape=(9, 7), block_size=16)
    assert torch.equal(moved, plain * 2.0**power)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ND4_the_product_is_rounded_once(dtype: torch.dtype) -> None:
    codes, scales = quantize_nf4(drawn((9, 7), 8).float())
    product = dequantize_nf4(codes, scales, shape=(9, 7))
    assert product.dtype == torch.float32
    assert torch.equal(dequantize_nf4(codes, scales, shape=(9, 7), dtype=dtype), product.to(dtype))
    exact = dequantize_nf4(codes, scales.double(), shape=(9, 7))
    assert ((product.double() - exact).abs() <= 2.0**-23 * exact.abs()).all()


def test_ND5_an_adapter_beside_four_bits() -> None:
    generator = Generator().manual_seed(9)
    weight, hidden = normal(generator, 6, 10), normal(generator, 3, 10).requires_grad_()
    factors = [normal(generator, *shape).requires_grad_() for shape in ((2, 10), (6, 2))]
    codes, scales = quantize_nf4(weight, block_size=16)
    base = dequantize_nf4(codes, scales, shape=(6, 10), block_size=16)
    assert not (base.requires_grad or codes.requires_grad or scales.requires_grad)
    found = lora_forward(hidden, base, *factors, alpha=1.3)
    assert all(g.any() for g in torch.autograd.grad(found.square().sum(), (hidden, *factors)))
    torch.testing.assert_close(found, hidden @ lora_weight(base, *factors, alpha=1.3).T)
    assert not torch.allclose(found, hidden @ lora_weight(weight, *factors, alpha=1.3).T)


@pytest.mark.parametrize(
    ("codes", "scales", "message"),
    [
        (
            torch.zeros(3, dtype=torch.uint8),
            torch.ones(2),
            r"codes must be \(4,\) of torch.uint8, got \(3,\)",
        ),
        (torch.zeros(4, dtype=torch.int64), torch.ones(2), r"codes must be .* got \(4,\) of torch.int64"),
        (
            torch.zeros(4, dtype=torch.uint8),
            torch.ones(1),
            r"scales must be \(2,\) of torch.float32, got \(1,\)",
        ),
        (
            torch.zeros(4, dtype=torch.uint8),
            torch.ones(2, dtype=torch.int64),
            r"scales must be \(2,\) of torch.float32, got .* torch.int64",
        ),
    ],
)
def test_ND6_what_does_not_fit_the_shape_is_refused(codes: Tensor, scales: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dequantize_nf4(codes, scales, shape=(7,), block_size=4)


# ---- quantize_scales

counts = st.integers(1, 30)


def some_scales(seed: int, count: int) -> Tensor:
    return 0.2 + torch.rand(count, generator=Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=seeds, count=counts, block_size=st.integers(1, 12))
def test_QS1_both_ways_equal_the_page(seed: int, count: int, block_size: int) -> None:
    scales = some_scales(seed, count)
    codes, seconds, mean = quantize_scales(scales, block_size=block_size)
    page_codes, page_seconds, page_mean = scalar("quantize_scales")(scales.tolist(), block_size)
    assert codes.tolist() == page_codes
    assert seconds.tolist() == pytest.approx(page_seconds, abs=1e-14)
    assert mean.item() == pytest.approx(page_mean, abs=1e-14)
    back = dequantize_scales(codes, seconds, mean, block_size=block_size)
    page = namespace("quantize_scales")["dequantize_scales"](page_codes, page_seconds, page_mean, block_size)
    assert back.tolist() == pytest.approx(page, abs=1e-13)


@given(seed=seeds, count=counts, block_size=st.integers(1, 12))
def test_QS2_the_error_is_bounded_and_no_scale_is_negative(seed: int, count: int, block_size: int) -> None:
    scales = some_scales(seed, count) - 0.2
    scales[0] = 0.0
    codes, seconds, mean = quantize_scales(scales, block_size=block_size)
    back = dequantize_scales(codes, seconds, mean, block_size=block_size)
    bound = seconds.repeat_interleave(block_size)[:count] / 254 + 1e-15
    assert ((back - scales).abs() <= bound).all() and (back >= 0).all()


def test_QS2_a_block_of_near_zeros_does_not_turn_its_sign() -> None:
    scales = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.1], dtype=torch.float64)
    codes, seconds, mean = quantize_scales(scales)
    assert float((mean + seconds * codes.double() / 127).min()) < 0.0  # the bare formula does
    assert (dequantize_scales(codes, seconds, mean) >= 0).all()


@given(seed=seeds, count=counts, block_size=st.integers(1, 12))
def test_QS3_equal_scales_come_back_exactly(seed: int, count: int, block_size: int) -> None:
    scales = some_scales(seed, 1).float().expand(count).contiguous()
    codes, seconds, mean = quantize_scales(scales, block_size=block_size)
    assert not codes.any() and not seconds.any()
    assert torch.equal(dequantize_scales(codes, seconds, mean, block_size=block_size), scales)


@given(seed=seeds, count=st.integers(2, 30), block_size=st.integers(1, 12))
def test_QS4_the_farthest_scale_of_a_block_uses_all_of_the_byte(
    seed: int, count: int, block_size: int
) -> None:
    scales = some_scales(seed, count)
    codes, _, mean = quantize_scales(scales, block_size=block_size)
    assert codes.dtype == torch.int8 and codes.shape == (count,)
    for start in range(0, count, block_size):
        far = (scales - mean)[start : start + block_size]
        found = codes[start : start + block_size].int()
        assert int(found.abs().max()) == 127 and int(found[far.abs().argmax()]) == (
            127 if far[far.abs().argmax()] > 0 else -127
        )


def test_QS5_weights_with_scales_in_eight_bits() -> None:
    weight = drawn((64, 40), 10)
    weight[3] = 0.0
    codes, scales = quantize_nf4(weight, block_size=8)
    coarse = dequantize_scales(*(parts := quantize_scales(scales)))
    assert len(parts[1]) == math.ceil(len(scales) / 256) and not torch.equal(coarse, scales)
    fine = dequantize_nf4(codes, scales, shape=(64, 40), block_size=8)
    back = dequantize_nf4(codes, coarse, shape=(64, 40), block_size=8)
    bound = (coarse - scales).abs().repeat_interleave(8).reshape(64, 40)
    assert ((back - fine).abs() <= bound + 1e-15).all() and not back[3].any()


@pytest.mark.parametrize(
    ("scales", "block_size", "message"),
    [
        (torch.ones(2, 2), 256, r"scales must be a vector of numbers ≥ 0, got \(2, 2\)"),
        (torch.tensor([1.0, -0.5]), 256, r"scales must be a vector of numbers ≥ 0, got \(2,\), -0.5"),
        (torch.tensor([1.0, math.inf]), 256, "scales must be finite, got inf"),
        (torch.zeros(0), 256, "scales must hold floating-point numbers"),
        (torch.ones(2), 0, "block_size must be a whole number of at least 1, got 0"),
    ],
)
def test_QS6_what_are_no_scales_is_refused(scales: Tensor, block_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_scales(scales, block_size=block_size)


def test_QS6_codes_that_do_not_fit_are_refused() -> None:
    codes, mean = torch.zeros(5, dtype=torch.int8), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"codes must be \(5,\) of torch.int8, got \(5,\) of torch.int64"):
        dequantize_scales(codes.long(), torch.ones(2), mean, block_size=3)
    with pytest.raises(ValueError, match=r"seconds must be \(2,\) of torch.float32, got \(3,\)"):
        dequantize_scales(codes, torch.ones(3), mean, block_size=3)


def test_the_size_of_the_error_that_the_page_states() -> None:
    weight = drawn((400, 640), 11, scale=1.0)
    assert float((there_and_back(weight) - weight).square().mean().sqrt()) == pytest.approx(0.09, abs=0.01)
