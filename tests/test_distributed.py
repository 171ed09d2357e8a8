"""Two Gloo ranks are one process: same losses, norms, weights and states; nothing hangs; rank 0 writes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nanopost import checkpoint, distributed, metrics, optim, shards
from nanopost.losses.likelihood import sft_loss
from nanopost.losses.reduce import aggregate, local_denom
from nanopost.models.config import LlamaConfig
from nanopost.models.llama import Llama
from tests.ranks import run_function, run_script
from tests.tolerances import within

ROWS, WIDTH, VOCABULARY, STEPS = 4, 9, 13, 3
TIED = {"tied": True, "untied": False}


def small_llama(*, tied: bool) -> Llama:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return Llama(config).double()


def small_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows with 8, 1, 0 and 0 supervised tokens: with two ranks, rank 1 has nothing to learn from."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(VOCABULARY, (ROWS, WIDTH + 1), generator=generator)
    mask = torch.zeros(ROWS, WIDTH, dtype=torch.bool)
    mask[0, 1:], mask[1, 4] = True, True
    return ids[:, :-1], ids[:, 1:], mask


def take_step(model: Llama, optimizer: torch.optim.Optimizer, step: int, *, micro: int) -> list[float]:
    """One optimiser step over the small batch in micro-batches of `micro` rows; returns loss and norm."""
    optim.set_lr(optimizer, 0.01 * optim.schedule(step, steps=STEPS, warmup=1, kind="cosine", final=0.1))
    inputs, targets, mask = small_batch()
    rows = distributed.shard_rows(range(ROWS))
    denom = distributed.all_sum(local_denom(mask[rows], mode="token_mean"))
    total = 0.0
    for start in range(0, len(rows), micro):
        part = rows[start : start + micro]
        logps = model.logps(inputs[part], targets[part], 0.7)
        loss = aggregate(sft_loss(logps), mask[part], mode="token_mean", denom=denom)
        loss.backward()
        total += loss.item()
    norm = optim.clip_grad_norm(model, 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return [distributed.all_sum(total), norm]


def train(run: str, tied: bool, micro: int, rollouts: bool) -> dict[str, Any]:
    """What every rank does; called in this process too, and that is the truth to compare with."""
    model = distributed.shard(small_llama(tied=tied))
    optimizer = optim.adamw(model, lr=0.01, weight_decay=0.1)
    inputs, _, _ = small_batch()
    steps, logits = [], []
    for step in range(STEPS):
        if rollouts:  # rank 0 runs no forward pass in the first step, rank 1 runs many
            with torch.no_grad(), distributed.gathered(model):
                for _ in range(3 * distributed.rank() + step):
                    model(inputs[:1])
                logits.append(model(inputs).sum().item() if step else 0.0)
        steps.append(take_step(model, optimizer, step, micro=micro))
    metrics.write_rollouts(run, 0, [{"rank": distributed.rank()}])
    metrics.write_record(run, 0, {"rank": distributed.rank()})
    checkpoint.save_state(run, STEPS, model, optimizer)
    return {
        "steps": steps,
        "logits": logits,
        "sums": [
            distributed.all_sum({"a": 1.5, "b": torch.tensor(distributed.rank())}),
            distributed.all_sum([]),
        ],
        "rows": distributed.shard_rows("abcde"),
        "identity": [distributed.rank(), distributed.world_size(), distributed.is_main()],
        "sharded": sum(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters()),
    }


def go_on(run: str, tied: bool) -> dict[str, Any]:
    """Load the state of a run, take one step more, save it."""
    model = distributed.shard(small_llama(tied=tied))
    optimizer = optim.adamw(model, lr=0.01, weight_decay=0.1)
    step = checkpoint.load_state(run, model, optimizer)
    loss = take_step(model, optimizer, step, micro=2)
    checkpoint.save_state(run, step + 1, model, optimizer)
    return {"step": step, "loss": loss}


def single_precision() -> list[float]:
    """Gloo's reductions differ by dtype, so the training dtype gets a step of its own."""
    model = distributed.shard(small_llama(tied=False).float())
    return take_step(model, optim.adamw(model, lr=0.01, weight_decay=0.1), 0, micro=2)


def everything(folder: str) -> dict[str, Any]:
    """All that two ranks do for this file, in one start: train, and go on from the state of one process."""
    results: dict[str, Any] = {
        name: train(f"{folder}/two-{name}", tied, 1, True) | go_on(f"{folder}/one-{name}", tied)
        for name, tied in TIED.items()
    }
    return results | {"float32": single_precision()}


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "state" / f"step_{step:06d}"
    index = shards.read_index(folder.glob("*.safetensors"))
    return {name: shards.read_part(index, name, whole_place(index, name)) for name in index}


def whole_place(index: shards.Index, name: str) -> shards.Place:
    return tuple((0, size) for size in shards.whole_shape(index, name))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process (no rollouts, all rows at once), then two ranks (uneven rollouts, row by row)."""
    folder = tmp_path_factory.mktemp("runs")
    for name in TIED:
        (folder / f"one-{name}").mkdir()
        (folder / f"two-{name}").mkdir()
    one = {name: train(f"{folder}/one-{name}", tied, 4, False) for name, tied in TIED.items()}
    two = run_function(__name__, "everything", ranks=2, args=(str(folder),))
    return {"folder": folder, "one": one, "two": two}


@pytest.fixture(params=TIED)
def both(request: pytest.FixtureRequest, runs: dict[str, Any]) -> dict[str, Any]:
    name, folder = request.param, runs["folder"]
    return {
        "tied": TIED[name],
        "folders": (folder / f"one-{name}", folder / f"two-{name}"),
        "one": runs["one"][name],
        "two": [result[name] for result in runs["two"]],
    }


def test_two_ranks_take_the_steps_of_one_process(both: dict[str, Any]) -> None:
    assert min(norm for _, norm in both["one"]["steps"]) > 0.5  # clipping is at work
    for result in both["two"]:
        assert result["sharded"] > 0
        within("world sizes, float64", result["steps"], both["one"]["steps"])
    one, two = (weights_of(folder, STEPS) for folder in both["folders"])
    within("world sizes, float64", two, one)


def test_row_by_row_is_all_rows_at_once(both: dict[str, Any], tmp_path: Path) -> None:
    told = train(str(tmp_path), both["tied"], 1, False)["steps"]
    found, expected = weights_of(tmp_path, STEPS), weights_of(both["folders"][0], STEPS)
    within("micro-batches, float64", [told, found], [both["one"]["steps"], expected])


def test_a_step_in_single_precision_too(runs: dict[str, Any]) -> None:
    for result in runs["two"]:
        within("world sizes, float32", result["float32"], single_precision())


def test_gathered_weights_are_the_current_ones_on_every_rank(both: dict[str, Any]) -> None:
    model = small_llama(tied=both["tied"])
    optimizer = optim.adamw(model, lr=0.01, weight_decay=0.1)
    expected = [0.0]
    for step in range(STEPS - 1):
        take_step(model, optimizer, step, micro=2)
        expected.append(model(small_batch()[0]).sum().item())
    assert abs(expected[1] - expected[2]) > 1e-3
    for result in both["two"]:
        within("world sizes, float64", result["logits"], expected)


def test_a_state_of_two_ranks_goes_on_with_one_and_back(both: dict[str, Any]) -> None:
    one, two = both["folders"]
    there = go_on(str(two), both["tied"])  # saved by two ranks, read by one process
    assert there["step"] == STEPS and [back["step"] for back in both["two"]] == [STEPS, STEPS]
    for back in both["two"]:  # saved by one process, read by two ranks
        within("resumed, other world size, float64", back["loss"], there["loss"])
    within("resumed, other world size, float64", weights_of(two, STEPS + 1), weights_of(one, STEPS + 1))


def test_only_rank_0_writes(both: dict[str, Any]) -> None:
    run = both["folders"][1]
    assert metrics.read_records(run) == [{"step": 0, "rank": 0}]
    assert metrics.read_rollouts(run, 0) == [{"rank": 0}]


def test_sums_and_parts_over_ranks(both: dict[str, Any]) -> None:
    one, two = both["one"], both["two"]
    assert one["sums"] == [{"a": 1.5, "b": 0.0}, []]
    assert [result["sums"] for result in two] == [[{"a": 3.0, "b": 1.0}, []]] * 2
    assert one["rows"] == list("abcde")
    assert two[0]["rows"] + two[1]["rows"] == list("abcde")
    assert one["identity"] == [0, 1, True]
    assert [result["identity"] for result in two] == [[0, 2, True], [1, 2, False]]


def test_everything_is_the_identity_on_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    distributed.setup()
    model = small_llama(tied=True)
    assert distributed.shard(model) is model
    with distributed.gathered(model) as whole:
        assert whole is model
    assert distributed.all_sum(torch.tensor([2.5])) == 2.5
    distributed.main_print("hello", 3)
    assert capsys.readouterr().out == "hello 3\n"
    distributed.barrier()
    distributed.teardown()


def test_restarts_that_would_call_the_dead_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun --max-restarts says to its ranks: the next start finds the old addresses."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(
        ValueError, match=r"--max-restarts 3: .*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and pass"
    ):
        distributed.setup()
    monkeypatch.setenv("WORLD_SIZE", "1")
    distributed.setup()  # alone nobody calls
    distributed.teardown()


def test_a_rank_that_fails_fails_the_test_and_stops_the_others() -> None:
    program = "import os, time; os.environ['RANK'] == '1' and exit('rank 1 fell over'); time.sleep(60)"
    with pytest.raises(AssertionError, match="rank 1 fell over"):
        run_script(["-c", program], ranks=2, limit=30)


def test_a_hang_ends_at_the_limit() -> None:
    with pytest.raises(AssertionError, match="within 1 s"):
        run_script(["-c", "import time; time.sleep(60)"], ranks=1, limit=1)
