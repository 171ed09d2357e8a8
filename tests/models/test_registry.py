"""The store, the table and the audit: names by content, no default, an older table as the way back."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopost.models.lora_model import Adapter
from nanopost.models.registry import adapter_name, audited, main, read_table, register, stored
from tests.models.test_bank import adapter_folders

TIME = "2026-01-02T03:04:05+00:00"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return adapter_folders(tmp_path, {name: Adapter(rank=1, alpha=2.0) for name in ("old", "new")})


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value) + "\n")
    return path


def test_a_name_is_the_hash_of_both_files(folders, tmp_path):
    parts = (folders["old"] / name for name in ("adapter_config.json", "adapter_model.safetensors"))
    digests = b"".join(hashlib.sha256(part.read_bytes()).digest() for part in parts)
    name = register(tmp_path / "store", folders["old"])
    assert name == hashlib.sha256(digests).hexdigest() == adapter_name(tmp_path / "store" / name)
    path = folders["old"] / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 2.0', '"lora_alpha": 3.0'))
    assert register(tmp_path / "store", folders["old"]) != name  # another α is another adapter
    assert register(tmp_path / "store", folders["new"]) != name
    assert len(list((tmp_path / "store").iterdir())) == 3


def test_what_is_stored_does_not_change(folders, tmp_path):
    store = tmp_path / "store"
    name = register(store, folders["old"])
    assert register(store, folders["old"]) == name and stored(store, name) == store / name
    config = store / name / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 2.0', '"lora_alpha": 3.0'))
    for again in (lambda: stored(store, name), lambda: register(store, folders["old"])):
        with pytest.raises(ValueError, match=f"{name} has changed: its content is"):
            again()
    with pytest.raises(ValueError, match="no adapter 00"):
        stored(store, "00")
    path = folders["new"] / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    for broken, message in (
        ({k: v for k, v in tensors.items() if k != first}, f"missing tensor {first}"),
        (tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "unknown tensor .*lm_head"),
        (tensors | {first: tensors[first].repeat(2, 1)}, f"{first} has shape"),
        ({"base_model.model.score.weight": torch.zeros(1, 2)}, "no tensor is a factor of"),
    ):
        save_file(broken, path)
        with pytest.raises(ValueError, match=rf"adapter_model.safetensors: {message}"):
            register(store, folders["new"])
    write(folders["new"] / "adapter_config.json", {"peft_type": "IA3"})
    with pytest.raises(ValueError, match="peft_type is 'IA3'"):
        register(store, folders["new"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"bank": {"v1": "17"}}', "'bank', 'v1' must name an adapter, got '17'"),
        ('{"bank": {"v1": 17}}', "'bank', 'v1' must name an adapter, got 17"),
        ('{"bank": {}}', "'bank' must have its versions, got {}"),
        ('{"bank": "v1"}', "'bank' must have its versions, got 'v1'"),
        ('{"bank": {"v1": "a", "v1": "b"}}', "'v1' stands there twice"),
        ("[]", "expected a JSON object, got list"),
    ],
)
def test_a_table_that_says_nothing_clear_is_refused(tmp_path, text, message):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=f"table.json: {message}"):
        read_table(tmp_path / "table.json")


def test_a_record_says_who_was_answered_by_what(tmp_path):
    table = {("bank", "v1"): "a" * 64, ("shop", "v1"): "b" * 64}
    request = {"id": "7", "tenant": "shop", "version": "v1", "text": "not for the record"}
    record = {"id": "7", "tenant": "shop", "version": "v1", "adapter": "b" * 64, "time": TIME}
    assert audited(table, request, time=TIME) == record
    for changes, message in (
        ({"tenant": "shops"}, "no adapter for tenant 'shops' and version 'v1': the tenant is unknown"),
        ({"version": "v2"}, "no adapter for tenant 'shop' and version 'v2': it has 'v1'"),
        ({"id": 7}, "a request must have 'id', a text, got 7"),
        ({"version": None}, "a request must have 'version', a text, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            audited(table, request | changes, time=TIME)


def test_replay_prints_the_audit_and_an_older_table_is_the_way_back(folders, tmp_path, capsys):
    store, names = tmp_path / "store", {}
    for key, folder in folders.items():
        assert main(["add", str(store), str(folder)]) == 0
        names[key] = capsys.readouterr().out.strip()
    requests = tmp_path / "requests.jsonl"
    asked = [
        {"id": str(i), "tenant": tenant, "version": "v1"} for i, tenant in enumerate(("bank", "shop", "bank"))
    ]
    requests.write_text("".join(json.dumps(row) + "\n" for row in asked))
    told = {}
    for key in ("new", "old"):  # deployed, then rolled back
        table = write(tmp_path / f"{key}.json", {"bank": {"v1": names[key]}, "shop": {"v1": names["old"]}})
        assert (
            main(["replay", str(store), str(table), str(requests), "--audit", str(tmp_path / "audit")]) == 0
        )
        printed = capsys.readouterr()
        rows = [json.loads(line) for line in printed.out.splitlines()]
        told[key] = [row["adapter"] for row in rows]
        assert [row["id"] for row in rows] == ["0", "1", "2"] and "3 routed, 0 refused" in printed.err
    assert told["new"] == [names["new"], names["old"], names["new"]] and told["old"] == [names["old"]] * 3
    assert len((tmp_path / "audit").read_text().splitlines()) == 6  # nothing is overwritten

    requests.write_text(
        requests.read_text() + json.dumps({"id": "3", "tenant": "cafe", "version": "v1"}) + "\n"
    )
    assert main(["replay", str(store), str(table), str(requests)]) == 1
    printed = capsys.readouterr()
    assert (
        len(printed.out.splitlines()) == 3 and "requests.jsonl:4: no adapter for tenant 'cafe'" in printed.err
    )
    nowhere = str(tmp_path / "nowhere/audit")
    assert main(["replay", str(store), str(table), str(requests), "--audit", nowhere]) == 2
    printed = capsys.readouterr()
    assert not printed.out and "nowhere/audit" in printed.err  # what is not recorded is not told
    requests.write_text("[]\n")
    assert main(["replay", str(store), str(table), str(requests)]) == 2
    assert "requests.jsonl:1: a request must be an object" in capsys.readouterr().err
    write(table, {"bank": {"v1": "f" * 64}})
    assert main(["replay", str(store), str(table), str(requests)]) == 2
    assert f"no adapter {'f' * 64}" in capsys.readouterr().err
