"""One token a row, from a distribution and a uniform number.

Randomness is an argument: a token is a function of its logits and its uniform number, and that is a function
of (seed, step, prompt, sample, place). So a rollout does not depend on what else is sampled along with it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopost.losses.checks import wide
from nanopost.losses.likelihood import truncate_logits

BLOCK = 64  # words whose weights are summed before the search


def draw(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row by the inverse of the cumulative distribution.

        y = min {y : Σ_{v ≤ y} exp s_v > u Σ_v exp s_v},   s = truncated z/τ

    The sum runs over blocks of words first and then inside the block where it passes u: of V words only V/64
    sums and 64 weights are accumulated, in float64. A token of probability 0 is never drawn.

    Args:
        logits: (B, V), z. uniforms: (B,), u in [0, 1).
        temperature: τ; 0 is the arg max, a point mass: log-prob 0, entropy 0.
        top_k, top_p: as for `truncate_logits`, which `Llama.logps` scores with.

    Returns:
        Tokens (B,), and log-probs of the tokens and entropies of the distributions, nats, in
        promote_types(dtype, float32). A row whose logits are NaN or +∞ has some token, and NaN for its
        log-prob: no other row is touched.
    """
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        best = logits.gather(1, tokens).squeeze(1)
        zeros = wide(best - best)  # NaN where it is not finite
        return tokens.squeeze(1), zeros, zeros
    scaled = wide(logits) if temperature == 1 else wide(logits) / temperature  # widened first, as in training
    scores = truncate_logits(scaled, top_k=top_k, top_p=top_p)
    scores = scores - scores.amax(-1, keepdim=True)
    weights = scores.exp()
    rest = -weights.shape[1] % BLOCK
    blocks = (F.pad(weights, (0, rest)) if rest else weights).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(-1).double()
    ends = sums.cumsum(-1)
    block = _first_above(ends, target := uniforms[:, None] * ends[:, -1:])
    inside = blocks.take_along_dim(block[:, :, None], 1).squeeze(1).double().cumsum(-1)
    before = (ends - sums).gather(1, block)
    tokens = (block * BLOCK + _first_above(inside, target - before)).clamp_(max=weights.shape[1] - 1)
    total = ends[:, -1].log().to(scores.dtype)
    scores.clamp_(min=torch.finfo(scores.dtype).min)  # 0 · −∞ would be NaN
    mean = (weights * scores).sum(-1) / ends[:, -1].to(scores.dtype)
    return tokens.squeeze(1), scores.gather(1, tokens).squeeze(1) - total, total - mean


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """Of sums that only grow, (B, n), the first one above the target (B, 1), which is held below the last.

    Of sums that are NaN it is the last.
    """
    below = torch.nextafter(ends[:, -1:], torch.zeros_like(target))
    found = torch.searchsorted(ends, target.clamp(min=0.0).minimum(below), right=True)
    return found.clamp_(max=ends.shape[1] - 1)
