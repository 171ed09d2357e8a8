"""The Llama decoder on one page: RMSNorm, RoPE, grouped-query attention, SwiGLU; Mistral, Qwen2, Qwen3 too.

Module names are the tensor names of the hub's files, so `load_state_dict` is the whole converter. Inside, a
batch is one list of tokens without padding; only attention knows which of them make a row (`attention.py`),
and only the head's kernels know that logits exist. Letters: B rows, T positions, N tokens of the list, M
supervised ones, V vocabulary, W words of it that the tokenizer has, D width, H query heads, K key/value
heads, E head width; H / K query heads share one key/value head.

References: Touvron et al. 2023 (Llama), Su et al. 2021 (RoPE), Ainslie et al. 2023 (grouped queries), Shazeer
2020 (SwiGLU), Zhang and Sennrich 2019 (RMSNorm).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopost.kernels.linear import linear
from nanopost.kernels.linear_cross_entropy import linear_cross_entropy
from nanopost.kernels.linear_logps import linear_logps
from nanopost.kernels.pointwise import rms_norm, rope, swiglu
from nanopost.losses.likelihood import token_logps
from nanopost.models.attention import Attend, Spans, attend, layout
from nanopost.models.config import LlamaConfig
from nanopost.models.rope import Pair, rope_table

Look = Callable[[Tensor, Tensor, Tensor], Tensor]  # attention of one layer: q, k, v to the heads' output


class Linear(nn.Linear):
    """x Wᵀ, or x Wᵀ + b."""

    def __init__(self, width: int, out: int, bias: bool = False):
        super().__init__(width, out, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · weight; the mean in float32 (or wider), the product in the weight's dtype."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """softmax(q kᵀ / √E) v over what a token may look at, where H / K query heads share a key/value head.

    Qwen2's projections have biases; Qwen3 norms each head of q and k before it is turned.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = (
            n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = Linear(config.hidden_size, width, config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, config.qkv_bias)
        self.o_proj = Linear(width, config.hidden_size)
        norms = (RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms

    def forward(self, x: Tensor, angles: Pair, look: Look) -> Tensor:
        projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projections)  # (N, H, E), (N, K, E) twice
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # autocast would part them
        return self.o_proj(look(rope(q, *angles), rope(k, *angles), v).flatten(1))


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
        c = self.config
        angles = rope_table(positions, c.head_dim, c.rope_theta, c.rope_scaling, x.dtype)
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
        plan = layout(spans or [(0, T)] * B, T, input_ids.device, self.config.sliding_window)
        tokens = input_ids.flatten()[plan.tokens]
        return self(tokens, plan.positions, partial(attend, plan)), plan.places


def picked(hidden: Tensor, places: Tensor) -> Tensor:
    """hidden[places], where the gradients of a place that is read several times add up in one order."""
    return F.embedding(places, hidden)


class Llama(nn.Module):
    """The decoder with its head; `logps` is what every loss of the project reads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.words = config.vocab_size  # W ≤ V tokens that the tokenizer has; the rows behind are padding
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, mask: Tensor | None = None, spans: Spans | None = None) -> Tensor:
        """Logits (B, T, W), or (M, W) at the places of `mask` (B, T) alone.

        `spans` say which positions each row brings, as for `Decoder.rows`; what lies behind a row's end is
        no logit of anything.
        """
        hidden, places = self.model.rows(input_ids, spans)
        return self.cut(self.lm_head(picked(hidden, places if mask is None else places[mask])), -1)

    def next_logits(self, token_ids: Tensor, positions: Tensor, look: Attend, last: Tensor | None) -> Tensor:
        """Logits after each token of a list, (N, W), or after those at the places `last`.

        `look` is the sampler's cache: it keeps keys and values and knows what each token may see.
        """
        hidden = self.model(token_ids, positions, look)
        return self.cut(self.lm_head(hidden if last is None else hidden[last]), -1)

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """The W words of V: padding is no outcome, of the sampler or of a loss."""
        return x if self.words == x.shape[dim] else x.narrow(dim, 0, self.words)

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
        hidden, targets = picked(hidden, places[mask]), target_ids[mask]
        if alike and (temperature, top_k, top_p) != (1.0, 0, 1.0):
            raise ValueError(f"alike needs temperature 1, no truncation, got {temperature}, {top_k}, {top_p}")
        weight = self.lm_head.weight
        if torch.is_autocast_enabled(weight.device.type):
            half = torch.get_autocast_dtype(weight.device.type)
            hidden, weight = hidden.to(half), weight.to(half)
        weight = self.cut(weight, 0)
        if alike:
            logps = -linear_cross_entropy(hidden, weight, targets)
        elif top_k or top_p < 1.0:
            logits = linear(hidden, weight)
            logps = token_logps(logits, targets, temperature=temperature, top_k=top_k, top_p=top_p)
        else:
            logps = linear_logps(hidden, weight, targets, temperature)[0]
        return logps.new_zeros(mask.shape).masked_scatter(mask, logps)
