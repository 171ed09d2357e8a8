"""LoRA on a whole model: the model it starts from, what trains, merging, and peft's files in and out."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopost.models.llama import Llama
from nanopost.models.lora import lora_scale
from nanopost.models.peft import (
    ATTENTION,
    TARGETS,
    Adapter,
    add_adapter,
    load_adapter,
    merged_state,
    read_adapter,
    save_adapter,
)
from nanopost.models.weights import load_model, save_model
from tests.models.golden import exact_transformers
from tests.tiny import tiny_model

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
    merged = merged_state(model.state_dict(), adapter)
    bare = load_model(tmp_path, dtype=torch.float64)
    assert merged.keys() == bare.state_dict().keys()
    assert not torch.allclose(bare(IDS), model(IDS), atol=1e-3)
    bare.load_state_dict(merged)
    torch.testing.assert_close(bare(IDS), model(IDS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_saved_and_loaded_it_is_the_same(tmp_path, adapter):
    model = lively(add_adapter(base(tmp_path / "base"), adapter, seed=0))
    save_adapter(adapter, model.state_dict(), tmp_path / "adapter", base=tmp_path / "base")
    again = load_model(tmp_path / "base", dtype=torch.float64)
    assert load_adapter(again, tmp_path / "adapter") == dataclasses.replace(
        adapter, targets=tuple(sorted(adapter.targets))
    )
    assert torch.equal(again(IDS), model(IDS))
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(names) == 2 * 2 * len(adapter.targets)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_peft_reads_what_we_write_and_we_what_peft_writes(tmp_path, adapter):
    pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
    peft = pytest.importorskip("peft", reason="the extra `oracle` is not installed")
    model = lively(add_adapter(base(tmp_path / "base"), adapter, seed=0))
    save_adapter(adapter, model.state_dict(), tmp_path / "adapter", base=tmp_path / "base")
    with exact_transformers() as transformers, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft says about transformers is theirs to mend
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
        bare = theirs(IDS).logits
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
        torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-9, atol=1e-9)
        assert (theirs(IDS).logits - bare).abs().max() > 0.1
        theirs.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "base", dtype=torch.float64)
    load_adapter(again, tmp_path / "again")
    assert torch.equal(again(IDS), model(IDS))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; nanopost reads 'LORA' only"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_dora": True}, "use_dora is True, which nanopost does not know how to follow"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\]"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"something_new": 3}, "something_new is 3, which nanopost does not know"),
        ({"target_modules": ".*proj"}, "target_modules is '.*proj'; nanopost reads a list"),
        ({"target_modules": []}, "targets names no layer"),
        ({"rank_pattern": {"(": 2}}, r"the pattern \( is no regular expression"),
        ({"r": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"lora_alpha": 0}, "alpha must be positive"),
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path, changes, message):
    adapter = ADAPTERS["all"]
    model = add_adapter(base(tmp_path), adapter, seed=0)
    save_adapter(adapter, model.state_dict(), tmp_path, base=tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"adapter_config.json: {message}"):
        read_adapter(tmp_path)


def test_layers_and_tensors_that_are_not_there_are_named(tmp_path):
    model = base(tmp_path)
    with pytest.raises(ValueError, match="targets: no layer is called 'wq'"):
        add_adapter(model, Adapter(rank=2, alpha=1.0, targets=("q_proj", "wq")), seed=0)
    with pytest.raises(ValueError, match=r"the pattern layers\\.7 matches none"):
        add_adapter(model, Adapter(rank=2, alpha=1.0, ranks={r"layers\.7": 3}), seed=0)
    adapter = ADAPTERS["attention"]
    save_adapter(adapter, add_adapter(model, adapter, seed=0).state_dict(), tmp_path, base=tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != name}, f"missing tensor {name}"),
        (tensors | {"more": torch.zeros(1)}, "unknown tensor more"),
        (tensors | {name: torch.zeros(3, 7)}, rf"{name} has shape \(3, 7\)"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=message):
            load_adapter(load_model(tmp_path), tmp_path)
