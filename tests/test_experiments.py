"""The experiments of docs/experiments: their script at toy size, and the page that tells what it found."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "docs" / "experiments"
SCRIPT = HERE / "dpo_vs_ppo.py"
TOY: dict[str, Any] = {
    "model": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 200.0,
        "tie_word_embeddings": True,
    },
    "vocab_size": 380,
    "corpora": {"base": 20, "sft": 800, "rl": 120, "test": 60, "padded_share": 0.0, "tool_share": 0.0}
    | {"turns_share": 0.0},
    "kind": "answer",  # nothing to work out: a model of a few steps is right now and then
    "sft": ["--max-length", 96, "--steps", 25, "--batch-size", 32, "--lr", 2e-2, "--warmup", 2],
    "seeds": [0],
    "betas": {"dpo": [0.5], "ppo": [0.1]},
    "max_new_tokens": 16,
    "pairs": {"prompts": 8, "group_size": 8},
    "dpo": ["--steps", 1, "--batch-size", 4, "--lr", 1e-3],
    "ppo": ["--steps", 1, "--prompts-per-step", 8, "--group-size", 1, "--lr", 1e-3],
    "completions": 1,
    "optimum": {"samples": 4, "betas": [0.1, 1.0]},
}


def run(folder: Path, *flags: str) -> str:
    (folder / "toy.json").write_text(json.dumps(TOY), encoding="utf-8")
    command = [sys.executable, str(SCRIPT), "--settings", "toy.json", "--results", "found.json", *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("toy")
    return folder, run(folder, "--work", "work")


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.slow
def test_a_toy_run_measures_both_methods_and_draws(toy: tuple[Path, str]) -> None:
    folder, printed = toy
    results = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    assert results["settings"] == TOY
    assert [(r["method"], r["beta"], r["seed"]) for r in results["runs"]] == [
        ("dpo", 0.5, 0),
        ("ppo", 0.1, 0),
    ]
    for found in results["runs"]:
        assert 0 <= found["reward"] <= 1 and 0 <= found["exact"] <= found["reward"] + 1e-9
        assert abs(found["kl"]) < 5.0 and found["kl"] != 0.0 and 1 <= found["length"] <= 16
        assert found["cpu_seconds"] > 0 and found["seconds"] > 0
    assert [stage["stage"] for stage in results["stages"]] == ["reference", "optimum", "pairs of seed 0"]
    assert "$ python train_dpo.py" in printed and "$ python train_ppo.py" in printed
    assert "| DPO | 0.5 | 1 |" in printed and "| PPO | 0.1 | 1 |" in printed
    assert (folder / "found.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")


@pytest.mark.slow
def test_what_the_results_have_is_not_run_again(toy: tuple[Path, str]) -> None:
    folder, first = toy
    before = (folder / "found.json").read_bytes()
    printed = run(folder, "--work", "elsewhere")  # no model is needed to find that nothing is missing
    assert "$ python" not in printed
    assert (folder / "found.json").read_bytes() == before
    assert printed.strip().splitlines()[-4:] == first.strip().splitlines()[-4:]  # the table


@pytest.mark.slow
def test_other_settings_are_refused(toy: tuple[Path, str], script: dict[str, Any]) -> None:
    folder, _ = toy
    with pytest.raises(SystemExit, match=r"made with other settings \(seeds\)"):
        script["experiment"](folder / "work", folder / "found.json", TOY | {"seeds": [1]}, [1])


def test_the_optimum_is_the_tilted_reference(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt of four samples with the scores 1, 0, 0, 0: by hand, β = 1 gives e/(e + 3)."""
    chosen = math.e / (math.e + 3.0)
    scores = [SimpleNamespace(candidates=[SimpleNamespace(score=score) for score in (1.0, 0.0, 0.0, 0.0)])]
    monkeypatch.setitem(script["optimum"].__globals__, "sample_groups", lambda *_, **__: scores)
    settings = {"optimum": {"samples": 4, "betas": [1.0]}, "max_new_tokens": 1}
    start, point = script["optimum"](Path(), [], settings)
    assert start == pytest.approx({"reward": 0.25, "kl": 0.0})
    rest = (1.0 - chosen) / 3.0
    kl = chosen * math.log(4.0 * chosen) + 3.0 * rest * math.log(4.0 * rest)
    assert point == pytest.approx({"reward": chosen, "kl": kl, "beta": 1.0})


def test_the_page_tells_the_results(script: dict[str, Any]) -> None:
    """Its table is that of the JSON file, which has every seed; its flags are those of the settings."""
    results = json.loads((HERE / "dpo-vs-ppo.json").read_text(encoding="utf-8"))
    text = (HERE / "dpo-vs-ppo.md").read_text(encoding="utf-8")
    assert script["table"](results) in text
    settings = results["settings"]
    assert settings == json.loads(json.dumps(script["SETTINGS"]))
    wanted = [
        (method, beta, seed)
        for method, betas in settings["betas"].items()
        for beta in betas
        for seed in settings["seeds"]
    ]
    found = [(run["method"], run["beta"], run["seed"]) for run in results["runs"]]
    assert sorted(found) == sorted(wanted)
    for name in ("sft", "dpo", "ppo"):
        assert f"`{' '.join(map(str, settings[name]))}`" in text, name
    seconds = sum(entry["cpu_seconds"] for entry in (*results["stages"], *results["runs"]))
    assert f"{seconds / 60:.0f} minutes of one core" in text and results["machine"] in text
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert pictures == ["dpo-vs-ppo.svg"] and (HERE / pictures[0]).stat().st_size > 1000
