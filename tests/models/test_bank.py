"""A batch whose rows have different adapters: each row alone, with nobody's NaN and nobody's gradient."""

import random
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopost.models.adapters import route
from nanopost.models.bank import add_to_bank, names_of, open_bank, remove_from_bank, seat
from nanopost.models.llama import Llama
from nanopost.models.lora_model import Adapter, add_adapter
from nanopost.models.peft import load_adapter, save_adapter
from nanopost.models.weights import load_model
from nanopost.rollout.sampler import row_uniforms, sample
from tests.models.test_lora_model import ADAPTERS, base
from tests.tolerances import within

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9], [3, 2, 3, 8, 4], [6, 2, 6, 4, 3]])
OWNERS = ["patterned", "all", "attention", "all", "patterned"]


def adapter_folders(folder: Path, kinds: dict[str, Adapter]) -> dict[str, Path]:
    """A base in folder/base, and beside it an adapter of each kind, as after some training."""
    base(folder / "base")
    for number, (name, adapter) in enumerate(kinds.items()):
        model = add_adapter(load_model(folder / "base", dtype=torch.float64), adapter, seed=number)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in (p for n, p in model.named_parameters() if n.endswith("lora_B")):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        save_adapter(model, model.state_dict(), folder / name, base=folder / "base")
    return {name: folder / name for name in kinds}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Ranks, targets and scales that differ from adapter to adapter."""
    return adapter_folders(tmp_path, ADAPTERS)


def plain(folder: Path) -> Llama:
    return load_model(folder.parent / "base", dtype=torch.float64)


def bank_of(folders: dict[str, Path]) -> Llama:
    model = open_bank(plain(next(iter(folders.values()))))
    for name, folder in folders.items():
        add_to_bank(model, name, folder)
    return model


def logits(model: Llama, ids: torch.Tensor, owners: list[str]) -> torch.Tensor:
    seat(model, [owner for owner in owners for _ in range(ids.shape[1])])
    return model(ids)


def test_every_row_says_what_it_says_alone(folders):
    model = bank_of(folders)
    mixed = logits(model, IDS, OWNERS)
    for row, owner in enumerate(OWNERS):
        one = slice(row, row + 1)
        within("adapters, float64", mixed[one], logits(model, IDS[one], [owner]))
        alone = load_adapter(plain(folders[owner]), folders[owner])
        within("adapters, float64", mixed[one], alone(IDS[one]))
        assert (mixed[one] - plain(folders[owner])(IDS[one])).abs().max() > 0.1


def test_another_tenants_nan_changes_no_bit(folders):
    model = bank_of(folders)
    before = logits(model, IDS, OWNERS)
    for layer in model.bank.values():
        layer.lora_A["all"].fill_(torch.nan)
        layer.lora_B["all"].fill_(torch.nan)  # what was stacked before does not hide it
    after, hers = logits(model, IDS, OWNERS), [owner == "all" for owner in OWNERS]
    assert after[hers].isnan().any()
    others = [not own for own in hers]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize(
    "scope", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 3, "top_p": 0.9}], ids=str
)
def test_another_tenants_nan_changes_no_answer(folders, scope):
    """Its rows say that they mean nothing; every other row is sampled bit for bit as before."""
    model, prompts = bank_of(folders), IDS.tolist()
    uniforms = row_uniforms(seed=0, step=0, prompts=range(5), group_size=1, count=6)
    options = {"max_new_tokens": 6, "stop_ids": [7], "uniforms": uniforms, "adapters": OWNERS, **scope}
    before = sample(model, prompts, **options)
    for layer in model.bank.values():
        layer.lora_B["all"].mul_(1e300)  # finite, and its logits are not
    for owner, ours, was in zip(OWNERS, sample(model, prompts, **options), before, strict=True):
        assert (ours.finish_reason == "error") == (owner == "all") and was.finish_reason != "error"
        if owner != "all":
            assert ours.completion_ids == was.completion_ids and torch.equal(ours.old_logps, was.old_logps)


def test_a_gradient_reaches_its_own_adapter_alone(folders):
    model = bank_of(folders)
    with torch.no_grad():
        logits(model, IDS, OWNERS)  # what this pass has stacked has no gradient
    factors = {
        (name, layer, which): getattr(module, which)[name].requires_grad_()
        for layer, module in model.bank.items()
        for name in folders
        for which in ("lora_A", "lora_B")
        if getattr(module, which)[name].numel()
    }
    out = logits(model, IDS, OWNERS)
    out[OWNERS.index("attention")].sum().backward()
    for (name, layer, which), factor in factors.items():
        moved = factor.grad is not None and bool(factor.grad.abs().max() > 0)
        assert moved == (name == "attention"), (name, layer, which)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_seats_are_used_up_and_there_is_no_default(folders):
    model = bank_of(folders)
    logits(model, IDS, OWNERS)
    for broken, message in (
        (lambda: model(IDS), r"no token has an adapter: seat\(model, names\) says which"),
        (lambda: (seat(model, ["all"]), model(IDS)), "25 tokens, but .* named 1"),
        (lambda: logits(model, IDS, [*OWNERS[:4], "nobody"]), "the bank has no adapter nobody"),
    ):
        with pytest.raises(ValueError, match=message):
            broken()
        assert not vars(next(iter(model.bank.values())).seats)  # what failed leaves no seat behind
    with pytest.raises(ValueError, match="the model has no room for many adapters"):
        seat(plain(folders["all"]), ["all"])


def test_threads_that_share_a_bank_do_not_share_seats(folders):
    """Another thread answers between our seating and our pass; and who seats nobody is told there too."""
    model = bank_of(folders)
    expected = logits(model, IDS, OWNERS)
    theirs = logits(model, IDS, ["all"] * len(IDS))
    seat(model, [owner for owner in OWNERS for _ in range(IDS.shape[1])])
    with ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(logits, model, IDS, ["all"] * len(IDS)).result(), theirs)
        with pytest.raises(ValueError, match="no token has an adapter"):
            other.submit(model, IDS).result()
    assert torch.equal(model(IDS), expected)


def test_names_are_never_given_to_another(folders):
    model = bank_of(folders)
    with pytest.raises(ValueError, match="open_bank was called before"):
        open_bank(model)
    with pytest.raises(ValueError, match="the bank has an adapter all already"):
        add_to_bank(model, "all", folders["attention"])
    with pytest.raises(ValueError, match=r"name must consist of letters, digits, _ and -, got 'a\.b'"):
        add_to_bank(model, "a.b", folders["all"])
    with pytest.raises(ValueError, match="name must not be a word that torch's modules use, got 'training'"):
        add_to_bank(model, "training", folders["all"])
    path = folders["all"] / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"][0, 0] = torch.inf
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"up_proj\.lora_A has a number that is not finite"):
        add_to_bank(model, "broken", folders["all"])
    with pytest.raises(ValueError, match="the bank has no adapter nobody"):
        remove_from_bank(model, "nobody")
    logits(model, IDS, OWNERS)
    remove_from_bank(model, "all")
    with pytest.raises(ValueError, match="the bank has no adapter all"):
        logits(model, IDS, OWNERS)
    (folders["all"] / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        add_to_bank(model, "all", folders["all"])
    assert names_of(model) == {"patterned", "attention"}  # what does not fit leaves nothing behind
    assert all(set(layer.lora_A) == set(layer.lora_B) == names_of(model) for layer in model.bank.values())


@pytest.mark.parametrize("slots", [2, 3, 256])
def test_a_mixed_batch_is_sampled_as_each_row_alone(folders, slots):
    """Ragged prompts, groups that share them, rows that come and go."""
    prompts = [row[: 2 + number % 3].tolist() for number, row in enumerate(IDS)]
    model, count, group = bank_of(folders), 6, 2
    uniforms = row_uniforms(seed=0, step=0, prompts=range(5), group_size=group, count=count)
    options = {"group_size": group, "max_new_tokens": count, "stop_ids": [7, 11]}
    found = sample(model, prompts, adapters=OWNERS, slots=slots, uniforms=uniforms, **options)
    for number, owner in enumerate(OWNERS):
        rows = slice(group * number, group * (number + 1))
        alone = load_adapter(plain(folders[owner]), folders[owner])
        expected = sample(alone, [prompts[number]], uniforms=uniforms[rows], **options)
        for ours, theirs in zip(found[rows], expected, strict=True):
            assert ours.completion_ids == theirs.completion_ids
            within("adapters, float64", ours.old_logps, theirs.old_logps)
    assert len({len(rollout.completion_ids) for rollout in found}) > 1
    with pytest.raises(ValueError, match="adapters must name one for each of 5 prompts, got 2"):
        sample(model, prompts, adapters=OWNERS[:2], uniforms=uniforms, **options)
    with pytest.raises(ValueError, match="no token has an adapter"):
        sample(model, prompts, uniforms=uniforms, **options)


def test_ten_thousand_events_and_no_wrong_adapter(tmp_path):
    """Adapters come and go between routed batches; the canary of a tenant's version is what it says alone."""
    kinds = {
        f"tenant{i}": Adapter(rank=1 + i % 3, alpha=3.0, targets=("q_proj", "down_proj")[: 1 + i % 2])
        for i in range(8)
    }
    folders = adapter_folders(tmp_path, kinds)
    ids = IDS[:1]
    exact = {name: load_adapter(plain(folder), folder)(ids)[0, -1] for name, folder in folders.items()}
    assert len({int(row.argmax()) for row in exact.values()}) > 3
    twins = {
        name: tmp_path / f"{name}-twin" for name in kinds
    }  # the same names, once more with other content
    for name, folder in twins.items():
        shutil.copytree(folders[name], folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file(
            {key: -x if "lora_B" in key else x for key, x in tensors.items()},
            folder / "adapter_model.safetensors",
        )
    others = {name: load_adapter(plain(folders[name]), folder)(ids)[0, -1] for name, folder in twins.items()}
    places, canaries = {"v0": folders, "v1": twins}, {"v0": exact, "v1": others}
    table: dict[tuple[str, str], str] = {}  # the deployed version of each tenant that is there
    model, rng, seen = open_bank(plain(folders["tenant0"])), random.Random(0), Counter()
    for _ in range(10_000):
        event = rng.choices(("add", "remove", "route", "sample"), (3, 2, 4, 1))[0]
        tenant, version = rng.choice(sorted(kinds)), rng.choice(("v0", "v1"))
        seen[event] += 1
        if event == "add" and tenant not in names_of(model):
            add_to_bank(model, tenant, places[version][tenant])
            table[tenant, version] = tenant
        elif event == "remove" and table:
            gone = table.pop(rng.choice(sorted(table)))
            remove_from_bank(model, gone)
        elif event == "route" and (tenant, version) in table:
            seat(model, [route(table, tenant, version)])
        elif event == "route":
            with pytest.raises(ValueError, match=f"no adapter for tenant '{tenant}' and version '{version}'"):
                route(table, tenant, version)
        elif event == "sample" and table:
            asked = [rng.choice(sorted(table)) for _ in range(rng.randint(1, 6))]
            owners = [route(table, *request) for request in asked]
            said = logits(model, ids.expand(len(owners), -1), owners)[:, -1]
            for row, (tenant, version) in zip(said, asked, strict=True):
                within("adapters, float64", row, canaries[version][tenant])
    assert min(seen.values()) > 900
