"""LoRA against its pages: the product, the pass beside the layer, and a merge that can be taken back."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

from nanopost.models.lora import LoRALinear, lora_forward, lora_scale, lora_weight, trainable_count
from tests.pages import namespace, scalar
from tests.properties import check_only_gradient
from tests.ragged import normal

HALVES = [torch.bfloat16, torch.float16]
# out, in, r: all different, r above and below both
sizes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7))
seeds = st.integers(0, 2**31)
alphas = st.floats(0.1, 40.0)


def factors(seed: int, out: int, width: int, rank: int) -> list[Tensor]:
    """W, lora_A, lora_B of normal numbers."""
    generator = Generator().manual_seed(seed)
    return [normal(generator, *shape) for shape in ((out, width), (rank, width), (out, rank))]


def layer(
    seed: int = 0,
    out: int = 5,
    width: int = 4,
    rank: int = 3,
    dtype: torch.dtype = torch.float64,
    **options: float,
) -> LoRALinear:
    """A layer with a bias whose lora_B is not zero any more."""
    generator = Generator().manual_seed(seed)
    base = nn.Linear(width, out, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(normal(generator, out, width))
        base.bias.copy_(normal(generator, out))
    found = LoRALinear(base, rank=rank, alpha=2.3, generator=generator, **options)
    with torch.no_grad():
        found.lora_B.copy_(normal(generator, out, rank))
    return found


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of the dtype's numbers at each value."""
    exponent = torch.frexp(value.abs()).exponent - 1
    return torch.ldexp(torch.full_like(value, torch.finfo(dtype).eps), exponent)


# ---- lora_weight


@given(size=sizes, seed=seeds, alpha=alphas, stable=st.booleans())
def test_LW1_value_equals_the_page(size: tuple[int, int, int], seed: int, alpha: float, stable: bool) -> None:
    inputs = factors(seed, *size)
    found = lora_weight(*inputs, alpha=alpha, rank_stabilised=stable)
    page = scalar("lora_weight")(*(tensor.tolist() for tensor in inputs), alpha, stable)
    torch.testing.assert_close(found, torch.tensor(page, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_LW1_square_matrices_do_not_hide_an_exchange_of_the_factors() -> None:
    inputs = factors(3, 3, 3, 3)
    page = scalar("lora_weight")(*(tensor.tolist() for tensor in inputs), 1.7)
    torch.testing.assert_close(lora_weight(*inputs, alpha=1.7), torch.tensor(page, dtype=torch.float64))


@pytest.mark.parametrize("stable", [False, True])
def test_LW2_gradients_have_their_closed_form(stable: bool) -> None:
    weight, lora_A, lora_B = inputs = [tensor.requires_grad_() for tensor in factors(1, 4, 5, 3)]
    upstream = normal(Generator().manual_seed(2), 4, 5)
    merged = lora_weight(*inputs, alpha=1.9, rank_stabilised=stable)
    found = torch.autograd.grad((upstream * merged).sum(), inputs)
    scale = 1.9 / (math.sqrt(3) if stable else 3)
    expected = [upstream, scale * lora_B.T @ upstream, scale * upstream @ lora_A.T]
    for gradient, closed in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, closed.detach(), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda *t: lora_weight(*t, alpha=1.9, rank_stabilised=stable), (weight, lora_A, lora_B)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_LW3_with_B_at_0_it_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    weight, lora_A, lora_B = (tensor.to(dtype) for tensor in factors(4, 6, 5, 2))
    lora_A, lora_B = lora_A.requires_grad_(), lora_B.zero_().requires_grad_()
    merged = lora_weight(weight, lora_A, lora_B, alpha=8.0)
    assert torch.equal(merged, weight)
    of_A, of_B = torch.autograd.grad(merged.float().square().sum(), (lora_A, lora_B))
    assert not of_A.any() and of_B.all()


def test_LW4_the_update_has_rank_r_and_is_the_documents_product_transposed() -> None:
    weight, lora_A, lora_B = factors(5, 7, 6, 2)
    update = lora_weight(weight, lora_A, lora_B, alpha=2.0) - weight
    assert torch.linalg.matrix_rank(update, tol=1e-9) == 2
    A, B = lora_A.T, lora_B.T  # (d × r) and (r × k) of W + A·B
    torch.testing.assert_close(update.T, A @ B, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("wide_factors", [False, True])
def test_LW5_half_precision_is_rounded_once(dtype: torch.dtype, wide_factors: bool) -> None:
    weight, lora_A, lora_B = factors(6, 40, 30, 9)
    weight = weight.to(dtype)
    lora_A, lora_B = ((t.float() if wide_factors else t.to(dtype)) for t in (0.3 * lora_A, 0.3 * lora_B))
    found = lora_weight(weight, lora_A, lora_B, alpha=7.0)
    exact = lora_weight(weight.double(), lora_A.double(), lora_B.double(), alpha=7.0)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= 0.501 * ulp(exact, dtype) + 1e-5).all()


@given(size=sizes, seed=seeds, alpha=alphas)
def test_LW6_the_scale_belongs_to_the_rank(size: tuple[int, int, int], seed: int, alpha: float) -> None:
    weight, lora_A, lora_B = factors(seed, *size)
    twice_A, twice_B = torch.cat([lora_A, lora_A]), torch.cat([lora_B, lora_B], dim=1)
    for stable, factor in ((False, 1.0), (True, math.sqrt(2))):
        once = lora_weight(weight, lora_A, lora_B, alpha=alpha, rank_stabilised=stable)
        twice = lora_weight(weight, twice_A, twice_B, alpha=alpha, rank_stabilised=stable)
        torch.testing.assert_close(twice - weight, factor * (once - weight), rtol=1e-9, atol=1e-11)


def test_LW6_the_scale_by_hand() -> None:
    assert (lora_scale(64, alpha=16.0), lora_scale(64, alpha=16.0, rank_stabilised=True)) == (0.25, 2.0)


@given(size=sizes)
def test_LW7_so_many_numbers_are_trained(size: tuple[int, int, int]) -> None:
    out, width, rank = size
    found = layer(out=out, width=width, rank=rank)
    trained = sum(p.numel() for p in found.parameters() if p.requires_grad)
    page = namespace("lora_weight")["trainable_count"](width, out, rank)
    assert trained == trainable_count(width, out, rank=rank) == page


def test_LW7_the_worked_value() -> None:
    assert trainable_count(4096, 4096, rank=16) == 131_072 and 4096 * 4096 == 16_777_216
    with torch.device("meta"):
        large = nn.Linear(4096, 4096, bias=False)
    found = LoRALinear(large, rank=16, alpha=16.0, generator=Generator())
    counts = {
        asked: sum(p.numel() for p in found.parameters() if p.requires_grad == asked)
        for asked in (True, False)
    }
    assert counts == {True: 131_072, False: 16_777_216}


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, torch.zeros(3, 6), r"lora_A \(3, 6\)"),
        (2, torch.zeros(5, 4), r"lora_B \(5, 4\)"),
        (2, torch.zeros(3, 4), r"lora_B \(3, 4\)"),
        (1, torch.zeros(5), r"lora_A \(5,\)"),
        (0, torch.zeros(4, 5, 1), r"weight \(4, 5, 1\)"),
    ],
)
def test_LW8_shapes_that_do_not_fit_are_refused(place: int, wrong: Tensor, message: str) -> None:
    inputs = [torch.zeros(4, 5), torch.zeros(3, 5), torch.zeros(4, 3)]
    inputs[place] = wrong
    with pytest.raises(ValueError, match=r"weight must be \(out, in\), lora_A \(r, in\).*" + message):
        lora_weight(*inputs, alpha=1.0)


def test_LW8_numbers_out_of_range_are_refused() -> None:
    good = [torch.zeros(4, 5), torch.zeros(3, 5), torch.zeros(4, 3)]
    for alpha in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"alpha must be positive and finite, got {alpha}"):
            lora_weight(*good, alpha=alpha)
    with pytest.raises(ValueError, match=r"lora_A must be floating point, got torch\.int64"):
        lora_weight(good[0], good[1].long(), good[2], alpha=1.0)
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, got 0"):
        lora_weight(torch.zeros(4, 5), torch.zeros(0, 5), torch.zeros(4, 0), alpha=1.0)
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, got 0"):
        LoRALinear(nn.Linear(4, 5), rank=0, alpha=1.0, generator=Generator())


# ---- lora_forward


def forward_inputs(seed: int, out: int, width: int, rank: int) -> list[Tensor]:
    """x (2, 3, in), W, lora_A, lora_B, b, u."""
    generator = Generator().manual_seed(seed + 1)
    hidden, bias = normal(generator, 2, 3, width), normal(generator, out)
    uniforms = torch.rand(2, 3, width, generator=generator, dtype=torch.float64)
    return [hidden, *factors(seed, out, width, rank), bias, uniforms]


@given(
    size=sizes,
    seed=seeds,
    alpha=alphas,
    stable=st.booleans(),
    bias=st.booleans(),
    dropout=st.floats(0.0, 0.9),
)
def test_LF1_value_equals_the_page(
    size: tuple[int, int, int], seed: int, alpha: float, stable: bool, bias: bool, dropout: float
) -> None:
    hidden, weight, lora_A, lora_B, b, uniforms = forward_inputs(seed, *size)
    added, options = b if bias else None, {"rank_stabilised": stable, "dropout": dropout}
    found = lora_forward(hidden, weight, lora_A, lora_B, added, uniforms, alpha=alpha, **options)
    matrices = [tensor.tolist() for tensor in (weight, lora_A, lora_B)]
    for place in itertools.product(range(2), range(3)):
        x, u, listed = hidden[place].tolist(), uniforms[place].tolist(), b.tolist() if bias else None
        page = scalar("lora_forward")(x, *matrices, listed, u, alpha=alpha, **options)
        torch.testing.assert_close(
            found[place], torch.tensor(page, dtype=torch.float64), rtol=1e-9, atol=1e-9
        )


@given(size=sizes, seed=seeds, alpha=alphas, stable=st.booleans())
def test_LF2_forward_of_the_merged_is_forward_of_base_and_adapter(
    size: tuple[int, int, int], seed: int, alpha: float, stable: bool
) -> None:
    hidden, *matrices, bias, _ = forward_inputs(seed, *size)
    found = lora_forward(hidden, *matrices, bias, alpha=alpha, rank_stabilised=stable)
    merged = F.linear(hidden, lora_weight(*matrices, alpha=alpha, rank_stabilised=stable), bias)
    size_of = max(1.0, float(merged.abs().max()), alpha)
    torch.testing.assert_close(found, merged, rtol=1e-12, atol=1e-12 * size_of)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_LF3_gradients(dropout: float) -> None:
    *leaves, uniforms = forward_inputs(7, 4, 5, 3)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def run(*tensors: Tensor) -> Tensor:
        return lora_forward(*tensors, uniforms, alpha=1.7, dropout=dropout)

    assert torch.autograd.gradcheck(run, tuple(leaves))
    check_only_gradient(
        lambda *t: lora_forward(*t, alpha=1.7, dropout=dropout), [*leaves, uniforms], to=[0, 1, 2, 3, 4]
    )
    if not dropout:
        hidden, *matrices, bias = leaves
        merged = F.linear(hidden, lora_weight(*matrices, alpha=1.7), bias)
        for mine, other in zip(
            torch.autograd.grad(run(*leaves).square().sum(), leaves),
            torch.autograd.grad(merged.square().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_LF4_with_B_at_0_it_is_the_linear_layer_bit_for_bit(dtype: torch.dtype) -> None:
    hidden, weight, lora_A, lora_B, bias, uniforms = (t.to(dtype) for t in forward_inputs(8, 33, 65, 4))
    for added, p in itertools.product((None, bias), (0.0, 0.3)):
        found = lora_forward(hidden, weight, lora_A, 0 * lora_B, added, uniforms, alpha=9.0, dropout=p)
        assert torch.equal(found, F.linear(hidden, weight, added)) and found.dtype == dtype
    found = layer(out=33, width=65, dtype=dtype)
    nn.init.zeros_(found.lora_B)
    assert torch.equal(found(hidden), found.base(hidden))


def test_LF5_dropout_of_1_leaves_the_base() -> None:
    hidden, weight, lora_A, lora_B, bias, uniforms = forward_inputs(9, 4, 6, 2)
    hidden.requires_grad_()
    found = lora_forward(hidden, weight, lora_A, lora_B, bias, uniforms, alpha=3.0, dropout=1.0)
    assert torch.equal(found, F.linear(hidden, weight, bias))
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    torch.testing.assert_close(gradient, weight.sum(0).expand(2, 3, 6))


@pytest.mark.parametrize("p", [0.25, 0.7])
def test_LF5_the_mean_over_all_masks_is_no_dropout(p: float) -> None:
    hidden, weight, lora_A, lora_B, bias, _ = forward_inputs(10, 4, 3, 2)
    mean = torch.zeros(2, 3, 4, dtype=torch.float64)
    for kept in itertools.product((0, 1), repeat=3):
        share = math.prod((1 - p) if one else p for one in kept)
        uniforms = torch.tensor([0.99 if one else 0.0 for one in kept], dtype=torch.float64).expand(2, 3, 3)
        mean += share * lora_forward(hidden, weight, lora_A, lora_B, bias, uniforms, alpha=3.0, dropout=p)
    torch.testing.assert_close(mean, lora_forward(hidden, weight, lora_A, lora_B, bias, alpha=3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stable", [False, True])
def test_LF6_a_merge_is_taken_back_bit_for_bit(dtype: torch.dtype, stable: bool) -> None:
    found = layer(11, out=37, width=29, dtype=dtype, rank_stabilised=stable)
    hidden = normal(Generator().manual_seed(12), 6, 29).to(dtype)
    before, beside = found.base.weight.clone(), found(hidden).detach()
    for _ in range(3):
        found.merge()
        assert found.merged and not torch.equal(found.base.weight, before)
        with torch.no_grad():
            bound = 40 * torch.finfo(dtype).eps * float(beside.abs().max())
            assert float((found(hidden) - beside).abs().max()) <= bound
        found.unmerge()
        assert not found.merged and torch.equal(found.base.weight, before)
        assert torch.equal(found(hidden), beside)


def test_LF6_an_update_far_larger_than_the_base_is_taken_back() -> None:
    found = layer(13, dtype=torch.float32)
    before = found.base.weight.clone()
    with torch.no_grad():
        found.lora_B.mul_(1e12)
    found.merge()
    found.unmerge()
    assert torch.equal(found.base.weight, before)


def test_LF6_what_would_add_the_adapter_twice_is_refused() -> None:
    found = layer(14)
    with pytest.raises(ValueError, match="the adapter is not merged: there is nothing to take back"):
        found.unmerge()
    assert sorted(found.state_dict()) == ["base.bias", "base.weight", "lora_A", "lora_B"]
    found.merge()
    merged = found.base.weight.clone()
    with pytest.raises(ValueError, match="merged already: a second time would add it twice"):
        found.merge()
    assert torch.equal(found.base.weight, merged)
    with pytest.raises(ValueError, match=r"^0 is merged: unmerge before saving"):
        nn.Sequential(found).state_dict()
    with pytest.raises(ValueError, match="merged: no gradient would reach lora_A and lora_B"):
        found(torch.zeros(1, 4, dtype=torch.float64))
    assert found.eval()(torch.zeros(1, 4, dtype=torch.float64)).shape == (1, 5)


def test_LF6_dropout_is_of_training_alone() -> None:
    found = layer(15, dropout=0.5)
    hidden = normal(Generator().manual_seed(16), 3, 4)
    uniforms = torch.rand(3, 4, generator=Generator().manual_seed(17), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"dropout 0.5 needs uniforms"):
        found(hidden)
    dropped, matrices = (
        found(hidden, uniforms),
        (found.base.weight, found.lora_A, found.lora_B, found.base.bias),
    )
    assert torch.equal(dropped, lora_forward(hidden, *matrices, uniforms, alpha=2.3, dropout=0.5))
    assert torch.equal(found.eval()(hidden), lora_forward(hidden, *matrices, alpha=2.3))
    assert not torch.equal(dropped, found(hidden))


def test_LF7_the_base_is_frozen_and_the_factors_start_as_said() -> None:
    def made(seed: int, dtype: torch.dtype = torch.bfloat16) -> LoRALinear:
        base = nn.Linear(400, 50, dtype=dtype)
        return LoRALinear(base, rank=8, alpha=16.0, generator=Generator().manual_seed(seed))

    one, same, other = made(1), made(1), made(2)
    assert not any(p.requires_grad for p in one.base.parameters())
    assert one.lora_A.requires_grad and one.lora_B.requires_grad and not one.lora_B.any()
    assert one.lora_A.dtype == one.lora_B.dtype == torch.float32
    assert made(1, torch.float64).lora_A.dtype == torch.float64
    assert torch.equal(one.lora_A, same.lora_A) and not torch.equal(one.lora_A, other.lora_A)
    bound = 1 / math.sqrt(400)
    assert 0.99 * bound < float(one.lora_A.detach().abs().max()) <= bound
    assert float(one.lora_A.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    one(torch.ones(2, 400, dtype=torch.bfloat16)).sum().backward()
    assert one.base.weight.grad is None and one.lora_B.grad is not None and one.lora_B.grad.any()


def test_LF8_half_precision_rounds_the_bases_product_and_the_sum() -> None:
    hidden, weight, lora_A, lora_B, bias, _ = forward_inputs(18, 31, 17, 5)
    half = [tensor.bfloat16() for tensor in (hidden, weight, bias)]
    found = lora_forward(half[0], half[1], lora_A.float(), lora_B.float(), half[2], alpha=3.0)
    base = F.linear(*half).double()
    exact = base + lora_forward(
        half[0].double(),
        torch.zeros_like(weight),
        lora_A.float().double(),
        lora_B.float().double(),
        alpha=3.0,
    )
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= 0.501 * ulp(exact, torch.bfloat16) + 1e-5).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 6)}, r"hidden must be \(..., 5\) and torch.float32.*got \(2, 6\)"),
        ({"hidden": torch.zeros(2, 5).double()}, r"got \(2, 5\) and torch.float64"),
        ({"lora_B": torch.zeros(3, 4)}, r"weight must be \(out, in\).*lora_B \(3, 4\)"),
        ({"dropout": 0.5}, "dropout 0.5 needs uniforms"),
        ({"dropout": 1.5}, r"dropout must lie in \[0, 1\], got 1.5"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\], got -0.1"),
        (
            {"dropout": 0.5, "uniforms": torch.zeros(5)},
            r"uniforms \(5,\) must have the shape of hidden \(2, 5\)",
        ),
        ({"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
    ],
)
def test_LF9_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"hidden": torch.zeros(2, 5), "weight": torch.zeros(4, 5)}
    good |= {"lora_A": torch.zeros(3, 5), "lora_B": torch.zeros(4, 3), "alpha": 1.0}
    with pytest.raises(ValueError, match=message):
        lora_forward(**(good | changes))  # type: ignore[arg-type]
