"""peft's files: what they write we read, what we write they read, and what we cannot follow is refused."""

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopost.models.lora_model import Adapter, adapter_of, add_adapter, layers_of
from nanopost.models.peft import load_adapter, read_adapter, save_adapter
from nanopost.models.weights import load_model
from tests.models.golden import exact_transformers
from tests.models.test_lora_model import ADAPTERS, IDS, base, lively


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_saved_and_loaded_it_is_the_same(tmp_path, adapter):
    model = lively(add_adapter(base(tmp_path / "base"), adapter, seed=0))
    save_adapter(model, model.state_dict(), tmp_path / "adapter", base=tmp_path / "base")
    again = load_model(tmp_path / "base", dtype=torch.float64)
    targets = tuple(sorted(adapter.targets))
    load_adapter(again, tmp_path / "adapter")
    assert adapter_of(again) == dataclasses.replace(adapter, targets=targets)
    assert torch.equal(again(IDS), model(IDS))
    names = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(names) == 2 * 2 * len(adapter.targets)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_peft_reads_what_we_write_and_we_what_peft_writes(tmp_path, adapter):
    pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
    peft = pytest.importorskip("peft", reason="the extra `oracle` is not installed")
    model = lively(add_adapter(base(tmp_path / "base"), adapter, seed=0))
    save_adapter(model, model.state_dict(), tmp_path / "adapter", base=tmp_path / "base")
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


def test_targets_by_their_full_names_are_layers_too(tmp_path):
    """As peft writes all-linear: every layer by its full name; or the names' ends. Heads it names twice."""
    model = lively(add_adapter(base(tmp_path / "base"), ADAPTERS["all"], seed=0))
    save_adapter(model, model.state_dict(), tmp_path, base=tmp_path / "base")
    path, names = tmp_path / "adapter_config.json", [*layers_of(base(tmp_path / "base"), ADAPTERS["all"])]
    raw = json.loads(path.read_text()) | {"modules_to_save": ["classifier", "score"]}
    for targets in (names, [".".join(name.split(".")[-2:]) for name in names]):
        path.write_text(json.dumps(raw | {"target_modules": targets}))
        again = load_adapter(load_model(tmp_path / "base", dtype=torch.float64), tmp_path)
        assert torch.equal(again(IDS), model(IDS))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    left = {key: x for key, x in tensors.items() if "layers.0.mlp.up_proj" not in key}
    save_file(left, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj"):  # of the other layers alone
        load_adapter(load_model(tmp_path / "base"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; nanopost reads 'LORA' only"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"use_rslora": "false"}, "use_rslora is 'false'; nanopost reads False or True only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config is {'loftq_bits': 4}"),
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
    model = add_adapter(base(tmp_path), ADAPTERS["all"], seed=0)
    save_adapter(model, model.state_dict(), tmp_path, base=tmp_path)
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
    model = add_adapter(model, adapter, seed=0)
    save_adapter(model, model.state_dict(), tmp_path, base=tmp_path)
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
