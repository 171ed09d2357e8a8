"""Preflight on what a model is and what it does with the first rows: its head, its loss, its gradient.

On several ranks all of them call a function together. None leaves a trace: no gradient stays behind.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanopost import distributed
from nanopost.data.chat import Chat
from nanopost.evals.preflight_data import Check
from nanopost.micro_batches import in_parts
from nanopost.models.config import load_config
from nanopost.models.llama import Llama
from nanopost.plan import Fit

Loss = Callable[[list[Any], list[Any]], Tensor]  # of a part, in a step that consists of a whole
ERROR = 0.15  # of a plan's sum, as a share
UNTRAINED = 0.1  # of the usual distance from the mean row: nearer rows look as they were made
# What rounding may do in float32 and in bfloat16: to a gradient, as a share; to a loss; to a gradient of 0.
GRADIENT, CARD, NOTHING = (1e-3, 0.1), (1e-3, 0.05), (1e-5, 1e-2)


@torch.no_grad()
def stop_row(model: nn.Module, chat: Chat) -> Check:
    """The head's rows of the stop tokens look trained, or can still be; all weights are here (`gathered`).

    A row is untrained if it is next to 0 or next to the mean of all rows: so new tokens are begun.
    """
    if not isinstance(model, Llama):
        return Check("stop row", "n/a", "a score model says no token")
    rows = model.cut(model.lm_head.weight, 0).float()
    mean, norms = rows.mean(0), rows.norm(dim=1)
    apart = (norms.square() - 2 * rows @ mean + mean.square().sum()).clamp(min=0).sqrt()
    least = torch.minimum(norms / norms.median(), apart / apart.median())
    low = [i for i in chat.stop_ids if not least[i] > UNTRAINED]
    told = f"least {min(float(least[i]) for i in chat.stop_ids):.2g} of the usual norm"
    if not low:
        return Check("stop row", "pass", told)
    told = f"{low[0]} {chat.tokenizer.id_to_token(low[0])!r} looks untrained, {told}"
    if model.lm_head.weight.requires_grad:
        return Check("stop row", "pass", f"{told}; the head trains")
    fix = "train all weights once (--lora-rank 0): a frozen head never learns to stop"
    return Check("stop row", "fail", told, fix)


def memory(fit: Fit, *, slots: bool) -> Check:
    """What the run takes at most is there; the plan knows it to within `ERROR`.

    Args:
        slots: whether the script has the flag of that name.
    """
    if fit.fits:
        return Check("memory", "pass", fit.sentence)
    fix = "--lora-rank, more ranks or a smaller model"
    if fit.micro_batch:
        fix = f"--micro-batch {fit.micro_batch}" + (f" --slots {fit.slots}" if fit.slots and slots else "")
    close = fit.need <= (1 + ERROR) * fit.memory
    return Check("memory", "warn" if close else "fail", fit.sentence, fix)


def tied_and_rope(model: nn.Module, folder: Path) -> Check:
    """The model in memory has its folder's numbers, rope among them, and a tied head iff they say so."""
    name, here, there = "tied and rope", model.config, load_config(folder)
    if apart := [key for key, value in vars(there).items() if getattr(here, key) != value]:
        told = (
            f"{apart[0]} is {getattr(here, apart[0])}, {folder / 'config.json'} has {vars(there)[apart[0]]}"
        )
        return Check(name, "fail", told, "load the model with the folder's own configuration")
    tied = isinstance(model, Llama) and model.lm_head.weight is model.model.embed_tokens.weight
    if isinstance(model, Llama) and tied != there.tie_word_embeddings:
        told = (
            f"tie_word_embeddings is {there.tie_word_embeddings}, the head {'is' if tied else 'is not'} tied"
        )
        return Check(name, "fail", told, "what is trained would not be what is saved")
    scaled = there.rope_scaling.rope_type if there.rope_scaling else "not scaled"
    told = f"θ = {there.rope_theta:g}, {scaled}; the head is {'tied' if tied else 'its own'}"
    return Check(name, "pass", told)


@dataclass(frozen=True)
class Gradient:
    """A rank's share of a loss, its shards of the gradient, and the passes that these were made in."""

    loss: float
    grads: list[Tensor]
    passes: int


def gradient(model: nn.Module, loss: Loss, rows: list[Any], whole: list[Any], *, size: int) -> Gradient:
    """The loss of a step and its gradient, which is taken away from the model again.

    Args:
        model: without gradients before and after.
        loss: see `Loss`; summed over parts and ranks it is the step's.
        rows: this rank's; as many on every rank.
        whole: all ranks' rows.
        size: rows a pass; fewer where memory holds no more (`micro_batches`).
    """

    def learn(part: Sequence[Any]) -> float:
        share = loss(list(part), whole)
        share.backward()
        return float(share.detach())

    values, grads = in_parts(model, rows, learn, size, model, desc="preflight"), list[Tensor]()
    for parameter in model.parameters():
        if (grad := parameter.grad) is not None:
            grads.append(grad.to_local() if isinstance(grad, DTensor) else grad)
            parameter.grad = None
    return Gradient(sum(values), grads, len(values))


def micro_batches(one: Gradient, many: Gradient | None, *, rows: int) -> Check:
    """Loss and gradient of the first rows in one pass are those of the same rows one by one.

    Args:
        one, many: of as few passes as memory allows, and of a pass a row; None where that is the same.
        rows: of all ranks.
    """
    if many is None:
        return Check("micro-batch", "n/a", "a pass has one row")
    pairs = list(zip(one.grads, many.grads, strict=True))
    apart = sum(float((a - b).double().square().sum()) for a, b in pairs)
    size = sum(float(a.double().square().sum()) for a, _ in pairs)
    apart, size, loss, other = distributed.all_sum([apart, size, one.loss, many.loss])
    apart, size, bf16 = math.sqrt(apart), math.sqrt(size), distributed.bf16()
    told = f"{rows} rows, {one.passes} and {many.passes} passes a rank: loss {abs(loss - other):.1g} apart, "
    told += f"gradient {apart:.1g} of {size:.2g}"
    if size <= NOTHING[bf16]:
        return Check("micro-batch", "warn", f"{told}: it is 0", "these rows teach nothing")
    if not (apart <= GRADIENT[bf16] * size and abs(loss - other) <= CARD[bf16] * max(1.0, abs(loss))):
        fix = "divide by the count of the whole step in every micro-batch; mask the padding"
        return Check("micro-batch", "fail", told, fix)
    return Check("micro-batch", "pass", told)


def preference_numbers(
    line: Mapping[str, float | None], starts: float, sft_weight: float
) -> dict[str, tuple[float, float]]:
    """What a line of preferences says and must where the policy is its reference: h = 0, and no KL.

    Args:
        line: `loss`, `margin`, `kl_from_ref`, and `sft` where the loss has that term too.
        starts: the loss at h = 0, without that term.
        sft_weight: its weight.
    """
    due = {"loss": starts + sft_weight * (line.get("sft") or 0.0), "margin": 0.0, "kl_from_ref": 0.0}
    return {name: (float(line[name] or 0.0), value) for name, value in due.items()}


def card(said: Mapping[str, tuple[float, float]], *, guess: float | None = None) -> Check:
    """What the first line must say: each number is what it is at the start.

    Args:
        said: the number that was found and the one that must be, by name; NaN: any finite one.
        guess: the loss of whoever guesses; a model is not much worse.
    """
    told = ", ".join(f"{name} {found:.4g}" for name, (found, _) in said.items())
    for name, (found, due) in said.items():
        if not math.isfinite(found) or abs(found - due) > CARD[distributed.bf16()] * max(1.0, abs(due)):
            fix = "policy and reference must be the same model in the same precision at the start"
            due_told = "a finite number" if math.isnan(due) else f"{due:.4g}"
            return Check("step-0 card", "fail", f"{name} is {found:.4g}, it must be {due_told}", fix)
    if guess is not None and said["loss"][0] > guess + 1:
        fix = "is this the model's own tokenizer and template? (fine for random weights)"
        return Check("step-0 card", "warn", f"{told}: worse than guessing, {guess:.4g}", fix)
    return Check("step-0 card", "pass", told if guess is None else f"{told}, {guess:.4g} by guessing")
