"""Every loss, advantage and estimator: the formulas of post-training as functions of tensors.

A loss returns one value per token (or per sequence) and `aggregate` is the only way to a scalar; an advantage
is a detached weight. The room needs torch alone and imports nothing of the rest of the project, so the folder
can be copied into another one. Each function names the page of `docs/losses/` where its formula stands and
runs.
"""

from .advantages import group_advantages, leave_one_out_advantages
from .likelihood import sft_loss, token_logps, truncate_logits
from .policy import clipped_surrogate_loss, entropy, kl_estimate, policy_ratio
from .reduce import aggregate, local_denom

__all__ = [
    "aggregate",
    "clipped_surrogate_loss",
    "entropy",
    "group_advantages",
    "kl_estimate",
    "leave_one_out_advantages",
    "local_denom",
    "policy_ratio",
    "sft_loss",
    "token_logps",
    "truncate_logits",
]
