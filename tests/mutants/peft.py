"""Ways to lose an adapter between two programs."""

from tests.mutants.mutant import Mutant

PEFT, TEST = "nanopost/models/peft.py", "tests/models/test_peft.py"

MUTANTS = [
    Mutant(
        name="base-trains-too",
        source="our own",
        story="The base is not frozen: what is saved as an adapter was learned beside a base that is gone.",
        file=PEFT,
        before="    model.requires_grad_(False)\n",
        after="    model.requires_grad_(True)\n",
        killer=f"{TEST}::test_a_new_adapter_changes_no_bit_and_alone_trains",
    ),
    Mutant(
        name="rslora-is-not-told",
        source="our own",
        story="The file says α/r where the run had α/√r: another program serves a weaker adapter.",
        file=PEFT,
        before='"use_rslora": adapter.rank_stabilised,',
        after='"use_rslora": False,',
        killer=f"{TEST}::test_saved_and_loaded_it_is_the_same",
    ),
    Mutant(
        name="merged-at-the-usual-scale",
        source="unsloth#3091",
        story="Merging takes α/r whatever the adapter was trained with.",
        file=PEFT,
        before="stable = adapter.rank_stabilised",
        after="stable = False",
        killer=f"{TEST}::test_merged_is_unmerged",
    ),
    Mutant(
        name="alpha-of-a-pattern-is-passed-over",
        source="our own",
        story="Layers with an α of their own are scaled by the adapter's.",
        file=PEFT,
        before="next(alphas, adapter.alpha)",
        after="adapter.alpha",
        killer=f"{TEST}::test_the_scale_is_that_of_each_layer",
    ),
    Mutant(
        name="one-draw-for-all-layers",
        source="our own",
        story="Every lora_A starts from the same generator: layers of a shape begin as copies of each other.",
        file=PEFT,
        before='f"{seed} {name}".encode()',
        after='f"{seed}".encode()',
        killer=f"{TEST}::test_a_factor_depends_on_its_seed_and_name_alone",
    ),
    Mutant(
        name="unknown-fields-are-ignored",
        source="our own",
        story="A DoRA adapter, or one with trained heads, is read as if it were plain LoRA.",
        file=PEFT,
        before="if raw[name] not in (None, False, {}, []):",
        after="if False:",
        killer=f"{TEST}::test_what_cannot_be_followed_is_refused",
    ),
]
