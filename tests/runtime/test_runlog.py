"""The run's record: lines survive kills and rewinds, numbers stay JSON, the display suits the terminal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from trenchcoat.runtime.files import SaveError
from trenchcoat.runtime.runlog import METRICS_FILE, RunLog, environment, read_metrics


def quiet(directory: Path) -> RunLog:
    return RunLog(directory, progress="off", console=Console(file=io.StringIO()))


def test_lines_are_json_and_on_disk_at_once(tmp_path: Path) -> None:
    with quiet(tmp_path / "new" / "run") as run:
        run.log("train", stage="a", step=1, loss=torch.tensor(0.5), bad=math.nan, shape=(1, 2), table={"x": math.inf})
        line = read_metrics(tmp_path / "new" / "run")[0]
    assert line.pop("time") > 0
    assert line == {
        "kind": "train", "stage": "a", "step": 1, "loss": 0.5, "bad": "nan", "shape": [1, 2], "table": {"x": "inf"},
    }  # fmt: skip


def test_rewinding_drops_what_comes_after_the_checkpoint(tmp_path: Path) -> None:
    with quiet(tmp_path) as run:
        run.info("begin")
        for stage in ("a", "b"):
            run.log("eval", stage=stage, step=0)
            for step in (1, 2, 3):
                run.log("train", stage=stage, step=step)
                run.log("eval", stage=stage, step=step)
        run.log("result", stage="b", step=2)
        assert run.rewind("b", 2, evaluated=False) == 4
        run.log("train", stage="b", step=3)
    kept = [(line["kind"], line["step"]) for line in read_metrics(tmp_path) if line.get("stage") == "b"]
    assert kept == [("eval", 0), ("train", 1), ("eval", 1), ("train", 2), ("train", 3)]
    assert sum(line.get("stage") == "a" for line in read_metrics(tmp_path)) == 7
    with quiet(tmp_path) as run:
        run.rewind("b", -1)
    assert not any(line.get("stage") == "b" for line in read_metrics(tmp_path))


def test_only_the_line_truncated_by_a_kill_is_lost(tmp_path: Path) -> None:
    with quiet(tmp_path) as run:
        run.log("train", stage="a", step=1)
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"kind": "train", "stage": "a", "st')
    with quiet(tmp_path) as run:
        run.log("train", stage="a", step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path / "absent") == []


def test_warnings_are_shown_even_when_progress_is_off(tmp_path: Path) -> None:
    shown = io.StringIO()
    with RunLog(tmp_path, progress="off", console=Console(file=shown)) as run:
        run.info("not shown")
        run.warning("step-5 is damaged")
    assert shown.getvalue() == "warning: step-5 is damaged\n"
    assert [line["kind"] for line in read_metrics(tmp_path)] == ["info", "warning"]


@pytest.mark.parametrize("display", ["auto", "bar", "plain", "off"])
def test_every_display_runs(tmp_path: Path, display: str) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=120)
    with RunLog(tmp_path, progress=display, console=console) as run, run.progress("transfer", 20, start=10) as progress:
        for step in range(11, 21):
            progress.update(step, loss=1.5)
    text = shown.getvalue()
    if display in ("auto", "plain"):
        first, *_, last = text.splitlines()
        assert first.startswith("transfer 11/20 (")
        assert "left" in first
        assert last.startswith("transfer 20/20")
        assert last.endswith("loss 1.5")
    if display == "off":
        assert text == ""


def test_a_wrong_display_and_an_impossible_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="progress='loud'"):
        RunLog(tmp_path, progress="loud")
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot save"):
        RunLog(tmp_path / "file" / "run")


def test_the_environment_names_versions_and_the_implementation(tmp_path: Path) -> None:
    with quiet(tmp_path) as run:
        run.write_environment(implementation="chunkwise")
        run.write_recipe("model: {path: embedded}\n")
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["implementation"] == "chunkwise"
    assert record["packages"]["torch"] == torch.__version__
    assert record.keys() == environment(implementation="x").keys()
    assert (tmp_path / "recipe.yaml").read_text() == "model: {path: embedded}\n"
