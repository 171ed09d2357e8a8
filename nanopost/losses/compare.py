"""How each variant weighs each token of one rollout: python -m nanopost.losses.variants --compare FILE."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .checks import check_count
from .reduce import aggregate, local_denom
from .variants import ROWS, Variant, policy_values, token_advantages


def read_rollout(path: Path) -> dict[str, Any]:
    """A rollout file: group_size, max_tokens, and samples with their reward and three policies' log-probs.

    A sample's keys: tokens (strings), reward, logps, old_logps, ref_logps; optional mask (default: every
    token), values (of a critic; all samples or none), trace (true: no policy of ours sampled it).
    Returns: its numbers, tokens, and tensors: rewards and traces (N,), the per-token ones (N, T).
    Raises: ValueError naming file, sample and key.
    """
    data = _read(path)
    samples = [(f"{path}: samples[{i}]", row) for i, row in enumerate(data["samples"])]
    tokens = [_tokens(row, where) for where, row in samples]
    names = ["logps", "old_logps", "ref_logps", "mask", *(["values"] if "values" in samples[0][1] else [])]
    rows = {name: [_numbers(row, name, where) for where, row in samples] for name in names}
    rewards = torch.cat([_numbers(row, "reward", where) for where, row in samples])
    traces = torch.tensor([_flag(row, "trace", where) for where, row in samples])
    padded = {name: pad_sequence(values, batch_first=True) for name, values in rows.items()}
    return data | padded | {"rewards": rewards, "traces": traces, "tokens": tokens}


def _read(path: Path) -> dict[str, Any]:
    """The file's object, its two numbers and its list of samples checked."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(data, dict) or not isinstance(data.get("samples"), list) or not data["samples"]:
        raise ValueError(f"{path}: a rollout is an object with group_size, max_tokens and a list of samples")
    for name in ("group_size", "max_tokens"):
        number: Any = data.get(name)
        try:
            check_count(name, number, 1)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if (count := len(data["samples"])) % data["group_size"]:
        raise ValueError(f"{path}: group_size {data['group_size']} must divide {count} samples")
    return data


def _tokens(sample: Any, where: str) -> list[str]:
    tokens = sample.get("tokens") if isinstance(sample, dict) else None
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{where}: tokens must be a list of at least one string, got {tokens!r}")
    return tokens


def _flag(sample: dict[str, Any], name: str, where: str) -> bool:
    if not isinstance(flag := sample.get(name, False), bool):
        raise ValueError(f"{where}: {name} must be true or false, got {flag!r}")
    return flag


def _numbers(sample: dict[str, Any], name: str, where: str) -> Tensor:
    """A sample's numbers under a key, (T,), or (1,) for the reward."""
    count = 1 if name == "reward" else len(sample["tokens"])
    numbers = sample.get(name, [1.0] * count if name == "mask" else None)
    numbers = [numbers] if name == "reward" else numbers
    if not isinstance(numbers, list) or len(numbers) != count:
        raise ValueError(f"{where}: {name} must hold {count} number(s), one a token, got {numbers!r}")
    for x in numbers:
        if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
            raise ValueError(f"{where}: {name} must hold finite numbers, got {x!r}")
        if (name.endswith("logps") and x > 0) or (name == "mask" and x not in (0, 1)):
            raise ValueError(f"{where}: {name} must be {'0 or 1' if name == 'mask' else '≤ 0'}, got {x!r}")
    return torch.tensor(numbers, dtype=torch.float64)


def token_weights(variant: Variant, rollout: dict[str, Any]) -> Tensor:
    """−∂L/∂ℓ_t of a row's loss over a whole rollout, (N, T): how hard each token is pushed up."""
    logps, mask = rollout["logps"].clone().requires_grad_(), rollout["mask"]
    old_logps, ref_logps = rollout["old_logps"], rollout["ref_logps"]
    options = {"group_size": rollout["group_size"], "values": rollout.get("values")}
    advantages = token_advantages(variant, rollout["rewards"], old_logps, ref_logps, mask, **options)
    traces = rollout["traces"]
    values = policy_values(variant, logps, old_logps, ref_logps, advantages, mask, traces=traces)
    denom = local_denom(mask, mode=variant.aggregation, max_tokens=rollout["max_tokens"])
    loss = aggregate(values, mask, mode=variant.aggregation, denom=denom)
    return -torch.autograd.grad(loss, logps)[0]


def comparison(rollout: dict[str, Any]) -> str:
    """For each sample its tokens, and under each variant how hard each is pushed up (+) or down (−)."""
    columns: dict[str, Tensor] = {}
    refusals = []
    for row in ROWS:
        try:
            columns[row.name] = token_weights(row, rollout)
        except ValueError as error:
            refusals.append(f"{row.name}: {error}")
    lines = []
    head = " " * 14 + "".join(f"{name:>{max(8, len(name) + 1)}}" for name in columns)
    for number, tokens in enumerate(rollout["tokens"]):
        lines += [f"sample {number}, reward {rollout['rewards'][number]:g}", head]
        for place, token in enumerate(tokens):
            lines.append(_line(token.replace("\n", "\\n"), {n: w[number, place] for n, w in columns.items()}))
        lines.append(_line("Σ |weight|", {n: w[number].abs().sum() for n, w in columns.items()}) + "\n")
    return "\n".join([*lines, *refusals])


def _line(label: str, cells: dict[str, Tensor]) -> str:
    shown = {name: round(float(number), 3) + 0.0 for name, number in cells.items()}  # no −0.000
    return f"{label[:13]:14}" + "".join(f"{x:>{max(8, len(name) + 1)}.3f}" for name, x in shown.items())
