"""torchtune's losses behind the vectors' interface."""

from importlib.metadata import version

import torch
from adapters.tensors import answer, answer_mean, leaves, stack_calls, two_logits
from torch.nn.functional import pad
from torchtune import rlhf
from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLLoss, ReverseKLLoss
from torchtune.rlhf.loss import DPOLoss, PPOLoss

FRAMEWORK = "torchtune"
VERSION = version("torchtune")
TOLERANCE = 1e-5  # distillation and cross-entropy compute in float32, a masked mean adds 1e-8 to its count


# ---- token level


def token_logps(inputs, arguments, upstream):
    if arguments.get("top_k", 0) or arguments.get("top_p", 1.0) < 1:
        raise NotImplementedError("logits_to_logprobs scores under the whole vocabulary")
    x = leaves(inputs)
    temperature = arguments.get("temperature", 1.0)
    return answer(rlhf.logits_to_logprobs(x["logits"], x["target_ids"], temperature), x, upstream)


def sft_loss(inputs, arguments, upstream):
    x = leaves(inputs)

    def call(logps):
        logits = two_logits(logps.reshape(1, -1))
        return CEWithChunkedOutputLoss(num_output_chunks=1)([logits], torch.zeros(1, logps.numel()).long())

    return answer_mean(call, ["logps"], x, upstream)


def sequence_logps(inputs, arguments, upstream):
    x = leaves(inputs)
    logits = pad(two_logits(x["logps"]), (0, 0, 0, 1))  # their shift drops the last position ...
    labels = pad(torch.where(x["mask"], 0, -100), (1, 0))  # ... and the first label
    average = arguments.get("average", False)
    return answer(rlhf.get_batch_log_probs(logits, labels, return_average_logprobs=average), x, upstream)


def aggregate(inputs, arguments, upstream):
    x = leaves(inputs)
    if arguments["mode"] != "token_mean" or arguments["denom"] != x["mask"].sum():
        raise NotImplementedError("masked_mean: the mean over the mask of one batch")
    return answer(rlhf.masked_mean(x["values"], x["mask"]), x, upstream)


# ---- preference


def dpo_loss(inputs, arguments, upstream):
    if arguments.get("robust", False):
        raise NotImplementedError("no robust DPO")
    x = leaves(inputs)
    loss = DPOLoss(arguments["beta"], arguments.get("label_smoothing", 0.0))
    names = ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
    return answer(loss(*(x[name] for name in names))[0], x, upstream)


# ---- PPO


def policy_ratio(inputs, arguments, upstream):
    """The surrogate for an advantage of −1 and a clip that never binds is the ratio."""
    if arguments.get("level", "token") != "token":
        raise NotImplementedError("token ratios only")
    x = leaves(inputs)
    loss = PPOLoss(epsilon=1e300, value_coeff=0.0)

    def call(logps, old_logps):
        zero = torch.zeros_like(logps)
        return loss(old_logps, logps, zero - 1, zero, zero, zero)[0]

    return answer(torch.where(x["mask"], stack_calls(call, x["logps"], x["old_logps"]), 1.0), x, upstream)


def clipped_surrogate_loss(inputs, arguments, upstream):
    low, high = arguments["clip_low"], arguments["clip_high"]
    if low != high or arguments.get("dual_clip") is not None:
        raise NotImplementedError("one ε for both sides, no dual clip")
    x = leaves(inputs)
    loss = PPOLoss(epsilon=low, value_coeff=0.0)

    def call(logps, advantages):
        zero = torch.zeros_like(logps)
        return loss(zero, logps, advantages, zero, zero, zero)[0]

    return answer_mean(lambda ratio, a: call(ratio.log(), a), ["ratio", "advantages"], x, upstream)


def value_loss(inputs, arguments, upstream):
    x = leaves(inputs)
    clip = arguments.get("clip")
    loss = PPOLoss(value_clip_range=float("inf") if clip is None else clip, value_coeff=1.0)

    def call(values, old_values, returns):
        zero = torch.zeros_like(values)
        return loss(zero, zero, zero, old_values, values, returns)[0]

    return answer_mean(call, ["values", "old_values", "returns"], x, upstream)


# ---- rewards and advantages


def kl_shaped_rewards(inputs, arguments, upstream):
    x = leaves(inputs)
    last = x["mask"].shape[1] - 1 - x["mask"].long().flip(1).argmax(dim=1)
    shaped = rlhf.get_rewards_ppo(x["rewards"], x["logps"], x["ref_logps"], arguments["beta"], last)[0]
    return answer(torch.where(x["mask"], shaped, 0.0), x, None)


def gae(inputs, arguments, upstream):
    """On values and rewards that are 0 outside the mask: its mask is for the whitening alone."""
    x = leaves(inputs)
    values, rewards = (x[name].masked_fill(~x["mask"], 0.0) for name in ("values", "rewards"))
    found = rlhf.estimate_advantages(values, rewards, arguments["gamma"], arguments["gae_lambda"], x["mask"])
    found = (torch.where(x["mask"], part, 0.0).detach().numpy() for part in found)
    return {"values": dict(zip(("advantages", "returns"), found, strict=True))}


def whiten(inputs, arguments, upstream):
    if (arguments.get("ddof", 1), arguments.get("eps", 1e-8)) != (1, 1e-8):
        raise NotImplementedError("fixed to ddof 1 and ε 1e-8")
    x = leaves(inputs)
    found = rlhf.whiten(x["advantages"], x["mask"], shift_mean=False)
    return answer(torch.where(x["mask"], found, 0.0), x, None)


# ---- distillation


def distillation(loss, inputs, arguments, upstream):
    if arguments.get("temperature", 1.0) != 1:
        raise NotImplementedError("no temperature")
    x = leaves(inputs)
    rows = zip(*(x[name].flatten(0, -2) for name in ("student_logits", "teacher_logits")), strict=True)
    values = [loss(student[None], teacher[None], torch.zeros(1)) for student, teacher in rows]
    return answer(torch.stack(values).reshape(x["student_logits"].shape[:-1]), x, upstream)


def forward_kl(inputs, arguments, upstream):
    return distillation(ForwardKLLoss(), inputs, arguments, upstream)


def reverse_kl(inputs, arguments, upstream):
    return distillation(ReverseKLLoss(), inputs, arguments, upstream)
