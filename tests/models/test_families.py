"""Llama, Mistral, Qwen2 and Qwen3 from one class: logits equal to transformers', cached and uncached."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopost.models.attention import layout
from nanopost.models.cache import KVCache
from nanopost.models.config import FAMILIES, LlamaConfig
from nanopost.models.llama import Llama
from nanopost.models.rope import RopeScaling
from nanopost.models.weights import load_model
from tests.models.golden import CONFIGS, FILE, IDS, SMALL, exact_transformers, last_logits, lively
from tests.tolerances import within

SCALINGS = [
    None,
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 16, low_freq_factor=1.0, high_freq_factor=4.0),
    RopeScaling("yarn", 4.0, 16),
    RopeScaling("yarn", 2.5, 24, beta_fast=16.0, beta_slow=2.0, attention_factor=1.3),
]


@st.composite
def configs(draw: st.DrawFn, family: str) -> LlamaConfig:
    few, head_dim = draw(st.integers(1, 2)), draw(st.sampled_from([2, 4, 6, 8]))
    heads = few * draw(st.integers(1, 3))
    return LlamaConfig(
        vocab_size=draw(st.integers(5, 40)),
        # Qwen2's heads always make up the width.
        hidden_size=heads * (head_dim if family == "qwen2" else draw(st.integers(1, 3))),
        intermediate_size=draw(st.integers(3, 20)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=few,
        head_dim=head_dim,
        max_position_embeddings=64,
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([100.0, 10_000.0, 500_000.0])),
        tie_word_embeddings=draw(st.booleans()),
        model_type=family,
        rope_scaling=draw(st.sampled_from(SCALINGS)),
        sliding_window=draw(st.none() | st.integers(1, 9)) if family != "llama" else None,
    )


def cached(model: Llama, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits (B, T − prompt + 1, V) from the prompts' last tokens on, by the sampler's cache."""
    rows, length = ids.shape
    cache = KVCache(model.config, length, model.lm_head.weight)
    cache.grow(torch.full((rows,), prompt), torch.arange(rows))
    plan = layout([(0, prompt)] * rows, prompt, ids.device, model.config.sliding_window)
    found = [
        model.next_logits(ids[:, :prompt].flatten(), plan.positions, cache.prefill(plan), plan.places[:, -1])
    ]
    for t in range(prompt, length):
        said = torch.full((rows,), t - prompt)
        found.append(model.next_logits(ids[:, t], said + prompt, cache.decode(said, length), None))
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path_factory, family):
    """In float64; and what transformers saves is read back to the same model."""
    pytest.importorskip("transformers", reason="the extra `oracle` is not installed")

    @settings(max_examples=12)
    @given(config=configs(family), seed=st.integers(0, 99))
    def check(config, seed):
        folder = tmp_path_factory.mktemp("family")
        model = lively(folder, config)
        ids = torch.randint(0, config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(seed))
        with exact_transformers() as transformers, torch.no_grad():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
            assert type(theirs).__name__ == f"{FAMILIES[family]}ForCausalLM"
            expected = theirs(ids).logits
            theirs.save_pretrained(folder / "again")
        torch.testing.assert_close(model(ids), expected, rtol=1e-10, atol=1e-10)
        within("cached, random shapes, float64", cached(model, ids, 4), model(ids)[:, 3:])
        again = load_model(folder / "again", dtype=torch.float64)
        assert again.config == config
        assert torch.equal(again(ids), model(ids))

    check()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_golden_ones(tmp_path, name):
    """Written once by transformers: `python -m tests.models.golden`."""
    model = lively(tmp_path, LlamaConfig(**vars(SMALL) | CONFIGS[name]))
    golden = json.loads(FILE.read_text())["logits"]
    assert golden.keys() == CONFIGS.keys()
    for found in (model(IDS), cached(model, IDS, 5)):
        assert last_logits(found) == pytest.approx(golden[name], rel=1e-9, abs=1e-9)
    assert len({tuple(logits) for logits in golden.values()}) == len(golden) - 1  # mistral's are llama's


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("family", "window"), [("llama", None), ("mistral", 1), ("qwen2", 3), ("qwen3", 5)])
def test_a_row_alone_equals_the_row_in_a_batch(tmp_path, family, window, dtype):
    """Ragged rows with a common beginning, a window shorter than they are: values and gradients."""
    config = LlamaConfig(**vars(SMALL) | {"model_type": family, "head_dim": 2, "sliding_window": window})
    model, generator = lively(tmp_path, config).to(dtype), torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (4, 20), generator=generator)
    ids[1, :13], ids[2, :10] = ids[0, :13], ids[0, :10]
    spans, ends = [(0, 20), (13, 18), (10, 16), (0, 4)], (20, 18, 16, 4)
    shared = model(ids, spans=spans)
    weights = torch.randn(shared.shape, generator=generator, dtype=dtype)
    parameters = list(model.parameters())
    alone = [model(ids[row : row + 1, :end])[0] for row, end in enumerate(ends)]
    sums = (
        sum((rows[row][: ends[row]] * weights[row, : ends[row]]).sum() for row in range(4))
        for rows in (shared, alone)
    )
    found, expected = (torch.autograd.grad(total, parameters) for total in sums)
    found, expected = [*found, *(shared[row, :end] for row, end in enumerate(ends))], [*expected, *alone]
    if dtype == torch.float32:
        within("row in a batch, float32", found, expected)
    else:
        within("row in a batch, float64", found, expected)
