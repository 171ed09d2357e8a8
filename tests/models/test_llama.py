"""The decoder against a scalar transcription of the papers, and its own invariances."""

import dataclasses
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopost.data.collate import collate
from nanopost.data.schema import Sample
from nanopost.models.llama import KVCache, Llama
from tests.tiny import TINY, tiny_model


def scalar_logits(model: Llama, ids: list[int]) -> list[list[float]]:
    """The decoder of Touvron et al. 2023 with loops and lists, from the papers' formulas."""
    c, w = model.config, {name: tensor.tolist() for name, tensor in model.state_dict().items()}

    def matvec(matrix, x):
        return [math.fsum(a * b for a, b in zip(row, x, strict=True)) for row in matrix]

    def norm(x, gain):
        scale = math.sqrt(math.fsum(v * v for v in x) / len(x) + c.rms_norm_eps)
        return [g * v / scale for g, v in zip(gain, x, strict=True)]

    def rope(x, position):  # the pair (i, i + E/2) is one complex number turned by position · θ^(−2i/E)
        half, out = c.head_dim // 2, list(x)
        for i in range(half):
            turned = complex(x[i], x[i + half]) * complex(
                math.cos(a := position * c.rope_theta ** (-2 * i / c.head_dim)), math.sin(a)
            )
            out[i], out[i + half] = turned.real, turned.imag
        return out

    def heads(x, position=None):
        parts = [x[i : i + c.head_dim] for i in range(0, len(x), c.head_dim)]
        return parts if position is None else [rope(part, position) for part in parts]

    stream = [list(w["model.embed_tokens.weight"][token]) for token in ids]
    for i in range(c.num_hidden_layers):
        p = f"model.layers.{i}."
        normed = [norm(x, w[p + "input_layernorm.weight"]) for x in stream]
        q = [heads(matvec(w[p + "self_attn.q_proj.weight"], x), t) for t, x in enumerate(normed)]
        k = [heads(matvec(w[p + "self_attn.k_proj.weight"], x), t) for t, x in enumerate(normed)]
        v = [heads(matvec(w[p + "self_attn.v_proj.weight"], x)) for x in normed]
        share = c.num_attention_heads // c.num_key_value_heads
        for t in range(len(ids)):
            mixed = []
            for h in range(c.num_attention_heads):
                scores = [
                    math.fsum(a * b for a, b in zip(q[t][h], k[s][h // share], strict=True))
                    / math.sqrt(c.head_dim)
                    for s in range(t + 1)
                ]
                weights = [math.exp(score - max(scores)) for score in scores]
                total = math.fsum(weights)
                mixed += [
                    math.fsum(weight * v[s][h // share][e] for s, weight in enumerate(weights)) / total
                    for e in range(c.head_dim)
                ]
            stream[t] = [
                a + b for a, b in zip(stream[t], matvec(w[p + "self_attn.o_proj.weight"], mixed), strict=True)
            ]
        for t, x in enumerate(stream):
            y = norm(x, w[p + "post_attention_layernorm.weight"])
            gate, up = matvec(w[p + "mlp.gate_proj.weight"], y), matvec(w[p + "mlp.up_proj.weight"], y)
            inner = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)]
            stream[t] = [a + b for a, b in zip(x, matvec(w[p + "mlp.down_proj.weight"], inner), strict=True)]
    return [matvec(w["lm_head.weight"], norm(x, w["model.norm.weight"])) for x in stream]


@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_the_scalar_decoder(tmp_path, tied):
    model = tiny_model(tmp_path, tie_word_embeddings=tied)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms away from 1
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    ids = [3, 17, 0, 22, 9, 9, 4]
    torch.testing.assert_close(
        model(torch.tensor([ids]))[0],
        torch.tensor(scalar_logits(model, ids), dtype=torch.float64),
        rtol=1e-10,
        atol=1e-10,
    )


@given(seed=st.integers(0, 10**6), splits=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_cached_equals_uncached_at_every_growth_boundary(tmp_path_factory, seed, splits):
    model = tiny_model(tmp_path_factory.mktemp("m"))
    length = sum(splits)
    ids = torch.randint(0, 23, (2, length), generator=torch.Generator().manual_seed(seed))
    cache, out, start = KVCache(model.config, 2, length, model.lm_head.weight), [], 0
    with torch.no_grad():
        for n in splits:
            positions = torch.arange(start, start + n).expand(2, -1)
            out.append(model(ids[:, start : start + n], positions, cache=cache))
            start += n
        torch.testing.assert_close(torch.cat(out, 1), model(ids), rtol=1e-9, atol=1e-9)


def ragged(rng: random.Random, lengths: list[int]) -> list[Sample]:
    return [Sample(tuple(rng.randrange(23) for _ in range(n)), (False, *[True] * (n - 1))) for n in lengths]


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(2, 9), min_size=2, max_size=5))
def test_packed_equals_padded_equals_alone(tmp_path_factory, seed, lengths):
    model, samples = tiny_model(tmp_path_factory.mktemp("m")), ragged(random.Random(seed), lengths)

    def supervised(batch):
        logps = model.logps(
            batch.input_ids, batch.target_ids, position_ids=batch.position_ids, segment_ids=batch.segment_ids
        )
        return logps[batch.completion_mask]

    with torch.no_grad():
        alone = torch.cat([supervised(collate([sample])) for sample in samples])
        torch.testing.assert_close(supervised(collate(samples)), alone, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(supervised(collate(samples, pack_length=16)), alone, rtol=1e-9, atol=1e-9)


def test_packing_leaks_no_gradient_into_another_sample(tmp_path):
    model, samples = tiny_model(tmp_path), ragged(random.Random(1), [5, 6])
    batch = collate(samples, pack_length=16)
    embedded = []
    model.model.embed_tokens.register_forward_hook(
        lambda *args: embedded.append(args[-1]) or args[-1].retain_grad()
    )
    logps = model.logps(
        batch.input_ids, batch.target_ids, position_ids=batch.position_ids, segment_ids=batch.segment_ids
    )
    logps[batch.segment_ids == 2].sum().backward()
    gradient = embedded[0].grad.abs().sum(-1)
    assert (gradient[batch.segment_ids == 1] == 0).all()
    assert (gradient[batch.segment_ids == 2] > 0).all()


def test_changing_a_token_changes_nothing_before_it(tmp_path):
    model = tiny_model(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    other = ids.clone()
    other[0, 3] = 20
    with torch.no_grad():
        a, b = model(ids), model(other)
    assert torch.equal(a[:, :3], b[:, :3])
    assert (a[:, 3:] - b[:, 3:]).abs().amax(-1).gt(1e-6).all()


def test_rope_sees_relative_positions_only(tmp_path):
    model, ids = tiny_model(tmp_path), torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        shifted = model(ids, torch.arange(7, 12)[None])
        torch.testing.assert_close(model(ids), shifted, rtol=1e-9, atol=1e-9)
        stretched = model(ids, torch.arange(0, 10, 2)[None])
    assert (model(ids) - stretched).abs().max() > 1e-3


def test_last_picks_one_position_a_row(tmp_path):
    model, ids = tiny_model(tmp_path), torch.randint(0, 23, (3, 5))
    last = torch.tensor([4, 0, 2])
    torch.testing.assert_close(
        model(ids, last=last), model(ids)[torch.arange(3), last], rtol=1e-12, atol=1e-12
    )


def test_logps_have_the_temperature_of_the_sampler(tmp_path):
    model, ids = tiny_model(tmp_path), torch.randint(0, 23, (2, 6))
    targets = torch.randint(0, 23, (2, 6))
    for temperature in (0.5, 1.0, 2.0):
        expected = (model(ids) / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(model.logps(ids, targets, temperature), expected, rtol=1e-12, atol=1e-12)


def test_bad_numbers_are_refused_by_name():
    with pytest.raises(ValueError, match="num_hidden_layers must be above 0, got 0"):
        dataclasses.replace(TINY, num_hidden_layers=0)
    with pytest.raises(ValueError, match="num_attention_heads=5 must be a multiple of num_key_value_heads=2"):
        dataclasses.replace(TINY, num_attention_heads=5)
    with pytest.raises(ValueError, match="head_dim must be even"):
        dataclasses.replace(TINY, head_dim=7)
