"""States in parts: what 1 rank writes 2 read, what these write 4 read, and back, bit for bit."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nanopost import checkpoint, distributed, optim, shards
from tests.ranks import run_function
from tests.test_checkpoint import Model, bits


class Uneven(Model):
    """Rows of 7, 4, 3, 1 and none: on four ranks some parts are smaller and some are empty."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 1)])
        self.frozen = nn.Parameter(torch.randn(3, 2), requires_grad=False)


def started(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model on this process's ranks, with moments."""
    model = distributed.shard(Uneven(seed))
    optimizer = optim.adamw(model, lr=0.1, weight_decay=0.2)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone() if parameter.requires_grad else None
    optimizer.step()
    return model, optimizer


def pass_on(source: str, target: str) -> dict[str, object]:
    """Read a state of whatever ranks wrote it, write it again from these."""
    model, optimizer = started(5)
    step = checkpoint.load_state(source, model, optimizer)
    checkpoint.save_state(target, step, model, optimizer)
    whole = {name: tensor.tolist() for name, tensor in checkpoint.full_state(model).items()}
    return {"step": step, "whole": whole}


def test_a_state_goes_from_1_to_2_to_4_ranks_and_back(tmp_path):
    model, optimizer = started(0)
    folders = [str(tmp_path / str(ranks)) for ranks in (1, 2, 4)]
    checkpoint.save_state(folders[0], 3, model, optimizer)
    want = {name: tensor.tolist() for name, tensor in model.state_dict().items() if name != "frozen"}
    for source, target, ranks in ((folders[0], folders[1], 2), (folders[1], folders[2], 4)):
        found, *others = run_function(__name__, "pass_on", ranks=ranks, args=(source, target))
        assert found["step"] == 3
        assert {**found["whole"], "head.weight": want["head.weight"]}.keys() >= want.keys()
        assert all(found["whole"][name] == x for name, x in want.items() if name in found["whole"])
        assert all(
            other == {"step": 3, "whole": {}} for other in others
        )  # rank 0 alone keeps what it gathers
        names = [path.name for path in (Path(target) / "state/step_000003").glob("*.safetensors")]
        numbers = [f"-{rank:05d}-of-{ranks:05d}" for rank in range(1, ranks + 1)]
        assert sorted(names) == sorted(f"{x}{n}.safetensors" for x in ("model", "optimizer") for n in numbers)
    parts = [load_file(path) for path in sorted((Path(folders[2]) / "state/step_000003").glob("model-*"))]
    assert [len(part["embed.weight"]) for part in parts] == [2, 2, 2, 1]  # none has the whole
    assert [len(part["body.weight"]) for part in parts] == [1, 1, 1, 1]
    assert ["model.layers.1.weight" in part for part in parts] == [True, False, False, False]
    other, other_optimizer = started(7)
    assert checkpoint.load_state(folders[2], other, other_optimizer) == 3
    assert bits(other, other_optimizer) == bits(model, optimizer)


@pytest.mark.parametrize("hurt", ["missing", "swapped"])
def test_a_shard_that_is_missing_or_another_rank_s_is_seen(tmp_path, hurt):
    model, optimizer = started(0)
    checkpoint.save_state(tmp_path / "one", 2, model, optimizer)
    args = (str(tmp_path / "one"), str(tmp_path / "two"))
    run_function(__name__, "pass_on", ranks=2, args=args)
    folder = tmp_path / "two/state/step_000002"
    first, second = sorted(folder.glob("model-*"))
    assert checkpoint.flaw(folder) is None
    if hurt == "missing":
        second.unlink()
    else:
        aside = first.rename(tmp_path / "aside")
        second.rename(first)
        aside.rename(second)
    assert checkpoint.flaw(folder).startswith(second.name if hurt == "missing" else first.name)
    with pytest.raises(ValueError, match=rf"step_000002 passed over: {re.escape(checkpoint.flaw(folder))}"):
        checkpoint.load_state(tmp_path / "two", model, optimizer)


def test_files_that_do_not_cover_a_part_are_refused(tmp_path):
    whole = torch.arange(12.0).view(6, 2)
    shards.write_part(tmp_path / "a.safetensors", {"x": whole})
    index = shards.read_index([tmp_path / "a.safetensors"])
    assert torch.equal(shards.read_part(index, "x", ((1, 4), (0, 2))), whole[1:4])
    assert shards.read_part(index, "x", ((6, 6), (0, 2))).shape == (0, 2)
    with pytest.raises(ValueError, match=r"x: the files hold \[2, 2\] of the part \(\(4, 8\), \(0, 2\)\)"):
        shards.read_part(index, "x", ((4, 8), (0, 2)))


def test_what_one_rank_cannot_write_all_ranks_raise(tmp_path):
    for said in run_function(__name__, "fails_on_rank_1", ranks=2, args=(str(tmp_path),)):
        assert said.startswith("[Errno 28] No space left on device: ")
        assert said.endswith("/model-00002-of-00002.safetensors'")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000001"]


def fails_on_rank_1(run: str) -> str:
    model, optimizer = started(0)
    checkpoint.save_state(run, 1, model, optimizer)
    if distributed.rank():
        shards.save_file = full
    try:
        checkpoint.save_state(run, 2, model, optimizer)
    except OSError as error:
        return str(error)
    return "saved"


def full(*_, **__) -> None:
    raise OSError(28, "No space left on device")
