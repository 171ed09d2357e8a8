"""The Llama decoder on one page: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Module names are the tensor names of the hub's files, so `load_state_dict` is the whole converter. Inside, a
batch is one list of tokens without padding; only attention knows which of them make a row (`attention.py`),
and only the head's kernels know that logits exist. Letters: B rows, T positions, N tokens of the list, M
supervised ones, V vocabulary, D width, H query heads, K key/value heads, E head width; H / K query heads
share one key/value head.

References: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Ainslie et al. 2023 (grouped queries), Shazeer
2020 (SwiGLU), Zhang and Sennrich 2019 (RMSNorm).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nanopost.kernels.linear import linear
from nanopost.kernels.linear_cross_entropy import linear_cross_entropy
from nanopost.kernels.linear_logps import linear_logps
from nanopost.kernels.pointwise import rms_norm, rope, swiglu
from nanopost.losses.likelihood import token_logps
from nanopost.models.attention import Attend, Spans, attend, layout

Pair = tuple[Tensor, Tensor]  # cosines and sines, (N, E/2) each
Look = Callable[[Tensor, Tensor, Tensor], Tensor]  # attention of one layer: q, k, v to the heads' output


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a decoder, under the names of the hub's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        heads, few = self.num_attention_heads, self.num_key_value_heads
        if heads % few:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={few}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE turns pairs), got {self.head_dim}")


class Linear(nn.Linear):
    """x Wᵀ, without a bias."""

    def __init__(self, width: int, out: int):
        super().__init__(width, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight; the mean in float32 (or wider), the product in the weight's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope_table(config: LlamaConfig, positions: Tensor, dtype: torch.dtype) -> Pair:
    """cos, sin of p · θ^(−2i/E) at `positions` (N,): each (N, E/2).

    The angles are made in float64, so that position 100,000 is as exact as position 1.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[:, None] * config.rope_theta ** (-steps / config.head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Attention(nn.Module):
    """softmax(q kᵀ / √E) v over what a token may look at, where H / K query heads share a key/value head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, kv_width)
        self.v_proj = Linear(config.hidden_size, kv_width)
        self.o_proj = Linear(width, config.hidden_size)

    def forward(self, x: Tensor, angles: Pair, look: Look) -> Tensor:
        q = rope(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), *angles)  # (N, H, E)
        k = rope(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), *angles)  # (N, K, E)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return self.o_proj(look(q, k, v).flatten(1))


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: Pair, look: Look) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), angles, look)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: a list of N tokens to hidden states (N, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, token_ids: Tensor, positions: Tensor, look: Attend) -> Tensor:
        """`positions` (N,) turn the heads; `look(layer, q, k, v)` is attention: it knows who sees whom."""
        x = self.embed_tokens(token_ids)
        angles = rope_table(self.config, positions, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, angles, partial(look, i))
        return self.norm(x)

    def rows(self, input_ids: Tensor, spans: Spans | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states (N, D) of the tokens that rows bring, and where each position (B, T) finds its own.

        Args:
            input_ids: (B, T), padded on the right.
            spans: which positions each row brings (`attention.py`); None: all of them.
        """
        B, T = input_ids.shape
        plan = layout(spans or [(0, T)] * B, T, input_ids.device)
        tokens = input_ids.flatten()[plan.tokens]
        return self(tokens, plan.positions, partial(attend, plan)), plan.places


class Llama(nn.Module):
    """The decoder with its head; `logps` is what every loss of the project reads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, spans: Spans | None = None) -> Tensor:
        """Logits (B, T, V), or (M, V) at the places of `mask` (B, T) alone.

        `spans` say which positions each row brings, as for `Decoder.rows`; what lies behind a row's end is
        no logit of anything.
        """
        hidden, places = self.model.rows(input_ids, spans)
        return self.lm_head(hidden[places if mask is None else places[mask]])

    def next_logits(self, token_ids: Tensor, positions: Tensor, look: Attend, last: Tensor | None) -> Tensor:
        """Logits after each token of a list, (N, V), or after those at the places `last`.

        `look` is the sampler's cache: it keeps keys and values and knows what each token may see.
        """
        hidden = self.model(token_ids, positions, look)
        return self.lm_head(hidden if last is None else hidden[last])

    def logps(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        temperature: float = 1.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        mask: Tensor | None = None,
        spans: Spans | None = None,
        alike: bool = False,
    ) -> Tensor:
        """log π(target_ids[r, t] | input_ids[r, :t+1]), (B, T), in nats; `collate` has made the one shift.

        π is the distribution a sampler draws from at this temperature and truncation.

        Args:
            mask: (B, T), the places to score, none behind a row's end; elsewhere the log-prob is 0, and no
                head was asked. None: all there are.
            spans: which positions each row brings; a shared prompt is computed once. None: all.
            alike: the loss weighs every log-prob alike (SFT): the gradient is made along with the value, for
                a third of the time that the logits take otherwise. At temperature 1, without truncation.

        Raises:
            ValueError: what the kernels and `token_logps` refuse, by name.
        """
        hidden, places = self.model.rows(input_ids, spans)
        if mask is None:
            ends = torch.tensor([end for _, end in spans or [(0, places.shape[1])] * len(places)])
            mask = torch.arange(places.shape[1], device=places.device) < ends.to(places.device)[:, None]
        hidden, targets = hidden[places[mask]], target_ids[mask]
        if alike and (temperature, top_k, top_p) != (1.0, 0, 1.0):
            raise ValueError(f"alike needs temperature 1, no truncation, got {temperature}, {top_k}, {top_p}")
        weight = self.lm_head.weight
        if torch.is_autocast_enabled(weight.device.type):
            half = torch.get_autocast_dtype(weight.device.type)
            hidden, weight = hidden.to(half), weight.to(half)
        if alike:
            logps = -linear_cross_entropy(hidden, weight, targets)
        elif top_k or top_p < 1.0:
            logits = self.lm_head(hidden)
            logps = token_logps(logits, targets, temperature=temperature, top_k=top_k, top_p=top_p)
        else:
            logps = linear_logps(hidden, weight, targets, temperature)[0]
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps)
