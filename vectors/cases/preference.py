"""preference: losses on log-probabilities of whole completions, in pairs or one by one."""

import math

from case import Case, Drawn, Spec
from layout import elements

SUMS, MEANS = (-60.0, -5.0), (-3.0, -0.1)
PAIR = {"chosen_logps": Drawn("P", *SUMS), "rejected_logps": Drawn("P", *SUMS)}
FOUR = PAIR | {"ref_chosen_logps": Drawn("P", *SUMS), "ref_rejected_logps": Drawn("P", *SUMS)}
MEAN_PAIR = {"chosen_logps": Drawn("P", *MEANS), "rejected_logps": Drawn("P", *MEANS)}
OF_MEANS = dict.fromkeys(FOUR, MEANS)
CHOSEN_FAR, REJECTED_FAR = {"chosen_logps": (-1e4, -9e3)}, {"rejected_logps": (-1e4, -9e3)}
LOW_BETA = {"beta": 0.13}
SAME = {name: [-21.5, -8.25, -40.0, -5.75, -13.0] for name in FOUR}
POLICY = ("chosen_logps", "rejected_logps")
NAN = {"mask": "drop", "junk": math.nan}

MARGIN = Spec(
    "preference_margin",
    inputs=PAIR,
    layout=elements,
    masked="P",
    gradients=POLICY,
    cases=(
        Case("sums", {}),
        Case("mean over pairs", {}, mean=True),
        Case("means", {}, ranges=OF_MEANS),
        Case("a dropped pair holds NaN", {}, **NAN),
        Case("a dropped pair holds −inf", {}, mask="drop", junk=-math.inf),
        Case("a dropped pair holds 1e30", {}, mask="drop", junk=1e30),
        Case("chosen at −1e4", {}, ranges=CHOSEN_FAR),
        Case("rejected at −1e4", {}, ranges=REJECTED_FAR),
        Case("one pair", {}, sizes={"P": 1}),
    ),
)

DPO = Spec(
    "dpo_loss",
    inputs=FOUR,
    layout=elements,
    masked="P",
    gradients=POLICY,
    cases=(
        Case("sums", LOW_BETA, "sums: TRL sigmoid, OpenRLHF, torchtune, LLaMA-Factory", mean=True),
        Case("sums, weighted", LOW_BETA, "sums: TRL sigmoid, OpenRLHF, torchtune, LLaMA-Factory"),
        Case(
            "means", {"beta": 5.0}, "means: open-instruct dpo_norm, Tülu 3, TRL sigmoid_norm", ranges=OF_MEANS
        ),
        Case("label smoothing", LOW_BETA | {"label_smoothing": 0.17}, "cDPO: OpenRLHF, torchtune"),
        Case(
            "robust",
            LOW_BETA | {"label_smoothing": 0.17, "robust": True},
            "robust DPO: TRL robust",
            mean=True,
        ),
        Case("policy = reference: log 2", {"beta": 0.37}, given=SAME),
        Case("a dropped pair holds NaN", LOW_BETA, **NAN),
        Case(
            "a dropped pair holds inf, robust",
            LOW_BETA | {"label_smoothing": 0.3, "robust": True},
            mask="drop",
            junk=math.inf,
        ),
        Case(
            "a dropped pair holds 1e30, smoothed", LOW_BETA | {"label_smoothing": 0.3}, mask="drop", junk=1e30
        ),
        Case("chosen at −1e4", LOW_BETA, ranges=CHOSEN_FAR),
        Case("rejected at −1e4", LOW_BETA, ranges=REJECTED_FAR),
        Case("rejected at −1e4, smoothed", LOW_BETA | {"label_smoothing": 0.05}, ranges=REJECTED_FAR),
    ),
)

IPO = Spec(
    "ipo_loss",
    inputs=FOUR,
    layout=elements,
    masked="P",
    gradients=POLICY,
    cases=(
        Case("sums", LOW_BETA, "sums: OpenRLHF, rlhf-book", mean=True),
        Case("sums, weighted", LOW_BETA, "sums: OpenRLHF, rlhf-book"),
        Case("means", LOW_BETA, "means: TRL ipo", ranges=OF_MEANS, mean=True),
        Case("means, weighted", {"beta": 0.6}, "means: TRL ipo", ranges=OF_MEANS),
        Case("policy = reference: 1/(4β²)", {"beta": 0.37}, given=SAME),
        Case("a dropped pair holds NaN", LOW_BETA, **NAN),
        Case("a dropped pair holds 1e30", LOW_BETA, mask="drop", junk=1e30),
        Case("a dropped pair holds −inf", LOW_BETA, mask="drop", junk=-math.inf),
        Case("chosen at −1e4", LOW_BETA, ranges=CHOSEN_FAR),
        Case("rejected at −1e4", {"beta": 0.021}, ranges=REJECTED_FAR),
    ),
)

WEIGHTS = {"desirable_weight": 1.33, "undesirable_weight": 0.8}
KTO = Spec(
    "kto_loss",
    inputs={
        "logps": Drawn("P", *SUMS),
        "ref_logps": Drawn("P", *SUMS),
        "desirable": Drawn("P", options=(0, 1)),
        "kl": Drawn("", 0.2, 3.0),
    },
    layout=elements,
    masked="P",
    gradients=("logps",),
    cases=(
        Case("mean", LOW_BETA | WEIGHTS, "TRL kto, OpenRLHF KTOLoss", mean=True),
        Case("weighted", LOW_BETA | WEIGHTS, "TRL kto, OpenRLHF KTOLoss"),
        Case(
            "a negative KL counts as 0", LOW_BETA | WEIGHTS, "TRL kto, OpenRLHF KTOLoss", given={"kl": -0.7}
        ),
        Case(
            "both weights 1",
            LOW_BETA | dict.fromkeys(WEIGHTS, 1.0),
            "no weights: Liger-Kernel, TRL's defaults",
            mean=True,
        ),
        Case("all desirable", LOW_BETA | WEIGHTS, given={"desirable": [1] * 5}),
        Case("none desirable", LOW_BETA | WEIGHTS, given={"desirable": [0] * 5}),
        Case("a dropped row holds NaN", {"beta": 0.3} | WEIGHTS, **NAN),
        Case("a dropped row holds 1e30", {"beta": 0.3} | WEIGHTS, mask="drop", junk=1e30),
        Case("policy at −1e4", LOW_BETA | WEIGHTS, ranges={"logps": (-1e4, -9e3)}),
        Case("reference at −1e4", LOW_BETA | WEIGHTS, ranges={"ref_logps": (-1e4, -9e3)}),
        Case("a KL of 50", {"beta": 0.021} | WEIGHTS, given={"kl": 50.25}),
    ),
)

ORPO = Spec(
    "orpo_loss",
    inputs=MEAN_PAIR,
    layout=elements,
    masked="P",
    gradients=POLICY,
    cases=(
        Case("mean", {"odds_weight": 0.13}, "the paper, Liger-Kernel", mean=True),
        Case("weighted", {"odds_weight": 0.13}, "the paper, Liger-Kernel"),
        Case("a large weight", {"odds_weight": 2.7}),
        Case("sure of both", {"odds_weight": 0.6}, ranges=dict.fromkeys(POLICY, (-0.02, -0.001))),
        Case("a dropped pair holds NaN", {"odds_weight": 0.6}, **NAN),
        Case("a dropped pair holds −inf", {"odds_weight": 0.6}, mask="drop", junk=-math.inf),
        Case("chosen at −1e4", {"odds_weight": 0.6}, ranges=CHOSEN_FAR),
        Case("rejected at −1e4", {"odds_weight": 0.6}, ranges=REJECTED_FAR),
        Case("long texts: sums in place of means", {"odds_weight": 0.13}, ranges=dict.fromkeys(POLICY, SUMS)),
    ),
)

SIMPO = Spec(
    "simpo_loss",
    inputs=MEAN_PAIR,
    layout=elements,
    masked="P",
    gradients=POLICY,
    cases=(
        Case(
            "γ is the margin",
            {"beta": 2.1, "margin": 0.55},
            "γ itself .55: the paper, TRL simpo, LLaMA-Factory",
            mean=True,
        ),
        Case(
            "γ is the margin, weighted",
            {"beta": 2.1, "margin": 0.55},
            "γ itself .55: the paper, TRL simpo, LLaMA-Factory",
        ),
        Case(
            "γ is a ratio to β",
            {"beta": 2.1, "margin": 2.1 * 0.3},
            "gamma_beta_ratio .3, margin β · .3: open-instruct, SimPO's own code",
            mean=True,
        ),
        Case("a margin of 0", {"beta": 2.1, "margin": 0.0}),
        Case("a large margin", {"beta": 10.5, "margin": 5.25}),
        Case("a dropped pair holds NaN", {"beta": 2.1, "margin": 0.55}, **NAN),
        Case("a dropped pair holds 1e30", {"beta": 2.1, "margin": 0.55}, mask="drop", junk=1e30),
        Case("chosen at −1e4", {"beta": 2.1, "margin": 0.55}, ranges=CHOSEN_FAR),
        Case("rejected at −1e4", {"beta": 2.1, "margin": 0.55}, ranges=REJECTED_FAR),
    ),
)

SPECS = (MARGIN, DPO, IPO, KTO, ORPO, SIMPO)
