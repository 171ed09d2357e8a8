"""Many adapters beside one base: every row of a batch has its own, and none sees another's.

    model = open_bank(load_model(base))
    add_to_bank(model, name, folder)           once for each adapter, in peft's format
    seat(model, names)                         whose adapter each token of the next forward pass has
    sample(model, prompts, adapters=names, …)  seats the rows itself

An adapter is asked for by its name (`registry.py`: the hash of its content), never by a number that could be
given to another one later. Threads may share a bank, each with seats of its own; adapters come and go between
their passes. What one layer does is `mixed_lora_forward`'s formula, token by token; here the tokens of an
adapter go through it together, so that a mixed batch costs few more products than a plain one.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopost.losses.checks import wide
from nanopost.models.cache import side_by_side
from nanopost.models.llama import Llama
from nanopost.models.lora import lora_scale
from nanopost.models.lora_model import TARGETS, rank_and_alpha
from nanopost.models.nf4 import NF4Linear
from nanopost.models.peft import read_factors

NAME = re.compile(r"[0-9A-Za-z_-]+")


@dataclass(frozen=True)
class Seating:
    """Whose adapter each of N tokens has."""

    present: tuple[str, ...]  # P names, in the order of their first tokens
    places: Tensor  # (P, M) the tokens of each, filled up with its first
    back: Tensor  # (N,) of each token: its place among the P · M


class MixedLinear(nn.Module):
    """x_t Wᵀ + b + s_i (x_t lora_A_iᵀ) lora_B_iᵀ, i the adapter of token t: a frozen layer and its adapters.

    The tokens of an adapter are fetched by index: a sum over all adapters with weights of 0 and 1 would carry
    one tenant's NaN to everyone.
    """

    def __init__(self, base: nn.Linear | NF4Linear, seats: threading.local):
        super().__init__()
        self.base = base
        self.seats = seats  # the whole model's, taken while a pass runs; each thread has its own
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()  # by name; the scale is in lora_B
        self.stack: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def hold(self, name: str, lora_A: Tensor, lora_B: Tensor) -> None:
        """Keep an adapter's factors, (r, in) and (out, r); r is 0 where it leaves this layer alone."""
        self.lora_A[name], self.lora_B[name] = (
            nn.Parameter(x, requires_grad=False) for x in (lora_A, lora_B)
        )

    def drop(self, name: str) -> None:
        """Forget them."""
        del self.lora_A[name], self.lora_B[name]
        self.stack = None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in) to (N, out)."""
        if (seating := getattr(self.seats, "taken", None)) is None:
            raise ValueError(
                "no token has an adapter: seat(model, names) says which, and there is no default"
            )
        y = self.base(x)
        if len(seating.back) != len(x):
            raise ValueError(f"{len(x)} tokens, but seat(model, names) named {len(seating.back)}")
        lora_A, lora_B = self.stacked(seating.present)
        if not lora_A.shape[1]:
            return y
        update = torch.bmm(torch.bmm(wide(x)[seating.places], lora_A.mT), lora_B.mT)
        return (y + update.flatten(0, 1)[seating.back]).to(y.dtype)

    def stacked(self, present: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """The factors of these adapters, (P, r, in) and (P, out, r); a lower rank is filled up with zeros."""
        factors = [(self.lora_A[name], self.lora_B[name]) for name in present]
        each = [x for pair in factors for x in pair]
        key = (present, *((x.data_ptr(), x._version) for x in each))  # what was moved or changed is no hit
        held = self.stack  # another thread may put its own there meanwhile
        if held and held[0] == key and not any(x.requires_grad for x in each):
            return held[1]
        rank = max(len(lora_A) for lora_A, _ in factors)
        lora_A = torch.stack([F.pad(x, (0, 0, 0, rank - len(x))) for x, _ in factors])
        lora_B = torch.stack([F.pad(x, (0, rank - x.shape[1])) for _, x in factors])
        if not (lora_A.requires_grad or lora_B.requires_grad):
            self.stack = key, (lora_A, lora_B)
        return lora_A, lora_B


def open_bank(model: Llama) -> Llama:
    """Freeze a model and make room for adapters beside all projections of its blocks; no head has one.

    Returns:
        The same model. Every pass through it needs `seat` first, and uses the seats up: none can be stale.
    Raises:
        ValueError: it is a bank already.
    """
    if hasattr(model, "bank"):
        raise ValueError("the model has room for many adapters already: open_bank was called before")
    seats, bank = threading.local(), dict[str, MixedLinear]()
    model.requires_grad_(False)
    for name in [name for name, _ in model.named_modules() if name.split(".")[-1] in TARGETS["all"]]:
        bank[name] = MixedLinear(model.get_submodule(name), seats)  # type: ignore[arg-type]
        model.set_submodule(name, bank[name])
    model.bank = bank  # type: ignore[assignment]
    model.model.register_forward_hook(lambda *_: vars(seats).clear(), always_call=True)
    return model


def layers(model: Llama) -> dict[str, MixedLinear]:
    """The layers of a bank, by name.

    Raises:
        ValueError: the model is no bank.
    """
    found: dict[str, MixedLinear] | None = getattr(model, "bank", None)
    if found is None:
        raise ValueError("the model has no room for many adapters: open_bank(model) makes it")
    return found


def names_of(model: Llama) -> set[str]:
    """The names of the adapters in a bank."""
    return set(next(iter(layers(model).values())).lora_A)


def add_to_bank(model: Llama, name: str, folder: str | Path) -> None:
    """Put the adapter of a folder beside the others; nothing is changed when it does not fit.

    Raises:
        ValueError: a name of other signs than letters, digits, _ and -, a word that torch's own modules use,
            or one that is taken; what `peft.py` refuses, by file and tensor; a number that is not finite.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"name must consist of letters, digits, _ and -, got {name!r}")
    if hasattr(nn.ParameterDict(), name):
        raise ValueError(f"name must not be a word that torch's modules use, got {name!r}")
    if name in names_of(model):
        raise ValueError(f"the bank has an adapter {name} already; what a name stands for does not change")
    adapter, factors = read_factors(model, folder)
    if wrong := sorted(key for key, tensor in factors.items() if not tensor.isfinite().all()):
        raise ValueError(f"{folder}: {wrong[0]} has a number that is not finite")
    for layer_name, layer in layers(model).items():
        like = wide(layer.base.weight.new_empty(0))
        lora_A, lora_B = like.new_empty(0, layer.in_features), like.new_empty(layer.out_features, 0)
        if f"{layer_name}.lora_A" in factors:
            rank, alpha = rank_and_alpha(adapter, layer_name)
            scale = lora_scale(rank, alpha=alpha, rank_stabilised=adapter.rank_stabilised)
            lora_A, lora_B = (factors[f"{layer_name}.lora_{x}"].to(like) for x in "AB")
            lora_B = scale * lora_B
        layer.hold(name, lora_A, lora_B)


def remove_from_bank(model: Llama, name: str) -> None:
    """Take an adapter out.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in names_of(model):
        raise ValueError(f"the bank has no adapter {name}")
    for layer in layers(model).values():
        layer.drop(name)


def seating(names: Sequence[str], device: torch.device) -> Seating:
    """Sort N tokens by the names of their adapters."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    back, most = side_by_side(torch.tensor([number[name] for name in names], device=device), len(number))
    firsts = torch.tensor([names.index(name) for name in number], device=device)
    places = firsts[:, None].repeat(1, most)
    places.view(-1)[back] = torch.arange(len(names), device=device)
    return Seating(tuple(number), places, back)


def seat(model: Llama, names: Sequence[str] | Seating) -> None:
    """Say whose adapter each token of this thread's next pass has, of the list that `Decoder.forward` reads.

    Raises:
        ValueError: a name that the bank does not have.
    """
    device = model.lm_head.weight.device
    found = names if isinstance(names, Seating) else seating(names, device)
    if unknown := sorted(set(found.present) - names_of(model)):
        raise ValueError(f"the bank has no adapter {unknown[0]}: it would answer under nobody's policy")
    next(iter(layers(model).values())).seats.taken = found
