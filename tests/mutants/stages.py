"""The bugs of other projects' evaluations, put back into the measuring of a stage."""

from tests.mutants.mutant import Mutant

STAGES = "nanopost/evals/stages.py"

MUTANTS = [
    Mutant(
        name="verdicts_of_the_other_model",
        source="NeMo#3635",
        story="Completions are paired with verdicts that belong to others: lengths alone decide who wins.",
        file=STAGES,
        before="candidates(chat, theirs, others)",
        after="candidates(chat, theirs, found)",
        killer="tests/evals/test_stages.py::test_against_another_it_is_judged_prompt_by_prompt",
    ),
]
