"""distill: a student against a teacher, over the vocabulary, its top tokens or the hidden states."""

import math
from collections.abc import Iterator
from typing import Any

from case import Case, Drawn, Spec, indices, nested, shape_of
from layout import Slot, Unit, elements, kept

NAN, INF = math.nan, math.inf
LOGITS = {"student_logits": Drawn("BTV", -3, 3), "teacher_logits": Drawn("BTV", -3, 3)}
HUGE = {
    "student_logits": [[[9.0e3, 9001.5, -1e4, 0.0], [1e4, -1e4, 0.0, 9999.25]]],
    "teacher_logits": [[[9000.25, 9.0e3, 8999.0, -1e4], [-1e4, -9998.5, -1e4, -9999.0]]],
}
OUTSIDE = {  # a token that neither has
    "student_logits": [[[0.5, -INF, 1.25, -0.75], [-INF, -INF, 0.3, 1.9]]],
    "teacher_logits": [[[-0.25, -INF, 0.8, 1.1], [-INF, -INF, 1.4, -0.6]]],
}
SMALL = {"B": 1, "T": 2, "V": 4}
HERE = [[[0.5, -0.2, 1.25, -0.75], [0.9, 1.6, 0.3, 1.9]]]
MISSING = [[[-0.25, -INF, 0.8, 1.1], [0.7, 1.3, 1.4, -0.6]]]  # the first position lacks a token


def divergence(name: str, argument: dict[str, float], *cases: Case) -> Spec:
    """The questions that every divergence of two rows of logits is asked."""
    return Spec(
        name,
        inputs=LOGITS,
        layout=elements,
        gradients=("student_logits",),
        cases=(
            Case("temperature 1.9", {"temperature": 1.9} | argument, mask="tail"),
            Case("temperature .6", {"temperature": 0.6} | argument, mask="tail"),
            Case("holes over NaN", {"temperature": 1.9} | argument, mask="holes", junk=NAN),
            Case("a row without tokens over inf", {"temperature": 0.6} | argument, mask="row", junk=INF),
            Case("left padding over 1e30", {"temperature": 1.9} | argument, mask="head", junk=1e30),
            Case("logits of 1e4", {"temperature": 1.3} | argument, sizes=SMALL, given=HUGE),
            Case("a token that neither has", {"temperature": 1.3} | argument, sizes=SMALL, given=OUTSIDE),
            Case(
                "student = teacher: 0 and no gradient",
                {"temperature": 1.3} | argument,
                sizes=SMALL,
                given=dict.fromkeys(LOGITS, HERE),
            ),
            *cases,
        ),
    )


FORWARD = divergence(
    "forward_kl",
    {},
    Case("temperature 1", {"temperature": 1.0}, "TRL GKD β = 0, Liger-Kernel", mask="tail", mean=True),
    Case(
        "a token that the student lacks: infinite",
        {"temperature": 1.3},
        sizes=SMALL,
        given={"student_logits": MISSING, "teacher_logits": HERE},
    ),
)
REVERSE = divergence(
    "reverse_kl",
    {},
    Case("temperature 1", {"temperature": 1.0}, "TRL GKD β = 1, MiniLLM, torchtune", mask="tail", mean=True),
    Case(
        "a token that the teacher lacks: infinite",
        {"temperature": 1.3},
        sizes=SMALL,
        given={"student_logits": HERE, "teacher_logits": MISSING},
    ),
)
JSD = divergence(
    "generalized_jsd",
    {"beta": 0.27},
    Case("β = .1", {"beta": 0.1, "temperature": 1.0}, "GKD: TRL, Liger-Kernel", mask="tail", mean=True),
    Case("β = .5", {"beta": 0.5, "temperature": 1.0}, "GKD: TRL, Liger-Kernel", mask="tail", mean=True),
    Case("β = .9", {"beta": 0.9, "temperature": 1.0}, "GKD: TRL, Liger-Kernel", mask="tail", mean=True),
    Case(
        "a token that the teacher lacks: finite",
        {"beta": 0.27, "temperature": 1.3},
        sizes=SMALL,
        given={"student_logits": HERE, "teacher_logits": MISSING},
    ),
)

ALL = [[[-0.693147, -1.386294, -2.079442, -2.079442], [-1.203973, -0.356675, -INF, -INF]]]
TOP_K = Spec(
    "top_k_forward_kl",
    inputs={
        "student_logits": Drawn("BTV", -3, 3),
        "teacher_logps": Drawn("BTK", -3, -1.2),
        "teacher_ids": Drawn("BTK", below="V", distinct=True),
    },
    layout=elements,
    gradients=("student_logits",),
    cases=tuple(
        Case(name, {"temperature": tau}, **({"sizes": {"K": 3}} | options))
        for name, tau, options in (
            ("three of six", 1.0, {"mask": "tail", "mean": True}),
            ("three of six, temperature 1.9", 1.9, {"mask": "tail"}),
            ("one of six", 0.7, {"mask": "tail", "sizes": {"K": 1}}),
            ("holes over NaN", 1.9, {"mask": "holes", "junk": NAN}),
            ("a row without tokens over inf", 0.7, {"mask": "row", "junk": INF}),
            ("left padding over 1e30", 0.7, {"mask": "head", "junk": 1e30}),
            (
                "the whole vocabulary, two tokens of probability 0",
                1.3,
                {
                    "sizes": SMALL | {"K": 4},
                    "given": {"teacher_logps": ALL, "teacher_ids": [[[2, 0, 3, 1], [1, 3, 0, 2]]]},
                },
            ),
            ("student's logits of 1e4", 1.3, {"ranges": {"student_logits": (-1e4, 1e4)}}),
        )
    ),
)


def states(spec: Spec, case: Case, inputs: dict[str, Any], mask: Any) -> Iterator[Unit]:
    """One call a token with its two states and the whole projection."""
    width, wide = shape_of("SD", case)
    projection = nested((width, wide), lambda i: Slot("projection", i))
    for index in kept(mask, shape_of("BT", case)):
        student = [Slot("student_hidden", (*index, *i)) for i in indices((width,))]
        teacher = [Slot("teacher_hidden", (*index, *i)) for i in indices((wide,))]
        yield [student, teacher, projection], [index]


HIDDEN = Spec(
    "hidden_state_loss",
    inputs={
        "student_hidden": Drawn("BTS", -2, 2),
        "teacher_hidden": Drawn("BTD", -2, 2),
        "projection": Drawn("SD", -1, 1),
    },
    layout=states,
    gradients=("student_hidden", "projection"),
    cases=(
        Case("mean", {}, mask="tail", mean=True),
        Case("weighted", {}, mask="tail"),
        Case("full", {}),
        Case("a wider student", {}, mask="tail", sizes={"S": 5, "D": 3}),
        Case("holes over NaN", {}, mask="holes", junk=NAN),
        Case("a row without tokens over inf", {}, mask="row", junk=INF),
        Case("left padding over 1e30", {}, mask="head", junk=1e30),
        Case("states of 1e4", {}, ranges={"student_hidden": (-1e4, 1e4), "teacher_hidden": (-1e4, 1e4)}),
        Case("one number a state", {}, sizes={"S": 1, "D": 1}),
    ),
)

SPECS = (FORWARD, REVERSE, JSD, TOP_K, HIDDEN)
