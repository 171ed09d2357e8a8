"""Out of memory: fewer rows a pass, the same step."""

import os
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from nanopost import distributed, micro_batches
from nanopost.micro_batches import in_parts, sum_parts
from tests.ranks import run_function


@pytest.fixture(autouse=True)
def no_run() -> Iterator[None]:
    """Sizes are of a run, and these tests are none; nor do those that follow get them."""
    micro_batches.begin()
    yield
    micro_batches.begin()


class Narrow:
    """Rows through a linear layer; that more than `most` do not fit is found out on the way back."""

    def __init__(self, most: int) -> None:
        self.model, self.most, self.seen = nn.Linear(3, 1).double(), most, list[list[int]]()
        self.left: list[weakref.ref[torch.Tensor]] = []

    def learn(self, rows: list[int]) -> dict[str, float]:
        assert not any(tensor() is not None for tensor in self.left), "what was broken off holds its memory"
        self.seen.append(list(rows))
        x = torch.tensor(rows, dtype=torch.float64)[:, None].expand(-1, 3)
        loss = (hidden := self.model(x)).square().sum()
        loss.backward()
        if len(rows) > self.most:
            self.left.append(weakref.ref(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return {"loss": float(loss.detach()), "rows": len(rows)}


def test_the_gradient_of_a_step_that_did_not_fit_is_that_of_one_that_did(capsys):
    torch.manual_seed(0)
    small = Narrow(2)
    large = Narrow(9)
    large.model.load_state_dict(small.model.state_dict())
    optimizer = torch.optim.SGD(small.model.parameters(), lr=0.1)
    rows = list(range(9))
    sums = sum_parts(small.model, rows, small.learn, 8, optimizer)
    assert small.seen == [[*range(8)], [0, 1, 2, 3], [0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert sums == pytest.approx(large.learn(rows)) and sums["rows"] == 9
    for one, other in zip(small.model.parameters(), large.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=0.0)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == (
        "rank 0 is out of memory with 8 rows a pass (--micro-batch): 4 from here on, the batch and its "
        "gradient stay the same"
    )
    small.seen.clear()  # the size is kept, for what is only scored too
    in_parts(small.model, rows[:5], small.learn, 8, optimizer)
    assert small.seen == [[0, 1], [2, 3], [4]] and len(told) == 2 and not capsys.readouterr().out


def test_a_run_writes_its_size_down_and_a_resumed_one_begins_with_it(tmp_path, capsys):
    assert micro_batches.read_limit(tmp_path) is None
    micro_batches.begin(tmp_path)
    narrow = Narrow(2)
    in_parts(narrow.model, list(range(9)), narrow.learn, 8, narrow.model)
    assert [path.name for path in tmp_path.iterdir()] == ["micro_batch-rank0.json"]
    assert (tmp_path / "micro_batch-rank0.json").read_text() == '{"rows": 2}\n'
    (tmp_path / "micro_batch-rank1.json").write_text('{"rows": 4}\n')  # it has come less far down
    capsys.readouterr()
    other = Narrow(2)
    micro_batches.begin(tmp_path, micro_batches.read_limit(tmp_path))
    in_parts(other.model, list(range(5)), other.learn, 8, other.model)
    assert [len(rows) for rows in other.seen] == [2, 2, 1]
    told = "memory ran out before: at most 2 rows a pass (--micro-batch), as long as "
    assert capsys.readouterr().out == f"{told}{tmp_path}/micro_batch-rank*.json says so\n"
    in_parts(other.model, [0], other.learn, 1, other.model)  # no more than was asked for
    assert len(other.seen[-1]) == 1


@pytest.mark.parametrize("rows", ["0", "-2", '"4"', "2.5", "null", "true"])
def test_a_size_that_is_none_is_named(tmp_path, rows):
    (tmp_path / "micro_batch-rank3.json").write_text(f'{{"rows": {rows}}}\n')
    with pytest.raises(ValueError, match=r'micro_batch-rank3\.json: expected \{"rows": N\} .*, got '):
        micro_batches.read_limit(tmp_path)


def test_a_size_that_cannot_be_written_down_is_told(tmp_path, capsys):
    micro_batches.begin(tmp_path / "gone")
    narrow = Narrow(1)
    assert len(in_parts(narrow.model, [1, 2], narrow.learn, 2, narrow.model)) == 2
    assert "gone/micro_batch-rank0.json does not say so: [Errno 2]" in capsys.readouterr().out


def test_a_size_that_no_row_has_is_not_tried():
    """A step of 5 rows under --micro-batch 64: the next size is 2, not 32."""
    narrow = Narrow(2)
    assert len(in_parts(narrow.model, list(range(5)), narrow.learn, 64, narrow.model)) == 3
    assert [len(rows) for rows in narrow.seen] == [5, 2, 2, 1]


def test_one_row_that_does_not_fit_ends_the_run():
    narrow = Narrow(0)
    with pytest.raises(MemoryError, match=r"out of memory with 1 rows a pass .*--recompute, --lora-rank"):
        in_parts(narrow.model, [1, 2], narrow.learn, 2, narrow.model)


def test_another_error_is_no_matter_of_memory():
    def act(rows: list[int]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        in_parts(nn.Linear(1, 1), [1, 2], act, 2)
    assert in_parts(nn.Linear(1, 1), [], act, 2) == []


def within_a_limit(room: int) -> list:
    """On one rank: the allocator itself says no. 32 MB a row, `room` MB for all of them."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + room * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sizes: list[int] = []

    def act(rows: list[int]) -> float:
        sizes.append(len(rows))
        return float(torch.ones(len(rows), 2**23).sum()) / 2**23

    return [sizes, in_parts(nn.Linear(1, 1), list(range(16)), act, 16)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its own size from /proc")
def test_the_memory_of_this_machine_runs_out():
    ((sizes, sums),) = run_function(__name__, "within_a_limit", ranks=1, args=[300])
    assert sizes[:2] == [16, 8] and len(sums) > 1 and sum(sums) == 16


def on_one_of_two(folder: str) -> str:
    micro_batches.begin(Path(folder))
    narrow = Narrow(9 - distributed.rank() * 8)
    try:
        in_parts(narrow.model, [1, 2, 3, 4], narrow.learn, 4, narrow.model)
    except MemoryError as error:
        return str(error)
    return ""


def test_several_ranks_are_told_what_to_start_again_with(tmp_path):
    """The others already wait in a pass that this one cannot end."""
    fine, lost = run_function(__name__, "on_one_of_two", ranks=2, args=[str(tmp_path)])
    assert not fine and lost == (
        "rank 1 is out of memory with 4 rows a pass (--micro-batch): start again with --micro-batch 2; "
        f"{tmp_path}/micro_batch-rank1.json says so to a start with --resume"
    )
    assert micro_batches.read_limit(tmp_path) == 2


def beside_fsdp() -> str:
    """One process whose model is sharded all the same, as `--offload` does."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    narrow, told = Narrow(1), ""
    fully_shard(narrow.model)
    try:
        in_parts(narrow.model, [1, 2, 3, 4], narrow.learn, 4, narrow.model)
    except MemoryError as error:
        told = str(error)
    dist.destroy_process_group()
    return told


def test_a_sharded_model_is_not_tried_again():
    """What FSDP keeps of a pass that broke off is out of reach: the gradient behind it would be another."""
    (told,) = run_function(__name__, "beside_fsdp", ranks=1)
    assert "out of memory with 4 rows a pass (--micro-batch): start again with --micro-batch 2" in told
