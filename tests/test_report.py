"""The page of a run: what it must show, what it must never do, and the same bytes every time."""

import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest

from nanopost import config, metrics, report, report_figures, runs

ROOT = Path(__file__).resolve().parent.parent
VOID = {"meta", "input", "br", "link", "img"}
ATTACK = '"><script>alert("x")</script>\x00\u202e'
RL = ["Reward", "Length", "Entropy", "KL to the reference", "KL to the sampler", "Groups without signal"]
RL += ["Gradient norm", "Surrogate loss", "Clipped", "Stopped", "Time"]
STAGES: list[dict[str, Any]] = [
    {
        "stage": "base",
        "strict_json": 0.1275,
        "exact_greedy": 0.0625,
        "exact_sampled": 0.0425,
        "refusal_precision": None,
        "refusal_recall": 0.0,
        "worked": 0.2225,
        "mean_length": 18.375,
        "kl": None,
        "seconds": 141.2,
        "samples": [{"prompt": "1+1?\n", "completion": "two\nor three", "exact": False}],
    },
    {
        "stage": "grpo",
        "strict_json": 0.9925,
        "exact_greedy": 0.9125,
        "exact_sampled": 0.8775,
        "refusal_precision": 1.0,
        "refusal_recall": 0.9876,
        "worked": 0.6325,
        "mean_length": 1234.5,
        "kl": 3.4142,
        "seconds": 59.4,
        "samples": [{"prompt": "1+1?\n", "completion": ATTACK, "exact": True}],
    },
]
# The same numbers as a reader should see them, row by row.
SEEN = "12.8% 99.2% 6.2% 91.2% 4.2% 87.8% – 100.0% 0.0% 98.8% 22.2% 63.2% 18.4 1,234 – 3.41"
SEEN_TIMES = ["2 min 21 s", "59 s"]


@dataclass(frozen=True)
class Config(config.Machine):
    model: str = "start/model"
    data: str = "<b>data</b>.jsonl"
    steps: int = 4
    eval_data: str | None = None


class Page(HTMLParser):
    """The page as a browser would take it apart: elements with attributes, and the text of chosen ones."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        self.texts.setdefault(tag, [])
        if tag not in VOID:
            self.open.append(tag)
            self.texts[tag].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    @property
    def titles(self) -> list[str]:
        return [dict(attrs)["aria-label"].split(" by step:")[0] for tag, attrs in self.tags if tag == "svg"]  # type: ignore[union-attr]


def row(line: int, advantage: float, tokens: list[str], **more: Any) -> dict[str, Any]:
    return {
        "line": line,
        "prompt": f"prompt {line}\n",
        "tokens": tokens,
        "completion": "".join(tokens),
        "score": 1.0 if advantage > 0 else 0.25,
        "parts": {"exact": float(advantage > 0), "shape": 0.5},
        "reason": "right" if advantage > 0 else "wrong",
        "advantage": advantage,
        "finish": "stop",
        "old_logps": [-0.125 * (1 + i) for i in range(len(tokens))],
    } | more


def rl_run(folder: Path, steps: int = 4, **more: float) -> Path:
    runs.open_run(folder, Config(), env={"template": "abc123"})
    for step in range(steps):
        values: dict[str, Any] = {
            "reward": 0.25 + step / (8 * steps),
            "no_signal": 0.5,
            "length": 30.0 - step % 9,
        }
        values |= {"stopped": 1.0, "clipped": 0.0, "entropy": 0.5, "kl_old": 5e-13, "kl_ref": 0.001 * step}
        values |= {
            "loss": -0.0002,
            "grad_norm": 1.5,
            "rollout_s": 2.0,
            "verify_s": 0.5,
            "train_s": 30.0,
            **more,
        }
        if step % 2:
            values |= {"eval_reward": 0.75, "eval_length": 12.0}
        metrics.write_record(folder, step, values)
    for step in (0, 2, steps - 1):
        rows = [row(1, 0.0, ["same", ""]), row(1, 0.0, ["same", ""])]
        rows += [row(2, -0.5, [f"low{step}", "\n", ""]), row(2, 0.5, [f"high{step}", " b", ""])]
        rows += [row(n, sign * 0.125, [f"g{n}", ""]) for n in (3, 4, 5) for sign in (1, -1)]
        metrics.write_rollouts(folder, step, rows)
    return folder


def sft_run(folder: Path, steps: int = 3) -> Path:
    runs.open_run(folder, Config(), env={})
    for step in range(steps):
        values = {
            "loss": 3.0 - step / steps,
            "lr": 1e-4 / (1 + step),
            "grad_norm": 1.0,
            "tokens": 99,
            "seconds": 0.5,
        }
        metrics.write_record(folder, step, values | ({"eval_loss": 2.5} if step == steps - 1 else {}))
    return folder


def run_of(
    folder: Path, records: list[dict[str, Any]], evaluation: dict[str, Any] | None = None, **args: Any
) -> Path:
    runs.open_run(folder, Config(), env={})
    if args:
        (folder / "args.json").write_text(json.dumps({"model": "m", "data": "d", **args}), encoding="utf-8")
    for step, values in enumerate(records):
        metrics.write_record(folder, step, values)
    if evaluation:
        (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return folder


def ppo_record(step: int, **more: float) -> dict[str, Any]:
    values = {"reward": 0.5 * step, "verified": 0.75 - step / 8, "exact": 0.5, "stopped": 1.0, "length": 9.0}
    values |= {"entropy": 0.1, "clipped": 0.0, "kl_old": 0.0, "kl_ref": 0.125 * step, "loss": 0.0, "lr": 1e-4}
    return values | {"value_loss": 0.25, "explained_variance": 0.5, "beta": 0.25, "grad_norm": 1.0} | more


def demo(folder: Path, **changes: Any) -> Path:
    sft_run(folder / "base")
    rl_run(folder / "grpo", worked=0.5)
    summary = {"title": "A <demo>", "intro": "What it is.", "machine": "2 cores", "seconds": 331.4}
    summary |= {"stages": STAGES, "runs": [{"name": n, "folder": n} for n in ("base", "grpo")], **changes}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def rl_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(report.write_report(rl_run(tmp_path_factory.mktemp("rl") / "run")))


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(report.write_report(demo(tmp_path_factory.mktemp("demo") / "demo")))


# ---- what it shows


def test_the_page_lies_in_the_folder_it_is_about(tmp_path: Path) -> None:
    path = report.write_report(sft_run(tmp_path / "sft"))
    page = Page(path)
    assert path == tmp_path / "sft" / "report.html" and page.texts["h1"] == ["sft"]
    assert page.titles == ["Loss", "Learning rate", "Gradient norm", "Time", "Tokens"]
    assert "Samples" not in page.source and "held out" in page.source


def test_a_reinforcement_run(rl_page: Page) -> None:
    assert rl_page.texts["h1"] == ["run"] and rl_page.titles == RL
    figure = next(a["aria-label"] for t, a in rl_page.tags if t == "svg")
    assert figure and "sampled from 0.25 to 0.344, between 0.25 and 0.344" in figure and "held out" in figure
    for said in ("start/model", "<b>data</b>.jsonl", "2 min 10 s", "abc123", "packages.torch"):  # 4 × 32.5 s
        assert html.escape(said) in rl_page.source
    assert "null" in rl_page.texts["td"]


def test_the_first_and_the_last_written_step_show_whole_groups_best_first(rl_page: Page) -> None:
    assert rl_page.texts["h3"] == ["Samples of steps 0 and 3"]
    assert "1 of 5 groups without signal" in rl_page.source
    samples = rl_page.texts["li"]
    assert len(samples) == 2 * (2 + 2 + 2)  # three groups of two a step, the widest first
    assert [s for s in samples if "low2" in s or "same" in s or "g5" in s] == []
    for step, at in ((0, 0), (3, 6)):
        assert f"high{step}" in samples[at] and f"low{step}" in samples[at + 1]
    assert all(word in samples[0] for word in ("score 1", "advantage +0.50", "right", "● exact", "shape 0.5"))
    assert all(
        word in samples[1] for word in ("score 0.25", "advantage −0.50", "wrong", "○ exact", "↵\n", "■")
    )


def test_tokens_carry_their_advantage_and_log_prob(rl_page: Page) -> None:
    styles = [
        (a["class"], a["style"]) for _, a in rl_page.tags if (a.get("class") or "").startswith("tokens")
    ]
    assert styles[:4] == [
        ("tokens pos", "--tone:1.0"),
        ("tokens neg", "--tone:1.0"),
        ("tokens pos", "--tone:0.25"),
        ("tokens neg", "--tone:0.25"),
    ]
    assert '<span title="log p −0.125">high0</span><span title="log p −0.25"> b</span>' in rl_page.source


def test_a_surprising_token_and_a_cut_sample_are_marked(tmp_path: Path) -> None:
    run = rl_run(tmp_path / "run")
    rows = [row(9, 1.0, ["a", "b"], old_logps=[-0.69, -0.70], finish="length"), row(9, 0.0, ["c", ""])]
    metrics.write_rollouts(run, 3, rows)
    page = Page(report.write_report(run))
    assert '<span title="log p −0.69">a</span><span class="rare" title="log p −0.7">b</span>' in page.source
    assert "cut off at the length limit, 2 tokens" in page.source and "stopped, 2 tokens" in page.source


def test_worked_share_stands_between_reward_and_length_and_the_unplanned_last(tmp_path: Path) -> None:
    page = Page(report.write_report(rl_run(tmp_path / "run", worked=0.5, margin=0.5)))
    assert page.titles == ["Reward", "Worked share", *RL[1:], "margin"]


def test_every_stage_number_appears(demo_page: Page) -> None:
    numbers = [float(attrs["value"] or "") for tag, attrs in demo_page.tags if tag == "data"]
    keys = [key for key in STAGES[0] if key not in ("stage", "samples")]
    assert numbers == [stage[key] for key in keys for stage in STAGES if stage[key] is not None]
    assert [text.strip() for text in demo_page.texts["td"]][1:19] == [*SEEN.split(), *SEEN_TIMES]
    bars = re.findall(r'<i style="width:([\d.]+)%">', demo_page.source)
    assert [round(float(bar) / 100, 6) for bar in bars] == numbers[:11]
    assert (
        demo_page.texts["h1"] == ["A <demo>"]
        and "5 min 31 s" in demo_page.source
        and "2 cores" in demo_page.source
    )


def test_a_demo_shows_its_runs_and_the_answers_of_each_stage_to_one_prompt(demo_page: Page) -> None:
    assert [a["id"] for t, a in demo_page.tags if t == "section"] == ["stages", "answers", "run-0", "run-1"]
    assert (
        demo_page.titles[:3] == ["Loss", "Learning rate", "Gradient norm"]
        and "Worked share" in demo_page.titles
    )
    assert demo_page.texts["pre"] == ["two↵\nor three", '"><script>alert("x")</script>␀\u202e']
    assert [text[:5].strip() for text in demo_page.texts["dt"] if "exact" in text] == ["base✗", "grpo✓"]


# ---- other kinds of run


COMMON = {"lr": 1e-4, "grad_norm": 1.0, "tokens": 9, "seconds": 0.5}


def seen(path: Path, title: str) -> str:
    """What a reader sees over the figure of that title."""
    page = Page(report.write_report(path))
    return next(" ".join(text.split()) for text in page.texts["figcaption"] if text.strip().startswith(title))


def test_a_ppo_run_shows_where_score_and_verifier_part(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [ppo_record(s, eval_reward=1.0, eval_verified=0.5) for s in range(3)])
    metrics.write_rollouts(run, 2, [row(1, 0.5, ["a", ""]), row(1, -0.5, ["b", ""])])
    page = Page(report.write_report(run))
    titles = ["Reward and verified", "The same, held out", "Exact", "Length", "KL to the reference", "β"]
    titles += ["Critic's loss", "Explained variance", "Entropy", "KL to the sampler", "Gradient norm"]
    assert page.titles == [*titles, "Surrogate loss", "Clipped", "Stopped", "Learning rate"]
    both = seen(run, "Reward and verified")
    assert both.endswith("reward model 0 → 1 verifier 75% → 50%")  # each on its own scale
    drawing = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)[0]
    labels = re.findall(r'<text style="([^"]*)"[^>]*>([^<]+)</text>', drawing)
    colours = {text: re.findall(r"var\(--\w+\)", style) for style, text in labels}
    assert colours["100%"] == ["var(--two)"] and colours["1"] == ["var(--one)"]
    assert "than the critic expected" in page.source and "without signal" not in page.source


def test_ppo_with_a_verifier_alone_has_one_reward(tmp_path: Path) -> None:
    records = [{k: v for k, v in ppo_record(s).items() if k != "verified"} for s in range(3)]
    assert Page(report.write_report(run_of(tmp_path / "run", records))).titles[:2] == ["Reward", "Exact"]


def test_a_preference_run_lays_both_changes_on_one_figure(tmp_path: Path) -> None:
    values = {"loss": 0.5, "margin": 1.0, "accuracy": 0.75, "chosen_change": -1.0, "rejected_change": -3.0}
    values |= {"kl_from_ref": 0.1}
    records = [values | COMMON, {**values, **COMMON, "chosen_change": -2.0, "eval_accuracy": 0.5}]
    run = run_of(tmp_path / "run", records)
    page = Page(report.write_report(run))
    assert page.titles == ["Loss", "Margin", "Accuracy", "Change of log-prob", "KL(reference ‖ policy)",
                           "Learning rate", "Gradient norm", "Time", "Tokens"]  # fmt: skip
    assert seen(run, "Change of log-prob").endswith("chosen −1 → −2 rejected −3 → −3")
    assert seen(run, "Accuracy").endswith("training 75% → 75% held out 50%")  # one point, one number
    label = next(
        a["aria-label"] for t, a in page.tags if t == "svg" and "Accuracy" in (a["aria-label"] or "")
    )
    assert label == "Accuracy by step: training from 75% to 75%, between 75% and 75%; held out 50%"
    assert "preference optimisation" in page.source


def test_a_distillation_run(tmp_path: Path) -> None:
    values = {"loss": 2.0, "kl": 1.5, "agreement": 0.25, "length": 9.0, "rollout_s": 1.0, **COMMON}
    page = Page(report.write_report(run_of(tmp_path / "run", [values, values | {"eval_kl": 1.0}])))
    assert page.titles[:4] == ["Loss", "KL(teacher ‖ student)", "Agreement", "Length"]
    assert page.titles[4:] == ["Learning rate", "Gradient norm", "Sampling time", "Time", "Tokens"]
    assert seen(tmp_path / "run", "Loss") == "Loss nats a token 2 → 2"


FALL = "The chosen completions are less likely than at the start: the margin may grow while both sides fall"


@pytest.mark.parametrize(("change", "told"), [(-1.0, True), (-1e-6, False), (0.5, False)])
def test_a_fall_of_the_chosen_is_told_under_its_figure(change: float, told: bool, tmp_path: Path) -> None:
    values = {"loss": 0.5, "margin": 1.0, "rejected_change": -3.0, **COMMON}
    records = [{**values, "chosen_change": c} for c in (-change, change)]  # it is the end that counts
    page = Page(report.write_report(run_of(tmp_path / "run", records)))
    figures = [text for text in page.texts["figure"] if FALL in text]
    assert len(figures) == told == page.source.count(FALL)
    assert all("Change of log-prob" in text for text in figures)


@pytest.mark.parametrize(
    ("args", "loss", "margin"),
    [
        ({"loss": "dpo"}, "nats a pair; log 2 at the start", "β times what chosen gained over rejected"),
        ({"loss": "dpo", "ref_model": "r"}, "nats a pair", "β times what chosen gained over rejected"),
        (
            {"loss": "dpo_norm", "sft_weight": 0.5},
            "nats a pair + sft_weight · SFT loss",
            "β times what chosen",
        ),
        ({"loss": "ipo"}, "nats², a pair", "β times what chosen gained over rejected"),
        ({"loss": "kto"}, "a row, from 0 to its λ", "β times the distance from z, a row"),
        ({"loss": "orpo"}, "nats a pair", "log-prob a token, chosen minus rejected"),
        ({"loss": "simpo"}, "nats a pair", "β times chosen minus rejected log-prob a token"),
        ({"loss": "robust"}, "nats a pair", "β times what chosen gained over rejected"),
        (
            {"loss": "robust", "label_smoothing": 0.0},
            "nats a pair; log 2 at the start",
            "β times what chosen",
        ),
    ],
)
def test_a_preference_page_speaks_of_its_loss(
    args: dict[str, Any], loss: str, margin: str, tmp_path: Path
) -> None:
    records = [dict.fromkeys(NAMES["dpo"][0].split(), 0.5)]
    run = run_of(tmp_path / "run", records, None, **{"sft_weight": 0.0, **args})
    assert seen(run, "Loss") == f"Loss {loss} 0.5"
    assert seen(run, "Margin").startswith(f"Margin {margin}")
    start = args["loss"] in ("orpo", "simpo")  # they have no reference
    assert seen(run, "KL(").startswith(f"KL({'start' if start else 'reference'} ‖ policy)")


# What each script writes in a record; the second text stands for the names with eval_ in front.
NAMES = {
    "sft": ("loss lr grad_norm tokens seconds", "loss"),
    "grpo": ("reward boxed correct reasoning stopped length no_signal entropy clipped kl_old kl_ref loss "
             "grad_norm rollout_s verify_s train_s lr", "reward length boxed correct reasoning"),
    "grpo, ledger": ("reward json shape exact worked refused due stopped length no_signal entropy loss lr "
                     "clipped kl_old kl_ref grad_norm", "reward length json shape exact worked refused due"),
    "ppo": ("reward verified boxed correct reasoning stopped length entropy clipped kl_old kl_ref value_loss "
            "explained_variance beta loss grad_norm rollout_s verify_s train_s lr",
            "reward length verified boxed correct reasoning"),
    "ppo, reward model": ("reward stopped length entropy clipped kl_old kl_ref value_loss lr loss grad_norm "
                          "explained_variance beta rollout_s verify_s train_s", "reward length"),
    "dpo": ("loss margin accuracy chosen_change rejected_change kl_from_ref sft lr grad_norm tokens seconds",
            "loss margin accuracy chosen_change rejected_change kl_from_ref sft"),
    "distill": ("loss kl agreement lr grad_norm tokens seconds length rollout_s", "loss kl agreement"),
    "distill, text": ("loss lr grad_norm tokens seconds", "loss"),
    "reward, pairs": ("loss accuracy margin lr grad_norm tokens seconds",
                      "accuracy loss margin elo length_correlation accuracy_chosen_shorter calibration_error "
                      "accuracy_chosen_longer audit_correctness"),
    "reward, steps": ("loss accuracy margin lr grad_norm tokens seconds",
                      "accuracy loss right margin length_correlation"),
    "reward, attributes": ("loss error lr grad_norm tokens seconds",
                           "loss error_coherence spread_coherence length_correlation_coherence"),
}  # fmt: skip


@pytest.mark.parametrize("script", NAMES)
def test_no_figure_bears_a_raw_key(script: str, tmp_path: Path) -> None:
    own, held_out = (text.split() for text in NAMES[script])
    keys = {*own, *(f"eval_{name}" for name in held_out)}
    found: dict[str, Any] | None = {"step": 2, "labels": "pairs"} if script.startswith("reward,") else None
    run = run_of(tmp_path / "run", [dict.fromkeys(own, 0.25), dict.fromkeys(sorted(keys), 0.25)], found)
    page = Page(report.write_report(run))
    shown = [caption.split()[0] for caption in page.texts["figcaption"]]
    assert len(shown) >= 4 and not {*shown, *page.titles} & keys, (shown, page.titles)
    assert len({*page.titles}) == len(page.titles)  # no two of a name


def test_the_facts_name_the_algorithm(tmp_path: Path) -> None:
    args: dict[str, Any] = {
        "loss": "ipo",
        "labels": None,
        "mode": "on-policy",
        "divergence": "reverse",
        "beta": 0.0,
    }
    args |= {"teacher": "t/<b>", "reward_model": "rm", "verifier": "gsm8k"}
    page = Page(report.write_report(run_of(tmp_path / "run", [{"loss": 1.0}], **args)))
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert (facts["Loss"], facts["Mode"], facts["β"]) == ("ipo", "on-policy, reverse", "0.0")
    assert (facts["Teacher"], facts["Reward model"], facts["Verifier"]) == ("t/<b>", "rm", "gsm8k")
    assert "Labels" not in facts


BINS = [{"from": 0.0, "to": 0.5, "pairs": 8, "wins": 4.5, "expected": 4.5},
        {"from": 0.5, "to": 2.0, "pairs": 0, "wins": 0.0, "expected": 0.0},
        {"from": 2.0, "to": None, "pairs": 4, "wins": 3.75, "expected": 3.75}]  # fmt: skip


def test_a_reward_run_shows_calibration_audit_and_what_length_decides(tmp_path: Path) -> None:
    values = {"loss": 0.7, "accuracy": 0.5, "margin": 0.0, **COMMON}
    last = values | {"eval_accuracy": 0.625, "eval_audit_<short>": 0.5}
    found = {"step": 2, "labels": "pairs", "audit_note": "n", "pairs": 12, "accuracy": 0.625, "elo": 17.5}
    found |= {"length_correlation": None, "accuracy_chosen_shorter": 0.75, "pairs_chosen_shorter": 4}
    found |= {
        "calibration_error": 0.125,
        "calibration": BINS,
        "audit": {"<short>": {"pairs": 8, "accuracy": 0.5}},
    }
    run = run_of(tmp_path / "run", [values, last], found)
    page = Page(report.write_report(run))
    assert page.titles[:5] == ["Loss", "Accuracy", "Margin", "Learning rate", "Gradient norm"]
    assert page.titles[5].startswith("Calibration: lead from 0 to 0.5: 8 pairs, 56% right, 56% expected;")
    assert "eval_audit" not in "".join(page.titles)  # told by the table alone
    facts = " ".join(page.texts["dl"][1].split())
    assert facts == ("Pairs 12 Accuracy 62.5% Lead in Elo points 17.5 Correlation of score and length – "
                     "… where the better is shorter 75.0% of 4 "
                     "Calibration error, mean |counted − promised| 12.5%")  # fmt: skip
    counts = " ".join(page.texts["table"][0].split())
    assert counts == "category pairs accuracy <short> 8 50.0%"


def points_of(drawing: str, colour: str) -> list[tuple[float, float]]:
    """The corners of the line of that colour, in units of the drawing."""
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="([^"]*)"', drawing.replace("\n", " "))
    line = next(d for d, style in paths if f"stroke: var(--{colour})" in style and "fill: none" in style)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ?([\d.]+) ([\d.]+)", line)]


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_calibrated_bins_lie_on_the_curve(shift: float) -> None:
    bins = [{**b, "wins": b["wins"] + shift * (b["pairs"] > 0)} for b in BINS]
    drawing = report_figures.calibration(bins, "c")
    curve, counted = points_of(drawing, "two"), points_of(drawing, "one")
    assert len(counted) == 2 and all(f">{n}<" in drawing for n in (8, 4)) and ">0.5<" in drawing
    for x, y in counted:
        due = float(numpy.interp(x, *zip(*curve, strict=True)))
        # matplotlib leaves out corners within 1/9 of a point, which is a unit; down is more.
        assert abs(y - due) < 0.25 if shift == 0 else y - due > 10.0


def test_ratings_are_told_attribute_by_attribute(tmp_path: Path) -> None:
    found: dict[str, Any] = {"step": 1, "labels": "attributes", "audit_note": "", "answers": 5, "loss": 1.25}
    for part, value in (("rated", 4), ("error", 0.5), ("spread", 0.75), ("length_correlation", None)):
        found |= {f"{part}_helpfulness": value}
    run = run_of(tmp_path / "run", [{"loss": 1.5, "error": 1.0, **COMMON}], found)
    page = Page(report.write_report(run))
    assert page.titles[:2] == ["Loss", "Error"]
    table = " ".join(page.texts["table"][0].split())
    assert table.endswith("correlation with length helpfulness 4 0.5 0.75 –")


def test_what_nothing_names_shares_a_figure_with_its_held_out_self(tmp_path: Path) -> None:
    records = [ppo_record(0, form=1.0, eval_form=0.5, eval_other=1.0), ppo_record(1)]
    titles = Page(report.write_report(run_of(tmp_path / "run", records))).titles
    assert titles[-3:] == ["eval_other", "form", "Learning rate"]


def test_runs_side_by_side(tmp_path: Path) -> None:
    run_of(tmp_path / "a", [ppo_record(s) for s in range(4)])
    run_of(tmp_path / "b", [ppo_record(s, reward=0.125) for s in range(3)])
    figures = [{"key": "reward", "against": "kl_ref", "runs": ["a", "b"]}]
    figures += [{"key": "verified", "against": "step", "runs": ["b", "a"]}]
    runs = [{"name": n, "folder": n} for n in "ab"]
    summary = {"title": "T", "intro": "", "machine": "m", "seconds": 1, "stages": STAGES, "runs": runs}
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"figures": figures}), encoding="utf-8")
    page = Page(report.write_report(tmp_path))
    assert [a["id"] for t, a in page.tags if t == "section"] == [
        "stages",
        "answers",
        "compared",
        "run-0",
        "run-1",
    ]
    captions = [" ".join(text.split()) for text in page.texts["figcaption"][:2]]
    assert captions[0] == "Reward model's score mean of a sample, against KL a 0 → 1.5 b 0.125 → 0.125"
    assert captions[1] == "Verifier's score mean of a sample, by step b 75% → 50% a 75% → 38%"
    faults = [({"runs": ["c"]}, "figures: no run 'c'"), ({"runs": ["a", "b", "a", "b"]}, "at most 3 runs")]
    faults += [({"key": "x"}, "run 'a' has no step with 'x'")]
    for wrong, message in faults:
        text = json.dumps(summary | {"figures": [figures[0] | wrong]})
        (tmp_path / "summary.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            report.write_report(tmp_path)


# ---- what it never does


def test_what_models_wrote_is_escaped(tmp_path: Path) -> None:
    folder = demo(tmp_path / "demo", title=ATTACK, intro=ATTACK, machine=ATTACK)
    rows = [row(1, 1.0, [ATTACK, ""], prompt=ATTACK, reason=ATTACK, parts={ATTACK: 1.0})]
    metrics.write_rollouts(folder / "grpo", 3, [*rows, row(1, -1.0, ["x", ""], prompt=ATTACK)])
    page = Page(report.write_report(folder))
    assert "script" not in page.texts and "<script" not in page.source
    assert page.source.count("&lt;script&gt;alert(") >= 8
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page.source)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


@pytest.mark.parametrize("name", ["rl_page", "demo_page"])
def test_nothing_is_loaded_from_anywhere(name: str, request: pytest.FixtureRequest) -> None:
    page: Page = request.getfixturevalue(name)
    assert not re.search(r"https?:|//cdn|@import|url\((?!#)", page.source)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if "src" in attrs]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 5
    used = {a["href"] for _, a in page.tags if "href" in a} | {
        f"#{x}" for x in re.findall(r"url\(#(.*?)\)", page.source)
    }
    assert used and used <= {f"#{name}" for name in ids}


def test_figures_follow_the_theme(tmp_path: Path) -> None:
    page = Page(report.write_report(sft_run(tmp_path / "sft")))
    drawings = re.findall(r"<svg.*?</svg>", page.source, re.DOTALL)
    assert len(drawings) == 5 and not re.search(r"#[0-9a-f]{6}|font-family", "".join(drawings))
    used = set(re.findall(r"var\((--\w+)\)", "".join(drawings)))
    light, dark = page.source.split("@media (prefers-color-scheme: dark)")
    assert used and all(f"{name}:" in light and f"{name}:" in dark for name in used)


def test_long_runs_and_long_completions_stay_a_small_file(tmp_path: Path) -> None:
    run = rl_run(tmp_path / "run", steps=2000)
    for step in (0, 1999):
        tokens = ["start", *(["word"] * 3000), "finish", ""]
        metrics.write_rollouts(run, step, [row(n, a, tokens) for n in (1, 2, 3) for a in [0.5, -0.5] * 8])
    page = Page(report.write_report(run))
    assert len(page.source.encode()) < 1_500_000
    assert len(page.texts["li"]) == 2 * 3 * 16 and "2,000" in page.source
    assert all("start" in s and "finish" in s and "2878 tokens more" in s for s in page.texts["li"])


# ---- the same input, the same bytes; and errors


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = demo(tmp_path / "a" / "demo")
    first = report.write_report(folder).read_bytes()
    (tmp_path / "b").mkdir()
    shutil.copytree(folder, tmp_path / "b" / "demo", ignore=shutil.ignore_patterns("report.html"))
    with matplotlib.rc_context({"lines.linewidth": 7, "svg.hashsalt": "other", "axes.grid.which": "both"}):
        assert report.write_report(tmp_path / "b" / "demo").read_bytes() == first
        assert matplotlib.rcParams["lines.linewidth"] == 7
    command = [sys.executable, "-m", "nanopost.report", str(tmp_path / "b" / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == str(tmp_path / "b" / "demo" / "report.html")
    assert Path(done.stdout.strip()).read_bytes() == first


def test_one_step_is_enough(tmp_path: Path) -> None:
    assert Page(report.write_report(sft_run(tmp_path / "sft", steps=1))).titles[0] == "Loss"
    assert Page(report.write_report(rl_run(tmp_path / "rl", steps=3))).titles == RL


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is no folder"):
        report.write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty/metrics\.jsonl: no complete record"):
        report.write_report(tmp_path / "empty")
    folder = demo(tmp_path / "demo")
    (folder / "grpo" / "args.json").unlink()
    with pytest.raises(ValueError, match=r"grpo/args\.json: not readable"):
        report.write_report(folder)
    (folder / "grpo" / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"grpo/metrics\.jsonl: no complete record"):
        report.write_report(folder)


@pytest.mark.parametrize(
    ("summary", "message"),
    [
        ("[]", "expected an object, got list"),
        ("{", "not readable"),
        ('{"title": "x"}', "no 'intro'"),
        (
            json.dumps({"stages": [{"stage": "x", "worked": 63.25}]}),
            "worked: expected a rate between 0 and 1, got 63.25",
        ),
    ],
)
def test_a_wrong_summary_is_named(summary: str, message: str, tmp_path: Path) -> None:
    if "stages" in summary:
        summary = json.dumps(
            {"title": "", "intro": "", "machine": "", "seconds": 1, "runs": []} | json.loads(summary)
        )
    (tmp_path / "summary.json").write_text(summary, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"summary\.json: {re.escape(message)}"):
        report.write_report(tmp_path)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape('pip install "nanopost[report]"')):
        report.write_report(sft_run(tmp_path / "sft"))
