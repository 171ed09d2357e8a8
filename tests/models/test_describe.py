"""`python -m nanopost.models.weights check DIR`: what a folder is, or what is wrong with it."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopost.data.chat import copy_chat, load_chat
from nanopost.models import others
from nanopost.models.describe import check_finite, describe, main
from nanopost.models.heads import load_score_model, save_score_model
from nanopost.models.rope import RopeScaling
from nanopost.models.trainable import LoRA, adapt, save_policy, save_scores
from nanopost.models.weights import load_model, random_model, save_model, write_config
from tests.tiny import hub_folder, tiny_model


def test_a_folder_is_told_in_a_few_lines(tmp_path, capsys):
    hub_folder(tmp_path)
    main(["check", str(tmp_path), "--values", "--logits"])
    lines = capsys.readouterr().out.splitlines()
    told = dict(line.split(maxsplit=1) for line in lines if not line.startswith("logits"))
    model = load_model(tmp_path)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert told["family"] == "llama, LlamaForCausalLM"
    assert told["shape"] == "width 20, 2 layers, 6 heads over 2 of 6, SwiGLU 28"
    assert told["positions"] == "256, θ = 500"
    assert told["parameters"] == f"{count:,}, head tied to the embedding"
    assert told["vocabulary"] == f"{model.words} tokens, 0 rows of padding (never sampled)"
    assert told["stop"] == f"ids    {model.words - 1} (generation_config.json)"
    assert told["template"].endswith("in chat_template.jinja and tokenizer_config.json")
    assert told["values"] == f"{count:,} numbers, all finite"
    assert "logits      written and read again: 0 away" in lines


def test_every_part_of_a_family_is_told(tmp_path):
    scaling = RopeScaling("yarn", 4.0, 16)
    changes = {"model_type": "qwen2", "sliding_window": 9, "rope_scaling": scaling, "hidden_size": 36}
    model = tiny_model(tmp_path, **changes)
    save_model(model.config, model.state_dict(), tmp_path, stop_ids=(1, 2), max_shard_bytes=9000)
    told = dict(line.split(maxsplit=1) for line in describe(tmp_path))
    assert told["family"] == "qwen2, Qwen2ForCausalLM"
    assert told["positions"] == "64, θ = 500, yarn × 4, a window of 9"
    assert told["vocabulary"] == "23 rows, no tokenizer.json"
    files = len(list(tmp_path.glob("*.safetensors")))
    assert files > 1 and told["tensors"].endswith(f"MB in {files} files")
    assert told["stop"] == "ids    1, 2 (generation_config.json)" and told["template"] == "none"


def test_a_number_that_is_not_finite_is_found_by_its_tensor(tmp_path):
    hub_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert check_finite(tmp_path) == sum(tensor.numel() for tensor in tensors.values())
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4:6] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj.weight has 2 numbers that are not finite"
    ):
        check_finite(tmp_path)


def test_what_is_wrong_is_one_line(tmp_path):
    hub_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("another")
    with pytest.raises(
        SystemExit, match=r"the templates in chat_template\.jinja and tokenizer_config.json differ"
    ):
        main(["check", str(tmp_path)])
    config = dataclasses.replace(load_model(tmp_path).config, intermediate_size=29)
    write_config(config, tmp_path, dtype=torch.float32, stop_ids=(1,))
    with pytest.raises(
        SystemExit, match=r"mlp.down_proj.weight has shape \(20, 28\), config.json says \(20, 29\)"
    ):
        main(["check", str(tmp_path)])


@pytest.fixture
def merged(tmp_path):
    """A base, and a folder with a model that an adapter was merged into, the adapter beside it."""
    base = hub_folder(tmp_path / "base")
    policy = adapt(load_model(base), LoRA(lora_rank=2, lora_alpha=4.0), seed=0, base=base)
    for name, parameter in policy.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    copy_chat(base, tmp_path / "out")
    options = {"base": base, "stop_ids": load_chat(base).stop_ids}
    save_policy(policy, policy.state_dict(), tmp_path / "out", **options)
    return tmp_path / "out"


def test_an_adapter_beside_the_model_is_told_and_held_to_it(merged, capsys):
    main(["check", str(merged)])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("adapter")]
    assert len(told) == 1 and told[0].startswith("adapter     rank 2, α 4, down_proj, gate_proj, ")
    assert told[0].endswith(f"; beside {merged.parent / 'base'}")
    main(["check", str(merged), "--logits"])
    assert "adapter     beside its base: " in capsys.readouterr().out
    path = merged / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    first, *_ = sorted(tensors)
    save_file({**tensors, first: tensors[first] + 1}, path)
    main(["check", str(merged)])  # its numbers are not looked at
    with pytest.raises(SystemExit, match=r"adapter: beside its base \S+ away from the merged model"):
        main(["check", str(merged), "--logits"])
    save_file({**tensors, first: tensors[first][:1].contiguous()}, path)
    with pytest.raises(SystemExit, match=rf"adapter_model\.safetensors: {first} has shape \(1, "):
        main(["check", str(merged)])
    del tensors[first]
    save_file(tensors, path)
    with pytest.raises(SystemExit, match=rf"adapter_model\.safetensors: missing tensor {first}"):
        main(["check", str(merged)])


GARBAGE = [b"", b"\xff\xfe", b"[]", b"{}", b"null", b"7", b'{"a": 1}', b'{"a": {"b": []}}', None]


@pytest.mark.parametrize("garbage", GARBAGE, ids=repr)
def test_a_folder_with_any_file_spoilt_is_one_line(merged, garbage):
    """A check ends in a word of its own, whatever the file holds."""
    refused = set()
    for path in sorted(path for path in merged.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if garbage is None else garbage)
        try:
            main(["check", str(merged), "--values", "--logits"])
        except SystemExit as told:
            assert isinstance(told.code, str) and "\n" not in told.code.strip(), (path.name, told.code)
            refused.add(path.name)
        path.write_bytes(whole)
    assert refused >= {"config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"}


def test_whoever_reads_the_folder_reads_its_weights(merged):
    """safetensors makes its files the owner's alone: a server under another name could not read them."""
    modes = {path.stat().st_mode for path in merged.rglob("*") if path.is_file()}
    assert len(modes) == 1 and modes.pop() & 0o077 == 0o077 & 0o666 & ~current_umask()


def current_umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def test_a_padded_vocabulary_and_a_score_model_are_told(tmp_path, capsys):
    hub_folder(tmp_path / "a")
    chat = load_chat(tmp_path / "a")
    config = dataclasses.replace(
        load_model(tmp_path / "a").config, vocab_size=chat.tokenizer.get_vocab_size() + 7
    )
    write_config(config, tmp_path / "a", dtype=torch.float32, stop_ids=chat.stop_ids)
    model = random_model(tmp_path / "a", seed=0)
    save_model(config, model.state_dict(), tmp_path / "a", stop_ids=chat.stop_ids)
    main(["check", str(tmp_path / "a"), "--logits"])
    told = capsys.readouterr().out
    assert f"{model.words} tokens, 7 rows of padding" in told and "written and read again: 0 away" in told
    scorer = load_score_model(tmp_path / "a", labels=2)
    copy_chat(tmp_path / "a", tmp_path / "b")
    save_score_model(config, scorer.state_dict(), tmp_path / "b", stop_ids=chat.stop_ids, labels=["x", "y"])
    told = dict(line.split(maxsplit=1) for line in describe(tmp_path / "b"))
    assert told["family"] == "llama, LlamaForSequenceClassification" and told["parameters"].endswith(
        ", 2 scores"
    )
    main(["check", str(tmp_path / "b"), "--logits"])
    assert "scores      written and read again: 0 away" in capsys.readouterr().out


def test_ids_that_are_no_token_are_refused(tmp_path):
    hub_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9999]}')
    with pytest.raises(SystemExit, match=r"generation_config.json: eos_token_id 9999 is no token"):
        main(["check", str(tmp_path)])
    for name in ("generation_config.json", "config.json"):
        raw = json.loads((tmp_path / name).read_text())
        (tmp_path / name).write_text(json.dumps({k: v for k, v in raw.items() if k != "eos_token_id"}))
    assert dict(line.split(maxsplit=1) for line in describe(tmp_path))["stop"].endswith(
        "(tokenizer_config.json)"
    )
    (tmp_path / "tokenizer.json").write_text('{"model": []}')
    with pytest.raises(SystemExit, match=r"tokenizer.json: no vocabulary with ids"):
        main(["check", str(tmp_path)])


def test_the_command_runs(tmp_path):
    hub_folder(tmp_path)
    command = [sys.executable, "-m", "nanopost.models.weights", "check"]
    found = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("family") and not found.stderr
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"model_type": "gemma"}))
    found = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr.count("\n") == 1 and "model_type is 'gemma'" in found.stderr


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_is_asked_where_it_is_installed(tmp_path, capsys, family):
    pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
    model = tiny_model(tmp_path, dtype=torch.float32, model_type=family, hidden_size=24)
    save_model(model.config, model.state_dict(), tmp_path, stop_ids=(1,))
    main(["check", str(tmp_path), "--logits"])
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [float(line.split(" away")[0].split()[-1]) < 1e-4 for line in lines] == [True] * 3
    assert "reads it" in lines[1] and "reads what was written" in lines[2]


def test_transformers_and_peft_are_asked_for_scores_too(tmp_path, capsys):
    """A reward model with its adapter beside it; the last id is the one its config calls padding."""
    pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
    pytest.importorskip("peft", reason="the extra `oracle` is not installed")
    model = tiny_model(tmp_path / "base", dtype=torch.float32, hidden_size=24)
    save_model(model.config, model.state_dict(), tmp_path / "base", stop_ids=(1,))
    scorer = adapt(load_score_model(tmp_path / "base"), LoRA(lora_rank=2), seed=0, base=tmp_path / "base")
    for name, parameter in scorer.named_parameters():
        if name.endswith(("lora_B", "score.weight")):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    padding = 34 % model.config.vocab_size
    options = {"base": tmp_path / "base", "stop_ids": tuple(range(padding)), "labels": ["reward"]}
    save_scores(scorer, scorer.state_dict(), tmp_path / "out", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say of each other is theirs to mend
        main(["check", str(tmp_path / "out"), "--logits"])
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [float(line.split(" away")[0].split()[-1]) < 1e-4 for line in lines] == [True] * 5
    assert [line.split()[0] for line in lines] == ["scores", "adapter", "adapter", "scores", "scores"]
    assert float(lines[3].split()[-1]) > 0.01  # the largest score
    assert "peft" in lines[2] and "reads it" in lines[3] and "reads what was written" in lines[4]


def test_a_large_run_and_several_ranks_are_not_held_up(merged, monkeypatch):
    """The other ranks wait for rank 0 at the end: it names the command instead."""
    monkeypatch.setattr(others, "find_spec", lambda name: True)
    for changes in ({"ranks": 2}, {"ranks": 1, "most": 9}):
        monkeypatch.setattr(others, "ASKED", changes.get("most", 2**30))
        (line,) = others.certificate_of_run(merged, ranks=changes["ranks"])
        assert line.endswith(f": python -m nanopost.models.weights check {merged} --logits does")
    monkeypatch.setattr(others, "find_spec", lambda name: None)
    assert others.certificate_of_run(merged, ranks=1) == []


def test_whoever_reads_another_model_is_told_so(merged, monkeypatch, capsys):
    """A library that is there and whose logits are a tenth away, of seven; and one that refuses."""
    ids, ours = others.known_ids(merged), others.said(merged)

    def near(away: float):
        return lambda: lambda _: SimpleNamespace(logits=ours + away)

    most = float(ours.abs().max())
    assert others.heard(ours, ids, near(1e-5 * most), "it", scores=0).startswith("reads it: ")
    assert others.heard(ours, ids, near(0.01 * most), "it", scores=0).startswith(
        "reads another model in it: "
    )
    assert others.heard(ours, ids, lambda: 1 / 0, "it", scores=0) == "refuses it: division by zero"
    told = [f"transformers 0 {others.ANOTHER} it: 0.1 away, of 7"]
    monkeypatch.setattr("nanopost.models.describe.read_by_others", lambda folder, **_: told)
    with pytest.raises(SystemExit, match=r"out: logits transformers 0 reads another model in it: 0\.1 away"):
        main(["check", str(merged), "--logits"])
    assert "reads another model in it" in capsys.readouterr().out


def test_a_model_that_was_rounded_may_be_as_far_from_its_adapter(merged, capsys):
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(merged / "model.safetensors").items()}
    save_file(tensors, merged / "model.safetensors")
    main(["check", str(merged), "--logits"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "beside its base" in line]
    assert float(line.split(": ")[1].split()[0]) > 1e-3
