"""Every loss, advantage and estimator: the formulas of post-training as functions of tensors.

A loss returns one value per token (or per sequence) and `aggregate` is the only way to a scalar; an advantage
is a detached weight. The room needs torch alone and imports nothing of the rest of the project, so the folder
can be copied into another one. Each function names the page of `docs/losses/` where its formula stands and
runs.
"""

from .advantages import group_advantages, informative_groups, leave_one_out_advantages, whiten
from .calibration import calibration, elo_from_reward, win_fraction
from .distill import forward_kl, generalized_jsd, reverse_kl, top_k_forward_kl
from .hidden import hidden_state_loss
from .kl import entropy, kl_estimate, kl_loss_with_correct_gradient
from .likelihood import preference_margin, sequence_logps, sft_loss, token_logps, truncate_logits
from .policy import cispo_loss, clipped_surrogate_loss, off_policy_shaped_loss, reinforce_loss
from .preference import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from .ratio import importance_weights, policy_ratio
from .reduce import aggregate, local_denom
from .returns import gae, kl_shaped_rewards, overlong_penalty, reward_to_go
from .reward import (
    aggregate_steps,
    attribute_loss,
    bradley_terry_loss,
    plackett_luce_loss,
    process_reward_loss,
    ranking_loss,
)
from .value import value_loss

__all__ = [
    "aggregate",
    "aggregate_steps",
    "attribute_loss",
    "bradley_terry_loss",
    "calibration",
    "cispo_loss",
    "clipped_surrogate_loss",
    "dpo_loss",
    "elo_from_reward",
    "entropy",
    "forward_kl",
    "gae",
    "generalized_jsd",
    "group_advantages",
    "hidden_state_loss",
    "importance_weights",
    "informative_groups",
    "ipo_loss",
    "kl_estimate",
    "kl_loss_with_correct_gradient",
    "kl_shaped_rewards",
    "kto_loss",
    "leave_one_out_advantages",
    "local_denom",
    "off_policy_shaped_loss",
    "orpo_loss",
    "overlong_penalty",
    "plackett_luce_loss",
    "policy_ratio",
    "preference_margin",
    "process_reward_loss",
    "ranking_loss",
    "reinforce_loss",
    "reverse_kl",
    "reward_to_go",
    "sequence_logps",
    "sft_loss",
    "simpo_loss",
    "token_logps",
    "top_k_forward_kl",
    "truncate_logits",
    "value_loss",
    "whiten",
    "win_fraction",
]
