"""Bugs that move the place where a descent ends, found by going there."""

from tests.mutants.mutant import Mutant

DISTILL, PREFERENCE = "nanopost/losses/distill.py", "nanopost/losses/preference.py"
RETURNS, VARIANTS = "nanopost/losses/returns.py", "nanopost/losses/variants.py"
REACHES = "tests/losses/test_optima.py::test_it_reaches_the_optimum"

MUTANTS = [
    Mutant(
        name="beta_divides_the_gain",
        source="tinker#172",
        story="β is put on the wrong side: what should hold the policy near the reference lets it go.",
        file=PREFERENCE,
        before="loss, flipped = -logsigmoid(beta * h), -logsigmoid(-beta * h)",
        after="loss, flipped = -logsigmoid(h / beta), -logsigmoid(-h / beta)",
        killer=f"{REACHES}[dpo-0.3]",
    ),
    Mutant(
        name="dpo_without_its_reference",
        source="LLaMA-Factory#8459",
        story="The reference is forgotten: the policy learns the reward and loses its language.",
        file=PREFERENCE,
        before="return held(preference_margin(chosen, rejected) - reference)",
        after="return held(preference_margin(chosen, rejected) - 0.0 * reference)",
        killer=f"{REACHES}[dpo-1.0]",
    ),
    Mutant(
        name="flipped_labels_are_not_given_back",
        source="trl#4171",
        story="The robust loss smooths instead of correcting: noisy labels draw every reward towards 0.",
        file=PREFERENCE,
        before="return ((1.0 - label_smoothing) * loss - label_smoothing * flipped)",
        after="return ((1.0 - label_smoothing) * loss + label_smoothing * flipped)",
        killer=f"{REACHES}[robust dpo, labels flipped-1.0]",
    ),
    Mutant(
        name="distance_to_the_reference_is_rewarded",
        source="verl#179",
        story="The KL in the reward has the wrong sign: the policy is paid for leaving the reference.",
        file=RETURNS,
        before="return terminal - beta * (ours - reference)",
        after="return terminal + beta * (ours - reference)",
        killer=f"{REACHES}[ppo, exact critic-1.0]",
    ),
    Mutant(
        name="log_ratio_in_the_reward_is_clamped",
        source="NeMo#2958",
        story="A token pays for its distance up to a limit: whoever is beyond it goes on for free.",
        file=RETURNS,
        before="return terminal - beta * (ours - reference)",
        after="return terminal - beta * (ours - reference).clamp(-1.0, 1.0)",
        killer=f"{REACHES}[reinforce, KL in the reward-0.3]",
    ),
    Mutant(
        name="rloo_leaves_the_kl_out",
        source="OpenRLHF#1309",
        story="The group's baseline is taken of the bare scores: β is in the settings and nowhere else.",
        file=VARIANTS,
        before="rewards = rewards - variant.beta * sequence_logps(",
        after="rewards = rewards - 0.0 * sequence_logps(",
        killer=f"{REACHES}[rloo-1.0]",
    ),
    Mutant(
        name="teacher_keeps_its_temperature",
        source="slime#2085",
        story="The temperature reaches the student alone: it ends as the teacher at another temperature.",
        file=DISTILL,
        before="rows = [sound_rows(wide(tensor) / temperature) for tensor in logits.values()]",
        after=(
            'rows = [sound_rows(wide(tensor) / (temperature if name == "student_logits" else 1.0)) '
            "for name, tensor in logits.items()]"
        ),
        killer=f"{REACHES}[distillation, on-policy, reverse KL-2.0]",
    ),
]
