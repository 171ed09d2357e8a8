"""Requests of many tenants beside one base: what is answered, what is recorded, what stops a batch."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nanopost.data.chat import decode, load_chat
from nanopost.data.schema import Message, Record
from nanopost.evals.stages import complete
from nanopost.evals.tenants import answers, deploy
from nanopost.models.lora_model import TARGETS, Adapter, add_adapter
from nanopost.models.peft import load_adapter, save_adapter
from nanopost.models.weights import load_model, save_model
from tests.tiny import hub_folder

Store = dict[str, Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Store:
    """A base, two tenants' adapters in a store, a table; the second overflows float32 and is finite."""
    folder = tmp_path_factory.mktemp("tenants")
    base = hub_folder(folder / "base")
    for number, (tenant, scale) in enumerate({"calm": 1.0, "loud": 1e30}.items()):
        model = add_adapter(load_model(base), Adapter(rank=2, alpha=4.0), seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_B"):
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        save_adapter(model, model.state_dict(), folder / tenant, base=base)
    tenants = {tenant: folder / tenant for tenant in ("calm", "loud")}
    deploy(folder / "store", tenants, "v1", folder / "table.json")
    return {"base": base, "store": folder / "store", "table": folder / "table.json"}


def ask(place: Store, audit: Path, *requests: dict) -> list[str | None]:
    where = place["base"], place["store"], place["table"]
    return answers(*where, requests, max_new_tokens=4, audit=audit)


def request(number: int, tenant: str, **changes) -> dict:
    return {"id": str(number), "tenant": tenant, "version": "v1", "text": "add two to two"} | changes


def test_a_tenant_whose_logits_overflow_is_the_only_one_without_an_answer(place, tmp_path):
    alone = ask(place, tmp_path / "alone.jsonl", request(0, "calm"))
    both = ask(place, tmp_path / "both.jsonl", request(0, "calm"), request(1, "loud"))
    assert both == [*alone, None] and alone[0] is not None
    told = [json.loads(line)["id"] for line in (tmp_path / "both.jsonl").read_text().splitlines()]
    assert told == ["0", "1"]  # asked is asked


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request(1, "nobody"), "nobody"),
        (request(1, "calm", version="v2"), "v2"),
        (request(1, "calm", text=None), "request 1: text must be a string, got None"),
        ({"id": "1", "tenant": "calm", "version": "v1"}, "request 1: text must be a string, got None"),
    ],
    ids=["tenant", "version", "null", "missing"],
)
def test_one_bad_request_stops_the_batch_and_nothing_is_said_to_be_answered(place, tmp_path, bad, message):
    with pytest.raises(ValueError, match=message):
        ask(place, tmp_path / "audit.jsonl", request(0, "calm"), bad)
    assert not (tmp_path / "audit.jsonl").exists()


def test_adapters_of_another_base_are_refused_before_anything_is_recorded(place, tmp_path):
    other = shutil.copytree(place["base"], tmp_path / "other")
    model = load_model(other)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    save_model(model.config, model.state_dict(), other, stop_ids=(1,))
    with pytest.raises(ValueError, match="belongs beside the weights"):
        ask({**place, "base": other}, tmp_path / "audit.jsonl", request(0, "calm"))
    assert not (tmp_path / "audit.jsonl").exists()


def test_a_prompt_that_leaves_no_room_is_told_before_anything_is_recorded(place, tmp_path):
    long = request(1, "calm", text="add " * 300)
    with pytest.raises(
        ValueError, match=r"request 1: the prompt has \d+ tokens, 252 leave room for max_new_tokens"
    ):
        ask(place, tmp_path / "audit.jsonl", request(0, "calm"), long)
    assert not (tmp_path / "audit.jsonl").exists()


@pytest.fixture(scope="module")
def four_bits(place, tmp_path_factory) -> Store:
    """The same base in four bits: a tenant's adapter that was trained beside it, and a table with both."""
    folder = tmp_path_factory.mktemp("four")
    base = load_model(place["base"], four_bits=TARGETS["all"])
    model = add_adapter(base, Adapter(rank=2, alpha=4.0), seed=5)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(number))
    save_adapter(model, model.state_dict(), folder / "small", base=place["base"])
    shutil.copytree(place["store"], folder / "store")
    deploy(folder / "store", {"small": folder / "small"}, "v1", folder / "table.json")
    table = json.loads(place["table"].read_text()) | json.loads((folder / "table.json").read_text())
    (folder / "table.json").write_text(json.dumps(table))
    return {
        "base": place["base"],
        "store": folder / "store",
        "table": folder / "table.json",
        "own": folder / "small",
    }


def test_an_adapter_of_a_base_in_four_bits_answers_beside_it(four_bits, tmp_path):
    """As the model that it was trained in: QLoRA's adapters are served too."""
    (answer,) = ask(four_bits, tmp_path / "audit.jsonl", request(0, "small"))
    base = load_model(four_bits["base"], four_bits=TARGETS["all"])
    chat, record = (
        load_chat(four_bits["base"]),
        Record((Message("user", "add two to two"),), None, None, {}, "", 0),
    )
    settings = {"temperature": 0.0, "max_new_tokens": 4, "seed": 0}
    (alone,) = complete(load_adapter(base, four_bits["own"]), chat, [record], **settings)
    assert answer == decode(chat, alone.completion_ids)
    (bare,) = complete(load_model(four_bits["base"]), chat, [record], **settings)
    assert answer != decode(chat, bare.completion_ids)


def test_a_batch_has_one_base_in_one_format(four_bits, tmp_path):
    with pytest.raises(ValueError, match="stand beside one base in different formats: ask them apart"):
        ask(four_bits, tmp_path / "audit.jsonl", request(0, "calm"), request(1, "small"))
    assert not (tmp_path / "audit.jsonl").exists()
