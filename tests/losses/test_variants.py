"""The table of variants: each row's weights by hand, its refusals, its page and its comparison tool."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanopost.losses.compare import comparison, read_rollout, token_weights
from nanopost.losses.variants import (
    ROWS,
    VARIANTS,
    choose,
    clip_holds,
    policy_values,
    table,
    token_advantages,
)

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


@pytest.mark.parametrize("name", VARIANTS)
def test_a_completion_without_a_token_is_no_sample(name: str) -> None:
    """Nobody scored the second of eight: its group is one of three, and what is of a step has seven rows."""
    row, rollout = VARIANTS[name], on_policy()
    keys = ("rewards", "old_logps", "ref_logps", "mask", "values")
    columns = {key: torch.cat([rollout[key], rollout[key].flip(0)]) for key in keys}
    first, second, most = [0, 2, 3], [4, 5, 6, 7], [0, 2, 3, 4, 5, 6, 7]

    def advantages(places: list[int], size: int, **changes: Tensor) -> Tensor:
        *inputs, values = ({**columns, **changes}[key][places] for key in keys)
        return token_advantages(row, *inputs, group_size=size, values=values)

    rewards, mask = columns["rewards"].clone(), columns["mask"].clone()
    rewards[1], mask[1] = math.nan, False
    found = advantages([*range(8)], 4, rewards=rewards, mask=mask)
    expected = torch.cat([advantages(first, 3), advantages(second, 4)])
    if row.baseline in ("batch", "critic"):
        expected = advantages(most, 1)
    assert not found[1].any() and expected.abs().max() > 1e-2
    torch.testing.assert_close(found[most], expected, rtol=0.0, atol=1e-14)
    mask[[2, 3]] = False  # the first is alone now
    (alone,) = advantages([*range(4)], 4, rewards=rewards, mask=mask)[0, :1].tolist()
    if row.baseline in ("group_mean", "group_std", "leave_one_out"):
        assert alone == 0.0
    assert row.baseline != "none" or alone == REWARDS[0]


def test_choose_overrides_what_a_row_has_and_refuses_the_rest() -> None:
    row = choose("grpo", clip_low=0.1, clip_high=None, beta=0.0)
    assert (row.clip_low, row.clip_high, row.beta) == (0.1, 0.2, 0.0)
    with pytest.raises(ValueError, match=r"loss must be one of 'reinforce', .*, got 'trpo'"):
        choose("trpo")
    with pytest.raises(ValueError, match=r"beta must not be given: dapo has no such term, got 0.1"):
        choose("dapo", beta=0.1)
    with pytest.raises(ValueError, match=r"clip_low must not be given: reinforce has no such term, got 0.0"):
        choose("reinforce", clip_low=0.0)
    assert choose("dapo", beta=0.0) == VARIANTS["dapo"]
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
    assert re.findall(r"^ *(?:import|from) .*$", block, flags=re.MULTILINE) == ["import math"]
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


def drop(rollout: dict, key: str) -> None:
    del rollout[key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: drop(r, "max_tokens"), "max_tokens must be a whole number of at least 1, got None$"),
        (lambda r: r.update(group_size=0), "group_size must be a whole number of at least 1, got 0$"),
        (lambda r: r.update(group_size=3), "group_size 3 must divide 4 samples$"),
        (
            lambda r: r.update(samples=[]),
            "a rollout is an object with group_size, max_tokens and a list of s",
        ),
        (lambda r: r["samples"].append(7), "group_size 4 must divide 5 samples$"),
        (lambda r: r["samples"].__setitem__(1, 7), r"samples\[1\]: tokens must be a list .*, got None$"),
        (
            lambda r: r["samples"][1].update(tokens=["a", 2]),
            r"samples\[1\]: tokens must be .*, got \['a', 2\]$",
        ),
        (
            lambda r: r["samples"][1].update(logps=[-0.1]),
            r"samples\[1\]: logps must hold 2 num.* got \[-0.1\]$",
        ),
        (lambda r: drop(r["samples"][1], "ref_logps"), r"samples\[1\]: ref_logps must hold 2 .* got None$"),
        (lambda r: drop(r["samples"][1], "values"), r"samples\[1\]: values must hold 2 number.* got None$"),
        (
            lambda r: r["samples"][1]["old_logps"].__setitem__(1, "x"),
            "old_logps must hold finite .* got 'x'$",
        ),
        (
            lambda r: r["samples"][1]["logps"].__setitem__(0, float("nan")),
            "logps must hold finite .* got nan$",
        ),
        (lambda r: r["samples"][1]["logps"].__setitem__(0, 0.5), r"logps must be ≤ 0, got 0.5$"),
        (lambda r: r["samples"][1].update(mask=[1, 0.5]), r"samples\[1\]: mask must be 0 or 1, got 0.5$"),
        (lambda r: r["samples"][1].update(trace="yes"), r"samples\[1\]: trace must be true or .* 'yes'$"),
        (
            lambda r: r["samples"][1].update(reward="good"),
            r"samples\[1\]: reward must hold finite .* 'good'$",
        ),
    ],
)
def test_a_bad_rollout_is_named(change: Callable[[dict], None], message: str, tmp_path: Path) -> None:
    rollout = json.loads(ROLLOUT.read_text(encoding="utf-8"))
    change(rollout)
    path = tmp_path / "rollout.json"
    path.write_text(json.dumps(rollout), encoding="utf-8")
    with pytest.raises(ValueError, match=f"rollout.json: .*{message}|rollout.json: {message}"):
        read_rollout(path)


@pytest.mark.parametrize("text", ["[1]", "{", "7"])
def test_a_file_that_is_no_rollout_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rollout.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"rollout.json(:1: not JSON|: a rollout is an object)"):
        read_rollout(path)


def test_what_the_mask_leaves_out_has_no_weight_and_gives_none() -> None:
    """Other log-probs and values in the masked slots: the same weights, to the bit."""
    rollout, other = read_rollout(ROLLOUT), read_rollout(ROLLOUT)
    for masked in (rollout, other):
        masked["mask"][2, 3:5] = 0.0
    for name in ("logps", "old_logps", "ref_logps", "values"):
        other[name][2, 3:5] = torch.tensor([math.nan, -7.0], dtype=torch.float64)
    for row in ROWS:
        weights = token_weights(row, rollout)
        assert not weights[2, 3:5].any() and weights[2, :3].any() == (row.name != "reinforce")
        assert torch.equal(weights, token_weights(row, other)), row.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "mean"}, "baseline must be one of 'none', .*, got 'mean'"),
        ({"ratio": "word"}, "ratio must be one of 'token', 'sequence', got 'word'"),
        ({"surrogate": "wieght"}, "surrogate must be one of 'log_prob', .*, got 'wieght'"),
        ({"aggregation": "mean"}, "aggregation must be one of .*, got 'mean'"),
        ({"kl": "lose"}, "kl must be one of 'none', 'loss', 'reward', got 'lose'"),
        ({"clip_low": 0.0}, r"clip_low must lie in \(0.0, 1.0\], got 0.0"),
        ({"clip_high": -0.1}, r"clip_high must lie in \(0.0, inf\], got -0.1"),
        ({"beta": -0.1}, r"beta must lie in \[0, inf\), got -0.1"),
        ({"beta": math.nan}, r"beta must lie in \[0, inf\), got nan"),
    ],
)
def test_a_row_that_is_none_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(VARIANTS["grpo"], **change)


def test_tensors_that_would_broadcast_are_refused() -> None:
    rollout, row = on_policy(), VARIANTS["luffy"]
    with pytest.raises(ValueError, match=r"rewards \(3,\), rows \(4,\)"):
        token_weights(row, rollout | {"rewards": rollout["rewards"][:3]})
    with pytest.raises(ValueError, match=r"traces \(1,\), rows \(4,\)"):
        token_weights(row, rollout | {"traces": rollout["traces"][:1]})
    with pytest.raises(ValueError, match=r"mask must have 2 dimension\(s\), got shape \(3,\)"):
        token_weights(row, rollout | {"mask": rollout["mask"][0]})


def test_the_clip_holds_where_the_gradient_is_cut() -> None:
    """Signs and sides for the pessimistic clip, either side for CISPO's weight."""
    ratio = torch.tensor([[0.5, 0.9, 1.1, 1.5], [0.5, 0.9, 1.1, 1.5]])
    advantages = torch.tensor([[1.0] * 4, [-1.0] * 4])
    held = clip_holds(VARIANTS["grpo"], ratio, advantages)
    assert held.tolist() == [[False, False, False, True], [True, False, False, False]]
    weight = replace(VARIANTS["cispo"], clip_low=0.2, clip_high=0.3)
    assert clip_holds(weight, ratio, advantages).tolist() == [[True, False, False, True]] * 2
    assert not clip_holds(VARIANTS["rloo"], ratio, advantages).any()


def test_kl_where_a_row_has_none_is_not_read() -> None:
    rollout = on_policy()
    logps, mask = rollout["logps"], rollout["mask"]
    nothing = torch.full_like(logps, math.nan)
    for row in (row for row in ROWS if row.kl == "none"):
        advantages = token_advantages(row, rollout["rewards"], logps, nothing, mask, group_size=4)
        assert advantages.isfinite().all()
        assert policy_values(row, logps, logps, nothing, advantages, mask)[mask].isfinite().all()
