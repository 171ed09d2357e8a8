"""What a sampler gives back: one `Rollout` a completion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from nanopost.data.schema import Sample


@dataclass(frozen=True)
class Rollout:
    """One sampled completion; a sampled stop token is its last token and is trained on like any other."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    old_logps: Tensor  # (len(completion_ids),) nats, under the very distribution sampled from
    entropies: Tensor  # (len(completion_ids),) nats, of that distribution at each step
    finish_reason: Literal["stop", "length", "error"]  # error: its logits were not finite, no token counts

    @property
    def sample(self) -> Sample:
        """The training sample: every token the policy chose is trained on, the prompt is not."""
        prompt, completion = len(self.prompt_ids), len(self.completion_ids)
        return Sample(
            ids=self.prompt_ids + self.completion_ids, mask=(False,) * prompt + (True,) * completion
        )
