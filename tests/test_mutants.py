"""Every mutant of tests/mutants/ is killed by the test it names, and by that test's verdict alone.

A killer runs in its own process on a patched copy of the project, two at a time. Exit code 1 and a FAILED
line of the killer are asked for: a mutant that merely breaks an import or the collection is not killed. That
a killer passes without its mutant is said by the suite itself, of which it is a part.
`-k losses` runs the mutants of one room, `-k NAME` a single one.
"""

import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.forks import run_pytest
from tests.museum import PAGE, mutants, page
from tests.mutants.mutant import ROOT, Mutant, patched, write_mutant

MUTANTS = [(f"{room}-{mutant.name}", mutant) for room, found in mutants().items() for mutant in found]
SECONDS = 240  # of one killer; a mutant that hangs is not killed by its test
Outcome = tuple[int, str]  # exit status and output


def run_mutant(mutant: Mutant) -> Outcome:
    """pytest on the killer, in a patched copy of the project."""
    arguments = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", mutant.killer]
    # pytest looks for its old folders and may leave the look-up open.
    arguments += ["-W", "ignore:unclosed scandir iterator:ResourceWarning"]
    environment = {"NANOPOST_MUTANT": mutant.name, "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # for speed
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        write_mutant(mutant, project)
        environment |= {"PYTHONPATH": str(project)}
        return run_pytest(project, arguments, environment=environment, seconds=SECONDS)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """The runs of the selected mutants, two at a time."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    chosen = {
        call.params["name"]: call.params["mutant"] for call in calls if call and "mutant" in call.params
    }
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = {name: pool.submit(run_mutant, mutant) for name, mutant in chosen.items()}
        yield runs
        for run in runs.values():
            run.cancel()


def test_mutants_are_well_formed() -> None:
    assert len({name for name, _ in MUTANTS}) == len(MUTANTS) > 0
    for name, mutant in MUTANTS:
        assert mutant.before != mutant.after and mutant.source, name
        assert mutant.story and "\n" not in mutant.story, name
        compile(patched(mutant), mutant.file, "exec")
        path, *_, test = mutant.killer.split("[")[0].split("::")
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), name


@pytest.mark.parametrize(("name", "mutant"), MUTANTS, ids=[name for name, _ in MUTANTS])
def test_mutant_is_killed(name: str, mutant: Mutant, outcomes: dict[str, Future[Outcome]]) -> None:
    status, printed = outcomes[name].result()
    report = f"{name} ({mutant.source}) under {mutant.killer}:\n{printed}"
    assert status != 0, f"survived: {report}"
    assert status == 1 and f"FAILED {mutant.killer}" in printed, f"broken: {report}"


def test_the_museum_shows_every_mutant() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/bug-museum.md is stale: python -m tests.museum"


def test_the_museum_counts_our_own_bugs_apart() -> None:
    """An exhibit says its source behind its name; the heading's two counts are those of the exhibits."""
    sources = re.findall(r"^\*\*.*\*\* \((.*)\)  $", page(), re.MULTILINE)
    ours = sources.count("our own")
    assert len(sources) == len(MUTANTS) and 0 < ours < len(sources)
    assert f"\n{len(sources) - ours} bugs that other projects have had and {ours} of our own" in page()
    assert not [source for source in sources if "our own" in source and source != "our own"]
