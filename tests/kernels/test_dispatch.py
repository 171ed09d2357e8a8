"""Which path runs, the precision set for linear layers alone, and the small kernels in torch."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanopost.kernels import dispatch
from nanopost.kernels.linear import linear
from nanopost.kernels.linear_logps import linear_logps
from nanopost.kernels.pointwise import rms_norm, rope, swiglu


@pytest.fixture
def another_maker(monkeypatch):
    """A processor that is not Intel's."""
    monkeypatch.setattr(dispatch, "vendor", lambda: "AuthenticAMD")
    dispatch.onednn.cache_clear()
    yield
    dispatch.onednn.cache_clear()


def test_importing_sets_nothing():
    program = """
import torch
before = torch.get_float32_matmul_precision(), torch.get_num_threads()
import nanopost.models.llama, nanopost.rollout.sampler, nanopost.optim, sys
assert before == (torch.get_float32_matmul_precision(), torch.get_num_threads())
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_default_stays_on_intels_processors(monkeypatch):
    dispatch.onednn.cache_clear()
    monkeypatch.setattr(dispatch, "vendor", lambda: "GenuineIntel")
    assert not dispatch.onednn()
    with dispatch.fast_products(torch.zeros(1)):
        assert torch.get_float32_matmul_precision() == "highest"
    dispatch.onednn.cache_clear()


def test_a_product_that_is_not_exact_is_not_taken(another_maker, monkeypatch):
    """What "medium" gives on a CPU with matrix units for bfloat16: 3 decimal digits."""
    exact = torch.Tensor.__matmul__

    def rough(a, b):
        medium = torch.get_float32_matmul_precision() == "medium"
        return exact(a.bfloat16().float(), b.bfloat16().float()) if medium else exact(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rough)
    assert not dispatch.onednn()


def test_the_fast_product_holds_for_linear_layers_forward_and_backward_alone(another_maker, monkeypatch):
    if not dispatch.onednn():
        pytest.skip("this CPU's products at medium precision are not float32's")
    set_to: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=draw, requires_grad=True) for n in (9, 11))
    out, expected = linear(x, w), nn.functional.linear(x, w)
    assert set_to == ["medium", "highest"]
    upstream = torch.randn(9, 11, generator=draw)
    found = torch.autograd.grad(out, (x, w), upstream)
    assert set_to == ["medium", "highest"] * 2
    for ours, theirs in zip(
        (out, *found), (expected, *torch.autograd.grad(expected, (x, w), upstream)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    linear_logps(x, w, torch.zeros(9, dtype=torch.long))[0].sum().backward()
    assert set_to == ["medium", "highest"] * 4
    linear(x.double(), w.double())  # float64 is no business of oneDNN
    assert len(set_to) == 8


def test_the_precision_comes_back_after_an_error(monkeypatch):
    monkeypatch.setattr(dispatch, "onednn", lambda: True)
    with pytest.raises(RuntimeError), dispatch.fast_products(torch.zeros(1)):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_frozen_weight_gets_no_gradient(another_maker):
    x, w = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)
    linear(x, w).sum().backward()
    assert x.grad.tolist() == [[4.0] * 3] * 2 and w.grad is None


def test_without_a_gpu_no_kernel_of_triton_is_chosen():
    x = torch.zeros(3, 4)
    assert not dispatch.fused(x) and not dispatch.ragged_attention(x.bfloat16())
    assert dispatch.head_path(x, x).__name__ == "nanopost.kernels.linear_logps_tiled"


def test_chunks_hold_a_mebiword_of_logits_and_no_few_rows():
    assert dispatch.chunk(torch.zeros(5000, 2), words=4096) == 256
    assert (
        dispatch.chunk(torch.zeros(5000, 2), words=100_000) == 256
    )  # the head's gradient is read and written once a chunk
    assert dispatch.chunk(torch.zeros(7, 2), words=10) == 256


@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 10**6))
def test_rms_norm_is_its_formula(n, d, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=draw, dtype=torch.float64, requires_grad=True)
    w = torch.randn(d, generator=draw, dtype=torch.float64, requires_grad=True)
    out = rms_norm(x, w, 1e-3)
    for row, y in zip(x.tolist(), out.tolist(), strict=True):
        scale = math.sqrt(sum(v * v for v in row) / d + 1e-3)
        assert y == pytest.approx([a * b / scale for a, b in zip(row, w.tolist(), strict=True)])
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-3), (x, w))


def test_rms_norm_rounds_before_the_weight():
    """The mean in float32, then x's dtype, then the weight: the order of the hub's models."""
    x = torch.tensor([[3.0, 4.0, 1.0]], dtype=torch.bfloat16)
    w = torch.tensor([1.0, 1.5, 1.25], dtype=torch.bfloat16)
    scale = 1.0 / math.sqrt((9 + 16 + 1) / 3)
    expected = torch.tensor([[v * scale for v in (3.0, 4.0, 1.0)]]).bfloat16() * w
    assert torch.equal(rms_norm(x, w, 1e-9), expected)


@given(st.integers(1, 30), st.integers(0, 10**6))
def test_swiglu_is_its_formula(n, seed):
    draw = torch.Generator().manual_seed(seed)
    a, b = (3 * torch.randn(n, generator=draw, dtype=torch.float64) for _ in range(2))
    expected = [x / (1 + math.exp(-x)) * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert swiglu(a, b).tolist() == pytest.approx(expected)
    assert torch.autograd.gradcheck(swiglu, (a.requires_grad_(), b.requires_grad_()))


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_rope_turns_halves_against_each_other(n, heads, half, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, heads, 2 * half, generator=draw, dtype=torch.float64)
    angles = torch.randn(n, half, generator=draw, dtype=torch.float64)
    out = rope(x, angles.cos(), angles.sin())
    for i in range(n):
        for h in range(heads):
            for j in range(half):
                turned = complex(x[i, h, j], x[i, h, j + half]) * complex(
                    math.cos(angles[i, j]), math.sin(angles[i, j])
                )
                assert complex(out[i, h, j], out[i, h, j + half]) == pytest.approx(turned)
    program = lambda x: rope(x, angles.cos(), angles.sin())  # noqa: E731
    assert torch.autograd.gradcheck(program, (x.requires_grad_(),))
