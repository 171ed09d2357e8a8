"""Ways to lose a run when its machine does."""

from tests.mutants.mutant import Mutant

CHECKPOINT, TEST = "nanopost/checkpoint.py", "tests/scripts/test_survive.py"
CUT = f"{TEST}::test_a_save_that_is_cut_at_any_call_leaves_a_whole_state"

MUTANTS = [
    Mutant(
        name="written-in-place",
        source="our own",
        story="A state is written where it will stand: a kill in between leaves half of one.",
        file="nanopost/atomic.py",
        before='    return path.with_name(f".{path.name}.tmp")',
        after="    return path",
        killer=f"{CUT}[kill]",
    ),
    Mutant(
        name="older-states-removed-file-by-file",
        source="our own",
        story="A kill while an older state is removed leaves some of its files, under its name.",
        file=CHECKPOINT,
        before='            os.rename(older, older.with_name(f".{older.name}.gone"))',
        after="            shutil.rmtree(older)",
        killer=f"{CUT}[kill]",
    ),
    Mutant(
        name="newest-state-is-trusted",
        source="our own",
        story="A run goes on from weights with a flipped bit, because they are the newest.",
        file=CHECKPOINT,
        before="    while states and (found := flaw(states[-1])):",
        after="    while not states and (found := flaw(states[-1])):",
        killer=f"{TEST}::test_a_broken_state_is_named_and_the_one_before_is_taken",
    ),
    Mutant(
        name="sizes-without-hashes",
        source="our own",
        story="A manifest of sizes sees what is cut off and not what has rotted.",
        file=CHECKPOINT,
        before='"sha256": atomic.sha256(path)}',
        after='"sha256": ""}',
        killer=f"{TEST}::test_every_flipped_bit_of_a_state_is_seen",
    ),
    Mutant(
        name="two-trainers-in-one-folder",
        source="our own",
        story="A supervisor starts a run twice: both write metrics and states over each other.",
        file="nanopost/runs.py",
        before="    _lock(run)\n",
        after="",
        killer=f"{TEST}::test_a_second_trainer_is_refused",
    ),
]
