"""advantages: what a sample is compared with. Weights without a gradient, so only values."""

from case import Case, Drawn, Spec
from layout import flat, groups

REWARDS = {"rewards": Drawn("N", -1, 2)}
STD = {"group_size": 4, "scale": "std"}

GROUP_ADVANTAGES = Spec(
    "group_advantages",
    inputs=REWARDS,
    layout=groups,
    masked="N",
    for_layout=("group_size",),
    cases=(
        Case(
            "no scale",
            {"group_size": 4, "scale": "none"},
            "no division: open-instruct default, nanochat, tinker, Dr. GRPO, TRL scale_rewards=none",
        ),
        Case("unbiased, 1e-4", STD | {"ddof": 1, "eps": 1e-4}, "TRL scale_rewards=group"),
        Case("unbiased, 1e-6", STD | {"ddof": 1, "eps": 1e-6}, "verl"),
        Case("unbiased, 1e-8", STD | {"ddof": 1, "eps": 1e-8}, "rlhf-book"),
        Case("unbiased, 1e-9", STD | {"ddof": 1, "eps": 1e-9}, "OpenRLHF"),
        Case("biased, 1e-4", STD | {"ddof": 0, "eps": 1e-4}, "minimind, GRPO-Zero"),
        Case("biased, 1e-8", STD | {"ddof": 0, "eps": 1e-8}, "open-instruct standard"),
        Case("groups of 3", {"group_size": 3, "scale": "std", "ddof": 1, "eps": 0.037}, sizes={"N": 9}),
        Case(
            "equal rewards give exactly 0",
            STD | {"ddof": 1, "eps": 1e-4},
            given={"rewards": [0.1, 0.1, 0.1, 0.1, 1.0, 0.0, 0.0, 0.0]},
        ),
        Case(
            "a group of one gives 0",
            {"group_size": 1, "scale": "std", "ddof": 1, "eps": 1e-4},
            "a group of one: TRL",
            sizes={"N": 3},
        ),
        Case("rewards of 1e4", STD | {"ddof": 0, "eps": 1e-4}, ranges={"rewards": (-1e4, 1e4)}),
        Case(
            "graded, no scale",
            {"group_size": 4, "scale": "none"},
            sizes={"N": 4},
            given={"rewards": [1.0, 0.6, 0.2, 0.0]},
        ),
    ),
)

LEAVE_ONE_OUT = Spec(
    "leave_one_out_advantages",
    inputs=REWARDS,
    layout=groups,
    masked="N",
    for_layout=("group_size",),
    cases=(
        Case("groups of 4", {"group_size": 4}, "TRL RLOO, OpenRLHF rloo, verl rloo"),
        Case("pairs", {"group_size": 2}),
        Case("one group of 8", {"group_size": 8}),
        Case("groups of 3", {"group_size": 3}, sizes={"N": 9}),
        Case("one of four right", {"group_size": 4}, sizes={"N": 4}, given={"rewards": [1.0, 0.0, 0.0, 0.0]}),
        Case("equal rewards give exactly 0", {"group_size": 4}, given={"rewards": [0.1] * 4 + [0.7] * 4}),
        Case("negative rewards", {"group_size": 4}, ranges={"rewards": (-9, -1)}),
        Case("rewards of 1e4", {"group_size": 4}, ranges={"rewards": (-1e4, 1e4)}),
    ),
)

INFORMATIVE = Spec(
    "informative_groups",
    inputs={"rewards": Drawn("N", options=(0.0, 1.0))},
    layout=groups,
    masked="N",
    for_layout=("group_size",),
    cases=(
        Case("pairs of 0 and 1", {"group_size": 2}, "DAPO's dynamic sampling: verl, open-instruct"),
        Case("groups of 4", {"group_size": 4}),
        Case("all right, then one wrong", {"group_size": 4}, given={"rewards": [1.0] * 7 + [0.0]}),
        Case("all wrong", {"group_size": 4}, given={"rewards": [0.0] * 8}),
        Case("equal and not 0 or 1", {"group_size": 4}, given={"rewards": [0.1] * 4 + [0.3, 0.3, 0.3, 0.6]}),
        Case("graded", {"group_size": 4}, given={"rewards": [0.2, 0.9, -1.4, 0.2, 5.5, 5.5, 5.5, 5.5]}),
        Case("a group of one", {"group_size": 1}, sizes={"N": 3}),
        Case(
            "one part in a million apart",
            {"group_size": 2},
            sizes={"N": 2},
            given={"rewards": [1.0, 1.000001]},
        ),
    ),
)

WHITEN = Spec(
    "whiten",
    inputs={"advantages": Drawn("BT", -2, 3), "mask": Drawn("BT")},
    layout=flat,
    cases=(
        Case(
            "unbiased",
            {"ddof": 1, "eps": 1e-8},
            "masked_whiten: TRL, verl",
            mask="tail",
        ),
        Case("biased", {"ddof": 0, "eps": 1e-8}, mask="tail"),
        Case(
            "biased, hardly an ε",
            {"ddof": 0, "eps": 1e-12},
            "biased, the variance held at 1e-8 from below: OpenRLHF",
            mask="tail",
        ),
        Case("a large ε", {"ddof": 1, "eps": 0.31}, mask="tail"),
        Case("holes over NaN", {"ddof": 1, "eps": 1e-5}, mask="holes", junk=float("nan")),
        Case("a row without tokens over 1e30", {"ddof": 0, "eps": 1e-5}, mask="row", junk=1e30),
        Case("left padding over inf", {"ddof": 1, "eps": 1e-3}, mask="head", junk=float("inf")),
        Case("advantages of 1e4", {"ddof": 1, "eps": 1e-8}, ranges={"advantages": (-1e4, 1e4)}),
        Case(
            "all equal give exactly 0",
            {"ddof": 1, "eps": 1e-8},
            mask="tail",
            given={"advantages": [[0.1] * 5] * 3},
        ),
        Case("one token gives 0", {"ddof": 1, "eps": 1e-8}, mask="one", junk=float("nan")),
    ),
)

SPECS = (GROUP_ADVANTAGES, LEAVE_ONE_OUT, INFORMATIVE, WHITEN)
