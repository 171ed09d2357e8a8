"""Heads that read a number instead of a token: reward models, critics, and a policy that carries its critic.

    score(x, t) = w · h_t,  h = the decoder's last hidden states (B, T, D), w (labels, D), no bias

A reward model reads it at a sequence's last token, found by length: padding may be made of any token, the
stop token too. A critic reads it at every position: V(s_t) for the state after token t. Temperature has no
place here, it belongs to the sampler's distribution. A new head is 0, so a run starts from equal scores.

Tensor names are those of the hub's LlamaForSequenceClassification: `model.*` and `score.weight`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from nanopost.models.attention import Spans
from nanopost.models.config import LlamaConfig
from nanopost.models.fill import fill
from nanopost.models.header import read_headers
from nanopost.models.llama import Decoder, Llama, picked
from nanopost.models.weights import load_config, load_model, read_json, write_config, write_tensors

HEAD = "score.weight"


def zero_head(config: LlamaConfig, labels: int = 1, *, dtype: torch.dtype | None = None) -> nn.Linear:
    """A linear head of zeros, D → labels."""
    head = nn.Linear(config.hidden_size, labels, bias=False, dtype=dtype)
    nn.init.zeros_(head.weight)
    return head


def read(head: nn.Linear, hidden: Tensor) -> Tensor:
    """The head's scores in its own precision: autocast has no say in a reward or a value."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(head.weight.dtype))


class ScoreModel(nn.Module):
    """The decoder with a score head: a reward model, an attribute model or a critic."""

    def __init__(self, config: LlamaConfig, labels: int = 1):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.score = zero_head(config, labels)

    def forward(self, input_ids: Tensor, spans: Spans | None = None) -> Tensor:
        """Scores at every position, (B, T, labels); `spans` say which positions each row brings."""
        hidden, places = self.model.rows(input_ids, spans)
        return read(self.score, picked(hidden, places))

    def values(self, input_ids: Tensor, *, spans: Spans | None = None) -> Tensor:
        """The one score at every position, (B, T): V(s_t) of a critic, or a logit a token."""
        return _only(self.forward(input_ids, spans))  # self(…) would run FSDP's hooks twice

    def scores(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """The scores of whole sequences, (B, labels), read at token lengths − 1 of each row.

        Raises:
            ValueError: a length below 1 or above T.
        """
        if not ((lengths >= 1) & (lengths <= input_ids.shape[1])).all():
            raise ValueError(f"lengths must lie in [1, {input_ids.shape[1]}], got {lengths.tolist()}")
        hidden, places = self.model.rows(input_ids, [(0, length) for length in lengths.tolist()])
        last = places[torch.arange(len(places), device=places.device), lengths - 1]
        return read(self.score, picked(hidden, last))


class ActorCritic(Llama):
    """A policy and its critic on one trunk: `lm_head` and `score` beside each other."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.score = zero_head(config)

    def values(self, input_ids: Tensor, *, spans: Spans | None = None) -> Tensor:
        """V(s_t) for the state after token t, (B, T)."""
        hidden, places = self.model.rows(input_ids, spans)
        return _only(read(self.score, picked(hidden, places)))


def load_score_model(
    folder: str | Path,
    *,
    labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    four_bits: Collection[str] = (),
    whole: bool = False,
) -> ScoreModel:
    """Read a score model's folder, or a language model's: its trunk, with a head of zeros.

    Args:
        folder: in hub format; it holds a score model iff it has the tensor `score.weight`.
        labels: how many scores; None: as many as a score model has, 1 on a language model.
        dtype: of the weights in memory.
        four_bits, whole: as for `load_model`.

    Raises:
        ValueError: what `load_model` refuses; a score model with another number of labels.
    """
    config, entries = load_config(folder), read_headers(folder)
    if HEAD not in entries:
        trunk = load_model(folder, dtype=dtype, four_bits=four_bits, whole=whole).model
        with torch.device("meta"):
            model = ScoreModel(config, 1)
        model.model, model.score = trunk, zero_head(config, labels or 1, dtype=dtype)
        return model
    found = entries[HEAD].shape[0] if entries[HEAD].shape else 0
    named = len(read_json(Path(folder) / "config.json").get("id2label") or range(found))
    if not found == named == (labels or found):
        wanted = "" if labels is None else f", labels={labels} are asked for"
        raise ValueError(f"{folder}: {HEAD} has {found} rows, config.json names {named} labels{wanted}")
    with torch.device("meta"):
        model = ScoreModel(config, found)
    return fill(model, folder, dtype=dtype, four_bits=four_bits, whole=whole)


def load_either(
    folder: str | Path,
    scores: int,
    *,
    dtype: torch.dtype = torch.float32,
    four_bits: Collection[str] = (),
) -> Llama | ScoreModel:
    """A language model where `scores` is 0, else a score model with so many; whole on this rank."""
    if not scores:
        return load_model(folder, dtype=dtype, four_bits=four_bits, whole=True)
    return load_score_model(folder, labels=scores, dtype=dtype, four_bits=four_bits, whole=True)


def save_score_model(
    config: LlamaConfig,
    tensors: dict[str, Tensor],
    folder: str | Path,
    *,
    stop_ids: tuple[int, ...],
    labels: Sequence[str],
) -> None:
    """Write `config.json` and the weights as transformers' AutoModelForSequenceClassification loads them.

    That class finds a row's last token as the last one that is not `pad_token_id`, so a padding id that also
    ends sequences would make it read one token early: the smallest id that is no stop token is written.

    Args:
        config: of the model.
        tensors: its full state dict (`checkpoint.full_state` gathers it from all ranks).
        folder: may hold tokenizer files already; made if it is not there.
        stop_ids: the tokens that end a turn.
        labels: what each score is, one name a row of the head.

    Raises:
        ValueError: not as many names as the head has rows.
    """
    if len(labels) != len(tensors[HEAD]):
        raise ValueError(f"labels must name each of the {len(tensors[HEAD])} scores, got {list(labels)}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_config(
        config,
        folder,
        dtype=tensors[HEAD].dtype,
        stop_ids=stop_ids,
        kind="ForSequenceClassification",
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        pad_token_id=next(i for i in range(config.vocab_size) if i not in stop_ids),
    )
    write_tensors(tensors, Path(folder))


def load_actor_critic(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, four_bits: Collection[str] = ()
) -> ActorCritic:
    """Read a language model's folder into an `ActorCritic`, its value head at 0."""
    policy = load_model(folder, dtype=dtype, four_bits=four_bits)
    with torch.device("meta"):
        model = ActorCritic(policy.config)
    model.model, model.lm_head = policy.model, policy.lm_head  # a tied head stays tied
    model.score, model.words = zero_head(policy.config, dtype=dtype), policy.words
    return model


def _only(scores: Tensor) -> Tensor:
    """(B, T, 1) as (B, T)."""
    if scores.shape[-1] != 1:
        raise ValueError(f"values are those of a model with one score, this one has {scores.shape[-1]}")
    return scores.squeeze(-1)
