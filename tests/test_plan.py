"""The plan of memory: what autograd keeps, to the byte; what allocator and processes take, within 15 %."""

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench import plan as bench
from bench.machine import ROOT
from nanopost import fsdp, losses, plan
from nanopost.data.collate import SHARED, Batch, collate
from nanopost.data.schema import Sample
from nanopost.kernels import dispatch
from nanopost.losses import aggregate, sft_loss
from nanopost.models import footprint
from nanopost.models.config import load_config
from nanopost.models.footprint import Job
from nanopost.models.llama import Llama
from nanopost.models.lora_model import TARGETS, Adapter, add_adapter
from nanopost.models.trainable import LoRA, load_policy
from nanopost.optim import adamw
from nanopost.rollout import footprint as sampling
from nanopost.rollout.sampler import row_uniforms, sample
from tests.ranks import run_script
from tests.tiny import TINY, hub_folder, write_chats

CONFIG = dataclasses.replace(
    TINY, vocab_size=2048, hidden_size=96, intermediate_size=264, head_dim=24, max_position_embeddings=512
)  # 6 query heads on 2 key/value heads, 144 numbers wide
CLOSE = 0.15
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def job(**changes) -> Job:
    return Job(**{"config": CONFIG, "micro_batch": 1, "rows": 1, "length": 100} | changes)


def rows(count: int, length: int) -> Batch:
    """Rows of one length, all of them trained on."""
    ids = torch.randint(3, CONFIG.vocab_size, (count, length + 1), generator=torch.Generator().manual_seed(0))
    return collate([Sample(tuple(row), (False, *[True] * length)) for row in ids.tolist()])


def model_of(j: Job, **changes) -> Llama:
    torch.manual_seed(0)
    model = Llama(dataclasses.replace(j.config, **changes))
    return add_adapter(model, Adapter(j.rank, 16.0, j.targets), seed=0) if j.rank else model


def loss_of(j: Job, model: Llama, batch: Batch) -> torch.Tensor:
    mask, ids = batch.completion_mask, (batch.input_ids, batch.target_ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=j.bf16, cache_enabled=False):
        logps = model.logps(*ids, mask=mask, spans=batch.spans, alike=j.head == "alike")
    return aggregate(sft_loss(logps), mask, mode="token_mean", denom=10.0)


def kept_by_autograd(j: Job, model: Llama, batch: Batch) -> int:
    """Bytes of all storages, each once, that the forward pass leaves for backward; without the parameters."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, dict[int, torch.Tensor]()

    def pack(x: torch.Tensor) -> torch.Tensor:
        if (place := x.untyped_storage().data_ptr()) not in own:
            kept[place] = x  # held, so that no other tensor gets its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss_of(j, model, batch)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def peak(run: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator has out at a time, above what it had before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    now = most = 0
    for _, count in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += count
        most = max(most, now)
    return most


ALL, FEW = TARGETS["all"], TARGETS["attention"]
KEPT = {
    "all weights": {},
    "no shared heads": {"config": dataclasses.replace(CONFIG, num_key_value_heads=6)},
    "head norms": {"config": dataclasses.replace(CONFIG, model_type="qwen3")},
    "biases": {"config": dataclasses.replace(CONFIG, model_type="qwen2")},
    "LoRA": {"rank": 4, "targets": ALL},
    "LoRA of attention": {"rank": 4, "targets": FEW},
    "bfloat16": {"bf16": True},
}


@pytest.mark.parametrize("changes", KEPT.values(), ids=KEPT)
def test_what_a_block_keeps_is_what_autograd_keeps(changes: dict) -> None:
    """A model of three blocks keeps so much more than one of two, to the byte."""
    j, batch = job(**changes), rows(1, 100)
    two, three = (kept_by_autograd(j, model_of(j, num_hidden_layers=n), batch) for n in (2, 3))
    cast = 2 * sum(a * b for a, b in footprint.matrices(j.config).values()) if j.bf16 else 0
    assert three - two == footprint.kept_by_block(j) + cast


@pytest.mark.parametrize("length", [16, 40])
def test_short_rows_keep_their_scores(length: int) -> None:
    j, batch = job(length=length), rows(1, length)
    two, three = (kept_by_autograd(j, model_of(j, num_hidden_layers=n), batch) for n in (2, 3))
    assert 0 <= three - two - footprint.kept_by_block(j) <= length**2  # the mask, bool


def test_sizes_are_those_of_the_kernels() -> None:
    """Where dispatch changes its mind, the plan must."""
    cpu = torch.empty(10_000, 4)
    assert dispatch.short_attention(cpu, keys=footprint.SHORT)
    assert not dispatch.short_attention(cpu, keys=footprint.SHORT + 1)
    assert dispatch.tile(cpu) == (footprint.LEAST, footprint.TILE["cpu"])
    for words in (500, 3000, 50_000):
        assert dispatch.chunk(cpu, words=words) == max(
            footprint.LEAST, min(footprint.CHUNK["cpu"] // words, 10_000)
        )
    assert footprint.SHARED == SHARED


@pytest.mark.parametrize("kind", ["llama", "tied", "qwen2", "qwen3"])
def test_numbers_are_those_of_the_model(kind: str) -> None:
    changes = {"tie_word_embeddings": True} if kind == "tied" else {"model_type": kind}
    config = dataclasses.replace(CONFIG, **changes)
    with torch.device("meta"):
        model = Llama(config)
    assert footprint.size(config) == sum(p.numel() for p in model.parameters())


def test_standing_memory_is_that_of_model_and_optimiser(tmp_path: Path) -> None:
    """Weights, gradients and moments, counted on the tensors; an adapter, and one beside four bits."""
    folder = hub_folder(tmp_path / "hub", hidden_size=64)
    for flags in (LoRA(), LoRA(lora_rank=4), LoRA(lora_rank=4, lora_targets="mlp", lora_nf4=True)):
        model = load_policy(folder, flags, seed=0)
        optimizer = adamw(model, lr=1e-3, weight_decay=0.0)
        model.logps(*torch.randint(3, 20, (2, 2, 5))).sum().backward()
        optimizer.step()
        tensors = [*model.parameters(), *model.buffers()]
        moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        adapter = plan.chosen_adapter(flags)
        targets = adapter.targets if adapter else ()
        j = job(config=model.config, rank=flags.lora_rank, targets=targets, nf4=flags.lora_nf4)
        wanted = {"weights": tensors, "Adam": moments}
        found = {name: sum(x.nbytes for x in group) for name, group in wanted.items()}
        terms = footprint.standing(j)
        assert terms["frozen models"] == 0
        assert (
            terms["Adam"] == found["Adam"] == 2 * sum(g.nbytes for g in grads) == 2 * footprint.gradients(j)
        )
        assert terms["weights"] == pytest.approx(found["weights"], rel=0.01 if flags.lora_nf4 else 0)


PEAKS = {
    "SFT": {"head": "alike"},
    "SFT, many words": {"head": "alike", "config": dataclasses.replace(CONFIG, vocab_size=16000)},
    "log-probs": {"head": "logps", "config": dataclasses.replace(CONFIG, vocab_size=16000)},
    "LoRA": {"head": "alike", "rank": 4, "targets": ALL},
    "bfloat16": {"head": "alike", "bf16": True},
    "recompute": {
        "head": "logps",
        "config": dataclasses.replace(CONFIG, num_hidden_layers=12),
        "recompute": True,
    },
}


@pytest.mark.parametrize("changes", PEAKS.values(), ids=PEAKS)
def test_a_micro_batch_takes_what_the_allocator_gives(changes: dict) -> None:
    """Forward and backward of a second micro-batch, gradients of the first being there."""
    j = job(micro_batch=6, rows=12, **changes)
    fsdp.choose(recompute=j.recompute)
    model, batch = fsdp.shard(model_of(j)), rows(6, 100)
    fsdp.choose()
    loss_of(j, model, batch).backward()
    taken = peak(lambda: loss_of(j, model, batch).backward())
    moments = plan.moments(j)
    standing = sum(footprint.standing(j).values()) + footprint.gradients(j)
    planned = max(sum(moments[name].values()) - standing for name in ("backward begins", "backward ends"))
    assert planned == pytest.approx(taken, rel=CLOSE)


@pytest.mark.parametrize("kind", [*plan.STORED, "top-p"])
def test_losses_of_stored_logits_take_what_the_allocator_gives(kind: str) -> None:
    """A divergence of two models' logits with what a line tells of it, and a truncated distribution.

    And without a gradient, as an evaluation compares them.
    """
    config = dataclasses.replace(CONFIG, vocab_size=4000)
    j = job(config=config, head="logits", stored=plan.STORED.get(kind, 8), micro_batch=3, rows=6, held_out=3)
    j = dataclasses.replace(j, seen=plan.SEEN.get(kind, 0))
    model, batch = model_of(j), rows(3, 100)
    teacher, mask, ids = model_of(j), batch.completion_mask, (batch.input_ids, batch.target_ids)
    divergence = {"forward": losses.forward_kl, "reverse": losses.reverse_kl, "jsd": losses.generalized_jsd}

    def step() -> None:
        if kind == "top-p":
            values = sft_loss(model.logps(*ids, mask=mask, spans=batch.spans, top_p=0.9))[mask]
        else:
            with torch.no_grad():
                taught = teacher(batch.input_ids, mask, batch.spans)
            logits = model(batch.input_ids, mask, batch.spans)
            values = divergence[kind](
                logits, taught, temperature=2.0, **({"beta": 0.5} if kind == "jsd" else {})
            )
            told = losses.forward_kl(logits.detach(), taught), logits.argmax(-1) == taught.argmax(-1)
            assert len(told[0]) == len(told[1]) == len(values)
        loss = aggregate(values[None], mask[mask][None], mode="token_mean", denom=10.0)
        if torch.is_grad_enabled():
            loss.backward()

    step()
    standing = sum(footprint.standing(j).values()) + footprint.gradients(j)
    planned = sum(plan.moments(j)["backward begins"].values()) - standing
    assert planned == pytest.approx(peak(step), rel=CLOSE)
    if j.seen:
        read = sum(plan.moments(j)["evaluation"].values()) - sum(footprint.standing(j).values())
        assert read == pytest.approx(peak(torch.no_grad()(step)), rel=CLOSE)


@pytest.mark.parametrize(("slots", "words"), [(256, 2048), (8, 64)])
def test_sampling_takes_what_the_allocator_gives(slots: int, words: int) -> None:
    """Groups of ragged answers: rows leave, and where slots are few others take their place."""
    config = dataclasses.replace(CONFIG, vocab_size=words)
    j = job(config=config, head="logps", length=48, new=40, group=4, sampled=16, slots=slots)
    model, prompts = model_of(j), [list(range(3 + i, 51 + i)) for i in range(4)]
    uniforms = row_uniforms(seed=0, step=0, prompts=range(4), group_size=4, count=40)
    ends = torch.randint(40, (16,), generator=torch.Generator().manual_seed(1))
    uniforms[torch.arange(16), ends] = 0.0  # the first token of all, which stops
    options = {"group_size": 4, "max_new_tokens": 40, "stop_ids": [0], "uniforms": uniforms, "slots": slots}
    taken = peak(lambda: sample(model, prompts, **options))
    planned = sum(plan.moments(j)["sampling"].values()) - sum(footprint.standing(j).values())
    assert planned == pytest.approx(taken, rel=CLOSE)
    assert sampling.kv_cache(j) == 2 * 2 * 2 * 24 * 4 * (min(4, slots // 4 + 1) * 48 + min(16, slots) * 40)


WIDE = dataclasses.replace(CONFIG, hidden_size=288, intermediate_size=792, num_hidden_layers=4)


def test_a_reference_that_is_gone_before_the_first_step_is_there_until_then() -> None:
    """DPO under an adapter with another folder's reference: its weights are what the run takes most of."""
    small = job(rank=4, targets=FEW, micro_batch=4, pair=2, rows=8)
    guest = job(config=WIDE)
    terms = plan.moments(dataclasses.replace(small, guest=guest))["reference reads"]
    model, batch = model_of(guest), rows(2, 100)
    assert terms["frozen models"] == sum(p.nbytes for p in model.parameters())
    assert terms["weights"] == footprint.standing(small)["weights"]
    with torch.no_grad():
        taken = peak(lambda: loss_of(guest, model, batch))
    assert terms["passing"] == pytest.approx(taken, rel=CLOSE)
    few = dataclasses.replace(small, guest=guest, micro_batch=64, rows=2)  # a step of one pair
    assert plan.moments(few)["reference reads"] == terms
    less = dataclasses.replace(small, rows=2, micro_batch=2)
    assert plan.need(dataclasses.replace(less, guest=guest)) > plan.need(less)


def test_a_teacher_writes_alone() -> None:
    """Nothing of the student is there yet; what the sampler takes is the sampler's test."""
    teacher = job(config=WIDE, length=48, new=40, group=2, sampled=16)
    terms = plan.moments(job(guest=teacher))["teacher writes"]
    assert terms["frozen models"] == 4 * footprint.size(WIDE) and "weights" not in terms
    assert terms["KV cache"] == 2 * 2 * 4 * 24 * 4 * (8 * 48 + 16 * 40)
    several = plan.moments(job(guest=dataclasses.replace(teacher, ranks=2)))["teacher writes"]
    assert (
        several["frozen models"] == terms["frozen models"] / 2 < several["gathered"] and not terms["gathered"]
    )
    away = dataclasses.replace(teacher, offload=True, device="cuda")
    assert plan.moments(job(guest=away))["teacher writes"]["frozen models"] == 0


def test_the_guests_of_the_scripts(tmp_path: Path) -> None:
    folder = hub_folder(tmp_path / "hub")
    read = {name: runpy.run_path(str(ROOT / f"train_{name}.py")) for name in ("dpo", "distill")}
    given = {"model": folder, "data": folder}
    cfg = read["dpo"]["Config"](**given, ref_model=folder)
    guest = plan.job_of(cfg, 20, held_out=9, guest=folder).guest
    assert guest == Job(config=load_config(folder), micro_batch=1, rows=1, length=20, device=DEVICE)
    told = {"samples": 3, "max_new_tokens": 50, "top_p": 0.9}
    cfg = read["distill"]["settle"](read["distill"]["Config"](**given, mode="text", teacher=folder, **told))
    guest = plan.job_of(cfg, 20, guest=folder, written=["a" * n for n in (9, 30, 12)]).guest
    assert (guest.sampled, guest.group, guest.new, guest.length, guest.head) == (9, 3, 50, 30, "logits")
    student = plan.job_of(cfg, 20)
    assert (student.head, student.frozen) == ("alike", ())  # top-p is the teacher's, and it is gone


def test_evaluation_is_planned_in_passes_of_the_flag(tmp_path: Path) -> None:
    """The held-out records do not come in steps: --micro-batch 32 is 32 rows of them, whatever a step has."""
    folder = hub_folder(tmp_path / "hub")
    Config = runpy.run_path(str(ROOT / "train_sft.py"))["Config"]
    cfg = Config(model=folder, data=folder, batch_size=4, micro_batch=32)
    many, few, one = (plan.moments(plan.job_of(cfg, 20, held_out=n))["evaluation"] for n in (50, 5, 1))
    assert many["passing"] == 32 * one["passing"] and few["passing"] == 5 * one["passing"]
    j = plan.job_of(cfg, 20)
    assert footprint.tokens(j)[0] == 4 * 20 and not footprint.adds(j)  # but a step has no more than it has
    assert (
        plan.fits(j, 2**40).micro_batch == 32
        and "micro-batches of 32; up to 32 would fit" in plan.fits(j, 2**40).sentence
    )
    config = load_config(folder)
    shared = dataclasses.replace(j, held_out=5, ranks=2, frozen=(config, config))
    alone = plan.moments(dataclasses.replace(shared, frozen=()))["evaluation"]["gathered"]
    assert plan.moments(shared)["evaluation"]["gathered"] == 3 * alone > 0  # what it is compared with too
    pairs = dataclasses.replace(j, pair=2, held_out=5, micro_batch=64)
    assert plan.moments(pairs)["evaluation"]["passing"] == 10 * one["passing"]


def test_the_largest_that_fits() -> None:
    """One row more does not fit, and the memory that it would take is enough for it."""
    j = job(rows=64, micro_batch=8)
    memory = plan.need(dataclasses.replace(j, micro_batch=11))
    found = plan.fits(j, memory)
    assert (found.fits, found.micro_batch, found.need) == (True, 11, plan.need(j))
    assert plan.fits(j, memory - 1).micro_batch == 10
    assert not plan.fits(dataclasses.replace(j, micro_batch=12), memory).fits
    assert plan.fits(j, 2**40).micro_batch == 64 and plan.fits(j, 1).micro_batch == 0
    pairs = dataclasses.replace(j, pair=2)
    assert plan.fits(pairs, memory).micro_batch == 5  # 10 rows
    wide = job(head="logits", stored=10, rows=9, micro_batch=32, length=8, held_out=99, seen=7.5)
    memory = plan.need(dataclasses.replace(wide, micro_batch=9))
    assert plan.need(dataclasses.replace(wide, micro_batch=8)) > memory  # gradients are added then
    passing = [n for n in range(1, 33) if plan.need(dataclasses.replace(wide, micro_batch=n)) <= memory]
    assert plan.fits(wide, memory).micro_batch == max(passing) >= 9
    speaks = job(head="logps", new=32, sampled=64, group=4, rows=64, micro_batch=1, slots=64)
    slots = plan.fits(speaks, plan.need(dataclasses.replace(speaks, slots=40))).slots
    assert slots >= 40 and plan.need(dataclasses.replace(speaks, slots=64)) >= plan.need(speaks)
    few = dataclasses.replace(speaks, slots=3)
    memory = plan.need(few)  # with as many slots as are asked for not even one row fits
    found = plan.fits(speaks, memory)
    assert not found.fits and found.micro_batch >= 1 and 3 <= found.slots < 64
    alone = dataclasses.replace(speaks, micro_batch=found.micro_batch, slots=found.slots)
    assert plan.fits(alone, memory).fits


def test_ranks_share_what_stands_and_recompute_keeps_inputs_alone() -> None:
    one, four = job(rows=8), job(rows=8, ranks=4)
    assert 4 * four_sum(four) == pytest.approx(four_sum(one), abs=16)
    assert footprint.gathered(one) == 0 < footprint.gathered(four)
    deep = job(config=dataclasses.replace(CONFIG, num_hidden_layers=40))
    assert footprint.activations(dataclasses.replace(deep, recompute=True)) < footprint.activations(deep) / 5
    away = dataclasses.replace(deep, offload=True, device="cuda")
    assert four_sum(away) == footprint.gradients(away) == 0 < footprint.gathered(away)


def four_sum(j: Job) -> int:
    return sum(footprint.standing(j).values())


READ = {  # what reads a script's hidden states, the rows of an item, how many models are frozen beside it
    "sft": ("alike", 1, 0), "dpo": ("logps", 2, 0), "reward": ("score", 2, 0), "grpo": ("logps", 1, 1),
    "ppo": ("logps", 1, 1), "distill": ("logits", 1, 1),
}  # fmt: skip
NEEDED = {"reward": {"labels": "pairs"}, "grpo": {"verifier": "math"}, "distill": {"mode": "logits"}}


@pytest.mark.parametrize("name", READ)
def test_the_job_of_each_script(name: str, tmp_path: Path) -> None:
    """Its defaults as numbers."""
    folder = hub_folder(tmp_path / "hub")
    Config = runpy.run_path(str(ROOT / f"train_{name}.py"))["Config"]
    given = {"model": folder, "data": folder, "lora_rank": 3, **NEEDED.get(name, {})}
    given |= {"teacher": folder} if name == "distill" else {}
    cfg = Config(**given)
    j = plan.job_of(cfg, 20, held_out=7)
    frozen = j.copies + len(j.frozen)
    assert (j.head, j.pair, frozen, j.rank, j.targets) == (*READ[name], 3, ALL)
    rows = getattr(cfg, "batch_size", 0) or cfg.prompts_per_step * cfg.group_size
    assert (j.rows, j.micro_batch) == (rows * j.pair, cfg.micro_batch * j.pair)
    assert (j.length, j.held_out, j.ranks, j.device) == (20, 7, 1, DEVICE)
    spoken = {"new": 256, "sampled": rows} if "group_size" in vars(cfg) else {"new": 0, "sampled": 0}
    assert {key: getattr(j, key) for key in spoken} == spoken
    assert j.critic == (j.config if name == "ppo" else None)


SCRIPTS = {
    "sft": ["--micro-batch", "4"],
    "grpo": ["--verifier", "gsm8k", "--max-new-tokens", "8"],
    "dpo": ["--ref-model", "HUB"],
    "distill": ["--mode", "text", "--teacher", "HUB", "--max-new-tokens", "8"],
}
GUESTS = {"dpo": "reference reads", "distill": "teacher writes"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_plan_of_a_script(name: str, tmp_path: Path) -> None:
    """The table, the verdict and no run; weights that are no weights show that none was read."""
    folder, data = hub_folder(tmp_path / "hub"), write_chats(tmp_path / "chats.jsonl", 8)
    (folder / "model.safetensors").write_bytes(b"none")
    if name == "dpo":
        data.write_text('{"prompt": "add one", "chosen": "it is 1", "rejected": "it is 2"}\n' * 8)
    flags = ["--model", folder, "--data", data, "--out", tmp_path / "run", *SCRIPTS[name], "--plan"]
    told = [str(folder if flag == "HUB" else flag) for flag in flags]
    printed = run_script([f"train_{name}.py", *told], ranks=1)
    assert "it fits: " in printed and "in all" in printed
    assert ("KV cache" in printed) == (name in ("grpo", "distill"))
    assert all((guest in printed) == (name == script) for script, guest in GUESTS.items())
    assert not (tmp_path / "run").exists()
    if name == "dpo":  # what scores gathers the policy, without held-out records too
        assert "evaluation" in printed
        # What the reference has said is kept: a resumed run does not read it again
        (tmp_path / "run/logps").mkdir(parents=True)
        (tmp_path / "run/logps/reference.safetensors").touch()
        assert GUESTS["dpo"] not in run_script([f"train_{name}.py", *told, "--resume"], ranks=1)


def test_what_does_not_fit_ends_with_1(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = hub_folder(tmp_path / "hub")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Flags(LoRA):
        model: Path = folder
        micro_batch: int = 4
        batch_size: int = 8
        epochs: float = 1.0
        plan: bool = True

    monkeypatch.setattr(plan, "available", lambda device: 2**17)
    with pytest.raises(SystemExit) as ended:
        plan.offer(Flags(), 64)
    assert ended.value.code == 1 and "it does not fit: " in capsys.readouterr().out
    assert not plan.offer(Flags(plan=False), 64).fits
    monkeypatch.setattr(plan, "available", lambda device: 2**40)
    with pytest.raises(SystemExit) as ended:
        plan.offer(Flags(), 64)
    assert ended.value.code == 0


def test_a_guest_that_does_not_fit_is_told_and_the_steps_are_judged_alone(
    tmp_path: Path, monkeypatch, capsys
):
    """Before it is loaded; the preflight comes when it is gone."""
    folder, large = hub_folder(tmp_path / "hub"), hub_folder(tmp_path / "large", intermediate_size=9999)
    Config = runpy.run_path(str(ROOT / "train_dpo.py"))["Config"]
    cfg = Config(model=folder, data=folder, ref_model=large, lora_rank=1, micro_batch=1, batch_size=1)
    alone, both = (plan.need(plan.job_of(cfg, 20, guest=guest)) for guest in (None, large))
    reads = plan.moments(plan.job_of(cfg, 20, guest=large))["reference reads"]
    monkeypatch.setattr(plan, "available", lambda device: sum(reads.values()) - 1)
    found = plan.offer(cfg, 20, guest=large)
    told = "memory: before the first step, when a reference reads, it takes "
    assert capsys.readouterr().out.startswith(told)
    assert found.need == alone < both
    monkeypatch.setattr(plan, "available", lambda device: sum(reads.values()))
    plan.offer(cfg, 20, guest=large)
    assert not capsys.readouterr().out


FIRST, *OTHERS = bench.CASES


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_fresh_process_takes_what_is_planned(name: str, tmp_path: Path) -> None:
    bench.write(tmp_path)
    marks = bench.measure(name, tmp_path)
    for moment, planned in bench.planned(bench.CASES[name]).items():
        assert planned == pytest.approx(marks[moment], rel=CLOSE), moment
