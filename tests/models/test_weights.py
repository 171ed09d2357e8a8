"""Hub folders: what is written is read back bit for bit; what cannot be read exactly is refused by name."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopost.models import fill
from nanopost.models.attention import attend, layout
from nanopost.models.config import load_config, write_config
from nanopost.models.rope import RopeScaling
from nanopost.models.weights import load_model, random_model, save_model
from nanopost.rollout.sampler import row_uniforms, sample
from tests.chat_fixtures import make_chat
from tests.tiny import TINY, tiny_folder, tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
QWEN = {"model_type": "qwen2", "sliding_window": 4}
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
        ({"model_type": "gemma"}, "model_type is 'gemma'; nanopost reads llama, mistral, qwen2, qwen3"),
        ({"num_experts": 8}, "num_experts is 8"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": None}, "rope type 'yarn' without factor"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
            "no part of the rope type 'longrope'",
        ),
        ({"rope_parameters": {"type": "dynamic"}}, "'dynamic'"),
        ({"rope_parameters": YARN | {"mscale": 1.0}}, "mscale is no part of the rope type 'yarn'"),
        ({"rope_parameters": YARN | {"factor": 0.5}}, "factor must be at least 1, got 0.5"),
        ({"rope_parameters": YARN | {"beta_slow": 40.0}}, "beta_slow must lie between 0 and beta_fast"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"full_attention": {}, "rope_type": "default"}}, "full_attention is no part"),
        ({"rope_scaling": YARN | {"factor": 2.0}, "rope_parameters": YARN}, "disagree"),
        ({"rope_theta": 7.0}, "rope_theta is both 7.0 and 500.0"),
        ({"rope_parameters": YARN | {"type": "linear"}}, "the rope type is both 'linear' and 'yarn'"),
        (
            {"rope_parameters": YARN | {"rope_type": "llama3"}},
            "'llama3' without high_freq_factor, low_freq_factor",
        ),
        ({"rope_parameters": "yarn"}, ""),
        ({"rope_interleaved": True}, "rope_interleaved is True"),
        ({"num_attention_heads": 0, "head_dim": None}, ""),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be above 0, got 0"),
        ({"vocab_size": 10.5}, "vocab_size must be a whole number, got 10.5"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, got '1e-6'"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a number, got None"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0},
            "without sliding_window",
        ),
        ({"torch_dtype": "float16"}, "dtype and torch_dtype disagree: float16 and float64"),
        ({"model_type": "mistral"}, "missing sliding_window, where readers of mistral assume"),
        ({"sliding_window": 4}, "sliding_window=4: a llama looks at everything before it"),
        (QWEN | {"use_sliding_window": True, "max_window_layers": 1}, "sliding_window=4 of some layers only"),
        (
            QWEN | {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
            "some layers",
        ),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 must be a multiple"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, changes, message):
    path = tiny_folder(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        load_config(tmp_path)


OLD, NEW = ("rope_theta", "rope_scaling", "torch_dtype"), ("rope_parameters", "dtype")


SCALINGS = [None, RopeScaling("linear", 4.0), RopeScaling("llama3", 4.0, 16), RopeScaling("yarn", 4.0, 16)]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("gone", [(), OLD, NEW])
def test_either_spelling_says_all(tmp_path, scaling, gone):
    """A reader of the other spelling must find θ and the scaling too."""
    path = tiny_folder(tmp_path, rope_scaling=scaling) / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in gone}))
    assert load_config(tmp_path) == dataclasses.replace(TINY, rope_scaling=scaling)


def test_a_length_that_is_not_told_is_that_of_the_config(tmp_path):
    path = tiny_folder(tmp_path) / "config.json"
    raw = json.loads(path.read_text()) | {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
    path.write_text(json.dumps(raw))
    assert load_config(tmp_path).rope_scaling == RopeScaling("yarn", 2.0, TINY.max_position_embeddings)


@pytest.mark.parametrize(
    ("said", "window"),
    [
        ({"use_sliding_window": False, "max_window_layers": 0}, None),
        ({}, None),
        ({"use_sliding_window": True, "max_window_layers": 2}, None),
        ({"use_sliding_window": True, "max_window_layers": 0}, 4),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 4),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 2}, None),
    ],
)
def test_qwens_window_is_that_of_all_layers_or_none(tmp_path, said, window):
    path = tiny_folder(tmp_path, model_type="qwen2") / "config.json"
    raw = {k: v for k, v in json.loads(path.read_text()).items() if "window" not in k}
    path.write_text(json.dumps(raw | {"sliding_window": 4} | said))
    assert load_config(tmp_path).sliding_window == window


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


def test_what_is_refused_is_refused_before_a_number_is_read(tmp_path, monkeypatch):
    folder = broken(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}))
    monkeypatch.setattr(fill, "safe_open", None)
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(3,\), config.json says \(20,\)"):
        load_model(folder)


def shards(folder):
    """A folder of several files, their index, and where it has the last tensor."""
    model = tiny_model(folder)
    save_model(model.config, model.state_dict(), folder, stop_ids=(1,), max_shard_bytes=6000)
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    return index, raw, max(raw["weight_map"])


def test_an_index_and_its_shards_must_agree(tmp_path):
    index, raw, last = shards(tmp_path)
    for change, message in (
        ({last: min(raw["weight_map"].values())}, "is not where model.safetensors.index.json has it"),
        ({"model.more": raw["weight_map"][last]}, "model.more is in no shard"),
    ):
        index.write_text(json.dumps(raw | {"weight_map": raw["weight_map"] | change}))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    index.write_text(json.dumps(raw))
    first, second = (tmp_path / name for name in sorted(set(raw["weight_map"].values()))[:2])
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="stands in another shard too"):
        load_model(tmp_path)


def test_padding_of_the_vocabulary_is_no_token(tmp_path):
    """Rows behind the tokenizer's last token are not sampled, not scored, and get no gradient."""
    chat = make_chat(tmp_path)
    count = chat.tokenizer.get_vocab_size()
    model = tiny_model(tmp_path, vocab_size=count + 7)
    assert model.words == count
    with torch.no_grad():
        model.lm_head.weight[count:] = 10 * model.lm_head.weight[:7]  # loud ones
    save_model(model.config, model.state_dict(), tmp_path, stop_ids=chat.stop_ids)
    model = load_model(tmp_path, dtype=torch.float64)
    assert model.words == count and model(IDS).shape[-1] == count
    uniforms = row_uniforms(seed=0, step=0, prompts=[0], group_size=50, count=8)
    drawn = sample(model, [[3, 4]], group_size=50, max_new_tokens=8, stop_ids=(1,), uniforms=uniforms)
    assert max(token for row in drawn for token in row.completion_ids) < count
    targets = IDS.roll(-1, 1)
    expected = torch.log_softmax(
        model.model(IDS[0], torch.arange(8), causal) @ model.lm_head.weight[:count].T, -1
    )
    logps = model.logps(IDS, targets)
    torch.testing.assert_close(
        logps[0], expected.gather(1, targets[0][:, None])[:, 0], rtol=1e-10, atol=1e-10
    )
    logps.sum().backward()
    assert model.lm_head.weight.grad[:count].abs().max() > 0 == model.lm_head.weight.grad[count:].abs().max()
    write_config(
        dataclasses.replace(model.config, vocab_size=count - 1), tmp_path, dtype=torch.float64, stop_ids=(1,)
    )
    with pytest.raises(
        ValueError, match=f"tokenizer.json has {count} tokens, the embedding {count - 1} rows"
    ):
        random_model(tmp_path, seed=0)


def causal(layer, q, k, v):
    return attend(layout([(0, len(q))], len(q), q.device), layer, q, k, v)


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
