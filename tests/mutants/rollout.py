"""The bugs of other projects' models and samplers, put back into ours."""

from tests.mutants.mutant import Mutant

LLAMA, SAMPLER, TYPES = "nanopost/models/llama.py", "nanopost/rollout/sampler.py", "nanopost/rollout/types.py"
MODEL_TESTS, SAMPLER_TESTS = "tests/models/test_llama.py", "tests/rollout/test_sampler.py"

MUTANTS = [
    Mutant(
        name="temperature-missing-in-training-logps",
        source="trl#3029",
        story="The trainer scores at temperature 1 what was sampled at another: the first ratio is not 1.",
        file=LLAMA,
        before="temperature=temperature, top_k=top_k, top_p=top_p)",
        after="top_k=top_k, top_p=top_p)",
        killer=f"{MODEL_TESTS}::test_logps_have_the_temperature_of_the_sampler",
    ),
    Mutant(
        name="sampler-records-raw-log-probs",
        source="trl#4159",
        story="The sampler gives back log-probs before temperature and truncation, not those it drew from.",
        file=SAMPLER,
        before="return tokens, logps.gather(",
        after="return tokens, logits.log_softmax(-1).gather(",
        killer=f"{SAMPLER_TESTS}::test_trainer_scores_what_the_sampler_recorded_at_every_temperature[0.5-scope0]",
    ),
    Mutant(
        name="only-the-first-stop-id-stops",
        source="verl#213",
        story="A model with two stop tokens talks on after the second one.",
        file=SAMPLER,
        before="stops = torch.tensor(list(stop_ids), device=device)",
        after="stops = torch.tensor(list(stop_ids)[:1], device=device)",
        killer=f"{SAMPLER_TESTS}::test_every_stop_id_ends_a_row_is_kept_and_is_trained_on",
    ),
    Mutant(
        name="sampled-stop-token-not-trained",
        source="nanochat#810",
        story="The stop action carries no gradient: the policy cannot learn when to stop.",
        file=TYPES,
        before="(True,) * completion",
        after="(True,) * (completion - 1) + (False,)",
        killer=f"{SAMPLER_TESTS}::test_every_stop_id_ends_a_row_is_kept_and_is_trained_on",
    ),
    Mutant(
        name="first-token-broadcast-to-the-group",
        source="nanochat 8f979a8",
        story="One draw after the shared prefill serves all samples of the prompt.",
        file=SAMPLER,
        before="uniforms[row, step], temperature",
        after="uniforms[torch.where(step == 0, row // group_size * group_size, row), step], temperature",
        killer=f"{SAMPLER_TESTS}::test_samples_of_a_group_have_their_own_first_token",
    ),
    Mutant(
        name="cache-read-one-column-short",
        source="nanochat b062b42",
        story="At a growth boundary the newest keys are cut off: cached and uncached logits part.",
        file=LLAMA,
        before="<= position_ids[:, None, :, None]",
        after="<= (position_ids[:, None, :, None] - 1).clamp(min=0)",
        killer=f"{MODEL_TESTS}::test_cached_equals_uncached_at_every_growth_boundary",
    ),
    Mutant(
        name="ragged-prompts-share-one-position",
        source="OpenRLHF#217",
        story="Rows of a batch decode at the longest prompt's position instead of their own.",
        file=SAMPLER,
        before="position_ids = sizes[held // group_size] + at",
        after="position_ids = sizes.max() + at",
        killer=f"{SAMPLER_TESTS}::test_a_row_alone_equals_the_row_in_any_batch_and_any_number_of_slots",
    ),
    Mutant(
        name="packing-leaks-into-the-next-sample",
        source="trl#1230",
        story="Packed samples attend to those before them in the row.",
        file=LLAMA,
        before="return same & torch.ones_like(same[0, 0]).tril()",
        after="return torch.ones_like(same).tril()",
        killer=f"{MODEL_TESTS}::test_packing_leaks_no_gradient_into_another_sample",
    ),
    Mutant(
        name="packed-rows-look-ahead",
        source="alignment-handbook#204",
        story="The block-diagonal mask forgets to be causal.",
        file=LLAMA,
        before="return same & torch.ones_like(same[0, 0]).tril()",
        after="return same",
        killer=f"{MODEL_TESTS}::test_packed_equals_padded_equals_alone",
    ),
    Mutant(
        name="rope-base-of-another-model",
        source="torchtune#997",
        story="The config's rotary base is ignored: the checkpoint loads, its logits are another model's.",
        file=LLAMA,
        before="config.rope_theta**-exponents",
        after="10000.0**-exponents",
        killer=f"{MODEL_TESTS}::test_logits_equal_the_scalar_decoder[False]",
    ),
]
