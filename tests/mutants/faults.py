"""Ways in which one bad step, one full disk or another number of ranks spoils a run."""

from tests.mutants.mutant import Mutant

FAULTS, SHARDS, RUNS = "nanopost/faults.py", "nanopost/shards.py", "nanopost/runs.py"
TEST, NO_OP = "tests/test_faults.py", "test_a_step_that_goes_wrong_changes_no_bit"
BACK = "tests/test_shards.py::test_a_state_goes_from_1_to_2_to_4_ranks_and_back"

MUTANTS = [
    Mutant(
        name="nan-goes-into-the-moments",
        source="our own",
        story="One NaN in a gradient, and Adam's moments are NaN for good: every later step is lost.",
        file=FAULTS,
        before="    if not wrong:\n        optimizer.step()\n        counts[0] = 0",
        after="    optimizer.step()\n    if not wrong:\n        counts[0] = 0",
        killer=f"{TEST}::{NO_OP}",
    ),
    Mutant(
        name="bad-gradients-wait-for-the-next-step",
        source="our own",
        story="The step is skipped and its gradients stay: the next backward adds to NaN.",
        file=FAULTS,
        before="    optimizer.zero_grad(set_to_none=True)\n    if not wrong:\n        return norm",
        after="    if not wrong:\n        optimizer.zero_grad(set_to_none=True)\n        return norm",
        killer=f"{TEST}::{NO_OP}",
    ),
    Mutant(
        name="each-rank-judges-its-own-loss",
        source="our own",
        story="One rank skips the step that the others take: from then on they train different models.",
        file=FAULTS,
        before="distributed.all_sum(float(not math.isfinite(loss))) > 0 or",
        after="not math.isfinite(loss) or",
        killer=f"{TEST}::test_no_rank_steps_where_one_must_not",
    ),
    Mutant(
        name="three-in-a-run-not-in-a-row",
        source="our own",
        story="A run of weeks ends at its third bad step, whatever lies between them.",
        file=FAULTS,
        before="        optimizer.step()\n        counts[0] = 0",
        after="        optimizer.step()",
        killer=f"{TEST}::{NO_OP}",
    ),
    Mutant(
        name="a-lost-kl-steers-beta",
        source="our own",
        story="min(.2, NaN) is .2: the step that measured nothing raises the KL's weight.",
        file="nanopost/optim.py",
        before="    if not target or not math.isfinite(kl):",
        after="    if not target:",
        killer=f"{TEST}::test_a_controller_learns_nothing_from_it",
    ),
    Mutant(
        name="a-step-not-taken-steers-beta",
        source="our own",
        story="The critic's gradient is NaN, the KL is not: the step is not taken and β moves.",
        file="train_ppo.py",
        before=' + 0 * line["grad_norm"]',
        after="",
        killer=f"{TEST}::test_every_script_goes_on_behind_a_step_that_it_could_not_take",
    ),
    Mutant(
        name="resumed-in-another-precision",
        source="our own",
        story="A run in float32 goes on in bfloat16, and env.json says bfloat16 for all of it.",
        file=RUNS,
        before='    env |= {"bf16": torch.is_autocast_enabled(',
        after='    _ = {"bf16": torch.is_autocast_enabled(',
        killer="tests/test_runs.py::test_products_in_another_precision_are_another_run",
    ),
    Mutant(
        name="a-full-disk-ends-the-run",
        source="our own",
        story="Days of training end because one state could not be written.",
        file=FAULTS,
        before="        if last:\n            raise",
        after="        raise",
        killer=f"{TEST}::test_a_full_disk_is_told_and_training_goes_on",
    ),
    Mutant(
        name="parts-cut-by-rounding-down",
        source="our own",
        story="Seven rows on four ranks are 2, 2, 2, 1; rounded down they are 1, 1, 1, 1, three are lost.",
        file=SHARDS,
        before="size = -(-(high - low) // mesh.size(dim))",
        after="size = (high - low) // mesh.size(dim)",
        killer=BACK,
    ),
    Mutant(
        name="parts-read-from-their-own-start",
        source="our own",
        story="A reader on another number of ranks takes the first rows of every file.",
        file=SHARDS,
        before="file.get_slice(name)[first - start : last - start]",
        after="file.get_slice(name)[0 : last - first]",
        killer=BACK,
    ),
    Mutant(
        name="another-tokenizer-under-the-same-name",
        source="our own",
        story="The model's folder has a new tokenizer: the resumed run reads other ids for the same text.",
        file=RUNS,
        before="for name in both if files[name] != found[name]",
        after="for name in both if files[name].keys() != found[name].keys()",
        killer="tests/test_runs.py::test_drift_is_refused_and_named_and_goes_on_where_it_is_accepted",
    ),
]
