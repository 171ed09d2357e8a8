"""This project's own functions, in float64: they must agree on every case of every file."""

import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import nanopost
from nanopost import losses
from nanopost.data import chat
from nanopost.data.schema import Message, Record
from nanopost.evals import accuracy
from nanopost.losses.variants import VARIANTS, policy_values, token_advantages
from nanopost.models import adapters, lora, quant

FRAMEWORK = "nanopost"
VERSION = nanopost.__version__

# Functions of several outputs, and what the vectors call them.
OUTPUTS = {
    "gae": ("advantages", "returns"),
    "calibration": ("counts", "wins", "expected"),
    "quantize_scales": ("codes", "seconds", "mean"),
}


def tensor(array: Any) -> Tensor:
    """The input as a tensor, floats as leaves that ask for a gradient."""
    found = torch.as_tensor(np.asarray(array))
    return found.double().requires_grad_() if found.is_floating_point() else found


def offer(name: str, module: Any = losses) -> Callable[..., dict[str, Any]]:
    """The function of this name as an adapter's: tensors in the order of its signature, numbers by name."""
    function = getattr(module, name)
    order = [p.name for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY]

    def adapted(inputs: dict[str, Any], arguments: dict[str, Any], upstream: Any) -> dict[str, Any]:
        tensors = {key: tensor(array) for key, array in inputs.items()}
        values = function(*(tensors[key] for key in order if key in tensors), **arguments)
        if name in OUTPUTS:
            return {"values": {key: v.detach().numpy() for key, v in zip(OUTPUTS[name], values, strict=True)}}
        if upstream is None:
            return {"values": np.asarray(values)}
        weight = torch.as_tensor(upstream)
        scalar = (weight * values.masked_fill(weight == 0, 0.0)).sum()
        scalar.backward()
        leaves = {key: leaf for key, leaf in tensors.items() if leaf.requires_grad}
        gradients = {
            key: (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).numpy()
            for key, leaf in leaves.items()
        }
        return {"values": values.detach().numpy(), "scalar": scalar.item(), "gradients": gradients}

    return adapted


for _name in losses.__all__:
    globals()[_name] = offer(_name)

lora_weight = offer("lora_weight", lora)
lora_forward = offer("lora_forward", lora)
mixed_lora_forward = offer("mixed_lora_forward", adapters)
quantize_scales = offer("quantize_scales", quant)


def pass_at_k(inputs: dict[str, Any], arguments: dict[str, Any], upstream: Any) -> dict[str, Any]:
    return {"values": accuracy.pass_at_k(arguments["samples"], arguments["correct"], k=arguments["k"])}


def variants(inputs: dict[str, Any], arguments: dict[str, Any], upstream: Any) -> dict[str, Any]:
    """A row of the table over a whole step: advantages, per-token losses, one number."""
    row, mode = VARIANTS[arguments["variant"]], VARIANTS[arguments["variant"]].aggregation
    x = {key: tensor(array) for key, array in inputs.items()}
    logps, old_logps, ref_logps, mask = (x[key] for key in ("logps", "old_logps", "ref_logps", "mask"))
    options = {"group_size": arguments["group_size"], "values": x["values"]}
    advantages = token_advantages(row, x["rewards"], old_logps, ref_logps, mask, **options)
    terms = policy_values(row, logps, old_logps, ref_logps, advantages, mask, traces=x["traces"])
    denom = losses.local_denom(mask, mode=mode, max_tokens=arguments["max_tokens"])
    loss = losses.aggregate(terms, mask, mode=mode, denom=denom)
    scalar = float(upstream) * loss
    scalar.backward()
    gradients = {"logps": logps.grad.numpy()}
    return {"values": loss.detach().numpy(), "scalar": scalar.item(), "gradients": gradients}


def quantize_nf4(inputs: dict[str, Any], arguments: dict[str, Any], upstream: Any) -> dict[str, Any]:
    """A code a weight, as the vectors have them; in memory two share a byte."""
    weight = tensor(inputs["weight"])
    codes, scales = quant.quantize_nf4(weight, **arguments)
    codes = quant.unpack_nf4(codes, weight.numel()).reshape(weight.shape)
    return {"values": {"codes": codes.numpy(), "scales": scales.numpy()}}


def dequantize_nf4(inputs: dict[str, Any], arguments: dict[str, Any], upstream: Any) -> dict[str, Any]:
    codes, scales = tensor(inputs["codes"]), tensor(inputs["scales"]).detach()
    packed = quant.pack_nf4(codes.flatten())
    return {"values": quant.dequantize_nf4(packed, scales, shape=tuple(codes.shape), **arguments).numpy()}


def route(inputs: dict[str, Any], arguments: dict[str, Any], upstream: Any) -> dict[str, Any]:
    table = {(tenant, version): int(adapter) for tenant, version, adapter in inputs["table"]}
    return {"values": adapters.route(table, arguments["tenant"], arguments["version"])}


# ---- chat

SPECIAL = ["<|im_start|>", "<|im_end|>"]


def model_folder(template: str) -> chat.Chat:
    """A chat with this template and a tokenizer of single bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    with tempfile.TemporaryDirectory() as folder:
        return chat.write_chat(folder, tokenizer, template, eos_token="<|im_end|>")


def messages_of(inputs: dict[str, Any]) -> tuple[Message, ...]:
    return tuple(Message(**m | {"tool_calls": tuple(m.get("tool_calls", ()))}) for m in inputs["messages"])


def render(inputs: dict[str, Any], arguments: dict[str, Any], upstream: Any) -> dict[str, Any]:
    return {"values": chat.render(model_folder(inputs["template"]), messages_of(inputs), **arguments)}


def record_samples(inputs: dict[str, Any], arguments: dict[str, Any], upstream: Any) -> dict[str, Any]:
    model = model_folder(inputs["template"])
    record = Record(messages_of(inputs), None, None, {}, "vectors", 1, arguments["context"])
    parts: dict[str, list[str]] = {"shown": [], "emitted": []}
    for sample in chat.record_samples(model, record):
        for name, trained in (("shown", False), ("emitted", True)):
            ids = [i for i, m in zip(sample.ids, sample.mask, strict=True) if m == trained]
            parts[name].append(model.tokenizer.decode(ids, skip_special_tokens=False))
    return {"values": parts}
