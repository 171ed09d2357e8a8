"""The door of the losses: numbers that are none, dtypes that do not fit, and what a masked slot may hold."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanopost import losses
from nanopost.losses import checks
from tests.properties import slope

B, GRID, MASK = torch.full((2,), -0.5), torch.full((2, 3), -0.5), torch.ones(2, 3)
IDS = torch.zeros(2, 3, dtype=torch.long)
CUBE = torch.zeros(2, 3, 4)
FOUR = (B, B, B, B)


def clipped(**numbers: Any) -> Tensor:
    return losses.clipped_surrogate_loss(MASK, GRID, **({"clip_low": 0.2, "clip_high": 0.3} | numbers))


def rated(**numbers: Any) -> Tensor:
    return losses.kto_loss(B, B, torch.ones(2), torch.tensor(0.1), **({"beta": 0.1} | numbers))


NUMBERS: dict[str, Callable[[Any], object]] = {  # argument of function: a call with that number
    "temperature of token_logps": lambda x: losses.token_logps(CUBE, IDS, temperature=x),
    "top_p of token_logps": lambda x: losses.token_logps(CUBE, IDS, top_p=x),
    "temperature of entropy": lambda x: losses.entropy(CUBE, temperature=x),
    "temperature of forward_kl": lambda x: losses.forward_kl(CUBE, CUBE, temperature=x),
    "beta of generalized_jsd": lambda x: losses.generalized_jsd(CUBE, CUBE, beta=x),
    "denom of aggregate": lambda x: losses.aggregate(GRID, MASK, mode="token_mean", denom=x),
    "clip_low of clipped_surrogate_loss": lambda x: clipped(clip_low=x),
    "clip_high of clipped_surrogate_loss": lambda x: clipped(clip_high=x),
    "high of importance_weights": lambda x: losses.importance_weights(MASK, mode="mask", high=x),
    "low of importance_weights": lambda x: losses.importance_weights(MASK, mode="mask", high=2.0, low=x),
    "shaping_gamma of off_policy_shaped_loss": lambda x: losses.off_policy_shaped_loss(
        GRID, GRID, shaping_gamma=x
    ),
    "beta of dpo_loss": lambda x: losses.dpo_loss(*FOUR, beta=x),
    "label_smoothing of dpo_loss": lambda x: losses.dpo_loss(*FOUR, beta=0.1, label_smoothing=x),
    "desirable_weight of kto_loss": lambda x: rated(desirable_weight=x),
    "odds_weight of orpo_loss": lambda x: losses.orpo_loss(B, B, odds_weight=x),
    "margin of simpo_loss": lambda x: losses.simpo_loss(B, B, beta=1.0, margin=x),
    "margin of bradley_terry_loss": lambda x: losses.bradley_terry_loss(B, B, margin=x),
    "beta of kl_shaped_rewards": lambda x: losses.kl_shaped_rewards(B, GRID, GRID, MASK, beta=x),
    "gamma of reward_to_go": lambda x: losses.reward_to_go(GRID, MASK, gamma=x),
    "gae_lambda of gae": lambda x: losses.gae(GRID, GRID, MASK, gamma=1.0, gae_lambda=x),
    "clip of value_loss": lambda x: losses.value_loss(GRID, GRID, GRID, clip=x),
    "eps of whiten": lambda x: losses.whiten(GRID, MASK, eps=x),
    "eps of group_advantages": lambda x: losses.group_advantages(B, group_size=2, scale="std", eps=x),
}
OPTIONAL = {"clip of value_loss"}  # None has a meaning


@pytest.mark.parametrize("value", [True, "0.5", None, torch.tensor(0.5), 0.5 + 0j])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_an_int_or_a_float(name: str, value: object) -> None:
    if value is None and name in OPTIONAL:
        return
    message = f"{name.split()[0]} must be a number (int or float), got {value!r}"
    with pytest.raises(ValueError) as error:
        NUMBERS[name](value)
    assert str(error.value) == message


TENSORS: dict[str, Callable[[Tensor], object]] = {  # argument of function: a call with ones of a dtype there
    "logits of token_logps": lambda x: losses.token_logps(x.expand(2, 3, 4), IDS),
    "logits of truncate_logits": lambda x: losses.truncate_logits(x.expand(2, 3, 4), top_k=2, top_p=1.0),
    "logits of entropy": lambda x: losses.entropy(x.expand(2, 3, 4)),
    "logps of kl_estimate": lambda x: losses.kl_estimate(x.expand(2, 3), GRID, kind="k3"),
    "ref_logps of kl_estimate": lambda x: losses.kl_estimate(GRID, x.expand(2, 3), kind="k1"),
    "values of value_loss": lambda x: losses.value_loss(x.expand(2, 3), GRID, GRID, clip=None),
    "old_values of value_loss": lambda x: losses.value_loss(GRID, x.expand(2, 3), GRID, clip=0.2),
    "returns of value_loss": lambda x: losses.value_loss(GRID, GRID, x.expand(2, 3), clip=0.2),
    "values of aggregate": lambda x: losses.aggregate(x.expand(2, 3), MASK, mode="token_mean", denom=1),
    "advantages of reinforce_loss": lambda x: losses.reinforce_loss(GRID, x.expand(2, 3)),
    "advantages of clipped_surrogate_loss": lambda x: losses.clipped_surrogate_loss(
        MASK, x.expand(2, 3), clip_low=0.2, clip_high=0.2
    ),
    "advantages of cispo_loss": lambda x: losses.cispo_loss(
        GRID, MASK, x.expand(2, 3), clip_low=0.2, clip_high=0.2
    ),
    "advantages of off_policy_shaped_loss": lambda x: losses.off_policy_shaped_loss(GRID, x.expand(2, 3)),
    "advantages of whiten": lambda x: losses.whiten(x.expand(2, 3), MASK),
    "logps of kl_shaped_rewards": lambda x: losses.kl_shaped_rewards(B, x.expand(2, 3), GRID, MASK, beta=0.1),
    "ref_logps of kl_shaped_rewards": lambda x: losses.kl_shaped_rewards(
        B, GRID, x.expand(2, 3), MASK, beta=0.1
    ),
    "values of gae": lambda x: losses.gae(GRID, x.expand(2, 3), MASK, gamma=1.0, gae_lambda=1.0),
    "logps of sft_loss": lambda x: losses.sft_loss(x.expand(2, 3)),
    "kl of kto_loss": lambda x: losses.kto_loss(B, B, torch.ones(2), x, beta=0.1),
    "student_logits of top_k_forward_kl": lambda x: losses.top_k_forward_kl(
        x.expand(2, 3, 4), CUBE[..., :1], IDS.unsqueeze(-1)
    ),
    "teacher_logps of top_k_forward_kl": lambda x: losses.top_k_forward_kl(
        CUBE, x.expand(2, 3, 1), IDS.unsqueeze(-1)
    ),
    "student_hidden of hidden_state_loss": lambda x: losses.hidden_state_loss(
        x.expand(2, 3, 4), CUBE, torch.eye(4)
    ),
    "teacher_hidden of hidden_state_loss": lambda x: losses.hidden_state_loss(
        CUBE, x.expand(2, 3, 4), torch.eye(4)
    ),
    "projection of hidden_state_loss": lambda x: losses.hidden_state_loss(CUBE, CUBE, x.expand(4, 4)),
}
SCORES: dict[str, Callable[[Tensor], object]] = {  # integers are welcome
    "rewards of group_advantages": lambda x: losses.group_advantages(x.expand(2), group_size=2, scale="none"),
    "rewards of leave_one_out_advantages": lambda x: losses.leave_one_out_advantages(
        x.expand(2), group_size=2
    ),
    "rewards of informative_groups": lambda x: losses.informative_groups(x.expand(2), group_size=2),
    "rewards of kl_shaped_rewards": lambda x: losses.kl_shaped_rewards(
        x.expand(2), GRID, GRID, MASK, beta=0.1
    ),
    "rewards of reward_to_go": lambda x: losses.reward_to_go(x.expand(2, 3), MASK, gamma=1.0),
    "rewards of gae": lambda x: losses.gae(x.expand(2, 3), GRID, MASK, gamma=1.0, gae_lambda=1.0),
    "ratings of attribute_loss": lambda x: losses.attribute_loss(GRID, x.expand(2, 3), MASK),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", [*TENSORS, *SCORES])
def test_a_dtype_that_does_not_fit_is_refused(name: str, dtype: torch.dtype) -> None:
    ones = torch.tensor(1, dtype=dtype)
    if name in SCORES and dtype == torch.int64:
        SCORES[name](ones)
        return
    kinds = "floating point or integers" if name in SCORES else "floating point"
    with pytest.raises(ValueError) as error:
        (TENSORS | SCORES)[name](ones)
    assert str(error.value) == f"{name.split()[0]} must be {kinds}, got {dtype}"


def test_a_number_is_no_tensor() -> None:
    with pytest.raises(ValueError, match=r"kl must be a tensor of 0 dimension\(s\), got 0.3"):
        losses.kto_loss(B, B, torch.ones(2), 0.3, beta=0.1)  # type: ignore[arg-type]


HUGE = [3e38, -3e38, 2e38, 1e19, math.inf, -math.inf, math.nan]
SQUARES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # loss of one input, its slope at ½
    "value_loss": (lambda x: losses.value_loss(x, torch.zeros_like(x), torch.zeros_like(x), clip=None), 0.5),
    "value_loss, clipped": (
        lambda x: losses.value_loss(x, x.detach(), torch.zeros_like(x), clip=0.1),
        0.5,
    ),
    "k2": (lambda x: losses.kl_estimate(x, torch.zeros_like(x), kind="k2"), 0.5),
    "ipo_loss": (lambda x: losses.ipo_loss(x, *[torch.zeros_like(x)] * 3, beta=1.0), 0.0),
    "hidden_state_loss": (
        lambda x: losses.hidden_state_loss(x[:, None], torch.zeros(2, 1), torch.eye(1)),
        1.0,
    ),
}


@pytest.mark.parametrize("junk", HUGE)
@pytest.mark.parametrize("name", SQUARES)
def test_a_masked_square_that_overflows_leaves_no_gradient(name: str, junk: float) -> None:
    loss, inside = SQUARES[name]
    leaf = torch.tensor([0.5, junk], requires_grad=True)
    assert not loss(leaf)[1].isfinite()  # loud, where no mask discards it
    total = losses.aggregate(loss(leaf)[None], torch.tensor([[1, 0]]), mode="token_mean", denom=1)
    assert slope(total, leaf).tolist() == [pytest.approx(inside), 0.0]


def test_squares_of_ordinary_numbers_are_squares() -> None:
    errors = torch.tensor([0.0, -3.0, 1e4, 9e18], requires_grad=True)
    assert torch.equal(checks.squared(errors), errors.detach() ** 2)
    assert torch.equal(slope(checks.squared(errors), errors), 2 * errors.detach())


def test_held_values_and_broken_rows() -> None:
    values = torch.tensor([-math.inf, -7.0, 0.5, 7.0, math.inf, math.nan], requires_grad=True)
    assert checks.held(values, -2.0, 3.0)[:5].tolist() == [-2.0, -2.0, 0.5, 3.0, 3.0]
    assert checks.held(values).isfinite().tolist() == [True] * 5 + [False]
    assert slope(checks.held(values), values).tolist() == [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    logits = torch.tensor([[0.0, -math.inf], [math.nan, 0.0], [math.inf, 0.0], [-math.inf, -math.inf]])
    filled, broken = checks.sound_rows(logits)
    assert broken.tolist() == [False, True, True, True] and not filled[1:].any()
    assert torch.equal(filled[0], logits[0])
    assert checks.sound_rows(logits[:1])[0].data_ptr() == logits.data_ptr()  # no copy where none is needed
