"""TRL's losses behind the vectors' interface; `trl_trainers` says how a method is reached that holds one."""

from importlib.metadata import version
from types import SimpleNamespace

import torch
from adapters.tensors import answer, answer_mean, leaves, two_logits
from adapters.trl_policy import (  # noqa: F401
    aggregate,
    cispo_loss,
    clipped_surrogate_loss,
    group_advantages,
    importance_weights,
    kl_estimate,
    leave_one_out_advantages,
    overlong_penalty,
    policy_ratio,
    reinforce_loss,
    variants,
)
from adapters.trl_trainers import outputs_of, tokens, trainer
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.experimental.server_distillation import ServerDistillationTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

FRAMEWORK = "TRL"
VERSION = version("trl")
TOLERANCE = 1e-9


# ---- token level


def token_logps(inputs, arguments, upstream):
    if arguments.get("top_k", 0) or arguments.get("top_p", 1.0) < 1:
        raise NotImplementedError("selective_log_softmax scores under the whole vocabulary")
    x = leaves(inputs)
    values = selective_log_softmax(
        x["logits"], x["target_ids"], temperature=arguments.get("temperature", 1.0)
    )
    return answer(values, x, upstream)


def entropy(inputs, arguments, upstream):
    x = leaves(inputs)
    return answer(entropy_from_logits(x["logits"] / arguments.get("temperature", 1.0)), x, upstream)


def sequence_logps(inputs, arguments, upstream):
    x = leaves(inputs)
    logits = two_logits(x["logps"])
    labels = torch.where(x["mask"], 0, -100)
    logits = torch.cat([logits, logits[:, :1]], dim=1)  # their shift drops the last position ...
    labels = torch.cat([labels[:, :1], labels], dim=1)  # ... and the first label
    values = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=arguments.get("average", False))
    return answer(values, x, upstream)


def sft_loss(inputs, arguments, upstream):
    """DPO's term "sft": the mean negative log-probability of the chosen completions."""
    x = leaves(inputs)

    def call(logps):
        logps = logps.flatten()
        batch = tokens(2 * len(logps)) | {"ref_chosen_logps": logps, "ref_rejected_logps": logps}
        made = trainer(DPOTrainer, beta=0.0, loss_types=["sft"], **DPO)
        return made._compute_loss(lambda **_: outputs_of(logps.repeat(2)), batch, return_outputs=False)

    return answer_mean(call, ["logps"], x, upstream)


# ---- preference


DPO = {"ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl"}
DPO |= {"loss_weights": [1.0], "use_weighting": False}


def dpo(inputs, upstream, **settings):
    x = leaves(inputs)

    def call(chosen, rejected, ref_chosen, ref_rejected):
        logps = torch.cat([chosen, rejected])
        batch = tokens(len(logps)) | {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
        made = trainer(DPOTrainer, **DPO, **settings)
        return made._compute_loss(lambda **_: outputs_of(logps), batch, return_outputs=False)

    names = ["chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"]
    return answer_mean(call, names, x, upstream)


def dpo_loss(inputs, arguments, upstream):
    smoothing, robust = arguments.get("label_smoothing", 0.0), arguments.get("robust", False)
    if smoothing and not robust:
        raise NotImplementedError("loss_type 'sigmoid' has no label smoothing, only 'robust' reads it")
    kind = "robust" if robust else "sigmoid"
    return dpo(inputs, upstream, beta=arguments["beta"], loss_types=[kind], label_smoothing=smoothing)


def ipo_loss(inputs, arguments, upstream):
    return dpo(inputs, upstream, beta=arguments["beta"], loss_types=["ipo"])


def kto_loss(inputs, arguments, upstream):
    x = leaves(inputs)

    def call(logps, ref_logps, desirable):
        batch = tokens(len(logps)) | {
            "label": desirable.bool(),
            "ref_logps": ref_logps,
            "ref_KL_logps": x["kl"] * 0,
        }
        made = trainer(
            KTOTrainer, loss_type="kto", beta=arguments["beta"], precompute_ref_logps=True, calculate_KL=True,
            desirable_weight=arguments.get("desirable_weight", 1.0),
            undesirable_weight=arguments.get("undesirable_weight", 1.0),
            _compute_kl_logps=lambda *_: x["kl"],
        )  # fmt: skip
        return made._compute_loss(lambda **_: outputs_of(logps), batch, return_outputs=False)

    return answer_mean(call, ["logps", "ref_logps", "desirable"], x, upstream)


def orpo_loss(inputs, arguments, upstream):
    x = leaves(inputs)

    def call(chosen, rejected):
        logits = two_logits(torch.cat([chosen, rejected])).unsqueeze(1).expand(-1, 2, -1)
        batch = {}
        for side, rows in (("chosen", len(chosen)), ("rejected", len(rejected))):
            ids = tokens(rows)["input_ids"]
            batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": ids + 1}
            batch |= {f"{side}_labels": torch.tensor([[-100, 0]]).expand(rows, 2)}
        made = trainer(ORPOTrainer, beta=arguments["odds_weight"], is_encoder_decoder=False, padding_value=0)
        return made.get_batch_loss_metrics(lambda *_, **__: SimpleNamespace(logits=logits), batch)[0]

    return answer_mean(call, ["chosen_logps", "rejected_logps"], x, upstream)


def simpo_loss(inputs, arguments, upstream):
    x = leaves(inputs)
    made = trainer(
        CPOTrainer, loss_type="simpo", beta=arguments["beta"], simpo_gamma=arguments["margin"], alpha=0.0,
        label_smoothing=0.0,
    )  # fmt: skip
    return answer(made.cpo_loss(x["chosen_logps"], x["rejected_logps"])[0], x, upstream)


def bradley_terry_loss(inputs, arguments, upstream):
    x = leaves(inputs)

    def call(chosen, rejected):
        model = lambda **_: SimpleNamespace(logits=torch.cat([chosen, rejected]).unsqueeze(-1))  # noqa: E731
        batch = tokens(2 * len(chosen)) | {"margin": arguments.get("margin", 0.0)}
        return trainer(RewardTrainer, {"center_rewards_coefficient": None}).compute_loss(model, batch)

    return answer_mean(call, ["chosen_rewards", "rejected_rewards"], x, upstream)


# ---- distillation: one value a position; the sum over the vocabulary is what reduction "none" leaves to do


def divergence(inputs, arguments, upstream, beta):
    x = leaves(inputs)
    found = GKDTrainer.generalized_jsd_loss(
        x["student_logits"], x["teacher_logits"], beta=beta, temperature=arguments.get("temperature", 1.0),
        reduction="none",
    )  # fmt: skip
    return answer(found.sum(dim=-1), x, upstream)


def forward_kl(inputs, arguments, upstream):
    return divergence(inputs, arguments, upstream, beta=0)


def reverse_kl(inputs, arguments, upstream):
    return divergence(inputs, arguments, upstream, beta=1)


def generalized_jsd(inputs, arguments, upstream):
    return divergence(inputs, arguments, upstream, beta=arguments["beta"])


def top_k_forward_kl(inputs, arguments, upstream):
    """The loss of a teacher behind a server: K log-probabilities, the rest in one bucket."""
    x = leaves(inputs)
    logps = torch.log_softmax(x["student_logits"] / arguments.get("temperature", 1.0), dim=-1)
    made = trainer(ServerDistillationTrainer, loss_add_tail=True, beta=0.0)
    shape = logps.shape[:-1]
    columns = [t.reshape(-1, t.shape[-1]) for t in (logps, x["teacher_logps"], x["teacher_ids"])]

    def call(student, teacher, ids):
        teacher_result = {"topk_logprobs": teacher[None, None], "topk_token_ids": ids[None, None]}
        return made._compute_server_forward_kl_loss(teacher_result, student[None, None], torch.zeros(1, 1))

    values = torch.stack([call(*row) for row in zip(*columns, strict=True)]).reshape(shape)
    return answer(values, x, upstream)
