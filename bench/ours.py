"""Our side of every comparison: all that `bench` calls of nanopost, through its public functions alone.

A builder `build(work, turn, **options)` is what `bench.worker` asks for; each ignores the options it does not
need (`**_`). `work` holds what `model_folder` and the data makers wrote before any process started.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from bench import head
from bench.inputs import STOP, ragged_lengths, ragged_rows, token_rows, word
from bench.machine import ROOT
from bench.worker import Turn, loop
from nanopost import metrics
from nanopost.data.chat import write_chat
from nanopost.data.collate import collate
from nanopost.data.schema import Sample
from nanopost.kernels.linear_cross_entropy import linear_cross_entropy
from nanopost.kernels.linear_logps import linear_logps as kernels_linear_logps
from nanopost.losses import aggregate, sft_loss
from nanopost.models.config import LlamaConfig
from nanopost.models.llama import Llama
from nanopost.models.lora_model import Adapter, add_adapter
from nanopost.models.peft import load_adapter, save_adapter
from nanopost.models.weights import load_model, random_model, save_model, write_config
from nanopost.rewards.math import gsm8k
from nanopost.rollout import sampler as rollout_sampler

TEMPLATE = """{% for message in messages %}{{ message.content }} \
{% if message.role == 'assistant' %}<stop>{% endif %}{% endfor %}"""


# ---- what both sides load ----------------------------------------------------------------------------------
@torch.no_grad()
def model_folder(work: Path, *, width: int, layers: int, vocabulary: int, **_: Any) -> None:
    """A random Llama with tokenizer and template in work/model: 8 query heads, 4 key/value heads, 3·D inside.

    Column 0 of the residual stream is a constant that no layer writes to, so column 0 of the head is a bias:
    it makes the stop token about as likely as 1e-7 in every context. Lengths are then what a case prescribes.
    """
    folder = work / "model"
    words = {word(n): n for n in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<stop>"])
    chat = write_chat(folder, tokenizer, TEMPLATE, eos_token="<stop>")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        max_position_embeddings=1024,
    )
    write_config(config, folder, dtype=torch.float32, stop_ids=chat.stop_ids)
    model = random_model(folder, seed=0)
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[STOP] = 0.0
    hidden = model.model.rows(torch.tensor(token_rows(4, 64, vocabulary)))[0][:, 0].mean()
    model.lm_head.weight[STOP, 0] = -7.5 / hidden
    save_model(config, model.state_dict(), folder, stop_ids=chat.stop_ids)


def adapter_folder(work: Path) -> None:
    """An adapter of rank 16 on the seven projections in work/adapter, as after some steps."""
    model = add_adapter(load_model(work / "model"), Adapter(rank=16, alpha=32.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    save_adapter(model, model.state_dict(), work / "adapter", base=work / "model")


def reward(text: str, answer: str) -> float:
    """The verifier that both GRPO trainers are given."""
    return gsm8k(text, answer).score


# ---- supervised fine-tuning --------------------------------------------------------------------------------
def gradients(model: Llama) -> dict[str, Tensor]:
    """The gradient of every parameter, by the hub's name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(work: Path, turn: Turn, rows: list[list[int]], *, bf16: bool = False, lora: bool = False) -> None:
    """Forward and backward of the mean loss over all tokens of these rows."""
    model = load_model(work / "model")
    if lora:
        load_adapter(model, work / "adapter")
    loop(turn, sft_step(model, rows, bf16=bf16), lambda loss: {"loss": loss, **gradients(model)})


def sft_step(model: Llama, rows: list[list[int]], *, bf16: bool = False) -> Callable[[], Tensor]:
    """A function that makes the gradients of these rows anew; the mean loss over all their tokens."""
    samples = [Sample(tuple(row), (False,) + (True,) * (len(row) - 1)) for row in rows]
    batch, count = collate(samples), float(sum(sum(sample.mask) for sample in samples))

    def iterate() -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logps = model.logps(
                batch.input_ids, batch.target_ids, mask=batch.completion_mask, spans=batch.spans, alike=True
            )
        loss = aggregate(sft_loss(logps), batch.completion_mask, mode="token_mean", denom=count)
        loss.backward()
        return loss.detach()

    return iterate


def sft(
    work: Path, turn: Turn, *, batch: int, length: int, vocabulary: int, bf16: bool = False, **_: Any
) -> None:
    train(work, turn, token_rows(batch, length + 1, vocabulary), bf16=bf16)


def lora(work: Path, turn: Turn, *, batch: int, length: int, vocabulary: int, **_: Any) -> None:
    train(work, turn, token_rows(batch, length + 1, vocabulary), lora=True)


def sft_ragged(
    work: Path, turn: Turn, *, batch: int, mean: float, length: int, vocabulary: int, **_: Any
) -> None:
    train(work, turn, ragged_rows(batch, mean, length, vocabulary))


# ---- the head ----------------------------------------------------------------------------------------------
def linear_ce(work: Path, turn: Turn, **shape: Any) -> None:
    """The mean cross-entropy under a linear head, forward and backward."""
    head.time_loss(turn, lambda *given: linear_cross_entropy(*given).mean(), **shape)


def linear_logps(work: Path, turn: Turn, **shape: Any) -> None:
    """The log-probability of every target under a linear head."""
    head.time_logps(turn, lambda *given: kernels_linear_logps(*given)[0], **shape)


# ---- the sampler -------------------------------------------------------------------------------------------
def prescribe(uniforms: Tensor, lengths: list[int]) -> Tensor:
    """Make row r stop at its length: a draw of 0 is the first token of all, which is the stop token."""
    uniforms[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = 0.0
    return uniforms


def sampler(
    work: Path,
    turn: Turn,
    *,
    prompts: int,
    group: int,
    prompt: int,
    new: int,
    vocabulary: int,
    mean: float = 0,
    **_: Any,
) -> None:
    """`group` completions of each prompt, of `new` tokens or of prescribed ragged lengths up to that."""
    model, rows = load_model(work / "model"), token_rows(prompts, prompt, vocabulary)
    lengths = ragged_lengths(prompts * group, mean, new) if mean else None
    step = 0

    def uniforms(size: int, count: int) -> Tensor:
        nonlocal step
        step += 1
        where = {"seed": 0, "step": step, "prompts": range(prompts)}
        return rollout_sampler.row_uniforms(**where, group_size=size, count=count)

    def draw() -> list[Any]:
        drawn = prescribe(uniforms(group, new), lengths) if lengths else uniforms(group, new)
        options = {"max_new_tokens": new, "stop_ids": [STOP], "uniforms": drawn}
        return rollout_sampler.sample(model, rows, group_size=group, **options)

    def digest(rollouts: list[Any]) -> dict[str, Tensor]:
        options = {"max_new_tokens": 64, "stop_ids": [STOP], "uniforms": uniforms(1, 64)}
        greedy = [r.completion_ids for r in rollout_sampler.sample(model, rows, temperature=0.0, **options)]
        useful = sum(len(rollout.completion_ids) for rollout in rollouts)
        return {"greedy tokens": torch.tensor(greedy), "useful tokens": torch.tensor(useful)}

    loop(turn, draw, digest)


# ---- whole scripts -----------------------------------------------------------------------------------------
def script(name: str, arguments: dict[str, Any], turn: Turn, digest: Any) -> None:
    """Run a script as it stands; it waits for its turn where it has just written the record of a step.

    So an iteration is a whole step: data, rollout, training, record. The first two steps belong to the build.
    """
    write = metrics.write_record

    def write_record(run: Path, step: int, values: dict[str, Any]) -> None:
        write(run, step, values)
        if step:
            turn(lambda: digest(Path(run)))

    metrics.write_record = write_record
    flags = [word for flag, value in arguments.items() for word in (f"--{flag}", str(value))]
    sys.argv = [name, *flags, "--threads", "1", "--steps", str(10**6), "--eval-every", "0"]
    runpy.run_path(str(ROOT / name), run_name="__main__")


def grpo(work: Path, turn: Turn, *, prompts: int, group: int, new: int, mean: float = 0, **_: Any) -> None:
    """train_grpo.py with its default loss; its first rollout is kept, for the peer to train on too."""
    if mean:
        uniforms, lengths = rollout_sampler.row_uniforms, ragged_lengths(prompts * group, mean, new)
        rollout_sampler.row_uniforms = lambda **options: prescribe(uniforms(**options), lengths)

    def digest(run: Path) -> dict[str, Tensor]:
        first, *_, last = metrics.read_records(run)
        keep_rollout(work, run)
        rows = prompts * group
        return {
            "useful tokens": torch.tensor(round(last["length"] * rows)),
            "first reward": torch.tensor(round(first["reward"] * rows)),
            "first loss and gradient norm": torch.tensor([first["loss"], first["grad_norm"]]),
        }

    arguments = {"model": work / "model", "data": work / "prompts.jsonl", "verifier": "gsm8k"}
    arguments |= {"out": tempfile.mkdtemp(dir=work), "prompts-per-step": prompts, "group-size": group}
    arguments |= {"micro-batch": prompts * group, "max-new-tokens": new, "rollouts-every": 10**6}
    script("train_grpo.py", arguments, turn, digest)


def keep_rollout(work: Path, run: Path) -> None:
    """The completions of the run's first step, by prompt, in work/rollout.json."""
    kept: dict[str, list[list[int]]] = {}
    for row in metrics.read_rollouts(run, 0):
        ids = [int(text[1:].split("=")[0]) if text else STOP for text in row["tokens"]]
        kept.setdefault(row["prompt"].strip(), []).append(ids)
    (work / "rollout.json").write_text(json.dumps(kept), encoding="utf-8")


def dpo(work: Path, turn: Turn, *, pairs: int, **_: Any) -> None:
    """train_dpo.py, all pairs in every step."""

    def digest(run: Path) -> dict[str, Tensor]:
        first = metrics.read_records(run)[0]
        return {"first loss and gradient norm": torch.tensor([first["loss"], first["grad_norm"]])}

    arguments = {"model": work / "model", "data": work / "pairs.jsonl", "out": tempfile.mkdtemp(dir=work)}
    script("train_dpo.py", arguments | {"batch-size": pairs, "micro-batch": pairs}, turn, digest)
