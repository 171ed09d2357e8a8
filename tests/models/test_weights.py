"""Hub folders: what is written is read back bit for bit; what cannot be read exactly is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopost.models.weights import load_config, load_model, random_model, save_model
from tests.tiny import TINY, tiny_folder, tiny_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 6000])
def test_saved_folder_loads_with_equal_logits(tmp_path, tied, max_shard_bytes):
    model = tiny_model(tmp_path / "a", tie_word_embeddings=tied)
    save_model(
        model.config, model.state_dict(), tmp_path / "b", stop_ids=(1, 2), max_shard_bytes=max_shard_bytes
    )
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes == 1 << 30)
    stored = [name for file in files for name in load_file(file)]
    assert len(stored) == len(set(stored)) and ("lm_head.weight" in stored) == (not tied)
    again = load_model(tmp_path / "b", dtype=torch.float64)
    assert again.config == model.config
    assert torch.equal(again(IDS), model(IDS))
    assert (again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()) == tied
    assert json.loads((tmp_path / "b/generation_config.json").read_text())["eos_token_id"] == [1, 2]


def test_a_generation_config_that_is_there_stays(tmp_path):
    model = tiny_model(tmp_path / "a")
    (tmp_path / "a/generation_config.json").write_text('{"eos_token_id": [7], "temperature": 0.6}')
    save_model(model.config, model.state_dict(), tmp_path / "a", stop_ids=(7,))
    assert json.loads((tmp_path / "a/generation_config.json").read_text())["temperature"] == 0.6


def test_random_weights_are_a_function_of_the_seed(tmp_path):
    folder = tiny_folder(tmp_path)
    a, b, c = (random_model(folder, seed=seed)(IDS) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    model = random_model(tiny_folder(tmp_path, hidden_size=512), seed=0)
    assert model.model.embed_tokens.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    layer = model.model.layers[0]
    assert layer.mlp.up_proj.weight.detach().std() == pytest.approx(512**-0.5, rel=0.05)
    assert layer.mlp.down_proj.weight.detach().std() == pytest.approx(
        28**-0.5 / 2, rel=0.05
    )  # √(2 · 2 layers)
    assert (model.model.norm.weight == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, "rope type is 'yarn'"),
        ({"rope_theta": 7.0}, "rope_theta is 7.0 at the top and 500.0"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 must be a multiple"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, changes, message):
    path = tiny_folder(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        load_config(tmp_path)


def test_older_and_newer_spellings_of_rope_are_read(tmp_path):
    path = tiny_folder(tmp_path) / "config.json"
    raw = json.loads(path.read_text())
    for gone in ("rope_theta", "rope_parameters"):
        path.write_text(json.dumps({key: value for key, value in raw.items() if key != gone}))
        assert load_config(tmp_path).rope_theta == TINY.rope_theta


def broken(tmp_path, change):
    model = tiny_model(tmp_path)
    save_model(model.config, model.state_dict(), tmp_path, stop_ids=(1,))
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensor model.norm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "unknown tensor extra"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \(3,\)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_model(broken(tmp_path, change))


def test_a_head_that_contradicts_tied_embeddings_is_refused(tmp_path):
    model = tiny_model(tmp_path, tie_word_embeddings=True)
    save_model(model.config, model.state_dict(), tmp_path, stop_ids=(1,))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="ties the head to the embedding"):
        load_model(tmp_path)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load_model(tmp_path)
    tiny_folder(tmp_path)
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00garbage!")
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')
    with pytest.raises(ValueError, match="a shard must be a file name in the same folder"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got list"):
        load_model(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_folder_with_equal_logits(tmp_path, tied):
    transformers = pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
    # a hidden size that is a multiple of the heads: transformers asks for it, though it sets head_dim apart
    model = tiny_model(tmp_path, tie_word_embeddings=tied, dtype=torch.float32, hidden_size=24)
    save_model(model.config, model.state_dict(), tmp_path, stop_ids=(1,))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS), rtol=1e-5, atol=1e-5)
