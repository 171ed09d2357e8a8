"""Ways in which a plan of memory says too little."""

from tests.mutants.mutant import Mutant

TRAINING, SAMPLING, PLAN = "nanopost/models/footprint.py", "nanopost/rollout/footprint.py", "nanopost/plan.py"
TEST = "tests/test_plan.py"

MUTANTS = [
    Mutant(
        name="adam-has-one-moment",
        source="our own",
        story="Adam is planned with one number a weight; it keeps two.",
        file=TRAINING,
        before='"Adam": ceil(8 *',
        after='"Adam": ceil(4 *',
        killer=f"{TEST}::test_standing_memory_is_that_of_model_and_optimiser",
    ),
    Mutant(
        name="logits-cost-nothing",
        source="our own",
        story="The head never stores its logits, so it is planned with nothing: its gradient is forgotten.",
        file=PLAN,
        before='begins |= {"logits": head, "passing": max(0, passing - head)}',
        after='begins |= {"logits": 0, "passing": 0}',
        killer=f"{TEST}::test_a_micro_batch_takes_what_the_allocator_gives[SFT, many words]",
    ),
    Mutant(
        name="gradients-of-before-are-gone",
        source="our own",
        story="Every micro-batch is planned as the first: the gradients that it adds to are forgotten.",
        file=PLAN,
        before='"gradients": grads * training.adds(job),',
        after='"gradients": 0,',
        killer=f"{TEST}::test_a_micro_batch_takes_what_the_allocator_gives[SFT, many words]",
    ),
    Mutant(
        name="cache-of-query-heads",
        source="our own",
        story="The KV cache is planned with query heads, of which there are more.",
        file=SAMPLING,
        before="(n, groups), (_, KE) = speaking(job), heads(job.config)",
        after="(n, groups), (KE, _) = speaking(job), heads(job.config)",
        killer=f"{TEST}::test_sampling_takes_what_the_allocator_gives[8-64]",
    ),
    Mutant(
        name="a-frozen-projection-keeps-its-input",
        source="our own",
        story="Under an adapter of attention alone the MLP is planned as if its weights had gradients.",
        file=TRAINING,
        before="return not job.rank or name in job.targets",
        after="return True",
        killer=f"{TEST}::test_what_a_block_keeps_is_what_autograd_keeps[LoRA of attention]",
    ),
    Mutant(
        name="rank-holds-all",
        source="our own",
        story="Adam's moments, which FSDP shares out, are planned whole on every rank.",
        file=TRAINING,
        before="ceil(8 * _trains(job) / job.ranks)",
        after="8 * _trains(job)",
        killer=f"{TEST}::test_ranks_share_what_stands_and_recompute_keeps_inputs_alone",
    ),
    Mutant(
        name="what-does-not-fit-passes",
        source="our own",
        story="--plan ends with 0 whatever it found: the job is queued and dies in its first step.",
        file=PLAN,
        before="raise SystemExit(0 if found.fits else 1)",
        after="raise SystemExit(0)",
        killer=f"{TEST}::test_what_does_not_fit_ends_with_1",
    ),
    Mutant(
        name="a-reference-as-small-as-the-policy",
        source="our own",
        story="DPO's reference from another folder is planned with the policy's weights, and is larger.",
        file=PLAN,
        before='"frozen models": training.standing(guest)["weights"]',
        after='"frozen models": training.standing(job)["weights"]',
        killer=f"{TEST}::test_a_reference_that_is_gone_before_the_first_step_is_there_until_then",
    ),
    Mutant(
        name="a-teacher-that-takes-no-room",
        source="our own",
        story="The plan begins with the student: a teacher of seventy times its size writes before it.",
        file=PLAN,
        before='guest = has.get("teacher") if written else None',
        after="guest = None if written else None",
        killer=f"{TEST}::test_the_guests_of_the_scripts",
    ),
]
