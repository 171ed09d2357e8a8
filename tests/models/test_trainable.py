"""What a script writes is read again before it counts, and an adapter belongs beside its own base."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopost.models import trainable
from nanopost.models.heads import load_score_model, save_score_model
from nanopost.models.lora_model import TARGETS, Adapter, add_adapter
from nanopost.models.peft import check_origin, origin, save_adapter
from nanopost.models.trainable import LoRA, adapt, load_policy, nf4_layers, save_policy, save_scores
from nanopost.models.weights import load_model, save_model, weights_id
from tests.models.test_lora_model import base, lively


def trained(folder: Path, **flags):
    """A model with an adapter that has learned something, beside the base in folder/base."""
    base(folder / "base")
    return lively(load_policy(folder / "base", LoRA(lora_rank=2, **flags), seed=0))


@pytest.mark.parametrize("nf4", [False, True])
def test_what_is_written_is_read_again(tmp_path, nf4):
    model = trained(tmp_path, lora_nf4=nf4)
    options = {"base": tmp_path / "base", "stop_ids": (1,)}
    told = save_policy(model, model.state_dict(), tmp_path / "out", **options)
    assert told.startswith(" (read again: the same logits; base and adapter ")


def test_a_file_that_says_something_else_does_not_count(tmp_path, monkeypatch):
    model = trained(tmp_path)
    options = {"base": tmp_path / "base", "stop_ids": (1,)}

    def rots(config, tensors, folder, **given):
        name = "model.norm.weight"
        save_model(config, tensors | {name: 1.5 * tensors[name]}, folder, **given)

    monkeypatch.setattr(trainable, "save_model", rots)
    with pytest.raises(ValueError, match=r"out: read again, its logits are .* away"):
        save_policy(model, model.state_dict(), tmp_path / "out", **options)
    monkeypatch.undo()

    def loses(model, state, folder, **given):
        save_adapter(model, state, folder, **given)
        path = folder / "adapter_model.safetensors"
        save_file({name: 0 * x for name, x in load_file(path).items()}, path)

    monkeypatch.setattr(trainable, "save_adapter", loses)
    with pytest.raises(ValueError, match=r"base and adapter are .* away from the merged model"):
        save_policy(model, model.state_dict(), tmp_path / "out", **options)


@pytest.mark.parametrize(
    "flags", [{}, {"lora_rank": 2}, {"lora_rank": 2, "lora_nf4": True}], ids=["all", "lora", "nf4"]
)
def test_a_score_model_is_read_again_as_well(tmp_path, monkeypatch, flags):
    """A reward model of two scores: trained whole, or with an adapter and the head."""
    chosen = LoRA(**flags)
    base(tmp_path / "base")
    start = {"seed": 0, "base": tmp_path / "base"}
    model = adapt(
        load_score_model(tmp_path / "base", labels=2, four_bits=nf4_layers(chosen)), chosen, **start
    )
    torch.nn.init.normal_(lively(model).score.weight, generator=torch.Generator().manual_seed(0))
    options = {"base": tmp_path / "base", "stop_ids": (1,), "labels": ["right", "kind"]}
    told = save_scores(model, model.state_dict(), tmp_path / "out", **options)
    assert told.startswith(" (read again: the same scores") and ("; base and adapter " in told) == bool(flags)

    def rots(config, tensors, folder, **given):
        save_score_model(config, tensors | {"score.weight": 1.5 * tensors["score.weight"]}, folder, **given)

    monkeypatch.setattr(trainable, "save_score_model", rots)
    with pytest.raises(ValueError, match=r"out: read again, its scores are .* away"):
        save_scores(model, model.state_dict(), tmp_path / "out", **options)


def test_another_number_in_the_config_is_another_model(tmp_path):
    """The same weights with another θ: an adapter trained beside one is none of the other's."""
    base(tmp_path)
    before, raw = weights_id(tmp_path), json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"transformers_version": "5.0"}))
    assert weights_id(tmp_path) == before  # it says nothing of the model
    theta = {"rope_theta": 700.0, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}}
    (tmp_path / "config.json").write_text(json.dumps(raw | theta))
    assert weights_id(tmp_path) != before


def test_an_adapter_belongs_beside_its_base_and_its_format(tmp_path):
    for name, four_bits in (("full", ()), ("nf4", TARGETS["all"])):
        base(tmp_path / "base")
        model = add_adapter(load_model(tmp_path / "base", four_bits=four_bits), Adapter(2, 4.0), seed=0)
        save_adapter(model, model.state_dict(), tmp_path / name, base=tmp_path / "base")
        known = {"format": "pt", "base": weights_id(tmp_path / "base"), "nf4": str(bool(four_bits))}
        assert origin(tmp_path / name) == known
        check_origin(tmp_path / name, tmp_path / "base", nf4=bool(four_bits))
    other = base(tmp_path / "other")
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    save_model(other.config, other.state_dict(), tmp_path / "other", stop_ids=(1,))
    for folder, flags, message in (
        (tmp_path / "other", LoRA(lora_from=tmp_path / "full"), "full belongs beside the weights"),
        (
            tmp_path / "base",
            LoRA(lora_from=tmp_path / "full", lora_nf4=True),
            "full belongs beside weights as they",
        ),
        (tmp_path / "base", LoRA(lora_from=tmp_path / "nf4"), "nf4 belongs beside weights in four bits"),
    ):
        with pytest.raises(ValueError, match=message):
            load_policy(folder, flags, seed=0)
    path = tmp_path / "full/adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})  # as peft writes it
    load_policy(tmp_path / "other", LoRA(lora_from=tmp_path / "full"), seed=0)
