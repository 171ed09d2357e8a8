"""What people ask again and again about a run, answered once, in a sentence, where the run makes one ask."""

import math
from typing import Any

from nanopost import distributed
from nanopost.data.chat import Chat
from nanopost.data.chat_files import CONFIG, read_json
from nanopost.losses.variants import Variant

PAD = ("pad_token", "eos_token")


def sentences(
    cfg: Any, chat: Chat, *, variant: Variant | None, starts: float, packed: bool, sampled: bool
) -> list[str]:
    """The sentences for this run.

    Args:
        cfg: the script's flags.
        chat: for its padding token.
        variant: of the policy-gradient scripts.
        starts: the loss that the first line must say, NaN where nothing says.
        packed: whether rows are samples that one could pack.
        sampled: whether the policy is sampled from.
    """
    flags, names = vars(cfg), read_json(chat.folder / CONFIG)
    pad, eos = (
        token.get("content") if isinstance(token, dict) else token for token in (names.get(k) for k in PAD)
    )
    asked: list[tuple[Any, str]] = [
        (
            pad and pad == eos,
            f"padding is {eos!r} too: padding is known by length, so the stop token is trained on",
        ),
        (packed, "samples are not packed: none sees another, whatever shares its batch"),
        (not math.isnan(starts), f"the loss starts at {starts:.4f}"),
        ("label_smoothing" in flags, "chosen log-probs may fall while the margin grows: watch chosen_change"),
        (
            flags.get("ref_model", 0) is None and (flags.get("lora_rank") or flags.get("lora_from")),
            "the reference is the base with the adapter that training starts from, not the bare base",
        ),
        (
            sampled and distributed.bf16(),
            "sampler and trainer agree to the rounding of bfloat16: kl_old and clipped are not quite 0",
        ),
    ]
    if variant:
        count = cfg.prompts_per_step * cfg.group_size
        answers = f"{cfg.prompts_per_step} prompts × {cfg.group_size} samples = {count} answers"
        updates = f"updates made on them: {cfg.minibatches * vars(cfg).get('epochs', 1)}"
        where = {"loss": "k3 in the loss", "reward": "k1 in the reward"}.get(variant.kl, "")
        asked += [
            (True, f"a step is {answers}, {updates}; micro-batches and ranks change nothing"),
            (
                variant.surrogate == "clip",
                "loss is near 0, its gradient is not: advantages sum to 0; watch the reward",
            ),
            (variant.baseline == "group_std", "advantages are divided by their group's standard deviation"),
            (variant.baseline == "group_mean", "advantages are not divided by a standard deviation"),
            (variant.beta and where, f"the KL to the reference is {where}, weight {variant.beta:g}"),
        ]
    elif "batch_size" in flags:
        asked.append((True, f"a step is {cfg.batch_size} rows; micro-batches and ranks change nothing"))
    return [sentence for holds, sentence in asked if holds]
