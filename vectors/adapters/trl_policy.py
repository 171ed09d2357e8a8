"""TRL's reinforcement learning: what GRPOTrainer and RLOOTrainer compute, one function a vector."""

import numpy as np
import torch
from adapters.tensors import answer, leaves, stack_calls
from adapters.trl_trainers import generation_step, grpo_loss
from trl import GRPOTrainer, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

# ---- advantages


def group_advantages(inputs, arguments, upstream):
    scaled = arguments["scale"] == "std"
    if scaled and (arguments.get("ddof", 1), arguments.get("eps", 1e-4)) != (1, 1e-4):
        raise NotImplementedError("fixed to ddof 1 and ε 1e-4")
    x = leaves(inputs)
    batch = generation_step(
        GRPOTrainer,
        x["rewards"].detach(),
        arguments["group_size"],
        scale_rewards="group" if scaled else "none",
    )
    return answer(batch["advantages"], x, None)


def leave_one_out_advantages(inputs, arguments, upstream):
    x = leaves(inputs)
    batch = generation_step(RLOOTrainer, x["rewards"].detach(), arguments["group_size"])
    return answer(batch["advantages"], x, None)


def overlong_penalty(inputs, arguments, upstream):
    penalty = get_soft_overlong_punishment(arguments["max_tokens"], arguments["cache"])
    lengths = [int(length) for length in inputs["lengths"]]
    return {"values": np.array(penalty([[0] * length for length in lengths]))}


# ---- policy gradient: GRPOTrainer._compute_loss, one token a call


def policy_ratio(inputs, arguments, upstream):
    """The surrogate for an advantage of −1 and a clip that never binds is the ratio."""
    x, level = leaves(inputs), arguments.get("level", "token")
    never = (1e300, 1e300)

    def call(logps, old_logps, mask):
        minus = -torch.ones(1, dtype=logps.dtype)
        return grpo_loss(logps, minus, mask, old_logps, loss_type="grpo", level=level, clip=never)

    if level == "token":
        one = lambda logps, old, mask: call(logps[None], old[None], mask[None])  # noqa: E731
        inside = stack_calls(one, x["logps"], x["old_logps"], x["mask"])
    else:
        rows = zip(x["logps"].split(1), x["old_logps"].split(1), x["mask"].split(1), strict=True)
        inside = torch.stack([call(*row) for row in rows])[:, None].expand_as(x["mask"])
    return answer(torch.where(x["mask"], inside, 1.0), x, upstream)


def importance_weights(inputs, arguments, upstream):
    x = leaves(inputs)
    logps = x["ratio"].detach().log()
    batch = generation_step(
        GRPOTrainer, torch.zeros(len(logps), dtype=logps.dtype), 1, logps, use_vllm=True,
        vllm_importance_sampling_correction=True, vllm_importance_sampling_mode=f"token_{arguments['mode']}",
        vllm_importance_sampling_clip_min=arguments.get("low", 0.0),
        vllm_importance_sampling_clip_max=arguments["high"],
    )  # fmt: skip
    return answer(batch["importance_sampling_ratio"], x, None)


def one_token(loss, *columns):
    """Values of a loss called on (1, 1) log-probabilities and (1,) advantages."""
    return stack_calls(lambda logps, advantages, *rest: loss(logps[None], advantages, *rest), *columns)


def reinforce_loss(inputs, arguments, upstream):
    """CISPO on policy: without old log-probabilities the ratio is 1."""
    x = leaves(inputs)
    values = one_token(
        lambda logps, advantages: grpo_loss(logps, advantages, loss_type="cispo", clip=(0.2, 5.0)),
        x["logps"], x["advantages"],
    )  # fmt: skip
    return answer(values, x, upstream)


def clipped_surrogate_loss(inputs, arguments, upstream):
    x = leaves(inputs)
    clip = (arguments["clip_low"], arguments["clip_high"])

    def loss(logps, advantages):
        return grpo_loss(
            logps, advantages, old_logps=logps.detach() * 0, clip=clip, delta=arguments.get("dual_clip")
        )

    return answer(one_token(loss, x["ratio"].log(), x["advantages"]), x, upstream)


def cispo_loss(inputs, arguments, upstream):
    if arguments["clip_low"] != 1:
        raise NotImplementedError("no lower bound")
    x = leaves(inputs)

    def loss(logps, advantages, ratio):
        old = logps.detach() - ratio.detach().log()
        clip = (0.0, 1 + arguments["clip_high"])  # their ε_high is the cap itself
        return grpo_loss(logps, advantages, old_logps=old, loss_type="cispo", clip=clip)

    return answer(one_token(loss, x["logps"], x["advantages"], x["ratio"]), x, upstream)


def kl_estimate(inputs, arguments, upstream):
    if arguments["kind"] != "k3":
        raise NotImplementedError("k3 only")
    x = leaves(inputs)

    def loss(logps, ref_logps):
        nothing = torch.zeros(1, dtype=logps.dtype)
        return grpo_loss(logps, nothing, ref_logps=ref_logps[None], beta=1.0)

    return answer(one_token(loss, x["logps"], x["ref_logps"]), x, upstream)


AGGREGATES = {"token_mean": "dapo", "sequence_mean": "grpo", "sequence_sum": "luspo", "constant": "dr_grpo"}


def aggregate(inputs, arguments, upstream):
    """At ratio 1 the per-token loss is −A: advantages of −values make GRPO's reduction of the values."""
    x, mode, denom = leaves(inputs), arguments["mode"], arguments["denom"]
    # their mean over the rows, spread over micro-batches, divides by any denominator
    steps = {"tokens_of_step": denom} if mode == "token_mean" else {"micro_batches": denom / len(x["values"])}
    logps = torch.zeros_like(x["values"])
    values = grpo_loss(logps, -x["values"], x["mask"], loss_type=AGGREGATES[mode], **steps)
    return answer(values, x, upstream)


# ---- whole losses: from rewards and log-probabilities to the number that is differentiated

GRPO_SETTINGS = {  # what TRL's documentation sets for the paper
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "dr_grpo": {"loss_type": "dr_grpo", "scale": "none"},
    "dapo": {"loss_type": "dapo", "clip": (0.2, 0.28)},
    "gspo": {"loss_type": "grpo", "level": "sequence", "clip": (3e-4, 4e-4)},
    "cispo": {"loss_type": "cispo", "clip": (0.2, 5.0)},
    "nanopost": {"loss_type": "dapo", "clip": (0.2, 0.28), "scale": "none"},
}


def variants(inputs, arguments, upstream):
    name = arguments["variant"]
    if name not in GRPO_SETTINGS:
        raise NotImplementedError(f"no {name}")
    x, settings = leaves(inputs), dict(GRPO_SETTINGS[name])
    scale = settings.pop("scale", "group")
    step = generation_step(GRPOTrainer, x["rewards"].detach(), arguments["group_size"], scale_rewards=scale)
    counts = {"tokens_of_step": float(x["mask"].sum()), "max_tokens": arguments.get("max_tokens", 1.0)}
    values = grpo_loss(
        x["logps"], step["advantages"], x["mask"], x["old_logps"], x["ref_logps"], **settings, **counts
    )
    return answer(values, x, upstream)
