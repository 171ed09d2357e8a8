"""Shard a model over ranks with FSDP2, read its weights into the shards, and hold them whole to sample.

Every rank holds a part of each parameter, the rows that torch.chunk would give it (`fully_shard`, one group a
decoder block and one for the rest). Gradients are *summed* over ranks, never averaged, because losses are
divided by the denominator of the whole optimiser step before backward. So the number of ranks cannot change
the gradient. A model that comes on the meta device has no numbers yet: each rank reads its own rows of them,
and none ever has the whole model.

Sampling needs care: ranks decode different numbers of tokens, so a collective inside a forward pass would
hang. `gathered` puts all weights in place first and keeps them there until its block ends.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import checkpoint

from nanopost import shards

M = TypeVar("M", bound=nn.Module)
METHODS = ("logps", "next_logits", "values", "scores")  # what a model can be asked beside its forward pass
_chosen: dict[str, Any] = {"recompute": False, "offload": False, "mesh": None}  # how `shard` places models


def choose(*, recompute: bool = False, offload: bool = False, replicas: int = 1) -> None:
    """Say how `shard` places the models that follow; it changes what fits and how fast it is, and no result.

    Args:
        recompute: keep the input of a block in place of its activations, and compute them again in backward.
        offload: weights, gradients and moments wait in host memory; a block's weights are on the device while
            it computes. On one process too.
        replicas: groups of ranks that each hold a whole model. As many as there are nodes keeps the gathering
            of weights inside a node; gradients are summed over all.
    Raises:
        ValueError: replicas does not divide the number of ranks.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if replicas < 1 or ranks % replicas:
        raise ValueError(f"replicas={replicas} must divide the number of ranks ({ranks})")
    shape, names = ((replicas, ranks // replicas), ("replica", "part")) if replicas > 1 else ((ranks,), None)
    mesh = init_device_mesh(device().type, shape, mesh_dim_names=names) if ranks > 1 or offload else None
    _chosen.update(recompute=recompute, offload=offload, mesh=mesh)


def bf16() -> bool:
    """Whether products are in bfloat16: on a GPU unless NANOPOST_BF16=0, on a CPU if NANOPOST_BF16=1.

    Raises:
        ValueError: the variable is neither 0 nor 1.
    """
    value = os.environ.get("NANOPOST_BF16", "1" if torch.cuda.is_available() else "0")
    if value not in ("0", "1"):
        raise ValueError(f"NANOPOST_BF16 must be 0 or 1, got {value!r}")
    return value == "1"


def device() -> torch.device:
    """Where this process computes: its own GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def shard(model: M) -> M:
    """Move a model to `device()` and shard its parameters over all ranks, block by block, in place.

    Args:
        model: the same on every rank, decoder blocks in `model.model.layers`; those of METHODS that it has
            become ways to run it beside the forward pass. A parameter on the meta device has an attribute
            `read`, and `read(low, high)` are its rows low to high (nanopost/models/fill.py): each rank asks
            for its own, parameter by parameter in their order.
    Returns:
        The same model; sharded already, it stays as it is. Gradients after backward are sums over ranks.
        Outside a forward or backward pass and outside `gathered`, its parameters are DTensors: build the
        optimiser after this call.
    Every rank must run the same number of forward and backward passes, with or without supervised tokens.
    """
    blocks: list[Any] = list(model.model.layers)  # type: ignore[union-attr, arg-type]
    for block in blocks if _chosen["recompute"] else ():
        if "forward" not in vars(block):  # not yet: a policy and its critic may be one model
            block.forward = partial(_twice, block.forward)
    if isinstance(model, FSDPModule):
        return model
    if _chosen["mesh"] is None:
        return model.to(device())
    reads = {name: p.read for name, p in model.named_parameters() if p.is_meta}  # type: ignore[attr-defined]
    # Where products are in bfloat16, blocks are sent in it and their gradients summed in float32. The rest
    # stays float32: rows of the embedding begin the sums that run through all blocks.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        _place(block, half if bf16() else MixedPrecisionPolicy())
    _place(model, MixedPrecisionPolicy())
    _read(model, reads)
    for name in METHODS:
        if hasattr(model, name):
            setattr(model, name, _copied(getattr(model, name)))
            register_fsdp_forward_method(model, name)
    return model


@contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """Hold all weights on every rank while the block runs, so that forward passes need no other rank.

    Args:
        model: sharded by `shard`, or any model on one process. All ranks enter and leave together; inside,
            each may run as many forward passes as it likes, none included. No backward inside.
    Yields:
        The same model.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]  # the root first
    for module in units:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield model
    finally:
        for module in units:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def _place(module: Any, precision: MixedPrecisionPolicy) -> None:
    """Shard what of a module is not sharded yet, as one group whose weights are gathered together."""
    waiting = (
        CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if _chosen["offload"] else OffloadPolicy()
    )
    # The root frees its weights too: for one gather more, nothing stale can outlive an optimiser step.
    how: dict[str, Any] = {"reshard_after_forward": True, "mp_policy": precision, "offload_policy": waiting}
    fully_shard(module, mesh=_chosen["mesh"], **how)
    module.set_gradient_divide_factor(1.0)  # the setters are not recursive
    module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale inside a reduction


@torch.no_grad()
def _read(model: nn.Module, reads: dict[str, Callable[[int, int], torch.Tensor]]) -> None:
    """Memory, and this rank's rows, for the parameters that have no numbers yet."""
    where = torch.device("cpu") if _chosen["offload"] else device()
    model._apply(lambda x: torch.empty_like(x, device=where) if x.is_meta else x)
    parameters = dict(model.named_parameters())
    for name, read in reads.items():
        (low, high), *_ = shards.place_of(parameters[name])[0]
        shards.local(parameters[name]).copy_(read(low, high))


def _twice(forward: Callable[..., torch.Tensor], *given: Any) -> torch.Tensor:
    """A forward pass that keeps what it was given, and is computed again when its backward comes."""
    if not torch.is_grad_enabled():
        return forward(*given)
    return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=False)  # there is no dropout


def _copied(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """FSDP hangs its backward hook on the output, and a view could lose it: hand out a copy."""
    return lambda *args, **kwargs: method(*args, **kwargs).clone()
