"""Frozen layers in four bits: what they hold, what goes through them, and how a folder is read into them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import linear

from nanopost.models.llama import Linear
from nanopost.models.lora_model import TARGETS, Adapter, add_adapter, merged_state
from nanopost.models.nf4 import NF4Linear
from nanopost.models.quant import (
    BORDERS,
    LEVELS,
    dequantize_nf4,
    dequantize_scales,
    quantize_nf4,
    quantize_scales,
)
from nanopost.models.weights import load_model
from tests.models.test_lora_model import base, lively

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def weight(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_it_holds_the_definitions_codes_and_scales():
    """4.13 bits a weight, and an error within half a gap between levels plus that of the scales."""
    w = weight(520, 1024)  # more than is quantised at a time
    layer = NF4Linear(w)
    codes, scales = quantize_nf4(w)
    eighths = quantize_scales(scales)
    found = dequantize_nf4(codes, dequantize_scales(*eighths), shape=w.shape)
    assert torch.equal(layer.weight, found)
    gap = max(b - a for a, b in zip(LEVELS, LEVELS[1:], strict=False)) / 2  # noqa: RUF007
    bound = (
        gap * scales.repeat_interleave(64)
        + eighths[1].repeat_interleave(256)[: len(scales)].repeat_interleave(64) / 254
    )
    assert ((layer.weight - w).flatten().abs() <= bound + 1e-12).all()
    stored = NF4Linear(w.float())
    bits = 8 * sum(buffer.nbytes for buffer in stored.buffers()) / w.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-3)
    assert len(BORDERS) == 15 and not stored.state_dict()


@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_those_of_the_weight_it_stands_for(bias):
    w, x = weight(6, 5), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    b = torch.nn.Parameter(weight(6)) if bias else None
    layer, up = NF4Linear(w, b), weight(3, 6)
    y = layer(x)
    torch.testing.assert_close(y, linear(x, layer.weight, b), rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad((y * up).sum(), x)
    torch.testing.assert_close(grad, up @ layer.weight, rtol=0, atol=1e-12)


def test_no_weight_is_kept_for_the_backward():
    """A layer that kept its dequantised weight for the backward would save nothing in training."""
    sizes: list[int] = []
    x = torch.randn(3, 64, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
        NF4Linear(weight(64, 64, dtype=torch.float32))(x).sum().backward()
        assert not sizes
        Linear(64, 64)(x).sum().backward()
        assert 64 * 64 in sizes


def test_a_folder_is_read_into_four_bits(tmp_path):
    """Biases stay as they are, layers that are not named too; the model is a plain one of those weights."""
    model = base(tmp_path, model_type="qwen2", hidden_size=36)
    read = load_model(tmp_path, dtype=torch.float64, four_bits=TARGETS["attention"])
    quantised = {name for name, module in read.named_modules() if isinstance(module, NF4Linear)}
    assert len(quantised) == 2 * 4 and all(name.split(".")[-1] in TARGETS["attention"] for name in quantised)
    with torch.no_grad():
        for name in quantised:
            layer = model.get_submodule(name)
            assert layer.bias is None or torch.equal(layer.bias, read.get_submodule(name).bias)
            layer.weight.copy_(read.get_submodule(name).weight)
    torch.testing.assert_close(read(IDS), model(IDS), rtol=0, atol=1e-12)


def test_an_adapter_on_four_bits_trains_alone_and_is_merged_into_what_they_stand_for(tmp_path):
    base(tmp_path)
    read = load_model(tmp_path, dtype=torch.float64, four_bits=TARGETS["all"])
    before = read(IDS).detach()
    model = add_adapter(read, Adapter(rank=2, alpha=3.0), seed=0)
    assert torch.equal(model(IDS), before)
    lively(model)
    model.logps(IDS[:, :-1], IDS[:, 1:]).sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert touched == {name for name, _ in model.named_parameters() if "lora_" in name}
    plain = load_model(tmp_path, dtype=torch.float64)
    plain.load_state_dict(merged_state(model, model.state_dict()))
    torch.testing.assert_close(plain(IDS), model(IDS), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="the base is in four bits and cannot hold the sum"):
        model.model.layers[0].mlp.up_proj.merge()


PEAK = """
import sys, torch
from pathlib import Path
from nanopost.models import nf4, weights
from nanopost.models.lora_model import TARGETS
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
torch.set_num_threads(1)
model = weights.load_model(sys.argv[1], four_bits=TARGETS["all"])  # once, for the libraries' own
del model
peak, init, before = 0, nf4.NF4Linear.__init__, anonymous()
def watched(self, *given):
    global peak
    init(self, *given)
    peak = max(peak, anonymous() - before)
nf4.NF4Linear.__init__ = watched
model = weights.load_model(sys.argv[1], four_bits=TARGETS["all"])
print(peak, sum(b.nbytes for b in model.buffers()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_folder_is_quantised_tensor_by_tensor(tmp_path):
    """The peak is what stays, and the tensor in hand: not all of the folder in float32."""
    base(tmp_path, hidden_size=512, intermediate_size=1536, num_hidden_layers=5)
    total = sum(x.nbytes for x in load_model(tmp_path, dtype=torch.float64).state_dict().values())
    printed = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], check=True, capture_output=True, text=True
    )
    peak, kept = map(int, printed.stdout.split())
    largest, working = 4 * 512 * 1536, 10 * 4 * 2**18
    assert total > 55e6 and peak < kept + 2 * largest + working + 4e6 < total
