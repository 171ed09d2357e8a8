"""The vectors: complete, well formed, as the pages make them now; a checker that finds what is planted."""

import ast
import functools
import json
import math
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nanopost import losses
from tests import pages

ROOT = Path(__file__).parents[1]
VECTORS = ROOT / "vectors"
ELSEWHERE = [*pages.ELSEWHERE, "variants"]
FILES = sorted(path.stem for path in VECTORS.glob("*.json") if path.stem != "schema")
SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@functools.cache
def head(name: str) -> dict[str, Any]:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def flat(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for branch in tree.values() for leaf in flat(branch)]
    return [leaf for branch in tree for leaf in flat(branch)] if isinstance(tree, list) else [tree]


def shape(tree: Any) -> tuple[int, ...]:
    return (len(tree), *shape(tree[0])) if isinstance(tree, list) else ()


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(VECTORS / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


# ---- the files


def test_every_public_function_has_vectors() -> None:
    assert sorted([*losses.__all__, *ELSEWHERE]) == FILES


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((VECTORS / "schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", FILES)
def test_file_follows_the_schema_and_its_digest(name: str) -> None:
    validator().validate(head(name))
    rest = {key: value for key, value in head(name).items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    assert sha256(text.encode()).hexdigest() == head(name)["sha256"]
    assert head(name)["function"] == name and (ROOT / head(name)["page"]).is_file()


def test_the_schema_refuses_what_is_no_file_of_vectors() -> None:
    good = head("sft_loss")
    for bad in (
        {key: value for key, value in good.items() if key != "sha256"},
        good | {"schema": 2},
        good | {"cases": good["cases"][:7]},
        good | {"cases": [*good["cases"], {"name": "no more than a name"}]},
        good | {"cases": [case | {"upstream": [[None]]} for case in good["cases"]]},
        good | {"cases": [case | {"reduction": "sum"} for case in good["cases"]]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            validator().validate(bad)


@pytest.mark.parametrize("name", FILES)
def test_cases_hang_together(name: str) -> None:
    cases = head(name)["cases"]
    assert len(cases) >= 8 and len({case["name"] for case in cases}) == len(cases)
    for case in cases:
        for key, gradient in case["gradients"].items():
            assert shape(gradient) == shape(case["inputs"][key])
            assert all(math.isfinite(slope) for slope in flat(gradient)), case["name"]
        if case["upstream"] is None:
            assert case["scalar"] is None and not case["gradients"]
            continue
        pairs = list(zip(flat(case["upstream"]), flat(case["values"]), strict=True))
        assert all(weight == 0.0 for weight, value in pairs if value is None or value in SPECIAL)
        weights = [weight for weight, _ in pairs if weight]
        total = math.fsum(weight * value for weight, value in pairs if weight)
        size = math.fsum(abs(weight * value) for weight, value in pairs if weight)
        assert weights and case["scalar"] == pytest.approx(total, rel=1e-15, abs=1e-15 * size)
        if case["reduction"] == "mean":
            assert set(weights) == {1.0 / len(weights)}
        elif len(weights) > 1:
            assert len(set(weights)) > 1


@pytest.mark.parametrize("name", FILES)
def test_what_carries_a_gradient_has_one_that_is_not_zero(name: str) -> None:
    inputs = {key for case in head(name)["cases"] for key in case["gradients"]}
    for key in inputs:
        assert any(any(flat(case["gradients"][key])) for case in head(name)["cases"]), key


def test_masks_are_awkward_and_shapes_not_square() -> None:
    masked = [case for name in FILES for case in head(name)["cases"] if "mask" in case["inputs"]]
    masks = [case["inputs"]["mask"] for case in masked]
    assert any(any(row) and 0 in row[: max(i for i, m in enumerate(row) if m)] for m in masks for row in m)
    assert any(not any(row) and any(flat(mask)) for mask in masks for row in mask)
    assert sum(len(mask) != len(mask[0]) for mask in masks) > 0.9 * len(masks)
    for junk in ("nan", "inf", "-inf", 1e30):
        assert any(junk in flat(list(case["inputs"].values())) for case in masked), junk


def test_the_files_are_what_the_pages_give(tmp_path: Path) -> None:
    made = run("make.py", "--out", tmp_path)
    assert made.returncode == 0, made.stderr
    assert sorted(path.stem for path in tmp_path.iterdir()) == FILES
    for name in FILES:
        assert (tmp_path / f"{name}.json").read_bytes() == (VECTORS / f"{name}.json").read_bytes(), name


def test_neither_the_maker_nor_the_checker_knows_the_library() -> None:
    own = {"case", "cases", "layout", "page", "mpmath"}
    allowed = {VECTORS / name: own for name in ("case.py", "layout.py", "make.py", "page.py")}
    allowed |= dict.fromkeys((VECTORS / "cases").glob("*.py"), own) | {VECTORS / "check.py": {"numpy"}}
    for path, names in allowed.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
        found |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in found} <= names | set(sys.stdlib_module_names), path.name


# ---- our own code against them


def test_the_library_agrees_on_every_case(tmp_path: Path) -> None:
    report = tmp_path / "nanopost.json"
    done = run("check.py", "--adapter", VECTORS / "adapters" / "nanopost.py", "--verbose", "--json", report)
    wrong = [line for line in done.stdout.splitlines() if "differs" in line or "crashed" in line]
    assert done.returncode == 0, "\n".join(wrong) + done.stderr
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    cases = [(name, case) for name in FILES for case in head(name)["cases"]]
    assert len(results) == len(cases)
    for result, (name, case) in zip(results, cases, strict=True):
        assert (result["function"], result["case"], result["outcome"]) == (name, case["name"], "agrees")
        scalar = ["scalar"] if case["upstream"] is not None else []
        assert result["compared"] == sorted(
            [f"gradients.{key}" for key in case["gradients"]] + scalar + ["values"]
        )


ONE_DIALECT = """
import importlib.util
from pathlib import Path

spec = importlib.util.spec_from_file_location("ours", Path({folder!r}) / "adapters" / "nanopost.py")
ours = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ours)
FRAMEWORK, VERSION = "one dialect everywhere", "0"


def always(name, **fixed):
    def adapted(inputs, arguments, upstream):
        return getattr(ours, name)(inputs, arguments | fixed, upstream)

    globals()[name] = adapted


always("group_advantages", scale="std", ddof=1, eps=1e-4)
always("clipped_surrogate_loss", clip_low=0.2, clip_high=0.2, dual_clip=None)
always("cispo_loss", clip_low=0.2, clip_high=0.28)
always("dpo_loss", label_smoothing=0.0, robust=False)
always("simpo_loss", beta=2.1, margin=0.55)
always("value_loss", clip=None)
always("aggregate", mode="token_mean", denom=9.0)
always("kl_estimate", kind="k3")
always("policy_ratio", level="token")
always("importance_weights", mode="truncate", low=0.0)
"""
FOUND = {  # a piece of each dialect that the fixed arguments are right for
    "group_advantages": ["TRL scale_rewards=group", "a group of one"],
    "clipped_surrogate_loss": ["PPO, GRPO"],
    "cispo_loss": ["verl"],
    "dpo_loss": ["sums", "means"],
    "simpo_loss": ["γ itself"],
    "value_loss": ["½ squared error"],
    "aggregate": ["token-mean, TRL dapo"],
    "kl_estimate": ["k3"],
    "policy_ratio": ["PPO, GRPO"],
    "importance_weights": ["TIS"],
}


def test_one_dialect_is_told_from_the_others(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    text = ONE_DIALECT.format(folder=str(VECTORS))
    assert check(tmp_path, text, "--function", *FOUND, "--json", report).returncode == 1
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    for name, pieces in FOUND.items():
        named = [result for result in results if result["function"] == name and result["dialect"]]
        for result in named:
            expected = "agrees" if any(piece in result["dialect"] for piece in pieces) else "differs"
            assert result["outcome"] == expected, (name, result["dialect"], result["outcome"])
        assert len({result["outcome"] for result in named}) == 2, name


# ---- the checker itself

WHO = 'FRAMEWORK, VERSION = "planted", "0"\nimport numpy as np\n'
SFT = WHO + (
    "def sft_loss(inputs, arguments, upstream):\n"
    "    values = -inputs['logps']\n"
    "    scalar = float((upstream * values)[upstream != 0].sum())\n"
    "    result = {'values': values, 'scalar': scalar, 'gradients': {'logps': -upstream}}\n"
)
RIGHT = SFT + "    return result\n"
PLANTED = {  # what the adapter does -> its text, the exit code, what is said
    "right": (RIGHT, 0, [r"sft_loss +— +7 +7 +0 +0 +0$"]),
    "half of it": (
        SFT + "    return {'values': result['values'] / 2, 'gradients': {'logps': -upstream / 2}}\n",
        1,
        [
            r"sft_loss .*  everywhere ×0\.5$",
            r"^    \S.* \(every framework\): differs$",
            r"values\[\d\]\[\d\]: ours .*, theirs .*, ratio 0\.5.*; everywhere ×0\.5$",
        ],
    ),
    "wrong sign of the gradient": (
        SFT + "    return result | {'gradients': {'logps': upstream}}\n",
        1,
        [r"gradients\.logps\[\d\]\[\d\]: ours .*, ratio -1, relative error 2.*everywhere ×-1"],
    ),
    "one wrong number": (
        SFT + "    values[2, 0] += 1e-6\n    return result\n",
        1,
        [r"values\[2\]\[0\]: ours [\d.]+, theirs [\d.]+, ratio 1(\.0+\d)?, relative error [\d.e-]+$"],
    ),
    "a mean where the sum is asked for": (
        SFT + "    return {'scalar': scalar / (upstream != 0).sum()}\n",
        1,
        [
            r"sft_loss .*  \D+.*: scalar: ours",
            r"scalar: ours .*, theirs .*, ratio 0\.\d+, relative error \S+$",
        ],
    ),
    "NaN": (SFT + "    return {'scalar': float('nan')}\n", 1, [r"scalar: ours .*, theirs nan"]),
    "wrong shape": (
        SFT + "    return {'values': values[:, :-1]}\n",
        1,
        [r"values\[0\]\[4\]: ours alone has it"],
    ),
    "scalar alone": (SFT + "    return {'scalar': scalar}\n", 0, [r"sft_loss +— +7 +7 +0"]),
    "missing function": (WHO, 0, [r"^not offered: sft_loss$"]),
    "not expressible": (
        WHO + "def sft_loss(inputs, arguments, upstream):\n    raise NotImplementedError('no weights')\n",
        0,
        [r"sft_loss +— +7 +0 +0 +7 +0  .+: no weights$", r"^    full.*: not offered: no weights$"],
    ),
    "crash": (
        WHO + "def sft_loss(inputs, arguments, upstream):\n    return 1 / 0\n",
        2,
        [r"sft_loss +— +7 +0 +0 +0 +7  .+: ZeroDivisionError", r"crashed: Zero.* at /.*planted\.py:4$"],
    ),
    "misspelt part": (
        SFT + "    return {'value': values}\n",
        2,
        [r"crashed: TypeError.*returns a dict of some"],
    ),
    "gradient of nothing": (
        SFT + "    return {'gradients': {'logits': values}}\n",
        2,
        [r"gradients of what is no input: \['logits'\]"],
    ),
    "nothing": (SFT, 2, [r"sft_loss .*returns a dict of some of \[.*\], got None"]),
    "gradients that are none": (
        SFT + "    return {'gradients': None}\n",
        2,
        [r"sft_loss .*TypeError\('gradients is None, not a dict"],
    ),
    "a gradient that is none": (
        SFT + "    return {'gradients': {'logps': None}}\n",
        2,
        [r"sft_loss .*gradients\.logps is None, which is no number"],
    ),
    "a text for a number": (
        SFT + "    return {'scalar': 'half'}\n",
        2,
        [r"sft_loss .*scalar is 'half', which is no number"],
    ),
    "float32 within its tolerance": (
        SFT.replace("inputs['logps']", "inputs['logps'].astype(np.float32)")
        + "    return {'values': values}\nTOLERANCE = 1e-5\n",
        0,
        [r"relative tolerance 1e-05"],
    ),
    "float32 beyond it": (
        SFT.replace("inputs['logps']", "inputs['logps'].astype(np.float32)")
        + "    return {'values': values}\n",
        1,
        [r"values\[\d\]\[\d\]: ours"],
    ),
    "does not say who it is": (
        "VERSION = '0'\n",
        2,
        [r"planted\.py: the adapter does not load: AttributeError"],
    ),
    "does not load": ("import no_such_framework\n", 2, [r"does not load: ModuleNotFoundError"]),
}


def check(tmp_path: Path, text: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    adapter = tmp_path / "planted.py"
    adapter.write_text(text, encoding="utf-8")
    return run("check.py", "--adapter", adapter, *(arguments or ("--function", "sft_loss", "--verbose")))


@pytest.mark.parametrize("what", PLANTED)
def test_the_checker_says_what_is_planted(what: str, tmp_path: Path) -> None:
    text, code, said = PLANTED[what]
    done = check(tmp_path, text)
    assert done.returncode == code, done.stdout + done.stderr
    for line in said:
        assert re.search(line, done.stdout + done.stderr, flags=re.MULTILINE), (
            line,
            done.stdout + done.stderr,
        )


def test_an_adapter_may_have_a_helper_beside_it(tmp_path: Path) -> None:
    (tmp_path / "helper_beside.py").write_text("SIGN = -1\n", encoding="utf-8")
    text = RIGHT.replace("-inputs", "helper_beside.SIGN * inputs") + "import helper_beside\n"
    assert check(tmp_path, text).returncode == 0


def test_the_checker_refuses_a_file_that_was_changed(tmp_path: Path) -> None:
    text = (VECTORS / "sft_loss.json").read_text(encoding="utf-8")
    for name, changed, said in (
        (
            "digit",
            text.replace('"values": [[', '"values": [[1', 1),
            "sft_loss.json: changed since it was made",
        ),
        ("digest", text.replace('"sha256"', '"sha255"'), "sft_loss.json: not a file of vectors"),
        ("half", text[: len(text) // 2], "sft_loss.json: not a file of vectors"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "sft_loss.json").write_text(changed, encoding="utf-8")
        done = check(tmp_path, RIGHT, "--vectors", folder)
        assert done.returncode == 2 and said in done.stderr and not done.stdout
    (tmp_path / "digit" / "sft_loss.json").write_text(text, encoding="utf-8")
    assert check(tmp_path, RIGHT, "--vectors", tmp_path / "digit").returncode == 0


def test_the_checker_names_a_function_or_an_adapter_that_does_not_exist(tmp_path: Path) -> None:
    done = check(tmp_path, RIGHT, "--function", "sft_loss", "no_such_loss")
    assert done.returncode == 2 and "no vectors of no_such_loss" in done.stderr
    done = run("check.py", "--adapter", tmp_path / "nowhere.py")
    assert done.returncode == 2 and "nowhere.py: no such adapter" in done.stderr


def test_the_adapter_of_the_readme_works(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (VECTORS / "README.md").read_text(), flags=re.DOTALL)
    done = check(tmp_path, example)
    assert done.returncode == 0 and "mine 1.2" in done.stdout, done.stdout + done.stderr
