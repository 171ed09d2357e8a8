"""Checks that look and do not see."""

from tests.mutants.mutant import Mutant

DATA, MODEL = "nanopost/evals/preflight_data.py", "nanopost/evals/preflight_model.py"
TEST = "tests/evals/test_preflight.py"

MUTANTS = [
    Mutant(
        name="stop-tokens-are-counted-not-placed",
        source="trl#976",
        story="A stop token outside the mask passes, if only some token of the target is trained on.",
        file=DATA,
        before="            if last not in (ends if text else stops) or (count != 1 and not text):",
        after="            if count > 1 and not text:",
        killer=f"{TEST}::test_a_target_without_its_one_stop_token[masked]",
    ),
    Mutant(
        name="a-verifier-is-asked-for-its-gold-alone",
        source="our own",
        story="A verifier that pays for an empty answer passes, since it pays for the right one too.",
        file=DATA,
        before="        if (found[0].score or 0.0) > 0:",
        after="        if empty.score > 1:",
        killer=f"{TEST}::test_verifiers_that_judge_wrongly",
    ),
    Mutant(
        name="losses-are-compared-alone",
        source="our own",
        story="Accumulated gradients that are scaled twice have the right loss.",
        file=MODEL,
        before="    if not (apart <= GRADIENT[bf16] * size and",
        after="    if not (",
        killer=f"{TEST}::test_a_gradient_that_depends_on_micro_batches[scaled]",
    ),
    Mutant(
        name="a-gradient-is-left-behind",
        source="our own",
        story="The first step of a run adds its gradient to that of its preflight.",
        file=MODEL,
        before="            parameter.grad = None\n",
        after="",
        killer=f"{TEST}::test_a_gradient_that_depends_on_micro_batches[scaled]",
    ),
]
