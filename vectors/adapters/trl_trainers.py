"""TRL's trainers without their constructors, so that the methods which hold a loss run on a vector's numbers.

A trainer is made by `__new__` and given what the method reads and nothing else; a model is a function that
returns the log-probabilities of the vector. What runs between the inputs and the loss is TRL's.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

torch.set_default_dtype(
    torch.float64
)  # what TRL makes itself, such as a quotient of two counts, is float64 too


def same(value: Any, *_: Any, **__: Any) -> Any:
    return value


def trainer(kind: type, args: dict[str, Any] | None = None, **attributes: Any) -> Any:
    """A trainer of one process, in training."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0)
    accelerator.gather = accelerator.gather_for_metrics = accelerator.reduce = same
    made = kind.__new__(kind)
    made.__dict__ |= {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
        "args": SimpleNamespace(**args or {}),
        "aux_loss_enabled": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    } | attributes
    return made


def outputs_of(logps: Tensor) -> SimpleNamespace:
    """What a model with TRL's fused head returns, for completions of one token."""
    logps = logps.unsqueeze(1)
    nothing = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


def tokens(rows: int) -> dict[str, Tensor]:
    """A prompt token and a completion token a row."""
    ids, completion = torch.zeros(rows, 2, dtype=torch.long), torch.tensor([[0, 1]]).expand(rows, 2)
    return {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": completion}


def grpo_loss(
    logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    old_logps: Tensor | None = None,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.0,
    loss_type: str = "bnpo",
    level: str = "token",
    clip: tuple[float, float] = (0.2, 0.2),
    delta: float | None = None,
    tokens_of_step: float = 1.0,
    max_tokens: float = 1.0,
    micro_batches: float = 1.0,
    correct_kl: bool = False,
) -> Tensor:
    """GRPOTrainer._compute_loss on (B, T) log-probabilities and (B,) or (B, T) advantages."""
    ids = torch.zeros(logps.shape, dtype=torch.long)
    mask = ids + 1 if mask is None else mask.long()
    batch = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids}
    batch |= {"completion_mask": mask, "advantages": advantages, "ref_per_token_logps": ref_logps}
    batch |= {"old_per_token_logps": old_logps, "num_items_in_batch": torch.tensor(tokens_of_step)}
    args = {"delta": delta, "use_bias_correction_kl": correct_kl, "steps_per_generation": 1}
    made = trainer(
        GRPOTrainer, args, beta=beta, loss_type=loss_type, importance_sampling_level=level,
        epsilon_low=clip[0], epsilon_high=clip[1], max_completion_length=max_tokens,
        current_gradient_accumulation_steps=micro_batches, top_entropy_quantile=1.0, use_vllm=False,
        off_policy_mask_threshold=None, _entropy_bonus_enabled=False,
        vllm_importance_sampling_correction=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )  # fmt: skip
    return made._compute_loss(None, batch)


def generation_step(
    kind: type, rewards: Tensor, group_size: int, logps: Tensor | None = None, **own: Any
) -> dict:
    """_generate_and_score_completions with the sampling taken out: rewards (N,) in, the training batch out.

    `logps` are the trainer's log-probabilities of the completions, (N, T); the sampler's are 0.
    """
    rows = len(rewards)
    logps = torch.zeros(rows, 1, dtype=rewards.dtype) if logps is None else logps
    completions = [[0] * logps.shape[1] for _ in range(rows)]
    sampled = [[0.0] * logps.shape[1] for _ in range(rows)]
    prompts = [[0]] * rows
    generated = (prompts, completions, None, ["text"] * rows, sampled, {}, None, None)
    if kind is not GRPOTrainer:  # RLOOTrainer has neither tools nor the sampler's log-probabilities
        generated = (prompts, completions, ["text"] * rows)
    args = {"per_device_train_batch_size": rows, "steps_per_generation": 1, "gradient_accumulation_steps": 1}
    nothing = dict.fromkeys(["environment_factories", "environments", "tools", "pad_to_multiple_of"])
    nothing |= dict.fromkeys(
        ["reward_clip_range", "mask_truncated_completions", "log_multimodal", "use_vllm"]
    )
    settings = nothing | {
        "_generate": lambda _: generated,
        "_calculate_rewards": lambda *_: rewards.unsqueeze(1),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logps, None, None),
        "_tokenizer": SimpleNamespace(pad_token_id=0),
        "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        "_pending_extra_logs": {},
        "_pending_metrics": {},
        "beta": 0.0,
        "multi_objective_aggregation": "sum_then_normalize",
        "normalize_advantages": False,
        "num_generations": group_size,
        "num_iterations": 1,
        "reward_func_names": ["reward"],
        "reward_weights": torch.ones(1),
        "scale_rewards": "none",
        "vllm_importance_sampling_correction": False,
    }
    made = trainer(kind, args | {"gradient_checkpointing_kwargs": None}, **settings | own)
    return made._generate_and_score_completions([{"prompt": "text"}] * rows)
