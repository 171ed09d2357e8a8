"""What the demo does: the models' shapes, the numbers of each step, the commands of each plan in order."""

from typing import Any, NamedTuple

SEED = 0

# The decoder: 0.7 M parameters under the hub's names; vocab_size comes from the tokenizer.
MODEL = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 200.0,
    "tie_word_embeddings": True,
}
# The student's, 0.17 M parameters: what is another number. Three layers again: of two it needs more steps.
STUDENT = {
    "hidden_size": 80,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
# Entries under a step's name are flags added to its command. A JSON file given with --settings replaces
# entries: tiny.json makes the demo a test of seconds.
SETTINGS: dict[str, Any] = {
    "model": MODEL,
    "student_model": STUDENT,
    "vocab_size": 512,
    "corpora": {
        "base": 24000, "sft": 3000, "preference": 800, "rl": 4000, "test": 400,
        "slip_share": 0.3, "padded_share": 0.5,
    },
    "max_new_tokens": 64,
    "base": "--max-length 96 --steps 1000 --batch-size 32 --lr 3e-3 --warmup 60",
    "sft": "--max-length 128 --epochs 2 --batch-size 32 --lr 1e-3 --warmup 10",
    "pairs": "--margin 4 --pairs-per-group 2",
    "preference": "--steps 36 --batch-size 64 --lr 4e-4 --schedule linear --warmup 5",
    "grpo": "--steps 40 --lr 4e-4 --schedule linear --warmup 3",
    "student": "--steps 800 --batch-size 32 --lr 5e-3 --warmup 40",
    "zero": "--steps 100 --lr 4e-4 --schedule linear --warmup 3",
}  # fmt: skip


class Step(NamedTuple):
    """One command of a plan. A stage leaves its model in OUT/name/model and has a row in the table."""

    name: str
    command: (
        str  # {out} is the demo's folder, {name} the step's name; {max_new_tokens} and {seed} are numbers
    )
    settings: str  # the entry of SETTINGS whose flags are added
    stage: bool = True


SHARED = "--threads 1 --seed {seed}"
SFT = "train_sft.py --out {out}/{name}"
GRPO = (
    "train_grpo.py --out {out}/{name} --data {out}/data/rl.jsonl --verifier ledger"
    " --eval-data {out}/data/test.jsonl --prompts-per-step 32 --group-size 8 --micro-batch 32"
    " --max-new-tokens {max_new_tokens}"
)
BASE = Step("base", f"{SFT} --model {{out}}/world --data {{out}}/data/base.jsonl --from-scratch", "base")
PLANS: dict[str, tuple[Step, ...]] = {
    "demo": (
        BASE,
        Step("sft", f"{SFT} --model {{out}}/base/model --data {{out}}/data/sft.jsonl", "sft"),
        Step(
            "pairs",
            "-m nanopost.evals.candidates --model {out}/sft/model --data {out}/data/preference.jsonl"
            " --verifier nanopost.worlds.ledger:verify --rule right_and_concise --out {out}/data/pairs.jsonl"
            " --max-new-tokens {max_new_tokens}",
            "pairs",
            stage=False,
        ),
        Step(
            "preference",
            "train_dpo.py --model {out}/sft/model --data {out}/data/pairs.jsonl --out {out}/{name}"
            " --loss dpo_norm --beta 10 --sft-weight 8",
            "preference",
        ),
        Step("grpo", f"{GRPO} --model {{out}}/preference/model", "grpo"),
        Step(
            "student",
            "train_distill.py --out {out}/{name} --mode text --model {out}/world-student --from-scratch"
            " --teacher {out}/grpo/model --data {out}/data/rl.jsonl --temperature 0"
            " --max-new-tokens {max_new_tokens}",
            "student",
        ),
    ),
    "demo-zero": (BASE, Step("grpo", f"{GRPO} --model {{out}}/base/model", "zero")),
}
TITLES = {
    "demo": "From a base model to an assistant, and to a small one",
    "demo-zero": "Reinforcement learning from the base",
}
