"""The plan of the house, held by execution: floors, caps, docstrings, headers, the one shift, the README.

Every rule is a function from a checkout to the violations it finds, and is tested three times: this checkout
has none, a small house has none, and the small house with a violation planted in it has exactly that one.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
Rule = Callable[[Path], list[str]]

LIBRARY_CAP, SCRIPT_CAP, LOSS_BODY_CAP, FIELD_CAP = 250, 300, 15, 35
FORMULAS = 47  # the project's formulas are numbered F1 to F47
SECTIONS = [
    "1 Configuration",
    "2 Process group, seeds, run directory",
    "3 Task and data",
    "4 Models, optimiser, resume",
    "5 Schedules",
    "6 Rollout",
    "7 Evaluation",
    "8 The loop",
    "9 Teardown",
]

# What a room may import, besides itself; a floor sees everything below the floor below it.
FLOORS: dict[str, set[str]] = {
    "__init__": set(),
    "data": set(),
    "rewards": set(),
    "losses": set(),
    "config": set(),
    "metrics": {"atomic"},
    "fsdp": {"shards"},
    "distributed": {"fsdp"},
    "atomic": set(),
    "shards": {"atomic"},
    "checkpoint": {"atomic", "distributed", "shards"},
    "optim": set(),
    "runs": {"atomic", "config", "distributed", "micro_batches"},
    "faults": {"atomic", "checkpoint", "distributed", "optim", "data.schema"},
    "micro_batches": {"atomic", "distributed", "metrics"},
    "kernels": {"losses"},
    "models": {"kernels", "losses", "atomic"},
    "rollout": {"models", "kernels", "losses", "data.schema"},
    "evals": {"rollout", "models", "kernels", "losses", "rewards", "data", "plan", "atomic"}
    | {"distributed", "metrics", "micro_batches"},
    "worlds": {"data", "rewards"},
    "memory": set(),
    "plan": {"memory", "rollout", "models", "kernels", "losses", "distributed"},
    "report_figures": set(),
    "report": {"atomic", "metrics", "report_figures"},
    "export": {"atomic", "distributed", "data", "models", "report"},
}
RECIPES = {"evals", "data", "rewards", "worlds"}
# Third-party packages by room; what is not named here is free to use the core dependencies.
THIRD_PARTY: dict[str, set[str]] = {
    "losses": {"torch"},
    "rewards": {"numpy", "jinja2", "tokenizers"},
    "data": {"numpy", "jinja2", "tokenizers"},
    "data.collate": {"numpy", "jinja2", "tokenizers", "torch"},
}
HEAVY = ("triton", "tyro", "tokenizers", "matplotlib", "jinja2", "transformers", "safetensors", "llguidance")
# Rooms that hold tensors and no text: there even a one-dimensional [1:] is a shift.
TENSOR_ROOMS = ("losses", "models", "rollout", "kernels")
BEHAVIOUR = ("Module", "Linear", "Function", "Llama")  # torch's, and our decoder; and the KV cache
SCALARS = {"int", "float", "str", "bool", "Path", "None", "Literal", "tuple"}

SKIPPED = {".venv", ".git", "runs", "build", "dist"}


def sources(root: Path, *patterns: str) -> Iterator[tuple[str, ast.Module, str]]:
    """Path below the root, syntax tree and text of every Python file that matches."""
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            text = path.read_text(encoding="utf-8")
            yield str(path.relative_to(root)), ast.parse(text, str(path)), text


def library(root: Path) -> Iterator[tuple[str, ast.Module, str]]:
    return sources(root, "nanopost/**/*.py")


def scripts(root: Path) -> Iterator[tuple[str, ast.Module, str]]:
    return sources(root, "train_*.py")


def module_of(name: str) -> str:
    """nanopost/data/chat.py -> data.chat; nanopost/losses/__init__.py -> losses."""
    return name.removeprefix("nanopost/").removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports(name: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, at any depth, relative imports resolved."""
    package = name.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def within(name: str, allowed: set[str]) -> bool:
    return any(name == room or name.startswith(room + ".") for room in allowed)


# ---- the rules


def floors(root: Path) -> list[str]:
    """Imports point down."""
    found = []
    for name, tree, _ in [*library(root), *sources(root, "recipes/**/*.py")]:
        room = module_of(name).split(".")[0] if name.startswith("nanopost/") else "recipes"
        if room not in FLOORS and room != "recipes":
            found.append(f"{name}: room {room!r} is on no floor")
            continue
        allowed = RECIPES if room == "recipes" else FLOORS[room] | {room}
        for line, target in imports(name, tree):
            if target.startswith("nanopost.") and not within(target.removeprefix("nanopost."), allowed):
                found.append(f"{name}:{line}: {room} may not import {target}")
    return found


def third_party(root: Path) -> list[str]:
    """losses: torch alone. rewards and data: stdlib, numpy, jinja2, tokenizers; torch in collate."""
    found = []
    for name, tree, _ in library(root):
        module = module_of(name)
        allowed = THIRD_PARTY.get(module, THIRD_PARTY.get(module.split(".")[0]))
        for line, target in imports(name, tree) if allowed is not None else ():
            top = target.split(".")[0]
            if top not in {"nanopost", *sys.stdlib_module_names, *(allowed or ())}:
                found.append(f"{name}:{line}: {module} may not import {top}")
    return found


def scripts_are_leaves(root: Path) -> list[str]:
    """Nothing imports a script."""
    names = {name.removesuffix(".py") for name, _, _ in scripts(root)}
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name not in SKIPPED)
    return [
        f"{name}:{line}: imports the script {target.split('.')[0]}"
        for name, tree, _ in sources(root, "*.py", *(f"{folder}/**/*.py" for folder in folders))
        for line, target in imports(name, tree)
        if target.split(".")[0] in names
    ]


def caps(root: Path) -> list[str]:
    """250 lines a library file, 300 a script, 15 the body of a loss."""
    found = []
    for files, cap in ((library(root), LIBRARY_CAP), (scripts(root), SCRIPT_CAP)):
        for name, _, text in files:
            if (lines := len(text.splitlines())) > cap:
                found.append(f"{name}: {lines} lines, the cap is {cap}")
    for name, tree, _ in sources(root, "nanopost/losses/*.py"):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > LOSS_BODY_CAP:
                    found.append(
                        f"{name}: the body of {node.name} has {lines} lines, the cap is {LOSS_BODY_CAP}"
                    )
    return found


def docstrings(root: Path) -> list[str]:
    """Every module, public function and public class says what it is for."""
    found = []
    for name, tree, _ in [*library(root), *scripts(root)]:
        if not ast.get_docstring(tree):
            found.append(f"{name}: the module has no docstring")
        for node in tree.body if name.startswith("nanopost/") else ():
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node) and not decorated(node, "overload"):
                found.append(f"{name}: {node.name} has no docstring")
    return found


def decorated(node: ast.AST, name: str) -> ast.expr | None:
    for decorator in getattr(node, "decorator_list", []):
        if ast.unparse(decorator).split("(")[0].split(".")[-1] == name:
            return decorator
    return None


def classes(root: Path) -> list[str]:
    """Classes with behaviour are nn.Modules and the KV cache; the rest are frozen records without methods."""
    found = []
    for name, tree, _ in library(root):
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            if node.name == "KVCache" or any(ast.unparse(b).split(".")[-1] in BEHAVIOUR for b in node.bases):
                continue
            data = decorated(node, "dataclass")
            if data is None or "frozen=True" not in ast.unparse(data):
                found.append(f"{name}: {node.name} is neither an nn.Module nor a frozen dataclass")
            for method in (item for item in node.body if isinstance(item, ast.FunctionDef)):
                if not (method.name.startswith("__") or decorated(method, "property")):
                    found.append(f"{name}: dataclass {node.name} has a method {method.name}")
    return found


def headers(root: Path) -> list[str]:
    """The same sections in the same order in every script, each with its header."""
    found = []
    for name, _, text in scripts(root):
        seen = re.findall(r"^ *# ---- (.*?) -*$", text, re.MULTILINE)
        if seen != SECTIONS:
            found.append(f"{name}: sections {seen}, expected {SECTIONS}")
    return found


def configurations(root: Path) -> list[str]:
    """One flat dataclass a script, at most 35 fields, one comment a field."""
    found = []
    for name, tree, text in scripts(root):
        lines = text.splitlines()
        records = [n for n in tree.body if isinstance(n, ast.ClassDef) and decorated(n, "dataclass")]
        if [record.name for record in records] != ["Config"]:
            found.append(f"{name}: expected one dataclass Config, got {[record.name for record in records]}")
            continue
        fields = [item for item in records[0].body if isinstance(item, ast.AnnAssign)]
        if len(fields) > FIELD_CAP:
            found.append(f"{name}: {len(fields)} fields, the cap is {FIELD_CAP}")
        for field in fields:
            label = f"{name}:{field.lineno}: field {ast.unparse(field.target)}"
            if (
                field.lineno != field.end_lineno or "  # " not in lines[field.lineno - 1]
            ):  # tyro reads this one
                found.append(f"{label} has no comment")
            kinds = {node.id for node in ast.walk(field.annotation) if isinstance(node, ast.Name)}
            if kinds - SCALARS:
                found.append(f"{label} is not flat: {ast.unparse(field.annotation)}")
    return found


def shifts(root: Path) -> list[str]:
    """`1:` and `:-1` live in collate alone: on several dimensions anywhere, on one where only tensors are."""
    found = []
    for name, tree, _ in [*library(root), *scripts(root)]:
        if name == "nanopost/data/collate.py":
            continue
        tensors = module_of(name).split(".")[0] in TENSOR_ROOMS or not name.startswith("nanopost/")
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Subscript)):
            several = isinstance(node.slice, ast.Tuple)
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            of_shape = isinstance(node.value, ast.Attribute) and node.value.attr == "shape"
            ends = [
                (part.lower, part.upper) for part in parts if isinstance(part, ast.Slice) and not part.step
            ]
            moved = any(
                (lower is not None and ast.unparse(lower) == "1")
                or (upper is not None and ast.unparse(upper) == "-1")
                for lower, upper in ends
            )
            if moved and not of_shape and (several or tensors):
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)} shifts outside collate")
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if tensors and ast.unparse(node.func).split(".")[-1] == "roll":
                found.append(f"{name}:{node.lineno}: roll shifts outside collate")
    return found


def formula_ids(root: Path) -> list[str]:
    """An F-number in the losses is one of the project's formulas."""
    return [
        f"{name}: there is no formula F{number}"
        for name, _, text in sources(root, "nanopost/losses/*.py")
        for number in re.findall(r"\bF(\d+)\b", text)
        if not 1 <= int(number) <= FORMULAS
    ]


def readme(root: Path) -> list[str]:
    """The README shows commands, and what they name exists."""
    text = (root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else ""
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    found = [] if blocks else ["README.md: no block of commands (```bash)"]
    for target in re.findall(r"^\s*(?:\$ )?make ([a-z-]+)", "\n".join(blocks), re.MULTILINE):
        if target not in targets:
            found.append(f"README.md: make {target} is no target of the Makefile")
    for target in re.findall(r"`make ([a-z-]+)`", text):
        if target not in targets:
            found.append(f"README.md: `make {target}` is no target of the Makefile")
    for script in re.findall(r"\b(?:python3?|torchrun)\b[^\n]*?\s([\w/]+\.py)\b", "\n".join(blocks)):
        if not (root / script).exists():
            found.append(f"README.md: {script} does not exist")
    return found


# ---- this house, and a small one with one violation planted in it

SCRIPT = '"""A script."""\n\n' + "\n".join(f"# ---- {section} -----" for section in SECTIONS) + "\n"
CONFIG = (
    "@dataclass\nclass Config:\n    steps: int = 3  # how many\n    data: tuple[str, ...] = ()  # files\n"
)
SCRIPT = SCRIPT.replace("# ---- 2 ", CONFIG + "# ---- 2 ")
HOUSE = {
    "nanopost/__init__.py": '"""A house."""\n',
    "nanopost/losses/__init__.py": '"""Losses."""\n\nfrom .reduce import total\n',
    "nanopost/losses/reduce.py": '"""F3."""\n\nimport torch\n\n\ndef total():\n    """0."""\n    return 0\n',
    "nanopost/models/llama.py": (
        '"""Model."""\n\nfrom nanopost.losses import total\n\n\nclass Llama(nn.Module):\n    """It."""\n\n'
        "    def forward(self, x):\n        return x.view(x.shape[:-1])[:, -1:]\n"
    ),
    "nanopost/data/__init__.py": '"""Data."""\n',
    "nanopost/data/collate.py": '"""The shift."""\n\nimport torch\n\nLEFT, RIGHT = x[:, :-1], x[:, 1:]\n',
    "nanopost/data/chat.py": '"""Text."""\n\nimport json\n\nimport jinja2\n\nREST = "abc"[1:]\n',
    "train_sft.py": SCRIPT,
    "recipes/demo/recipe.py": '"""Demo."""\n\nfrom nanopost.data import chat\n',
    "README.md": "# It\n\n```bash\nmake demo\npython train_sft.py --steps 3\n```\n\nSee `make demo`.\n",
    "Makefile": "demo:\n\techo\n",
}

PLANTED: list[tuple[Rule, str, str, str]] = [  # rule, file, what is added to it, what is found
    (
        floors,
        "nanopost/losses/reduce.py",
        "from nanopost import optim\n",
        "losses may not import nanopost.optim",
    ),
    (
        floors,
        "nanopost/losses/reduce.py",
        "from ..data import chat\n",
        "losses may not import nanopost.data.chat",
    ),
    (
        floors,
        "nanopost/models/llama.py",
        "def f():\n    import nanopost.rollout.types\n",
        "models may not import",
    ),
    (
        floors,
        "nanopost/rollout/x.py",
        "from nanopost.data.chat import C\n",
        "rollout may not import nanopost.data.chat",
    ),
    (floors, "nanopost/attic.py", "\n", "room 'attic' is on no floor"),
    (
        floors,
        "recipes/demo/recipe.py",
        "from nanopost import models\n",
        "recipes may not import nanopost.models",
    ),
    (third_party, "nanopost/losses/reduce.py", "import numpy as np\n", "losses.reduce may not import numpy"),
    (third_party, "nanopost/data/chat.py", "from torch import nn\n", "data.chat may not import torch"),
    (third_party, "nanopost/rewards/math.py", "import sympy.core\n", "rewards.math may not import sympy"),
    (scripts_are_leaves, "tests/test_x.py", "from train_sft import Config\n", "imports the script train_sft"),
    (scripts_are_leaves, "docs/x.py", "import train_sft\n", "imports the script train_sft"),
    (caps, "nanopost/data/chat.py", "#\n" * 250, "257 lines, the cap is 250"),
    (caps, "train_sft.py", "#\n" * 290, "the cap is 300"),
    (caps, "nanopost/losses/x.py", "def f(x):\n" + "    x = x\n" * 16, "the body of f has 16 lines"),
    (docstrings, "nanopost/data/chat.py", "def load(x):\n    return x\n", "load has no docstring"),
    (docstrings, "nanopost/data/chat.py", "class Chat:\n    x = 1\n", "Chat has no docstring"),
    (docstrings, "nanopost/data/new.py", "x = 1\n", "the module has no docstring"),
    (classes, "nanopost/data/chat.py", "class Trainer:\n    x = 1\n", "Trainer is neither"),
    (classes, "nanopost/data/chat.py", "@dataclass\nclass Chat:\n    x = 1\n", "Chat is neither"),
    (
        classes,
        "nanopost/data/chat.py",
        "@dataclass(frozen=True)\nclass Chat:\n    def render(self):\n        return 1\n",
        "dataclass Chat has a method render",
    ),
    (headers, "train_sft.py", "# ---- 10 More ----\n", "train_sft.py: sections"),
    (headers, "train_new.py", SCRIPT.replace("6 Rollout", "6 Rollouts"), "train_new.py: sections"),
    (headers, "train_new.py", SCRIPT.replace("# ---- 9 Teardown -----\n", ""), "train_new.py: sections"),
    (configurations, "train_new.py", SCRIPT.replace("  # how many", ""), "field steps has no comment"),
    (
        configurations,
        "train_new.py",
        SCRIPT.replace("steps: int = 3  # how many", "steps: int = (\n        3  # how many\n    )"),
        "field steps has no comment",
    ),
    (
        configurations,
        "train_new.py",
        SCRIPT.replace("steps: int = 3", "optim: Optim = 3"),
        "is not flat: Optim",
    ),
    (
        configurations,
        "train_new.py",
        SCRIPT.replace("class Config", "class Args"),
        "expected one dataclass Config",
    ),
    (
        configurations,
        "train_new.py",
        SCRIPT.replace("    steps", "".join(f"    x{i}: int = 1  # x\n" for i in range(34)) + "    steps"),
        "36 fields, the cap is 35",
    ),
    (shifts, "nanopost/losses/reduce.py", "y = x[:, 1:]\n", "x[:, 1:] shifts"),
    (shifts, "nanopost/losses/reduce.py", "y = x[..., 1:, :]\n", "x[..., 1:, :] shifts"),
    (shifts, "nanopost/models/llama.py", "y = x[1:]\n", "x[1:] shifts"),
    (shifts, "nanopost/rollout/x.py", "y = ids[:-1]\n", "ids[:-1] shifts"),
    (shifts, "nanopost/data/chat.py", "y = x[:, :-1]\n", "x[:, :-1] shifts"),
    (shifts, "train_sft.py", "y = logits[:, :-1]\n", "logits[:, :-1] shifts"),
    (shifts, "train_sft.py", "y = torch.roll(x, 1)\n", "roll shifts"),
    (formula_ids, "nanopost/losses/reduce.py", "# see F48\n", "there is no formula F48"),
    (readme, "README.md", "`make dinner`\n", "make dinner"),
    (readme, "README.md", "```console\n$ make lunch\n```\n", "make lunch"),
    (
        readme,
        "README.md",
        "```bash\ntorchrun --nproc-per-node 2 train_x.py\n```\n",
        "train_x.py does not exist",
    ),
]
RULES: list[Rule] = list(dict.fromkeys(rule for rule, *_ in PLANTED))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_this_house_keeps_the_rule(rule: Rule) -> None:
    assert rule(ROOT) == []


def build(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_small_house_keeps_the_rule(rule: Rule, tmp_path: Path) -> None:
    assert rule(build(tmp_path, HOUSE)) == []


@pytest.mark.parametrize(
    ("rule", "file", "addition", "finding"),
    PLANTED,
    ids=[f"{p[0].__name__}-{i}" for i, p in enumerate(PLANTED)],
)
def test_a_planted_violation_is_found(
    rule: Rule, file: str, addition: str, finding: str, tmp_path: Path
) -> None:
    found = rule(build(tmp_path, HOUSE | {file: HOUSE.get(file, "") + addition}))
    assert len(found) == 1 and finding in found[0] and file in found[0], found


def test_a_readme_without_commands_is_found(tmp_path: Path) -> None:
    assert readme(build(tmp_path, HOUSE | {"README.md": "# It\n"})) == [
        "README.md: no block of commands (```bash)"
    ]


# ---- what only a running program shows


def python(program: str) -> str:
    env = os.environ | {"COLUMNS": "110", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOADED = f"\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"


def test_importing_the_losses_loads_nothing_heavy() -> None:
    assert python("import nanopost.losses" + LOADED).split() == []
    assert python("import nanopost.losses, jinja2, tyro" + LOADED).split() == [
        "tyro",
        "jinja2",
    ]  # it would show


HELP = """
import glob, io, contextlib, runpy, sys
for script in sorted(glob.glob("train_*.py")):
    sys.argv = [script, "--help"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    lines = text.getvalue().strip().split("\\n")
    print(script, len(lines), max(map(len, lines)))
"""


def test_the_help_of_every_script_is_one_screen() -> None:
    rows = [row.split() for row in python(HELP).splitlines()]
    assert [row[0] for row in rows] == [name for name, _, _ in scripts(ROOT)] and rows
    for script, lines, columns in rows:
        assert 10 < int(lines) <= 80 and int(columns) <= 110, (script, lines, columns)
