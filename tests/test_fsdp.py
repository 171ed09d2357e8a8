"""How a model comes to lie on several ranks: none ever has all of it, and no way to place it moves a step."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from nanopost import checkpoint, distributed, fsdp, optim
from nanopost.losses.reduce import aggregate, local_denom
from nanopost.models.heads import load_actor_critic, load_score_model, save_score_model
from nanopost.models.lora_model import TARGETS
from nanopost.models.peft import save_adapter
from nanopost.models.trainable import LoRA, adapt
from nanopost.models.weights import load_model, random_model, save_model
from tests.ranks import run_function
from tests.test_distributed import small_batch, small_llama, take_step
from tests.tiny import tiny_folder, tiny_model

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
ADAPTER, FOUR_BITS = LoRA(lora_rank=2), {"four_bits": TARGETS["all"]}
DOUBLE = {"dtype": torch.float64}
KINDS: dict[str, Callable[..., nn.Module]] = {
    "policy": load_model,
    "tied": lambda folder, **how: load_model(folder.with_name("tied"), **how),
    "adapter": lambda folder, **how: adapt(load_model(folder, **how), ADAPTER, seed=1, base=folder),
    "four bits": lambda folder, **how: adapt(
        load_model(folder, **FOUR_BITS, **how), ADAPTER, seed=1, base=folder
    ),
    "critic": lambda folder, **how: load_score_model(folder, labels=1, **how),
    "actor with critic": load_actor_critic,
    "random": lambda folder, **how: random_model(folder, seed=3, **how),
}
SCORES: dict[str, Callable[..., nn.Module]] = {
    "score model": load_score_model,
    "score model with its adapter": lambda folder, **how: adapt(
        load_score_model(folder, **how), LoRA(lora_from=folder.with_name("adapter")), seed=1, base=folder
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, one with a tied head, a score model of two scores, and an adapter with a head of its own."""
    folder = tmp_path_factory.mktemp("folders")
    for name, tied in (("policy", False), ("tied", True)):
        model = tiny_model(folder / name, tie_word_embeddings=tied)
        save_model(model.config, model.state_dict(), folder / name, stop_ids=(1,), max_shard_bytes=6000)
    judge = load_score_model(folder / "policy", labels=2, **DOUBLE)
    judge.score.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    options = {"stop_ids": (1,), "labels": ["a", "b"]}
    save_score_model(judge.config, judge.state_dict(), folder / "score", **options)
    adapt(judge, ADAPTER, seed=2, base=folder / "score")
    for name, parameter in judge.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_adapter(judge, judge.state_dict(), folder / "adapter", base=folder / "score")
    return folder


def every_kind(folder: Path) -> dict[str, nn.Module]:
    kinds = {name: load(folder / "policy", **DOUBLE) for name, load in KINDS.items()}
    return kinds | {name: load(folder / "score", **DOUBLE) for name, load in SCORES.items()}


def load_and_tell(folder: str) -> dict[str, Any]:
    """Every kind of model, sharded: what it says, and its weights in a file."""
    told = {}
    for name, model in every_kind(Path(folder)).items():
        model = distributed.shard(model)
        whole = checkpoint.full_state(model)
        if distributed.is_main():
            save_file(whole, Path(folder) / f"{name}.safetensors")
        with torch.no_grad(), distributed.gathered(model):
            told[name] = model(IDS).tolist()
    return told


def test_each_rank_reads_its_own_rows_of_every_kind_of_model(folders: Path) -> None:
    """On three ranks parts are unequal, and a head of one row is on one rank alone."""
    told = run_function(__name__, "load_and_tell", ranks=3, args=(str(folders),))
    assert told[0] == told[1] == told[2]
    for name, model in every_kind(folders).items():
        expected = checkpoint.full_state(model)
        found = load_file(folders / f"{name}.safetensors")
        assert found.keys() == expected.keys() and found
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items()), name
        assert torch.equal(torch.tensor(told[0][name], dtype=torch.float64), model(IDS)), name


def refuse_a_head(folder: str) -> str:
    with pytest.raises(
        ValueError, match=r"ties the head to the embedding, but lm_head\.weight differs"
    ) as caught:
        load_model(folder)
    return str(caught.value)


def test_every_rank_refuses_a_head_that_contradicts_the_config(folders: Path, tmp_path: Path) -> None:
    """The difference is in the last row, which one rank alone would read."""
    model = tiny_model(tmp_path / "hub", tie_word_embeddings=True)
    save_model(model.config, model.state_dict(), tmp_path / "hub", stop_ids=(1,))
    tensors = load_file(tmp_path / "hub/model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1] += 1
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "hub/model.safetensors")
    told = run_function(__name__, "refuse_a_head", ranks=2, args=(str(tmp_path / "hub"),))
    assert told[0] == told[1]


# ---- memory


def memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def peak_of(act: Callable[[], Any]) -> tuple[int, Any]:
    """By how much resident memory rose above what it was, at the most; and what the call returned."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: a tensor that is freed is gone, not kept for the next one
    libc.malloc_trim(0)  # what is free is given back, and not used a second time unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    result = act()
    return memory("VmHWM") - before, result


def peaks(folder: str) -> dict[str, int]:
    """Bytes at the peak of loading each kind of model, and of gathering its weights to be saved."""
    found, model = dict[str, int](), distributed.shard(small_llama(tied=False))  # libraries' own memory first
    for name in ("policy", "adapter", "critic", "random"):
        load, model = KINDS[name], None
        found[name], model = peak_of(lambda load=load: distributed.shard(load(Path(folder))))
    found["save"], _ = peak_of(lambda: checkpoint.full_state(model))
    return found


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_no_rank_has_the_whole_model_in_memory(tmp_path: Path) -> None:
    """112 MB in float32, from a file in bfloat16, on two ranks: half of it, and the tensor in hand."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 4000}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    model = random_model(tiny_folder(tmp_path, dtype=torch.bfloat16, **shape, **heads), seed=0)
    whole = sum(p.nbytes for p in model.parameters())
    halves = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    save_model(model.config, halves, tmp_path, stop_ids=(1,))
    del model, halves
    told = run_function(__name__, "peaks", ranks=2, args=(str(tmp_path),))
    for name in ("policy", "adapter", "critic", "random"):
        for rank in told:
            assert whole / 3 < rank[name] < 0.7 * whole, (name, told)
    assert told[0]["save"] > 0.9 * whole > 0.5 * whole > told[1]["save"]


# ---- ways to place a model

WAYS: dict[str, dict[str, Any]] = {
    "replicas": {"replicas": 2},
    "recompute": {"recompute": True},
    "offload": {"offload": True},
    "all of it": {"replicas": 2, "recompute": True, "offload": True},
}


def two_steps(**way: Any) -> list[float]:
    """Losses and norms of two steps, what the model then says, and how its embedding lies."""
    fsdp.choose(**way)
    model = distributed.shard(small_llama(tied=True))
    optimizer = optim.adamw(model, lr=0.01, weight_decay=0.1)
    told = [number for step in range(2) for number in take_step(model, optimizer, step, micro=1)]
    with torch.no_grad(), distributed.gathered(model):
        return [*told, *model(small_batch()[0]).flatten().tolist()]


def every_way() -> dict[str, list[float]]:
    return {name: two_steps(**way) for name, way in WAYS.items()}


def test_no_way_to_place_a_model_changes_a_step() -> None:
    """Four ranks: two groups that hold a model each, activations made twice, weights that wait elsewhere."""
    expected = two_steps()
    for told in run_function(__name__, "every_way", ranks=4):
        for name in WAYS:
            assert told[name] == pytest.approx(expected, rel=1e-13, abs=1e-13), name


def test_replicas_divide_the_ranks() -> None:
    with pytest.raises(ValueError, match=r"replicas=2 must divide the number of ranks \(1\)"):
        fsdp.choose(replicas=2)


def gradients(**way: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of a batch, and how often a block has run."""
    fsdp.choose(**way)
    try:
        model, passes = distributed.shard(small_llama(tied=False)), []
    finally:
        fsdp.choose()
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    inputs, targets, mask = small_batch()
    with torch.no_grad():
        model.logps(inputs, targets)
    model.logps(inputs, targets)[mask].sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(passes)


def test_activations_made_twice_leave_the_gradient_as_it_is_bit_for_bit() -> None:
    (kept, once), (made, twice) = gradients(), gradients(recompute=True)
    assert (once, twice) == (2, 3) and kept.keys() == made.keys()  # without gradients nothing is made twice
    assert all(torch.equal(kept[name], gradient) for name, gradient in made.items())


def test_one_process_offloads_too() -> None:
    expected = two_steps()
    distributed.setup(SimpleNamespace(recompute=False, offload=True, replicas=1))
    try:
        told = two_steps(offload=True)
        assert isinstance(distributed.shard(small_llama(tied=True)).lm_head.weight, DTensor)
    finally:
        distributed.teardown()
    assert told == pytest.approx(expected, rel=1e-13, abs=1e-13)
    assert not isinstance(distributed.shard(small_llama(tied=True)).lm_head.weight, DTensor)


def half() -> dict[str, Any]:
    """A gradient under bfloat16, the dtypes on the way, and log-probs as trainer and sampler see them."""
    model: Any = distributed.shard(small_llama(tied=False).float())
    inputs, targets, mask = small_batch()
    rows = distributed.shard_rows(range(len(mask)))
    with torch.no_grad(), distributed.gathered(model):
        sampled = model.logps(inputs[rows], targets[rows])
        parts = model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight
        dtypes = [str(part.dtype) for part in parts]
    trained = model.logps(inputs[rows], targets[rows])
    denom = distributed.all_sum(local_denom(mask[rows], mode="token_mean"))
    aggregate(-trained, mask[rows], mode="token_mean", denom=denom).backward()
    whole = [p.grad.full_tensor() if distributed.world_size() > 1 else p.grad for p in model.parameters()]
    return {
        "same": torch.equal(sampled, trained),
        "dtypes": dtypes,
        "masters": [str(model.model.layers[0].mlp.up_proj.weight.dtype), str(whole[3].dtype)],
        "gradient": torch.cat([part.flatten() for part in whole]).tolist(),
    }


def test_bfloat16_is_what_is_sent_and_sums_are_made_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOPOST_BF16", "1")
    (one,), two = (run_function(__name__, "half", ranks=ranks) for ranks in (1, 2))
    expected = torch.tensor(one["gradient"])
    for told in two:
        assert told["same"] and told["dtypes"] == ["torch.float32", "torch.bfloat16"]
        assert told["masters"] == ["torch.float32", "torch.float32"]
        away = torch.tensor(told["gradient"]) - expected
        assert 0 < away.norm() < 0.01 * expected.norm()  # an average would be half of it
