"""Ways to let a rank have too much of a model, or another rank's part of it, or wait for ever."""

from tests.mutants.mutant import Mutant

FSDP, TEST_FSDP, TEST_RANKS = "nanopost/fsdp.py", "tests/test_fsdp.py", "tests/scripts/test_ranks.py"
WHOLE = f"{TEST_FSDP}::test_no_rank_has_the_whole_model_in_memory"
ROWS = f"{TEST_FSDP}::test_each_rank_reads_its_own_rows_of_every_kind_of_model"

MUTANTS = [
    Mutant(
        name="every-rank-reads-the-whole-model",
        source="our own",
        story="Eight ranks of a machine load eight models to keep one: its memory is the limit.",
        file="nanopost/models/fill.py",
        before="if several_ranks() and not whole else set()",
        after="if False else set()",
        killer=WHOLE,
    ),
    Mutant(
        name="every-rank-reads-the-first-rows",
        source="our own",
        story="Each rank begins at the first row: shapes fit, nothing complains, the model is another one.",
        file=FSDP,
        before=".copy_(read(low, high))",
        after=".copy_(read(0, high - low))",
        killer=ROWS,
    ),
    Mutant(
        name="head-of-the-base-in-the-place-of-the-adapters",
        source="our own",
        story="A head that is not read yet takes a copy of the adapter's for nothing: the base's follows.",
        file="nanopost/models/peft.py",
        before="named[name].read = lambda low, high, head=tensor: head[low:high]",
        after="named[name].copy_(tensor)",
        killer=ROWS,
    ),
    Mutant(
        name="every-rank-keeps-what-is-gathered",
        source="our own",
        story="All ranks gather the weights that rank 0 writes, and each holds all of them.",
        file="nanopost/checkpoint.py",
        before="for name, tensor in gathered if distributed.is_main()}",
        after="for name, tensor in gathered}",
        killer=WHOLE,
    ),
    Mutant(
        name="blocks-are-sent-in-float32",
        source="our own",
        story="Products are in bfloat16 and weights are sent in float32 to be cast: twice the traffic.",
        file=FSDP,
        before="_place(block, half if bf16() else MixedPrecisionPolicy())",
        after="_place(block, MixedPrecisionPolicy())",
        killer=f"{TEST_FSDP}::test_bfloat16_is_what_is_sent_and_sums_are_made_in_float32",
    ),
    Mutant(
        name="a-rank-that-hangs-is-waited-for",
        source="our own",
        story="torch's own patience with Gloo is half an hour: seven GPUs stand by while one is stuck.",
        file="nanopost/distributed.py",
        before="timeout=timedelta(seconds=_patience()), ",
        after="",
        killer=f"{TEST_RANKS}::test_a_rank_that_hangs_is_given_up",
    ),
]
