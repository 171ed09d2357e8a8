"""The run folder: what is written, what is refused, and what a resumed run is held to."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nanopost import config, metrics, micro_batches, runs


@dataclass(frozen=True)
class Config(config.Machine):
    out: Path = Path("runs/x")
    steps: int = 3
    betas: tuple[float, float] = (0.9, 0.95)
    micro_batch: int = 4
    data: Path | None = None
    model: Path | None = None


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def begin(folder: Path, **fields) -> Path:
    """A start; a resumed one where the folder holds a run."""
    env = fields.pop("env", {})
    resume = fields.pop("resume", (folder / "metrics.jsonl").exists())
    return runs.open_run(folder, Config(resume=resume, **fields), env=env)


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """Data, and a model's folder."""
    (tmp_path / "data.jsonl").write_text("{}\n")
    (folder := tmp_path / "hub").mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md", ".hidden"):
        (folder / name).write_text(name)
    return {"data": tmp_path / "data.jsonl", "model": folder}


def test_a_new_run_writes_down_what_runs(tmp_path, files):
    run = begin(tmp_path / "a" / "b", env={"template": "0f3a"}, **files)
    assert run == tmp_path / "a" / "b"
    args = read(run / "args.json")
    assert args["betas"] == [0.9, 0.95] and args["data"] == str(files["data"]) and args["steps"] == 3
    env = read(run / "env.json")
    assert env["template"] == "0f3a" and env["torch"] == torch.__version__ and env["threads"] == 1
    assert env["python"] == ".".join(map(str, sys.version_info[:3])) and env["ranks"] == 1
    assert env["packages"]["numpy"]
    assert env["commit"] is None or len(env["commit"].split("-")[0]) == 40
    assert "changes" not in env
    assert env["files"]["data"] == {  # printf "{}\n" | sha256sum
        "content": "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    }
    assert [*env["files"]["model"]] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in run.iterdir()) == [".lock", "args.json", "env.json"]


def test_a_folder_with_a_run_is_refused_unless_resumed(tmp_path):
    begin(tmp_path, resume=True)  # nothing there yet: a first start
    begin(tmp_path, resume=False)  # and still nothing
    metrics.write_record(tmp_path, 0, {"loss": 1.0})
    with pytest.raises(ValueError, match="--resume"):
        begin(tmp_path, resume=False)
    begin(tmp_path, resume=True)
    assert metrics.read_records(tmp_path) == [{"step": 0, "loss": 1.0}]
    (tmp_path / "other" / "state").mkdir(parents=True)
    with pytest.raises(ValueError, match="--resume"):
        begin(tmp_path / "other", resume=False)


def test_what_changes_no_number_may_change_and_is_kept_in_order(tmp_path):
    begin(tmp_path)
    metrics.write_record(tmp_path, 0, {})
    begin(tmp_path, micro_batch=8)
    begin(tmp_path, micro_batch=8)
    begin(tmp_path, micro_batch=2, out=Path("elsewhere"), threads=3)
    assert read(tmp_path / "args.json")["micro_batch"] == 2
    changes = [
        {"resume": [False, True], "micro_batch": [4, 8]},
        {"threads": [0, 3], "out": ["runs/x", "elsewhere"], "micro_batch": [8, 2]},
    ]
    assert read(tmp_path / "env.json")["changes"] == changes


def test_drift_is_refused_and_named_and_goes_on_where_it_is_accepted(tmp_path, files):
    run = tmp_path / "run"
    begin(run, env={"template": "abc"}, **files)
    metrics.write_record(run, 0, {})
    before = (run / "args.json").read_bytes(), (run / "env.json").read_bytes()
    files["data"].write_text('{"more": 1}\n')
    (files["model"] / "tokenizer.json").write_text("other")
    (files["model"] / "README.md").write_text("for readers")
    changed = {"env": {"template": "def"}, "steps": 5, "betas": (0.9, 0.9), **files}
    with pytest.raises(ValueError) as refused:
        begin(run, **changed)
    told = str(refused.value).splitlines()
    assert [line.split(":")[0] for line in told[:-1]] == ["steps", "betas", "template", "data", "model"]
    assert told[0] == f"steps: {run} was started with 3, this start has 5"
    assert told[2] == f"template: {run} was started with 'abc', this start has 'def'"
    assert told[4].count("'tokenizer.json': '") == 2 and "config.json" not in told[4]
    assert told[-1] == "put it back, or go on with --accept steps,betas,template,data,model"
    assert before == ((run / "args.json").read_bytes(), (run / "env.json").read_bytes())
    with pytest.raises(ValueError, match=r"^data: .*\n.*--accept data$"):
        begin(run, accept="steps,betas,template,model", **changed)
    begin(run, accept="steps,betas,template,data,model", **changed)
    (now,) = read(run / "env.json")["changes"]
    assert {"steps", "betas", "template", "data", "model"} < now.keys() and now["steps"] == [3, 5]
    begin(run, **changed)  # it is the run's own from here on
    with pytest.raises(ValueError, match="accept: nothing is called dtaa"):
        begin(run, accept="dtaa", **changed)


def test_products_in_another_precision_are_another_run(tmp_path):
    begin(tmp_path)
    metrics.write_record(tmp_path, 0, {})
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"bf16: .* was started with False, this start has True"):
            begin(tmp_path)
        begin(tmp_path, accept="bf16")
    assert read(tmp_path / "env.json")["bf16"] is True


def test_a_file_is_what_it_holds_wherever_it_lies(tmp_path, files):
    run = tmp_path / "run"
    begin(run, **files)
    metrics.write_record(run, 0, {})
    (tmp_path / "moved").mkdir()
    moved = files["data"].rename(tmp_path / "moved/renamed.jsonl")
    begin(run, data=moved, model=files["model"])
    assert read(run / "env.json")["changes"][0]["data"] == [str(files["data"]), str(moved)]
    with pytest.raises(
        ValueError, match=re.escape(f"data: {run} was started with '{moved}', this start has None")
    ):
        begin(run, model=files["model"])


def test_a_value_the_first_start_did_not_tell_is_added(tmp_path):
    begin(tmp_path, env={"template": "other"})
    begin(tmp_path, env={"template": "abc", "sizes": (1, 2)})  # not begun: nothing to hold it to
    metrics.write_record(tmp_path, 0, {})
    begin(tmp_path, env={"template": "abc", "sizes": (1, 2)})
    begin(tmp_path, env={"template": "abc", "later": 1})
    assert read(tmp_path / "env.json")["later"] == 1


def test_a_start_that_left_nothing_to_go_on_from_binds_to_nothing(tmp_path):
    begin(tmp_path, steps=0)  # the preflight alone
    begin(tmp_path, steps=9, resume=True)
    (tmp_path / "teacher.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"steps: .* was started with 9, this start has 3"):
        begin(tmp_path, resume=True)


def test_a_run_without_its_records_is_refused(tmp_path):
    begin(tmp_path)
    metrics.write_record(tmp_path, 0, {})
    (tmp_path / "env.json").unlink()
    with pytest.raises(
        ValueError, match=r"env\.json is not there: nothing says what the run was started with"
    ):
        begin(tmp_path)


def test_a_record_that_does_not_read_is_named(tmp_path):
    begin(tmp_path)
    metrics.write_record(tmp_path, 0, {})
    (tmp_path / "args.json").write_text("{")
    with pytest.raises(ValueError, match=r"args\.json: not JSON"):
        begin(tmp_path)


def test_what_memory_came_down_to_is_of_the_run_and_not_of_a_new_one_in_its_folder(tmp_path, capsys):
    try:
        begin(tmp_path)
        (tmp_path / "micro_batch-rank1.json").write_text('{"rows": 2}\n')
        begin(tmp_path, resume=True)
        assert "at most 2 rows a pass" in capsys.readouterr().out
        begin(tmp_path)  # nothing was begun there: another first start
        assert not [*tmp_path.glob("micro_batch*")] and not capsys.readouterr().out
    finally:
        micro_batches.begin()
