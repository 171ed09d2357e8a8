"""The table of variants: each row's weights by hand, its refusals, its page and its comparison tool."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanopost.losses.compare import comparison, read_rollout, token_weights
from nanopost.losses.variants import ROWS, VARIANTS, choose, policy_values, table, token_advantages

ROOT = Path(__file__).parents[2]
ROLLOUT = ROOT / "docs" / "rollout.json"
PAGE = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")

LENGTHS, REWARDS, MOST = (1, 3, 2, 3), (1.0, 0.0, 0.25, 0.5), 5
TOKENS, MEAN = sum(LENGTHS), sum(REWARDS) / 4
SPREAD = math.sqrt(sum((r - MEAN) ** 2 for r in REWARDS) / 3) + 1e-4
LOGPS = ((-0.5,), (-0.1, -1.2, -0.7), (-2.0, -0.3), (-0.4, -0.9, -0.2))
K1 = ((0.3,), (-0.2, 0.4, 0.1), (0.0, 0.25), (-0.6, 0.2, 0.15))  # log π − log π_ref
VALUES = ((0.5,), (0.4, 0.2, 0.1), (0.3, 0.2), (0.5, 0.6, 0.7))


def padded(rows: tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.tensor([[*row, *[math.nan] * (3 - len(row))] for row in rows], dtype=torch.float64)


def on_policy() -> dict:
    """One group of four ragged completions, scored by the policy that sampled them; padding is NaN."""
    logps, mask = padded(LOGPS), ~padded(LOGPS).isnan()
    return {
        "group_size": 4,
        "max_tokens": MOST,
        "rewards": torch.tensor(REWARDS, dtype=torch.float64),
        "logps": logps,
        "old_logps": logps,
        "ref_logps": logps - padded(K1),
        "values": padded(VALUES),
        "mask": mask,
        "traces": torch.tensor([False, False, True, False]),
        "tokens": [["x"] * length for length in LENGTHS],
    }


def whitened(rows: list[list[float]]) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1) + 1e-8)
    return [[(x - mean) / deviation for x in row] for row in rows]


def to_go(row: int, beta: float) -> list[float]:
    return [REWARDS[row] - beta * sum(K1[row][t:]) for t in range(LENGTHS[row])]


def gae_of(row: int, beta: float) -> list[float]:
    found, following, advantage = [], 0.0, 0.0
    for t in reversed(range(LENGTHS[row])):
        reward = -beta * K1[row][t] + (REWARDS[row] if t == LENGTHS[row] - 1 else 0.0)
        advantage = reward + following - VALUES[row][t] + 0.95 * advantage
        following = VALUES[row][t]
        found.append(advantage)
    return found[::-1]


def shaped(logp: float) -> float:
    return math.exp(logp) * 0.1 / (math.exp(logp) + 0.1) ** 2  # π · f′(π)


def each(weight) -> list[list[float]]:
    return [[weight(i, t) for t in range(length)] for i, length in enumerate(LENGTHS)]


def left_out(i: int) -> float:
    """RLOO with the KL in the reward: each completion's own, then against the mean of the others."""
    returns = [REWARDS[j] - 0.05 * sum(K1[j]) for j in range(4)]
    return returns[i] - (sum(returns) - returns[i]) / 3


# −∂L/∂ℓ of each token, on policy, from the papers.
BY_HAND = {
    "reinforce": each(lambda i, t: REWARDS[i] / 4),
    "rloo": each(lambda i, t: left_out(i) / 4),
    "reinforce++": [[a / TOKENS for a in row] for row in whitened([to_go(i, 0.01) for i in range(4)])],
    "ppo": [[a / TOKENS for a in gae_of(i, 0.02)] for i in range(4)],
    "grpo": each(
        lambda i, t: ((REWARDS[i] - MEAN) / SPREAD - 0.04 * (1 - math.exp(-K1[i][t]))) / (LENGTHS[i] * 4)
    ),
    "dr_grpo": each(lambda i, t: (REWARDS[i] - MEAN) / (4 * MOST)),
    "dapo": each(lambda i, t: (REWARDS[i] - MEAN) / SPREAD / TOKENS),
    "gspo": each(lambda i, t: (REWARDS[i] - MEAN) / SPREAD / (LENGTHS[i] * 4)),
    "cispo": each(lambda i, t: (REWARDS[i] - MEAN) / SPREAD / TOKENS),
    "luffy": each(lambda i, t: (REWARDS[i] - MEAN) * (shaped(LOGPS[i][t]) if i == 2 else 1.0) / (4 * MOST)),
    "nanopost": each(lambda i, t: (REWARDS[i] - MEAN) / TOKENS),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_of_a_row_are_those_of_its_paper(name: str) -> None:
    weights, mask = token_weights(VARIANTS[name], on_policy()), on_policy()["mask"]
    expected = torch.tensor([x for row in BY_HAND[name] for x in row], dtype=torch.float64)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(weights[mask], expected, rtol=1e-12, atol=1e-14)
    assert not weights[~mask].any()


def test_no_two_rows_are_the_same() -> None:
    """Off policy, where a clip and a weight differ."""
    rollout = on_policy()
    shift = torch.tensor([0.5, -0.5, 0.1, 0.25], dtype=torch.float64)[:, None]
    rollout["old_logps"] = rollout["logps"] - shift
    weights = [token_weights(row, rollout)[rollout["mask"]] for row in ROWS]
    for i, one in enumerate(weights):
        assert all((one - other).abs().max() > 1e-4 for other in weights[:i]), ROWS[i].name


def test_advantages_are_detached_and_zero_outside_the_mask() -> None:
    rollout = on_policy()
    mask = rollout["mask"]
    for row in ROWS:
        rewards = rollout["rewards"].clone().requires_grad_()
        old_logps = rollout["old_logps"].clone().requires_grad_()
        inputs = (rewards, old_logps, rollout["ref_logps"], mask)
        advantages = token_advantages(row, *inputs, group_size=4, values=rollout["values"])
        assert not advantages.requires_grad and advantages[mask].isfinite().all(), row.name
        assert not advantages[~mask].any(), row.name


def test_choose_overrides_what_a_row_has_and_refuses_the_rest() -> None:
    row = choose("grpo", clip_low=0.1, clip_high=None, beta=0.0)
    assert (row.clip_low, row.clip_high, row.beta) == (0.1, 0.2, 0.0)
    with pytest.raises(ValueError, match=r"loss must be one of 'reinforce', .*, got 'trpo'"):
        choose("trpo")
    with pytest.raises(ValueError, match=r"beta must not be given: dapo has no such term, got 0.1"):
        choose("dapo", beta=0.1)
    with pytest.raises(ValueError, match=r"clip_high must not be given: rloo has no such term, got 0.2"):
        choose("rloo", clip_high=0.2)


def test_ppo_needs_its_critic() -> None:
    rollout = on_policy() | {"values": None}
    with pytest.raises(ValueError, match=r"values must be given: the baseline of ppo is a critic, got None"):
        token_weights(VARIANTS["ppo"], rollout)
    assert "ppo: values must be given" in comparison(rollout)


def test_the_page_and_the_table_are_the_same() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(compile(block, "docs/variants.md", "exec"), names)
    assert list(names["TABLE"]) == list(VARIANTS)
    for row in ROWS:
        knobs = (row.baseline, row.ratio, row.surrogate, row.clip_low, row.clip_high, row.aggregation)
        assert names["TABLE"][row.name] == (*knobs, row.kl, row.beta)


def test_page_shows_the_table_and_the_comparison() -> None:
    assert table() in PAGE
    command = [sys.executable, "-m", "nanopost.losses.variants", "--compare", "docs/rollout.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (shown,) = re.findall(r"^\$ python -m [^\n]*\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert shown.strip() == done.stdout.strip()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": None}, "a rollout needs group_size, max_tokens and samples"),
        ({"samples": []}, "a rollout needs group_size, max_tokens and samples"),
        ({"logps": [-0.1]}, r"samples\[1\]: logps must hold 2 number\(s\), one a token, got \[-0.1\]"),
        ({"ref_logps": None}, r"samples\[1\]: ref_logps must hold 2 number\(s\), one a token, got None"),
        ({"old_logps": [-0.1, "x"]}, r"samples\[1\]: old_logps must hold numbers, got 'x'"),
        ({"reward": "good"}, r"samples\[1\]: reward must hold numbers, got 'good'"),
        ({"tokens": []}, r"samples\[1\]: tokens must be a list of at least one string, got \[\]"),
        ({"values": None}, r"samples\[1\]: values must hold 2 number\(s\), one a token, got None"),
    ],
)
def test_a_bad_rollout_is_named(change: dict, message: str, tmp_path: Path) -> None:
    rollout = json.loads(ROLLOUT.read_text(encoding="utf-8"))
    ((key, value),) = change.items()
    place = rollout if key in rollout else rollout["samples"][1]
    place.pop(key) if value is None else place.update(change)
    path = tmp_path / "rollout.json"
    path.write_text(json.dumps(rollout), encoding="utf-8")
    with pytest.raises(ValueError, match=f"rollout.json: {message}"):
        read_rollout(path)


def test_a_mask_leaves_tokens_out() -> None:
    rollout = read_rollout(ROLLOUT)
    rollout["mask"][2, 3:5] = 0.0
    for row in ROWS:
        weights = token_weights(row, rollout)
        assert not weights[2, 3:5].any() and torch.equal(weights, token_weights(row, rollout))


def test_kl_where_a_row_has_none_is_not_read() -> None:
    rollout = on_policy()
    logps, mask = rollout["logps"], rollout["mask"]
    nothing = torch.full_like(logps, math.nan)
    for row in (row for row in ROWS if row.kl == "none"):
        advantages = token_advantages(row, rollout["rewards"], logps, nothing, mask, group_size=4)
        assert advantages.isfinite().all()
        assert policy_values(row, logps, logps, nothing, advantages, mask)[mask].isfinite().all()
