"""Steps that go wrong: exact no-ops, counted, kept; states that cannot be written."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from nanopost import checkpoint, distributed, faults, metrics, optim
from nanopost.data.schema import Sample
from tests import small_runs
from tests.ranks import run_function, run_script
from tests.test_checkpoint import Model, bits

SAMPLES = [Sample((1, 2, 3), (False, True, True)), Sample((4,), (True,))]


def started() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that has taken a step, so that moments are there to be spoilt."""
    model = Model(0)
    optimizer = optim.adamw(model, lr=0.1, weight_decay=0.2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1) if parameter.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def step(run: Path, number: int, model, optimizer, *, loss: float = 1.0) -> float:
    seen = {"loss": loss, "samples": SAMPLES}
    return faults.take_step(run, number, optimizer, model, max_norm=1.0, **seen)


def fill(model: nn.Module, rng: torch.Generator, *, hurt: float | None = None) -> None:
    """Gradients; `hurt` takes the place of one number of them."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn(parameter.shape, generator=rng)
    if hurt is not None:
        grad = trained[int(torch.randint(len(trained), (), generator=rng))].grad.view(-1)
        grad[int(torch.randint(len(grad), (), generator=rng))] = hurt


def test_a_step_that_goes_wrong_changes_no_bit(tmp_path, capsys):
    """200 injections in loss and gradients, a good step behind each: the run that never saw them."""
    model, optimizer = started()
    alone, alone_optimizer = started()
    rng = torch.Generator().manual_seed(0)
    for number in range(200):
        before = bits(model, optimizer)
        loss, hurt = [(1.0, math.nan), (1.0, math.inf), (1.0, -math.inf), (math.nan, None), (math.inf, 0.5)][
            number % 5
        ]
        fill(model, rng, hurt=hurt)
        assert math.isnan(step(tmp_path, 2 * number, model, optimizer, loss=loss))
        assert bits(model, optimizer) == before and all(p.grad is None for p in model.parameters())
        state = torch.Generator().manual_seed(number)
        fill(model, state)
        fill(alone, state.manual_seed(number))
        assert step(tmp_path, 2 * number + 1, model, optimizer) == pytest.approx(
            optim.clip_grad_norm(alone, 1.0)
        )
        alone_optimizer.step()
    assert bits(model, optimizer) == bits(alone, alone_optimizer)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 200 and told[-1].endswith("(1 in a row, 200 in all)")
    assert told[0].startswith("step 1 was not taken: loss 1, gradient norm nan; its samples: ")
    assert len([*(tmp_path / "skipped").iterdir()]) == 200


def test_the_third_in_a_row_ends_the_run(tmp_path):
    model, optimizer = started()
    rng = torch.Generator().manual_seed(0)
    for number in (0, 1, 3, 4, 5):  # a good step between makes it begin again
        if number == 3:
            fill(model, rng)
            step(tmp_path, 2, model, optimizer)
        fill(model, rng, hurt=math.nan)
        before = bits(model, optimizer)
        if number < 5:
            step(tmp_path, number, model, optimizer)
    with pytest.raises(FloatingPointError, match=r"step 6 was not taken.*000005-rank0.*third in a row"):
        step(tmp_path, 5, model, optimizer)
    assert bits(model, optimizer) == before


def test_what_it_was_made_of_is_kept_and_forgotten_with_its_step(tmp_path):
    model, optimizer = started()
    fill(model, torch.Generator().manual_seed(0))
    step(tmp_path, 7, model, optimizer, loss=math.inf)
    path = tmp_path / "skipped/000007-rank0.jsonl"
    assert faults.read_skipped(path) == SAMPLES
    assert json.loads(path.read_text().splitlines()[0])["loss"] == "inf"
    metrics.truncate(tmp_path, 8)
    assert path.exists()
    metrics.truncate(tmp_path, 7)
    assert not path.exists()


def test_a_record_of_a_step_not_taken_has_no_number(tmp_path):
    metrics.write_record(tmp_path, 0, {"loss": math.nan, "grad_norm": math.nan, "lr": 0.1})
    assert metrics.read_records(tmp_path) == [{"step": 0, "loss": None, "grad_norm": None, "lr": 0.1}]
    with pytest.raises(ValueError, match="loss: expected a finite number at step 1, got nan"):
        metrics.write_record(tmp_path, 1, {"loss": math.nan, "grad_norm": 1.0})


def test_a_controller_learns_nothing_from_it():
    assert optim.steer_beta(0.3, math.nan, target=1.0) == optim.steer_beta(0.3, math.inf, target=1.0) == 0.3


def on_a_rank(folder: str) -> list[bool]:
    """Only rank 1 sees something wrong, in its loss or in its gradient; no rank steps."""
    model = distributed.shard(Wide())
    optimizer = optim.adamw(model, lr=0.1, weight_decay=0.0)
    found = []
    for number, (loss, hurt) in enumerate([(math.nan, False), (1.0, True), (1.0, False)]):
        ids = torch.tensor([[1.0, 2.0, 3.0]])
        (model(ids * math.inf if hurt and distributed.rank() else ids).sum()).backward()
        before = [p.to_local().clone() for p in model.parameters()]
        loss = loss if distributed.rank() else 1.0
        norm = step(Path(folder), number, model, optimizer, loss=loss)
        same = all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
        found += [math.isnan(norm), same]
    return found


class Wide(nn.Module):
    """What `shard` can cut: blocks in `model.layers`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Linear(3, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.layers[0](x)


def test_no_rank_steps_where_one_must_not(tmp_path):
    for found in run_function(__name__, "on_a_rank", ranks=2, args=(str(tmp_path),), limit=30):
        assert found == [True, True, True, True, False, False]
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == [
        f"00000{number}-rank{rank}.jsonl" for number in (0, 1) for rank in (0, 1)
    ]


def test_a_full_disk_is_told_and_training_goes_on(tmp_path, monkeypatch, capsys):
    model, optimizer = started()
    options = {"every": 1}
    faults.save_if_due(tmp_path, 1, 4, model, optimizer, **options)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shards, "write_part", full)
        faults.save_if_due(tmp_path, 2, 4, model, optimizer, **options)
        assert "the state after step 2 is not saved: [Errno 28] No space left" in capsys.readouterr().out
        with pytest.raises(OSError, match="No space left"):
            faults.save_if_due(tmp_path, 4, 4, model, optimizer, **options)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_manifest", full)
        faults.save_if_due(tmp_path, 2, 4, model, optimizer, **options)
        assert "No space left on device: '" in (said := capsys.readouterr().out) and "/step_000002'" in said
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step_000001"]
    faults.save_if_due(tmp_path, 3, 4, model, optimizer, **options)
    assert checkpoint.load_state(tmp_path, model, optimizer) == 3


SCRIPTS = """
import json, runpy, sys
from nanopost import optim
sys.argv, commands = sys.argv[:1], json.loads(sys.argv[1])
clip = optim.clip_grad_norm
def wrong(model, max_norm):
    calls.append(model)
    if len(calls) == 2:
        raise FloatingPointError("gradient norm is nan")
    return clip(model, max_norm)
optim.clip_grad_norm = wrong
for command in commands:
    calls, sys.argv = [], command
    runpy.run_path(command[0], run_name="__main__")
"""


def test_every_script_goes_on_behind_a_step_that_it_could_not_take(tmp_path):
    """Its second update goes wrong: told, null where it has no number, kept with all its samples; then on."""
    (tmp_path / "start").mkdir()
    start = small_runs.begin(tmp_path / "start")
    names = {name: tmp_path / name for name in small_runs.FLAGS}
    more = {"ppo": ["--beta", "0.1", "--kl-target", "0.01"]}
    commands = [
        small_runs.command(start, name, run, "--steps", "3", *more.get(name, []))
        for name, run in names.items()
    ]
    printed = run_script(["-c", SCRIPTS, json.dumps(commands)], ranks=1, limit=120)
    assert printed.count("was not taken: loss ") == len(names) == 6
    for name, run in names.items():
        records = metrics.read_records(run)
        norms = [record["grad_norm"] for record in records]
        lost = 0 if name == "ppo" else 1  # there a step clips policy and critic
        assert [norm is None for norm in norms] == [step == lost for step in range(3)], name
        (kept,) = (run / "skipped").iterdir()
        rows = faults.read_skipped(kept)
        assert len(rows) == {"dpo": 8, "reward": 8, "grpo": 8, "ppo": 8}.get(name, 4), name
        assert (run / "model/model.safetensors").exists()
        if name == "ppo":  # the KL of a step that was not taken steers nothing; that of the next one does
            first, second, third = (record["beta"] for record in records)
            assert first == second == 0.1 != third
