"""Parameter groups, AdamW, the learning rate as a pure function of the step, and a controller of the KL.

No scheduler object keeps a count that a resumed run could get wrong: the script asks `schedule(step, ...)`
for a multiplier and sets the rate. Weight decay is for matrices; norms' gains and biases are left alone.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
}


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, decay on matrices only.

    θ ← θ − lr·λ·θ − lr·m̂/(√v̂ + ε),  m̂ = m/(1−β₁ᵗ),  v̂ = v/(1−β₂ᵗ)

    Args:
        model: its parameters with requires_grad; embeddings are matrices too. Shard the model first.
        lr: peak learning rate, ≥ 0; the script multiplies it by `schedule`.
        weight_decay: λ ≥ 0, for parameters of two or more dimensions.
        betas, eps: decay of the two moments, and the ε added after the root.
    Returns:
        The optimiser, with two groups: matrices, then the rest.
    Raises:
        ValueError: nothing to train.
    Reference: Loshchilov & Hutter 2019, algorithm 2.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("model: no parameter requires a gradient")
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def schedule(step: int, *, steps: int, warmup: int, kind: str, final: float) -> float:
    """The learning rate's multiplier at one step.

    (step+1)/warmup during warm-up, then final + (1 − final)·f(p),  p = (step − warmup)/(steps − warmup)

    Args:
        step: the step about to be taken, counted from 0.
        steps: length of the run; `final` is the value one past the last step, so no step runs at rate 0.
        warmup: steps of linear warm-up, 0 ≤ warmup ≤ steps; the last of them has the full rate.
        kind: "constant" f = 1, "cosine" f = ½(1 + cos πp), "linear" f = 1 − p.
        final: where the decay ends, as a share of the peak, in [0, 1].
    Returns:
        Multiplier in [0, 1], above 0 before `steps`; `final` from `steps` on (1 for "constant").
    Raises:
        ValueError: unknown kind, or a number outside its range.

    >>> [round(schedule(s, steps=5, warmup=1, kind="cosine", final=0.1), 3) for s in range(6)]
    [1.0, 1.0, 0.868, 0.55, 0.232, 0.1]
    """
    if kind not in SCHEDULES:
        raise ValueError(f"kind: expected one of {', '.join(SCHEDULES)}, got {kind!r}")
    if step < 0 or steps < 1:
        raise ValueError(f"step: expected step >= 0 and steps >= 1, got step {step}, steps {steps}")
    if not 0 <= warmup <= steps:
        raise ValueError(f"warmup: expected 0 <= warmup <= steps, got warmup {warmup}, steps {steps}")
    if not 0.0 <= final <= 1.0:
        raise ValueError(f"final: expected a share in [0, 1], got {final}")
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup)) if step < steps else 1.0
    return final + (1.0 - final) * SCHEDULES[kind](progress)


def steer_beta(beta: float, kl: float, *, target: float, gain: float = 0.1) -> float:
    """The KL's weight for the next step: up where the policy has gone too far, down where it stays too near.

    β ← β·(1 + K·clip(KL/target − 1, −.2, .2))

    Args:
        beta: the weight of this step, above 0 where there is a target: factors cannot move 0.
        kl: what was measured under it, in the unit of the target.
        target: where the KL shall be; 0 leaves β as it is.
        gain: K.
    Returns:
        The new weight: at most K/5 more or less, as a share; the same β where kl is the target, and where
        it is not finite: a step that was not taken measured nothing.
    Raises:
        ValueError: a target below 0, or one for a β of 0.
    Reference: Ziegler et al. 2019, §2.2.

    >>> [round(steer_beta(0.5, kl, target=6.0), 3) for kl in (3.0, 6.0, 6.6, 60.0)]
    [0.49, 0.5, 0.505, 0.51]
    """
    if target < 0 or (target and not beta > 0):
        raise ValueError(f"kl_target: expected 0, or above 0 with beta above 0, got {target}, beta {beta}")
    if not target or not math.isfinite(kl):
        return beta
    return beta * (1.0 + gain * max(-0.2, min(0.2, kl / target - 1.0)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr` for the coming step.

    Args:
        optimizer: any optimiser; its groups' "lr" is overwritten.
        lr: the rate itself, multiplier applied.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their joint norm is at most `max_norm`.

    g ← g·min(1, max_norm/(‖g‖ + 1e-6)),  ‖g‖ = √Σ g² over every parameter and every rank

    Args:
        model: after backward; parameters without a gradient are left out. Every rank calls this.
        max_norm: > 0; infinity measures and leaves the gradients as they are.
    Returns:
        ‖g‖ before clipping, the same on every rank.
    Raises:
        ValueError: max_norm not above 0, or no gradient at all.
        FloatingPointError: ‖g‖ is NaN or infinite; the gradients are untouched and no step is skipped
            silently.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a number above 0, got {max_norm}")
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    if not parameters:
        raise ValueError("model: no parameter has a gradient; call backward first")
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    total = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not math.isfinite(total):
        raise FloatingPointError(f"gradient norm is {total}: the step was not taken")
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return total
