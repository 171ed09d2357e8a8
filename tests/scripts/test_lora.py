"""`--lora-rank` and friends in all six scripts: what trains, what is written, what a run goes on from.

Every script runs once with an adapter, once more is asked of the ones whose reference or resumption matters.
"""

import json
import math
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanopost import metrics
from nanopost.models.heads import load_score_model
from nanopost.models.lora_model import TARGETS
from nanopost.models.peft import load_adapter
from nanopost.models.weights import load_model
from tests.digits import digit_policy, write_lines
from tests.ranks import run_script
from tests.tiny import hub_folder
from tests.tolerances import within

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TIMES = ("rollout_s", "verify_s", "train_s", "seconds")
ROWS = {  # what each script needs besides model, data and out
    "sft": [],
    "dpo": ["--beta", "0.3"],
    "reward": ["--labels", "pairs"],
    "grpo": ["--verifier", "math"],
    "ppo": ["--verifier", "math"],
    "distill": ["--mode", "logits"],
}
RL = ["--max-new-tokens", "4", "--prompts-per-step", "4", "--group-size", "2"]
Start = dict[str, Path]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Start:
    """A model that says 3 or 7, prompts whose answer is 7, chats that say it, pairs that prefer it."""
    folder = tmp_path_factory.mktemp("lora")
    model, prompts = digit_policy(folder, hidden_size=24)  # a width that transformers takes too
    asked = [json.loads(line)["messages"] for line in prompts.read_text().splitlines()]
    pairs = [{"prompt": ask[0]["content"], "chosen": "7", "rejected": "3"} for ask in asked]
    chats = [{"messages": [*ask, {"role": "assistant", "content": "7"}]} for ask in asked]
    files = {"pairs": write_lines(folder / "pairs.jsonl", pairs), "prompts": prompts}
    files |= {"chats": write_lines(folder / "chats.jsonl", chats), "teacher": hub_folder(folder / "hub")}
    return {"model": model, **files}


def train(start: Start, name: str, out: Path, *flags: str, ranks: int = 1) -> list[dict]:
    """A run; its records without the times."""
    data = start["pairs" if name in ("dpo", "reward") else "prompts" if name in ("grpo", "ppo") else "chats"]
    fixed = ["--model", start["model"], "--data", data, "--out", out, "--steps", 3, "--lr", 3e-3, *ROWS[name]]
    fixed += RL if name in ("grpo", "ppo") else ["--batch-size", 4, "--warmup", 0]
    fixed += ["--teacher", start["teacher"]] if name == "distill" else []
    run_script([f"train_{name}.py", *map(str, fixed), "--threads", "1", *flags], ranks=ranks)
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics.read_records(out)]


def written(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/model.safetensors")


def answers(name: str, folder: Path) -> torch.Tensor:
    """What the model of a folder says: logits, or scores."""
    model = load_score_model(folder) if name == "reward" else load_model(folder)
    return model(IDS).detach()


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory) -> dict[str, Path]:
    """Every script once, rank 2 on all layers of the blocks."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ROWS:
        train(start, name, folder / name, "--lora-rank", "2", "--lora-alpha", "8")
    return {name: folder / name for name in ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_the_folder_is_the_base_with_the_adapter_beside_it(start, runs, name):
    """Merged and unmerged say the same; all but the adapter's layers (and a score head) is as it was."""
    folder, before = runs[name] / "model", load_file(start["model"] / "model.safetensors")
    for key, tensor in written(runs[name]).items():
        moved = key.split(".")[-2] in (*TARGETS["all"], "score")
        assert key == "score.weight" or torch.equal(tensor, before[key]) != moved, key
    bare = load_score_model(start["model"]) if name == "reward" else load_model(start["model"])
    unmoved = bare(IDS).detach()
    said = load_adapter(bare, folder / "adapter")(IDS).detach()
    within("merged adapter, float32", answers(name, folder), said)
    assert (said - unmoved).abs().max() > 1e-3
    kept = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert (kept["r"], kept["lora_alpha"], kept["lora_dropout"]) == (2, 8.0, 0.0)
    assert kept["base_model_name_or_path"] == str(start["model"])


def test_ppos_critic_has_an_adapter_of_its_own(start, runs):
    folder = runs["ppo"] / "critic"
    critic = load_adapter(load_score_model(start["model"]), folder / "adapter")
    values = critic(IDS).detach()
    within("merged adapter, float32", load_score_model(folder)(IDS), values)
    assert values.abs().max() > 1e-4


@pytest.mark.parametrize("name", ROWS)
def test_the_folders_load_in_transformers_and_peft(start, runs, name):
    transformers = pytest.importorskip("transformers", reason="the extra `oracle` is not installed")
    peft = pytest.importorskip("peft", reason="the extra `oracle` is not installed")
    kind = "SequenceClassification" if name == "reward" else "CausalLM"
    load = getattr(transformers, f"AutoModelFor{kind}").from_pretrained
    transformers.utils.logging.disable_progress_bar()
    folder, ids = runs[name] / "model", IDS
    ours = answers(name, folder)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say of each other is theirs to mend
        options = {"num_labels": 1} if name == "reward" else {}
        models = (
            load(folder),
            peft.PeftModel.from_pretrained(load(start["model"], **options), folder / "adapter"),
        )
        for theirs in models:
            theirs.config.pad_token_id = 0  # no padding here; else it looks for one
            logits = theirs(ids).logits
            expected = ours[:, -1] if name == "reward" else ours
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("nf4", [False, True])
def test_the_first_step_starts_from_the_reference(start, runs, tmp_path, name, nf4):
    """Step 0 of every script: the policy is the reference, whatever format the frozen weights have."""
    if nf4:
        first = train(start, name, tmp_path / "run", "--lora-rank", "2", "--lora-nf4", "--steps", "1")[0]
    else:
        first = metrics.read_records(runs[name])[0]
    if name == "dpo":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == 0.0
    elif name == "reward":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    elif name in ("grpo", "ppo"):
        assert abs(first["kl_ref"]) < 1e-9 and abs(first["kl_old"]) < 1e-9
    assert first["grad_norm"] > 0


def test_an_adapter_goes_on_where_it_was_and_is_its_own_reference(start, runs, tmp_path):
    """Not the bare base: that would be PITFALLS' reference without the adapter, and no loss of log 2."""
    adapter = runs["sft"] / "model/adapter"
    first = train(start, "dpo", tmp_path / "dpo", "--lora-from", str(adapter))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == 0.0
    first = train(start, "grpo", tmp_path / "grpo", "--lora-from", str(adapter))[0]
    assert abs(first["kl_ref"]) < 1e-9
    fresh, gone_on = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (adapter, tmp_path / "dpo/model/adapter")
    )
    moved = [name for name in fresh if not torch.equal(fresh[name], gone_on[name])]
    assert len(moved) == len(fresh)
    assert all((fresh[name] - gone_on[name]).abs().max() < 0.1 for name in fresh)  # from there, not from 0
    bare = train(
        start, "dpo", tmp_path / "bare", "--lora-from", str(adapter), "--ref-model", str(start["model"])
    )
    assert abs(bare[0]["margin"]) > 1e-4  # what another reference would have said


def test_a_configuration_alone_starts_a_new_adapter(start, tmp_path):
    """rsLoRA and ranks by layer, as peft writes them down."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "use_rslora": True}
    settings |= {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(settings))
    train(start, "sft", tmp_path / "run", "--lora-from", str(tmp_path / "adapter"))
    factors = load_file(tmp_path / "run/model/adapter/adapter_model.safetensors")
    shapes = {name.split(".")[-3]: len(x) for name, x in factors.items() if "lora_A" in name}
    assert shapes == {"q_proj": 2, "up_proj": 3}
    assert json.loads((tmp_path / "run/model/adapter/adapter_config.json").read_text())["use_rslora"] is True


def test_four_bits_are_frozen_and_merged_as_what_they_stand_for(start, tmp_path):
    train(start, "sft", tmp_path / "run", "--lora-rank", "2", "--lora-nf4", "--lora-targets", "mlp")
    layers = load_model(start["model"], four_bits=TARGETS["mlp"])
    said = load_adapter(layers, tmp_path / "run/model/adapter")(IDS).detach()
    within("merged adapter, float32", answers("sft", tmp_path / "run/model"), said)
    full = load_adapter(load_model(start["model"]), tmp_path / "run/model/adapter")(IDS).detach()
    assert (said - full).abs().max() > 1e-3  # the sixteen levels are not the weights


@pytest.mark.parametrize(
    "flags", [["--lora-rank", "2"], ["--lora-rank", "2", "--lora-nf4"]], ids=["lora", "nf4"]
)
def test_a_state_has_what_trains_and_resumes_bit_for_bit(start, tmp_path, flags):
    whole = train(start, "sft", tmp_path / "whole", *flags, "--save-every", "2")
    train(start, "sft", tmp_path / "cut", *flags, "--save-every", "2")
    shutil.rmtree(tmp_path / "cut/state/step_000003")
    state = load_file(tmp_path / "cut/state/step_000002/model.safetensors")
    assert state and all(name.endswith((".lora_A", ".lora_B")) for name in state)
    assert train(start, "sft", tmp_path / "cut", *flags, "--save-every", "2", "--resume") == whole
    assert all(
        torch.equal(x, written(tmp_path / "whole")[name]) for name, x in written(tmp_path / "cut").items()
    )
    with pytest.raises(AssertionError, match=r"ValueError: lora_alpha: .* was started with"):
        train(start, "sft", tmp_path / "cut", *flags, "--lora-alpha", "9", "--resume")


@pytest.mark.parametrize(("name", "nf4"), [("sft", False), ("grpo", False), ("sft", True)])
def test_ranks_change_nothing(start, runs, tmp_path, name, nf4):
    """The plain model and the adapter's file alike: its keys do not tell that the model was sharded."""
    flags = ["--lora-rank", "2", "--lora-alpha", "8", *(["--lora-nf4"] if nf4 else [])]
    train(start, name, tmp_path / "two", *flags, ranks=2)
    one = runs[name]
    if nf4:
        train(start, name, one := tmp_path / "one", *flags)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(run / "model" / file) for run in (one, tmp_path / "two"))
        assert ours.keys() == theirs.keys()
        within("world sizes, float32", theirs, ours)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora-rank", "-1"], "lora_rank must be at least 0, got -1"),
        (["--lora-nf4"], "lora_nf4 freezes weights: lora_rank or lora_from must say what trains"),
        (["--lora-rank", "2", "--lora-from", "X"], "lora_rank=2 and lora_from=X: the folder says it"),
        (["--lora-rank", "2", "--lora-alpha", "0"], "alpha must be positive"),
        (["--lora-alpha", "8"], "lora_alpha=8.0 needs lora_rank"),
        (["--lora-targets", "mlp", "--lora-from", "X"], "lora_targets=mlp needs lora_rank"),
        (["--lora-rank", "2", "--from-scratch"], "from_scratch trains all weights"),
        (["--lora-from", "X"], "X/adapter_config.json"),
    ],
)
def test_flags_that_cannot_be_are_named(start, tmp_path, flags, message):
    with pytest.raises(AssertionError, match=message):
        train(start, "sft", tmp_path / "run", *flags)


def test_an_adapter_with_dropout_is_refused(start, runs, tmp_path):
    shutil.copytree(runs["sft"] / "model/adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.1}))
    with pytest.raises(AssertionError, match=r"lora_dropout 0\.1, the scripts train without: set it to 0"):
        train(start, "sft", tmp_path / "run", "--lora-from", str(tmp_path / "adapter"))


def test_how_many_numbers_train_is_said(start, tmp_path):
    model = load_model(start["model"])
    layers = [module for name, module in model.named_modules() if name.split(".")[-1] in TARGETS["attention"]]
    count = sum(2 * (layer.in_features + layer.out_features) for layer in layers)
    flags = ["--model", start["model"], "--data", start["chats"], "--out", tmp_path / "run", "--steps", 1]
    flags += ["--lora-rank", 2, "--lora-targets", "attention"]
    printed = run_script(["train_sft.py", *map(str, flags)], ranks=1)
    assert f"36 samples, 1 steps of 32, {count:,} numbers train beside frozen weights" in printed
