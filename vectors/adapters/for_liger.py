"""Liger-Kernel's chunked losses behind the vectors' interface, uncompiled, on a CPU.

They take hidden states and the weights of a head. The head is the identity; the hidden states are the
vector's logits or, for a log-probability, the two logits of a token that has it. So the gradients are Liger's
backward pass and the chain rule of autograd. It computes in float32.
"""

from importlib.metadata import version

import torch
from adapters.tensors import answer, answer_mean, leaves, stack_calls, two_logits
from liger_kernel.chunked_loss import (
    LigerFusedLinearDPOLoss,
    LigerFusedLinearGRPOLoss,
    LigerFusedLinearJSDLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase

FRAMEWORK = "Liger-Kernel"
VERSION = version("liger-kernel")
TOLERANCE = 1e-5
EYE = torch.eye(2, dtype=torch.float32)


def head(logits):
    """Hidden states, weight and bias of (V,) logits; infinite ones are in the bias, as ∞ · 0 is NaN."""
    infinite = logits.isinf()
    bias = torch.where(infinite, logits.detach(), 0.0).float()
    return logits.masked_fill(infinite, 0.0).float()[None], torch.eye(len(logits), dtype=torch.float32), bias


def hidden(logps):
    """(B,) log-probabilities as hidden states of completions of one token, (B, 1, 2)."""
    if bool(logps.isinf().any()):
        raise NotImplementedError("takes hidden states, and a head makes no infinite logits")
    return two_logits(logps).float().unsqueeze(1)


# ---- token level


def token_logps(inputs, arguments, upstream):
    if arguments.get("top_k", 0) or arguments.get("top_p", 1.0) < 1:
        raise NotImplementedError("the fused log-probability is that of the whole vocabulary")
    x = leaves(inputs)
    temperature = arguments.get("temperature", 1.0)

    def call(logits, target):
        states, weight, bias = head(logits)
        return LigerFusedLinearPPOBase.chunk_forward(states[None], weight, target[None], bias, temperature)

    rows = zip(x["logits"].flatten(0, -2), x["target_ids"].reshape(-1, 1), strict=True)
    values = torch.stack([call(*row).reshape(()) for row in rows])
    return answer(values.reshape(x["target_ids"].shape), x, upstream)


def sequence_logps(inputs, arguments, upstream):
    x = leaves(inputs)
    target = torch.where(x["mask"], 0, -100)
    states = hidden(x["logps"].flatten()).reshape(*target.shape, 2).repeat(2, 1, 1)  # chosen and rejected
    values = LigerFusedLinearPreferenceBase.chunk_forward(
        states, EYE, target.repeat(2, 1), compute_nll_loss=False,
        average_log_prob=arguments.get("average", False),
    )[0]  # fmt: skip
    return answer(values, x, upstream)


# ---- preference


def paired(loss, inputs, upstream, *names):
    """A loss over pairs: chosen rows, then rejected rows, completions of one token."""
    x = leaves(inputs)

    def call(chosen, rejected, *reference):
        states = hidden(torch.cat([chosen, rejected]))
        extra = {"ref_input": hidden(torch.cat(reference)), "ref_weight": EYE} if reference else {}
        return loss(EYE, states, torch.zeros(len(states), 1).long(), **extra)[0]

    return answer_mean(call, ["chosen_logps", "rejected_logps", *names], x, upstream)


def dpo_loss(inputs, arguments, upstream):
    smoothing, robust = arguments.get("label_smoothing", 0.0), arguments.get("robust", False)
    if smoothing and not robust:
        raise NotImplementedError("loss_type 'sigmoid' has no label smoothing, only 'robust' reads it")
    loss = LigerFusedLinearDPOLoss(
        beta=arguments["beta"], compiled=False, loss_type="robust" if robust else "sigmoid",
        label_smoothing=smoothing,
    )  # fmt: skip
    return paired(loss, inputs, upstream, "ref_chosen_logps", "ref_rejected_logps")


def orpo_loss(inputs, arguments, upstream):
    loss = LigerFusedLinearORPOLoss(beta=arguments["odds_weight"], compiled=False)
    return paired(loss, inputs, upstream)


def simpo_loss(inputs, arguments, upstream):
    loss = LigerFusedLinearSimPOLoss(
        beta=arguments["beta"], gamma=arguments["margin"], compute_nll_loss=False, compiled=False
    )
    return paired(loss, inputs, upstream)


def kto_loss(inputs, arguments, upstream):
    if {arguments.get("desirable_weight", 1.0), arguments.get("undesirable_weight", 1.0)} != {1.0}:
        raise NotImplementedError("no weights")
    x = leaves(inputs)
    loss = LigerFusedLinearKTOLoss(beta=arguments["beta"], compiled=False, use_ref_model=True)
    kl = x["kl"].detach().float()

    def call(logps, ref_logps, desirable):
        reference = {"ref_input": hidden(ref_logps), "ref_weight": EYE}
        labels, target = desirable.bool(), torch.zeros(len(logps), 1).long()
        return loss(hidden(logps), EYE, target, preference_labels=labels, kl=kl, **reference)[0]

    return answer_mean(call, ["logps", "ref_logps", "desirable"], x, upstream)


# ---- policy gradient


def grpo(logps, advantages, old_logps, mask=None, ref_logps=None, **settings):
    """(B, T) log-probabilities and (B,) advantages to the loss of the batch."""
    ones = torch.ones(logps.shape)
    loss = LigerFusedLinearGRPOLoss(
        compiled=False, use_ref_model=ref_logps is not None, **{"beta": 0.0, "loss_type": "grpo"} | settings
    )
    ids, mask = torch.zeros(logps.shape).long(), ones if mask is None else mask.float()
    reference = None if ref_logps is None else ref_logps.detach().float()
    states = hidden(logps.flatten()).reshape(*logps.shape, 2)
    return loss(
        states, EYE, ids, mask, advantages.detach().float(), ref_per_token_logps=reference,
        old_per_token_logps=old_logps.detach().float(),
    )[0]  # fmt: skip


def policy_ratio(inputs, arguments, upstream):
    """The surrogate for an advantage of −1 and a clip that never binds is the ratio."""
    x, level = leaves(inputs), arguments.get("level", "token")
    settings = {"importance_sampling_level": level, "epsilon_low": 1e30, "epsilon_high": 1e30}

    def call(logps, old_logps, mask):
        return grpo(logps, -torch.ones(1), old_logps, mask, **settings)

    if level == "token":
        one = lambda logps, old, mask: call(logps[None], old[None], mask[None])  # noqa: E731
        inside = stack_calls(one, x["logps"], x["old_logps"], x["mask"])
    else:
        rows = zip(x["logps"].split(1), x["old_logps"].split(1), x["mask"].split(1), strict=True)
        inside = torch.stack([call(*row) for row in rows])[:, None].expand_as(x["mask"])
    return answer(torch.where(x["mask"], inside, 1.0), x, upstream)


def reinforce_loss(inputs, arguments, upstream):
    """CISPO at ratio 1."""
    x = leaves(inputs)
    call = lambda logps, a: grpo(logps[None], a, logps[None], loss_type="cispo", epsilon_high=5.0)  # noqa: E731
    return answer(stack_calls(call, x["logps"], x["advantages"]), x, upstream)


def clipped_surrogate_loss(inputs, arguments, upstream):
    x = leaves(inputs)
    settings = {"epsilon_low": arguments["clip_low"], "epsilon_high": arguments["clip_high"]}

    def call(ratio, advantages):
        log_ratio = ratio.log()[None]
        old = -log_ratio.detach().clamp(min=0.0) - 0.7  # low enough for both log-probabilities to be below 0
        return grpo(log_ratio + old, advantages, old, delta=arguments.get("dual_clip"), **settings)

    return answer(stack_calls(call, x["ratio"], x["advantages"]), x, upstream)


def cispo_loss(inputs, arguments, upstream):
    if arguments["clip_low"] != 1:
        raise NotImplementedError("no lower bound")
    x = leaves(inputs)

    def call(logps, ratio, advantages):
        old = (logps - ratio.log())[None]
        high = 1 + arguments["clip_high"]  # their ε_high is the cap itself
        return grpo(logps[None], advantages, old, loss_type="cispo", epsilon_high=high)

    return answer(stack_calls(call, x["logps"], x["ratio"], x["advantages"]), x, upstream)


def kl_estimate(inputs, arguments, upstream):
    if arguments["kind"] != "k3":
        raise NotImplementedError("k3 only")
    x = leaves(inputs)

    def call(logps, ref_logps):
        return grpo(logps[None], torch.zeros(1), logps[None], ref_logps=ref_logps[None], beta=1.0)

    return answer(stack_calls(call, x["logps"], x["ref_logps"]), x, upstream)


# ---- distillation


def generalized_jsd(inputs, arguments, upstream, beta=None):
    x = leaves(inputs)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=arguments["beta"] if beta is None else beta,
        temperature=arguments.get("temperature", 1.0), compiled=False,
    )  # fmt: skip

    def call(student, teacher):
        (states, weight, bias), (teacher_states, _, teacher_bias) = head(student), head(teacher.detach())
        return loss(states, weight, teacher_states, weight, torch.zeros(1).long(), bias, teacher_bias)

    rows = zip(x["student_logits"].flatten(0, -2), x["teacher_logits"].flatten(0, -2), strict=True)
    values = torch.stack([call(*row) for row in rows])
    return answer(values.reshape(x["student_logits"].shape[:-1]), x, upstream)


def forward_kl(inputs, arguments, upstream):
    return generalized_jsd(inputs, arguments, upstream, beta=0)


def reverse_kl(inputs, arguments, upstream):
    return generalized_jsd(inputs, arguments, upstream, beta=1)
