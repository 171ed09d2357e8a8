"""The sampler: a pure function of weights, prompts and uniforms, whose log-probs are the trainer's."""

import math
from collections import Counter
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopost.data.collate import collate, spread
from nanopost.losses import token_logps
from nanopost.models.cache import KVCache
from nanopost.models.llama import Llama
from nanopost.rollout import sampler
from nanopost.rollout.draw import draw
from nanopost.rollout.sampler import row_uniforms, sample
from tests.tiny import tiny_model
from tests.tolerances import within

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [4], [15, 3]]
STOPS = (1, 2)


@pytest.fixture
def model(tmp_path) -> Llama:
    return tiny_model(tmp_path)


def rollouts(model, prompts=PROMPTS, *, group_size=3, max_new_tokens=9, keys=None, **options):
    uniforms = row_uniforms(
        seed=7, step=2, prompts=keys or range(len(prompts)), group_size=group_size, count=max_new_tokens
    )
    return sample(
        model,
        prompts,
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        stop_ids=options.pop("stop_ids", STOPS),
        uniforms=uniforms,
        **options,
    )


def scored(model, samples, **scope):
    """The trainer's log-probs of the sampled tokens, and the sampler's."""
    batch = collate([rollout.sample for rollout in samples])
    logps = model.logps(batch.input_ids, batch.target_ids, **scope)
    old_logps = spread([rollout.old_logps for rollout in samples], batch.completion_mask)
    return logps[batch.completion_mask], old_logps[batch.completion_mask]


@pytest.mark.parametrize("scope", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 7, "top_p": 0.7}])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_trainer_scores_what_the_sampler_recorded_at_every_temperature(model, temperature, scope):
    logps, old_logps = scored(
        model, rollouts(model, temperature=temperature, **scope), temperature=temperature, **scope
    )
    within("sampler against trainer, float64", logps, old_logps)
    ratio = (logps - old_logps).exp()
    within("sampler against trainer, float64", ratio, torch.ones_like(ratio))
    assert old_logps.min() < -0.1  # not a point mass


@pytest.mark.parametrize("scope", [{}, {"top_k": 5, "top_p": 0.8}])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_trainer_and_sampler_agree_in_float32_and_in_bfloat16(tmp_path, temperature, scope):
    model = tiny_model(tmp_path, dtype=torch.float32, scale=1.5)
    scope = {**scope, "temperature": temperature}
    within("sampler against trainer, float32", *scored(model, rollouts(model, **scope), **scope))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        logps, old_logps = scored(model, rollouts(model, **scope), **scope)
    within("sampler against trainer, bfloat16", logps, old_logps)
    assert not torch.equal(logps, old_logps)


@given(
    order=st.permutations(range(4)), slots=st.integers(1, 12), temperature=st.sampled_from([0.0, 0.7, 1.3])
)
def test_a_row_alone_equals_the_row_in_any_batch_and_any_number_of_slots(
    tmp_path_factory, order, slots, temperature
):
    model = tiny_model(tmp_path_factory.mktemp("m"))
    together = rollouts(model, [PROMPTS[i] for i in order], keys=order, slots=slots, temperature=temperature)
    for place, i in enumerate(order):
        alone = rollouts(model, [PROMPTS[i]], keys=[i], temperature=temperature)
        for a, b in zip(alone, together[place * 3 : place * 3 + 3], strict=True):
            assert a.completion_ids == b.completion_ids and a.finish_reason == b.finish_reason
            within("row in a batch, float64", [b.old_logps, b.entropies], [a.old_logps, a.entropies])


def test_samples_of_a_group_have_their_own_first_token(model):
    samples = rollouts(model, [PROMPTS[0]], group_size=40, max_new_tokens=2, temperature=2.0)
    assert len({rollout.completion_ids[0] for rollout in samples}) > 5


def test_greedy_is_the_arg_max_of_the_uncached_model(model):
    for rollout in rollouts(model, group_size=1, temperature=0.0):
        ids = list(rollout.prompt_ids)
        for token in rollout.completion_ids:
            assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token)
        assert (rollout.old_logps == 0).all() and (rollout.entropies == 0).all()


def test_every_stop_id_ends_a_row_is_kept_and_is_trained_on(model):
    stop_ids = (1, 2, 3, 4, 5, 6)
    samples = rollouts(model, group_size=60, max_new_tokens=30, temperature=2.0, stop_ids=stop_ids)
    ended = Counter(rollout.completion_ids[-1] for rollout in samples if rollout.finish_reason == "stop")
    assert set(ended) == set(stop_ids)
    for rollout in samples:
        assert not set(rollout.completion_ids[:-1]) & set(stop_ids)
        assert (rollout.completion_ids[-1] in stop_ids) == (rollout.finish_reason == "stop")
        assert rollout.finish_reason == "stop" or len(rollout.completion_ids) == 30
        assert rollout.sample.mask[-1] is True
        assert sum(rollout.sample.mask) == len(rollout.completion_ids) == len(rollout.old_logps)


def test_a_row_without_a_stop_is_cut_at_the_length(model):
    assert {r.finish_reason for r in rollouts(model, stop_ids=(22,), max_new_tokens=1, temperature=0.0)} == {
        "length"
    }


def test_one_prefill_a_prompt_and_finished_rows_give_up_their_slots(model, monkeypatch):
    prefilled, widths, next_logits = [], [], model.next_logits

    def spy(token_ids, positions, look, last):
        if last is not None:
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(token_ids)]
            prefilled.extend(tuple(token_ids[a:b].tolist()) for a, b in pairwise(starts))
        else:
            widths.append(len(token_ids))
        return next_logits(token_ids, positions, look, last)

    monkeypatch.setattr(model, "next_logits", spy)
    samples = rollouts(model, group_size=8, max_new_tokens=20, temperature=1.5, slots=5)
    assert sorted(prefilled) == sorted(map(tuple, PROMPTS))  # though a group of 8 never fits the 5 slots
    longest_first = sum(sorted((len(r.completion_ids) for r in samples), reverse=True)[::5])
    assert (
        max(widths) == 5 and len(widths) < longest_first
    )  # static batches of 5 could not do with fewer steps


def test_rows_that_are_done_leave_the_batch(model, monkeypatch):
    """Where nobody waits, fewer than a quarter of the rows decode on though they are done."""
    widths, next_logits = [], model.next_logits
    monkeypatch.setattr(model, "next_logits", lambda *args: widths.append(len(args[0])) or next_logits(*args))
    samples = rollouts(model, group_size=8, max_new_tokens=30, temperature=1.5)
    said = [len(r.completion_ids) for r in samples]
    for step, width in enumerate(widths[1:], start=1):  # the first is the prefill
        live, before = (sum(n > place for n in said) for place in (step, step - 1))
        assert live <= width < max(4 / 3 * before, before + 0.5), (step, width, before)


def test_rows_that_end_are_told_once(model):
    told: list[int] = []
    samples = rollouts(model, group_size=8, max_new_tokens=20, temperature=1.5, slots=7, finished=told.append)
    assert sum(told) == len(samples) == 32 and max(told) < 8 and min(told) >= 0


def test_steps_that_are_replayed_say_the_same(model, monkeypatch):
    """As on a GPU: eight steps between looks at who is done, columns by powers of two, rows that speak on."""
    expected = rollouts(model, group_size=5, max_new_tokens=40, temperature=1.5, slots=9)
    widths, decode = [], KVCache.decode
    monkeypatch.setattr(sampler.dispatch, "replays", lambda model: True)
    monkeypatch.setattr(sampler, "replayed", lambda step: step)
    monkeypatch.setattr(
        KVCache, "decode", lambda self, said, n: widths.append((n, int(said.max()))) or decode(self, said, n)
    )
    found = rollouts(model, group_size=5, max_new_tokens=40, temperature=1.5, slots=9)
    assert {n for n, _ in widths} == {40} and max(most for _, most in widths) <= 39
    for a, b in zip(found, expected, strict=True):
        assert a.completion_ids == b.completion_ids and a.finish_reason == b.finish_reason
        within("row in a batch, float64", a.old_logps, b.old_logps)


def test_columns_grow_by_powers_of_two_where_steps_are_replayed(tmp_path, monkeypatch):
    model, widths, decode = tiny_model(tmp_path, max_position_embeddings=300), [], KVCache.decode
    monkeypatch.setattr(sampler.dispatch, "replays", lambda model: True)
    monkeypatch.setattr(sampler, "replayed", lambda step: step)
    monkeypatch.setattr(
        KVCache, "decode", lambda self, said, n: widths.append((n, int(said.max()))) or decode(self, said, n)
    )
    rollouts(model, [PROMPTS[0]], group_size=1, max_new_tokens=200, stop_ids=(99,), temperature=0.0)
    assert sorted({n for n, _ in widths}) == [64, 128, 200]
    assert all(most < n for n, most in widths)


def test_draws_follow_the_distribution(model):
    """10,000 stratified uniforms give every token its probability to 1e-4."""
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, -torch.inf]], dtype=torch.float64)
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for temperature in (0.7, 1.0, 1.6):
        tokens, logps, entropies = draw(
            logits.expand(10_000, -1), uniforms, temperature=temperature, top_k=0, top_p=1.0
        )
        weights = [math.exp(z / temperature) for z in (0.3, -1.0, 2.0, 0.0)] + [0.0]
        expected = [w / sum(weights) for w in weights]
        for token in range(5):
            assert (tokens == token).double().mean().item() == pytest.approx(expected[token], abs=1e-4)
        exact = torch.tensor([math.log(p) for p in expected[:4]], dtype=torch.float64)
        torch.testing.assert_close(logps, exact[tokens])
        assert entropies[0].item() == pytest.approx(-sum(p * math.log(p) for p in expected[:4]))


@pytest.mark.parametrize("words", [5, 64, 65, 200])
def test_draws_find_their_word_in_any_block(words):
    """Each word by the middle of its share of [0, 1), as plain cumulative sums have it."""
    logits = 2 * torch.randn(words, generator=torch.Generator().manual_seed(words), dtype=torch.float64)
    logits[words // 2] = -torch.inf
    weights = [math.exp(z) if z > -math.inf else 0.0 for z in logits.tolist()]
    ends = list(accumulate(w / math.fsum(weights) for w in weights))
    middles = [(a + b) / 2 for a, b in pairwise([0.0, *ends])]
    tokens, logps, _ = draw(
        logits.expand(words, -1),
        torch.tensor(middles, dtype=torch.float64),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    expected = list(range(words))
    expected[words // 2] += 1  # no share of its own: its middle is where the next one begins
    assert tokens.tolist() == expected
    assert logps.tolist() == pytest.approx([math.log(weights[i] / math.fsum(weights)) for i in expected])


def test_the_ends_of_the_unit_interval_draw_tokens_of_positive_probability():
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.5, -torch.inf]])
    uniforms = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    tokens, logps, _ = draw(logits.expand(2, -1), uniforms, temperature=1.0, top_k=0, top_p=1.0)
    assert tokens.tolist() == [1, 3] and logps.isfinite().all()


def test_a_uniform_number_of_0_draws_the_first_token_of_all_however_unlikely():
    """And the least above 0 beyond its mass the next one: no rounding of a block's sum comes between."""
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(0)) * 3
    logits[0, 0] = -14.0
    mass = float(logits.double().softmax(-1)[0, 0])
    assert mass < 1e-7
    uniforms = torch.tensor([0.0, 0.5 * mass, 1.5 * mass], dtype=torch.float64)
    tokens, logps, _ = draw(logits.expand(3, -1), uniforms, temperature=1.0, top_k=0, top_p=1.0)
    assert tokens.tolist() == [0, 0, 1] and logps[0].item() == pytest.approx(math.log(mass), abs=1e-4)


def test_truncated_draws_stay_in_the_support():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64).expand(500, -1)
    uniforms = torch.linspace(0, 1, 501, dtype=torch.float64)[:-1]
    tokens, logps, _ = draw(logits, uniforms, temperature=1.0, top_k=2, top_p=1.0)
    assert set(tokens.tolist()) == {0, 1}
    assert logps.unique().exp().sum().item() == pytest.approx(1.0)


def test_uniforms_depend_on_seed_step_prompt_and_sample_alone():
    whole = row_uniforms(seed=1, step=2, prompts=[5, 9], group_size=3, count=4)
    part = row_uniforms(seed=1, step=2, prompts=[9], group_size=3, count=4)
    assert torch.equal(whole[3:], part)
    assert len({tuple(row.tolist()) for row in whole}) == 6
    others = [row_uniforms(seed=s, step=t, prompts=[9], group_size=3, count=4) for s, t in ((2, 2), (1, 3))]
    assert not torch.equal(part, others[0]) and not torch.equal(part, others[1])


def test_half_precision_weights_are_sampled_in_float32(model):
    """Widened before the temperature divides, as the trainer's scores of the same logits are."""
    half = model.to(torch.bfloat16)
    for temperature in (0.0, 0.7):
        samples = rollouts(half, group_size=2, temperature=temperature)
        assert samples[0].old_logps.dtype == torch.float32
    logits = torch.randn(40, 23, generator=torch.Generator().manual_seed(0)).mul(8).to(torch.bfloat16)
    uniforms = torch.linspace(0, 0.99, 40, dtype=torch.float64)
    tokens, logps, _ = draw(logits, uniforms, temperature=0.7, top_k=0, top_p=1.0)
    torch.testing.assert_close(logps, token_logps(logits, tokens, temperature=0.7), rtol=0, atol=1e-6)


def test_no_prompts_give_no_rollouts(model):
    """A rank without a share of the held-out prompts samples along with the others."""
    assert rollouts(model, []) == []


def test_new_weights_are_seen_at_once(model):
    before = rollouts(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(3)
    logps, old_logps = scored(model, rollouts(model))
    within("sampler against trainer, float64", logps, old_logps)
    assert [r.completion_ids for r in before] != [r.completion_ids for r in rollouts(model)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ({"stop_ids": ()}, "stop_ids is empty"),
        ({"max_new_tokens": 60}, r"prompts\[1\] has 6 tokens; with max_new_tokens=60 it must have 1 to 4"),
        ({"prompts": [[3], []]}, r"prompts\[1\] has 0 tokens"),
        ({"uniforms": torch.zeros(2, 2)}, r"uniforms has shape \(2, 2\), expected \(4, 9\)"),
    ],
)
def test_bad_arguments_are_refused_by_name(model, options, message):
    arguments = {"prompts": PROMPTS, "group_size": 1, "max_new_tokens": 9, "stop_ids": STOPS} | options
    arguments.setdefault("uniforms", torch.zeros(len(arguments["prompts"]), arguments["max_new_tokens"]))
    with pytest.raises(ValueError, match=message):
        sample(model, **arguments)
