"""LoRA on a whole model: the model it starts from, what trains, and the plain weights it stands for."""

from pathlib import Path

import pytest
import torch

from nanopost.models.llama import Llama
from nanopost.models.lora import lora_scale
from nanopost.models.lora_model import ATTENTION, TARGETS, Adapter, add_adapter, merged_state
from nanopost.models.weights import load_model, save_model
from tests.tiny import tiny_model
from tests.tolerances import within

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
PATTERNED = Adapter(
    rank=2,
    alpha=5.0,
    targets=TARGETS["all"],
    rank_stabilised=True,
    ranks={r"layers\.1\.mlp\.up_proj": 3, "q_proj": 1},
    alphas={"q_proj": 7.0},
)
ADAPTERS = {
    "all": Adapter(rank=2, alpha=5.0),
    "attention": Adapter(rank=3, alpha=4.0, targets=ATTENTION, rank_stabilised=True),
    "patterned": PATTERNED,
}


def base(folder: Path, **changes) -> Llama:
    """A float64 model that also stands in the folder; a width that transformers takes too."""
    model = tiny_model(folder, **({"hidden_size": 24} | changes))
    save_model(model.config, model.state_dict(), folder, stop_ids=(1,))
    return model


def lively(model: Llama) -> Llama:
    """lora_B as after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_a_new_adapter_changes_no_bit_and_alone_trains(tmp_path, adapter):
    model = base(tmp_path)
    before, kept = model(IDS), {name: x.clone() for name, x in model.state_dict().items()}
    add_adapter(model, adapter, seed=0)
    assert torch.equal(model(IDS), before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.logps(IDS[:, :-1], IDS[:, 1:]).sum().backward()
    for name, parameter in model.named_parameters():
        factor = name.endswith(("lora_A", "lora_B"))
        assert parameter.requires_grad == factor and (parameter.grad is not None) == factor, name
        if name.endswith("lora_A"):
            assert parameter.grad.abs().max() == 0  # as lora_B is 0
        if name.endswith("lora_B"):
            assert parameter.grad.abs().max() > 0
    optimizer.step()
    assert not torch.equal(model(IDS), before)
    bare = {name.replace(".base.", "."): x for name, x in model.state_dict().items() if "lora_" not in name}
    assert bare.keys() == kept.keys() and all(torch.equal(bare[name], kept[name]) for name in kept)


def test_a_factor_depends_on_its_seed_and_name_alone(tmp_path):
    found = [
        dict(add_adapter(base(tmp_path), adapter, seed=seed).named_parameters())
        for adapter, seed in (
            (ADAPTERS["all"], 0),
            (Adapter(rank=2, alpha=1.0, targets=("v_proj",)), 0),
            (ADAPTERS["all"], 1),
        )
    ]
    names = [f"model.layers.{i}.self_attn.v_proj.lora_A" for i in range(2)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in names)
    assert not torch.equal(found[0][names[0]], found[0][names[1]])
    assert not torch.equal(found[0][names[0]], found[2][names[0]])


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_merged_is_unmerged(tmp_path, adapter, family):
    """To 1e-12; what is merged is a bare model's state, biases included."""
    model = lively(add_adapter(base(tmp_path, model_type=family, hidden_size=36), adapter, seed=0))
    merged = merged_state(model, model.state_dict())
    bare = load_model(tmp_path, dtype=torch.float64)
    assert merged.keys() == bare.state_dict().keys()
    assert not torch.allclose(bare(IDS), model(IDS), atol=1e-3)
    bare.load_state_dict(merged)
    within("merged adapter, float64", bare(IDS), model(IDS))


def test_the_scale_is_that_of_each_layer(tmp_path):
    model = add_adapter(base(tmp_path), PATTERNED, seed=0)
    first, second = model.model.layers
    for layer, rank, alpha in (
        (first.self_attn.q_proj, 1, 7.0),
        (second.mlp.up_proj, 3, 5.0),
        (first.mlp.up_proj, 2, 5.0),
    ):
        assert (len(layer.lora_A), layer.alpha) == (rank, alpha)
        assert lora_scale(rank, alpha=alpha, rank_stabilised=True) == alpha / rank**0.5
