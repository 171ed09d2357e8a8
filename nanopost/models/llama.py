"""The Llama decoder on one page: RMSNorm, RoPE, grouped-query attention, SwiGLU, and the sampler's KV cache.

Module names are the tensor names of the hub's files, so `load_state_dict` is the whole converter. Letters: B
sequences, T positions, V vocabulary, D width, H query heads, K key/value heads, E head width, S keys that a
query may look at; H / K query heads share one key/value head.

References: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Ainslie et al. 2023 (grouped queries), Shazeer
2020 (SwiGLU), Zhang and Sennrich 2019 (RMSNorm).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopost.losses.likelihood import token_logps

Pair = tuple[Tensor, Tensor]  # keys and values, or cosines and sines
Where = Tensor | None  # positions or segments, (B, T); None: one sequence a row
Store = Callable[[Tensor, Tensor], Pair]  # puts keys and values into a cache, gives back all there are


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


class KVCache:
    """The keys and values of every layer, (layers, rows, K, length, E); a row is one growing sequence.

    A token at position p writes column p and reads columns 0…p. So a row needs no length of its own, and what
    right padding leaves behind a prompt's end is overwritten before anything reads it.
    """

    def __init__(self, config: LlamaConfig, rows: int, length: int, like: Tensor):
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)

    def write(self, layer: int, position_ids: Tensor, frontier: int, k: Tensor, v: Tensor) -> Pair:
        """Store k, v (B, K, T, E) at `position_ids` (B, T); give back the columns below `frontier`."""
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.k[layer][rows, :, position_ids] = k.transpose(1, 2)
        self.v[layer][rows, :, position_ids] = v.transpose(1, 2)
        return self.k[layer][:, :, :frontier], self.v[layer][:, :, :frontier]

    def copy_row(self, source: KVCache, row: int, rows: Tensor) -> None:
        """Give `rows` the prefix that one row of another, shorter cache holds."""
        width = source.k.shape[3]
        self.k[:, rows, :, :width] = source.k[:, row : row + 1]
        self.v[:, rows, :, :width] = source.v[:, row : row + 1]

    def keep(self, rows: Tensor) -> None:
        """Drop every row that is not named."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight; the mean in float32 (or wider), the product in the weight's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def rope_tables(config: LlamaConfig, position_ids: Tensor, frontier: int, dtype: torch.dtype) -> Pair:
    """cos, sin of p · θ^(−2i/E) at `position_ids`, all < frontier: each (B, 1, T, E), the E/2 angles twice.

    The angles are made in float64, so that position 100,000 is as exact as position 1.
    """
    device = position_ids.device
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=device) / config.head_dim
    angles = torch.arange(frontier, device=device)[:, None] * config.rope_theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype)[position_ids][:, None], angles.sin().to(dtype)[position_ids][:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn the pair (x_i, x_{i+E/2}) by its position's angle. x (B, heads, T, E)."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    """softmax(q kᵀ / √E + mask) v, where G query heads share each key/value head."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_attention_heads > config.num_key_value_heads
        width, kv_width = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rope: Pair, mask: Tensor | None, store: Store | None) -> Tensor:
        B, T, _ = x.shape
        q = rotate(self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2), *rope)  # (B, H, T, E)
        k = rotate(self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2), *rope)  # (B, K, T, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        if store is not None:
            k, v = store(k, v)  # (B, K, S, E)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) ⊙ W_up x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Pair, mask: Tensor | None, store: Store | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, store)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: token ids (B, T) to hidden states (B, T, D)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Where, segments: Where, cache: KVCache | None) -> Tensor:
        x = self.embed_tokens(input_ids)
        position_ids = torch.arange(x.shape[1], device=x.device)[None] if positions is None else positions
        frontier = int(position_ids.max()) + 1
        rope = rope_tables(self.config, position_ids, frontier, x.dtype)
        mask = attention_mask(position_ids, segments, frontier if cache is not None else None)
        for i, layer in enumerate(self.layers):
            store = None if cache is None else partial(cache.write, i, position_ids, frontier)
            x = layer(x, rope, mask, store)
        return self.norm(x)


def attention_mask(position_ids: Tensor, segment_ids: Where, frontier: int | None) -> Tensor | None:
    """(B, 1, T, S), true where a query may look; None is plain causal, all that right padding needs.

    With a cache (frontier given) column s holds position s: look at s ≤ p. Packed: within the own segment.
    """
    if frontier is not None:
        return torch.arange(frontier, device=position_ids.device) <= position_ids[:, None, :, None]
    if segment_ids is None:
        return None
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()


class Llama(nn.Module):
    """The decoder with its head; `logps` is what every loss of the project reads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Where = None,
        segment_ids: Where = None,
        cache: KVCache | None = None,
        last: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V); with `last` (B,), one position a row, only those: (B, V).

        Without a cache, row b is a sequence (right-padded, or packed: then `position_ids` restart and
        `segment_ids` name each token's sample). With one, `position_ids` say where the tokens stand.
        """
        hidden = self.model(input_ids, position_ids, segment_ids, cache)
        if last is not None:
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return self.lm_head(hidden)

    def logps(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        temperature: float = 1.0,
        *,
        top_k: int = 0,
        top_p: float = 1.0,
        position_ids: Where = None,
        segment_ids: Where = None,
    ) -> Tensor:
        """log π(target_ids[b, t] | input_ids[b, :t+1]), (B, T), in nats; `collate` has made the one shift.

        π is the distribution a sampler draws from at this temperature and truncation.
        """
        logits = self.forward(input_ids, position_ids, segment_ids)  # self(…) would run FSDP's hooks twice
        return token_logps(logits, target_ids, temperature=temperature, top_k=top_k, top_p=top_p)
