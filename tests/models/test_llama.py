"""The decoder against a scalar transcription of the papers, and its own invariances."""

import dataclasses
import math
import random
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from nanopost.data.collate import collate
from nanopost.data.schema import Sample
from nanopost.models.attention import attend, layout
from nanopost.models.cache import KVCache
from nanopost.models.heads import ActorCritic, ScoreModel
from nanopost.models.llama import Llama
from tests.tiny import TINY, tiny_model
from tests.tolerances import within


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


@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    groups=st.lists(st.integers(0, 5), min_size=1, max_size=6),
)
@example(seed=0, sizes=[3, 2], groups=[0, 0, 1, 1])  # rows lie as their groups have them
@example(seed=0, sizes=[3, 2], groups=[0, 1, 0, 1])  # as many a group, but not beside each other
def test_cached_equals_uncached_token_by_token(tmp_path_factory, seed, sizes, groups):
    """Prompts of these sizes are read at once, then every row of each group says six tokens of its own."""
    model, generator = tiny_model(tmp_path_factory.mktemp("m")), torch.Generator().manual_seed(seed)
    width = max(sizes)
    ids = torch.randint(0, 23, (len(sizes), width), generator=generator)
    group = torch.tensor(groups) % len(sizes)
    words = torch.randint(0, 23, (len(group), 6), generator=generator)
    cache = KVCache(model.config, 6, model.lm_head.weight)
    cache.grow(torch.tensor(sizes), group)
    plan = layout([(0, size) for size in sizes], width, ids.device)
    with torch.no_grad():
        model.next_logits(ids.flatten()[plan.tokens], plan.positions, cache.prefill(plan), None)
        for t in range(6):
            said, place = torch.full_like(group, t), torch.tensor(sizes)[group] + t
            got = model.next_logits(words[:, t], place, cache.decode(said, t + 1), None)
            for row in range(len(group)):
                whole = torch.cat([ids[group[row], : sizes[group[row]]], words[row, : t + 1]])
                expected = model(whole[None])[0, -1]
                within("cached, float64", got[row], expected)


def ragged(rng: random.Random, lengths: list[int]) -> list[Sample]:
    return [Sample(tuple(rng.randrange(23) for _ in range(n)), (False, *[True] * (n - 1))) for n in lengths]


@given(
    seed=st.integers(0, 10**6), cuts=st.lists(st.tuples(st.integers(0, 30), st.integers(2, 9)), max_size=5)
)
def test_a_row_alone_equals_the_row_in_a_batch_that_shares_its_beginning(tmp_path_factory, seed, cuts):
    """Values and gradients: rows are 0 to 30 tokens of a common text, then their own."""
    model, rng = tiny_model(tmp_path_factory.mktemp("m")), random.Random(seed)
    text, ends = ragged(rng, [31])[0].ids, ragged(rng, [n for _, n in cuts] or [4])
    samples = [
        Sample(ids := (*text[:cut], *end.ids), (False, *[rng.random() < 0.7 for _ in ids[1:]]))
        for end, (cut, _) in zip(ends, cuts or [(0, 0)], strict=True)
    ]
    batch = collate(samples)
    mask, weights = batch.completion_mask, torch.randn(batch.input_ids.shape, dtype=torch.float64)

    def scored(batch, **rows):
        model.zero_grad()
        logps = model.logps(batch.input_ids, batch.target_ids, 0.8, mask=batch.completion_mask, **rows)
        return logps

    logps = scored(batch, spans=batch.spans)
    assert (logps[~mask] == 0).all()
    (logps * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for b, sample in enumerate(samples):
        alone = collate([sample])
        expected = model.logps(alone.input_ids, alone.target_ids, 0.8)[0]
        here = mask[b, : len(expected)]
        within("row in a batch, float64", logps[b, : len(expected)][here], expected[here])
        (expected * weights[b, : len(expected)])[here].sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        expected = torch.zeros_like(gradient) if parameter.grad is None else parameter.grad
        within("row in a batch, float64", gradient, expected)


def test_a_shared_beginning_is_computed_once(tmp_path):
    model, seen = tiny_model(tmp_path), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].tolist()))
    samples = [Sample((*range(20), n, n + 1), (False,) * 20 + (True,) * 2) for n in range(3)]
    batch = collate(samples)
    model.logps(batch.input_ids, batch.target_ids, mask=batch.completion_mask, spans=batch.spans)
    assert seen == [[*range(20), 0, 1, 2]]  # the last token of a row is no input; 20 + 3 and not 63


def test_no_row_gets_a_gradient_from_another(tmp_path):
    model, samples = tiny_model(tmp_path), ragged(random.Random(1), [5, 6, 8])
    batch, embedded = collate(samples), []
    model.model.embed_tokens.register_forward_hook(
        lambda *args: embedded.append(args[-1]) or args[-1].retain_grad()
    )
    logps = model.logps(batch.input_ids, batch.target_ids, spans=batch.spans)
    logps[1].sum().backward()
    gradient = embedded[0].grad.abs().sum(-1)
    assert (gradient[:4] == 0).all() and (gradient[9:] == 0).all()
    assert (gradient[4:9] > 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_alike_is_the_same_number_with_the_same_gradient(tmp_path, temperature):
    model, batch = tiny_model(tmp_path), collate(ragged(random.Random(2), [5, 9, 7]))
    found = []
    for alike in (False, True):
        model.zero_grad()
        options = {"mask": batch.completion_mask, "spans": batch.spans, "alike": alike}
        if alike and temperature != 1.0:
            with pytest.raises(
                ValueError, match=r"alike needs temperature 1, no truncation, got 0\.7, 0, 1\.0"
            ):
                model.logps(batch.input_ids, batch.target_ids, temperature, **options)
            return
        logps = model.logps(batch.input_ids, batch.target_ids, temperature, **options)
        (0.3 * logps.sum()).backward()
        found.append([logps, *(parameter.grad.clone() for parameter in model.parameters())])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="weighs all tokens alike, got upstream gradients from"):
        logps = model.logps(batch.input_ids, batch.target_ids, mask=batch.completion_mask, alike=True)
        (logps * torch.arange(logps.numel()).view_as(logps)).sum().backward()


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
    plan = layout([(0, 5)], 5, ids.device)

    def logits(positions):
        return model.next_logits(ids[0], positions, partial(attend, plan), None)

    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], logits(torch.arange(7, 12)), rtol=1e-9, atol=1e-9)
        assert (model(ids)[0] - logits(torch.arange(0, 10, 2))).abs().max() > 1e-3


def test_logits_at_the_places_of_a_mask(tmp_path):
    model, ids = tiny_model(tmp_path), torch.randint(0, 23, (3, 5))
    mask = torch.rand(3, 5) < 0.5
    torch.testing.assert_close(model(ids, mask), model(ids)[mask], rtol=1e-12, atol=1e-12)
    last = torch.tensor([4, 2])
    plan = layout([(0, 5)] * 3, 5, ids.device)
    found = model.next_logits(ids.flatten(), plan.positions, partial(attend, plan), last)
    torch.testing.assert_close(found, model(ids).flatten(0, 1)[last], rtol=1e-12, atol=1e-12)


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


def test_no_sum_of_the_backward_pass_hangs_on_threads():
    """On a CPU x[places] adds up the gradients of a place that is read several times as threads get there."""
    batch = collate([Sample((*range(5), n), (False,) * 5 + (True,)) for n in (5, 6, 7)])
    model, ids, spans = ActorCritic(TINY), batch.input_ids, {"spans": batch.spans}
    logps = model.logps(ids, batch.target_ids, mask=batch.completion_mask, **spans)
    scorer, lengths = ScoreModel(TINY), torch.tensor([5, 3, 1])
    outs = (logps, model(ids, **spans), model.values(ids, **spans), scorer.values(ids, **spans))
    for out in (*outs, scorer.scores(ids, lengths)):
        seen, todo = set(), [out.grad_fn]
        while todo:
            if (node := todo.pop()) is not None and node not in seen:
                seen.add(node)
                todo += [following for following, _ in node.next_functions]
        names = {node.name() for node in seen}
        assert "EmbeddingBackward0" in names and not [name for name in names if name.startswith("Index")]
