"""What PPO needs beyond GRPO: a critic beside the policy, its values, a reward model's scores."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nanopost.data.chat import Chat, load_chat
from nanopost.data.collate import collate
from nanopost.data.schema import Sample
from nanopost.distributed import main_print
from nanopost.evals.rollouts import Judged, completion_scores
from nanopost.micro_batches import in_parts
from nanopost.models.header import read_headers
from nanopost.models.heads import (
    HEAD,
    ActorCritic,
    ScoreModel,
    load_actor_critic,
    load_score_model,
)
from nanopost.models.llama import Llama
from nanopost.models.lora_model import add_adapter
from nanopost.models.trainable import LoRA, adapt, chosen_adapter, load_policy, nf4_layers
from nanopost.models.weights import load_config
from nanopost.rewards.verdict import Unverified


def load_scorer(folder: str | Path, chat: Chat) -> ScoreModel:
    """A reward model, which reads a policy's token ids.

    Args:
        folder: of a score model.
        chat: the policy's. It writes the prompts that the reward model reads; a note says so where that has
            another chat template of its own.

    Raises:
        ValueError: its tokenizer is not the policy's, so that the same ids are other text; it is a language
            model: every reward would be 0; it has more than one score; what `load_score_model` refuses.
    """
    model = load_critic(folder, chat)
    if HEAD not in read_headers(folder):
        raise ValueError(
            f"{folder}: no tensor {HEAD}: a language model has no score to give, every reward would be 0; "
            f"train a reward model (train_reward.py --model DIR)"
        )
    if load_chat(folder).template != chat.template:
        main_print("the reward model reads the policy's chat template, which is not its own")
    return model


def load_critic(folder: str | Path, chat: Chat, *, four_bits: Collection[str] = ()) -> ScoreModel:
    """A model with one score, which reads a policy's token ids; on a language model's folder the head is 0.

    Args:
        folder: of a score model or of a language model.
        chat: the policy's.
        four_bits: as for `load_score_model`.

    Raises:
        ValueError: as `load_scorer`, but for the language model.
    """
    if load_chat(folder).tokenizer.to_str() != chat.tokenizer.to_str():
        raise ValueError(
            f"{folder}: its tokenizer is not that of {chat.folder}, so it would read other text; train a "
            f"score model that starts from a model with the policy's tokenizer (train_reward.py --model DIR)"
        )
    return load_score_model(folder, labels=1, four_bits=four_bits)


def contexts(*folders: str | Path | None) -> list[int]:
    """The tokens that each of the models can read; None and "shared" are no folders."""
    return [load_config(path).max_position_embeddings for path in folders if isinstance(path, Path)]


def load_pair(
    folder: str | Path, critic: str | Path | None, chat: Chat, flags: LoRA, *, seed: int
) -> tuple[Llama | ActorCritic, ScoreModel | ActorCritic]:
    """Policy and critic.

    Args:
        folder: of the language model that the policy starts as.
        critic: None: a trunk of its own, which starts as the policy's; a folder: as that score model, or as
            that language model; "shared": the policy's trunk. A head that no folder has starts at 0.
        chat: the policy's.
        flags, seed: of their adapters, where adapters train (`trainable.py`): each has one of its own.

    Returns:
        Two models, or one and the same twice when the trunk is shared.
    Raises:
        ValueError: as `load_critic`.
    """
    if critic == "shared":
        both = load_actor_critic(folder, four_bits=nf4_layers(flags))
        return (adapt(both, flags, seed=seed, base=folder),) * 2
    policy = load_policy(folder, flags, seed=seed)
    model = load_critic(critic or folder, chat, four_bits=nf4_layers(flags))
    if critic and (adapter := chosen_adapter(flags)):  # --lora-from's factors are the policy's
        return policy, add_adapter(model, adapter, seed=seed)
    return policy, adapt(model, flags, seed=seed, base=folder)


def together(policy: nn.Module, critic: nn.Module, *, beta: float) -> nn.ModuleDict:
    """What the optimiser moves and a state holds: both models, and β, which a controller may steer."""
    both = nn.ModuleDict({"policy": policy, "critic": critic})
    both.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))
    return both


def parted(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of `together` as those of a language model and those of a score model."""
    policy, critic = (
        {name.removeprefix(key): tensor for name, tensor in weights.items() if name.startswith(key)}
        for key in ("policy.", "critic.")
    )
    if not critic:  # a shared trunk is told once, as the policy's
        critic = {name: tensor for name, tensor in policy.items() if name != "lm_head.weight"}
    return {name: tensor for name, tensor in policy.items() if name != HEAD}, critic


@torch.no_grad()
def completion_values(
    critic: ScoreModel | ActorCritic, samples: Sequence[Sample], *, micro_batch: int = 64
) -> list[Tensor]:
    """The critic's value of each state in which a supervised token was chosen, on the CPU, in order.

    V_t is read at the position that predicts token t, before the token is seen; no temperature touches it.

    Args:
        critic: with one score. Over several processes each must have as many samples as the others.
        samples: ids and mask, as a rollout has them.
        micro_batch: samples a forward pass. Neighbours with the same prompt compute it once.

    Returns:
        One tensor a sample, as long as its mask has ones.
    """
    device = next(critic.parameters()).device

    def read(part: Sequence[Sample]) -> list[Tensor]:
        batch = collate(part, device=device)
        mask = batch.completion_mask
        values = critic.values(batch.input_ids, spans=batch.spans)
        return list(values[mask].cpu().split(mask.sum(dim=1).tolist()))

    parts = in_parts(critic, samples, read, micro_batch, desc="score")
    return [row for part in parts for row in part]


def critic_metrics(
    values: Sequence[Tensor], returns: Sequence[Tensor], *, total: Callable[[float], float] = float
) -> dict[str, float]:
    """How well the critic foresaw a rollout, over all tokens of the step.

        value_loss = mean ½(V − G)²        explained_variance = 1 − Var(G − V) / Var(G)

    Args:
        values: V, one tensor a sample, as they were before the step.
        returns: G, of the same lengths.
        total: sums a number over processes (`distributed.all_sum`).

    Returns:
        Both by name. The second is 1 for a perfect critic, 0 for one that says the same of every state, below
        0 for a worse one; and 0 where the returns do not vary: there is nothing to explain.
    """
    target, error = (torch.cat(list(part)).double() for part in (returns, values))
    error = target - error
    count = total(float(len(target)))

    def variance(x: Tensor) -> float:
        return total(float((x - total(float(x.sum())) / count).square().sum())) / count

    loss, spread, missed = 0.5 * total(float(error.square().sum())) / count, variance(target), variance(error)
    return {"value_loss": loss, "explained_variance": 1.0 - missed / spread if spread > 0.0 else 0.0}


def rescored(rows: Sequence[Judged], model: ScoreModel, *, micro_batch: int = 64) -> list[Judged]:
    """The same completions with a reward model's score in their verdicts; what has none stays without.

    Args:
        rows: may be empty: a process without a share of an evaluation has none.
        model: as from `load_scorer`; it reads prompt and completion, stop token included.
        micro_batch: completions a forward pass.
    """
    if not rows:
        return []
    scores = completion_scores(model, [r.sample.ids for _, r, *_ in rows], micro_batch=micro_batch)
    return [
        (record, r, text, verdict if isinstance(verdict, Unverified) else replace(verdict, score=score))
        for (record, r, text, verdict), score in zip(rows, scores.squeeze(1).tolist(), strict=True)
    ]
