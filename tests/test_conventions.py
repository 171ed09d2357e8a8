"""docs/conventions.md: its table has every name that the scripts tell of a step, and no other."""

import contextlib
import io
import json
import math
import re
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nanopost import metrics
from nanopost.data.preference import ATTRIBUTES
from nanopost.evals.audit import read_audit
from tests.ranks import ROOT
from tests.tiny import hub_folder

KINDS: dict[str, dict[str, Any]] = {
    "pairs": {"chosen": "7", "rejected": "one two"},
    "attributes": {"response": "7", **dict.fromkeys(ATTRIBUTES, 3)},
    "steps": {"completions": ["add", "7"], "labels": [False, True]},
    "outcomes": {"completion": "7", "label": True},
}
ANSWERS = {"gsm8k": "7", "math": "7", "ledger": {"total": 7}}


class Told(NamedTuple):
    names: dict[str, set[str]]  # by script, recorded or printed
    first: dict[str, dict[str, Any]]  # the first record, by script and kind of run


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """A step of every kind of run, on tiny models."""
    folder = tmp_path_factory.mktemp("names")
    model = hub_folder(folder / "hub", max_position_embeddings=1024)
    printed: set[str] = set()
    found = Told({}, {})
    format_line = metrics.format_line

    def shown(step: int, steps: int, values: Mapping[str, Any]) -> str:
        printed.update(values)
        return format_line(step, steps, values)

    def lines(name: str, record: dict[str, Any]) -> Path:
        path = folder / f"{name}.jsonl"
        path.write_text(2 * (json.dumps(record) + "\n"), encoding="utf-8")
        return path

    def run(script: str, data: Path, **flags: Any) -> Path:
        out = folder / f"{script}{len(list(folder.iterdir()))}"
        flags |= {"model": model, "data": data, "eval_data": data, "out": out, "steps": 1, "threads": 1}
        argv = [x for name, value in flags.items() for x in (f"--{name.replace('_', '-')}", str(value))]
        patch.setattr(sys, "argv", [script, *argv])
        runpy.run_path(str(ROOT / f"train_{script}.py"), run_name="__main__")
        (record,) = metrics.read_records(out)
        found.names.setdefault(script, set()).update(printed, record)
        kind = [flags[name] for name in ("labels", "verifier", "mode") if name in flags]
        found.first[" ".join([script, *kind])] = record
        printed.clear()
        return out / "model"

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr("nanopost.report.write_report", lambda run: run)
        patch.setattr(metrics, "format_line", shown)
        answered = {"question": "add", "answer": "7", "teacher": "another", "decoding": {"temperature": 0}}
        run("sft", chats := lines("chats", answered))
        data = {kind: lines(kind, {"prompt": "add", **said}) for kind, said in KINDS.items()}
        models = {kind: run("reward", path, labels=kind, batch_size=2) for kind, path in data.items()}
        run("dpo", data["pairs"], sft_weight=0.1)
        sampled = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 2}
        for name, answer in ANSWERS.items():
            tasks = lines(name, {"messages": [{"role": "user", "content": "add"}], "answer": answer})
            run("grpo", tasks, verifier=name, **sampled)
            run("ppo", tasks, verifier=name, reward_model=models["pairs"], **sampled)
        run("distill", chats, mode="text")
        run("distill", chats, mode="logits", teacher=model)
        run("distill", chats, mode="on-policy", teacher=model, max_new_tokens=2)
    return found


def rows() -> dict[str, set[str]]:
    """The scripts of each name in the table; a name may have a row for some scripts and one for others."""
    text = (ROOT / "docs/conventions.md").read_text(encoding="utf-8").split("## The names of a line")[1]
    found: dict[str, set[str]] = {}
    for line in re.findall(r"^\| `.*$", text, flags=re.MULTILINE):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert len(cells) == 6, line
        name, scripts = cells[0].strip("`"), set(cells[5].split(", "))
        assert not found.setdefault(name, set()) & scripts, f"{name} has two rows for a script"
        found[name] |= scripts
    return found


def row_of(name: str, table: Mapping[str, set[str]]) -> str:
    """The name that a recorded number has in the table; its own where it has none."""
    name = re.sub(rf"_({'|'.join(ATTRIBUTES)})$", "_ATTRIBUTE", name)
    categories = {pair.provenance.meta["category"] for pair in read_audit()}
    name = re.sub(rf"^eval_audit_({'|'.join(categories)})$", "eval_audit_CATEGORY", name)
    return name if name in table else name.removeprefix("eval_")


def test_every_name_a_script_tells_has_its_row_and_no_row_is_stale(told: Told) -> None:
    table = rows()
    assert {*told.names} == {path.stem.removeprefix("train_") for path in ROOT.glob("train_*.py")}
    found: dict[str, set[str]] = {}
    for script, names in told.names.items():
        for name in names:
            found.setdefault(row_of(name, table), set()).add(script)
    assert found == table


FIRST: dict[str, dict[str, float]] = {
    "reward pairs": {"loss": math.log(2), "accuracy": 0.5, "margin": 0},
    "reward steps": {"loss": math.log(2), "accuracy": 0.5, "margin": 0},
    "reward outcomes": {"loss": math.log(2), "accuracy": 0.5, "margin": 0},
    "dpo": {"accuracy": 0.5, "margin": 0, "chosen_change": 0, "rejected_change": 0, "kl_from_ref": 0},
    "distill logits": {"loss": 0, "kl": 0, "agreement": 1},
    "distill on-policy": {"loss": 0, "kl": 0, "agreement": 1},
    **{f"grpo {name}": {"clipped": 0, "kl_old": 0, "kl_ref": 0} for name in ANSWERS},
    **{f"ppo {name}": {"clipped": 0, "kl_old": 0, "kl_ref": 0, "explained_variance": 0} for name in ANSWERS},
}


@pytest.mark.parametrize("run", FIRST)
def test_the_first_record_is_what_the_table_says(told: Told, run: str) -> None:
    """Here the teacher is the student, and heads and critics are new."""
    said = {name: told.first[run][name] for name in FIRST[run]}
    assert said == pytest.approx(FIRST[run], abs=2e-6)  # float32
