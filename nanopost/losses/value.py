"""The critic's loss: squared error to the returns, with PPO's clip around the value of the last rollout."""

import torch
from torch import Tensor

from .checks import check_floats, check_positive, squared, wide


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None) -> Tensor:
    """Squared error of the critic, token by token, pessimistic about steps beyond the clip.

        L_t = ½ max((V_t − R_t)², (clip(V_t, V_t^old − ε, V_t^old + ε) − R_t)²)

    R are the returns of `gae`, V^old the values it read them with. A value that has gone more than ε towards
    its return gets no further gradient; one that has gone the wrong way keeps it. Without a clip it is plain
    ½ (V_t − R_t)².

    Args:
        values: (B, T); carries the gradient: V − R, and 0 where the clip holds.
        old_values: (B, T); detached.
        returns: (B, T); detached.
        clip: ε > 0 in the unit of the values, or None for no clip (old_values are then not read).

    Returns:
        Losses, shape (B, T), ≥ 0; ½ (V − R)² while V is within ε of V^old. V = 1, R = 3 give 2.

    Raises:
        ValueError: shapes differ, inputs that are not floating point, ε ≤ 0.

    Reference:
        Schulman et al. 2017 (PPO), the value term of eq. 9, without ½ and clip; both as in the authors' code
        (OpenAI baselines, ppo2).

    Page: docs/losses/value_loss.md

    >>> values, old_values, returns = torch.tensor([[1.0, 1.0], [0.5, 1.0], [3.0, 3.0]]).unsqueeze(1)
    >>> value_loss(values, old_values, returns, clip=0.2)
    tensor([[2.6450, 2.0000]])
    """
    check_floats(values=values, old_values=old_values, returns=returns)
    values, returns = wide(values), wide(returns).detach()
    if clip is None:
        return 0.5 * squared(values - returns)
    check_positive("clip", clip)
    old_values = wide(old_values).detach()
    clipped = values.clamp(old_values - clip, old_values + clip)
    return 0.5 * torch.maximum(squared(values - returns), squared(clipped - returns))
