"""A probe: one class and one line. The example: the beginning of a row, asked for at its end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tasks_kit import SHORTEST_RUN
from trenchcoat.cli import app as cli
from trenchcoat.evaluation.own_tasks import OWN_TASKS
from trenchcoat.evaluation.probes import Haystack, Probe, Question, share_of_hits
from trenchcoat.evaluation.task_results import TaskResults


class Echo(Probe):
    """The row's first tokens are shown again at its end, and those that followed them are asked for."""

    name = "echo"
    description = "the beginning of the row again, its next tokens asked for"

    def question(self, hay: Haystack, rng: random.Random, length: int, depth: float) -> Question:
        """Eight tokens again, four asked for."""
        text, _ = hay.filler(rng, length - len(hay.opening) - 12)
        return Question([([*hay.opening, *text, *text[:8]], text[8:12])], share_of_hits)


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OWN_TASKS, "echo", Echo())


@pytest.mark.usefixtures("_registered")
def test_a_probe_is_offered_scored_and_reported(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    assert "echo" in capsys.readouterr().out
    run = tmp_path / "run"
    assert cli.main(["linearize", "demo", *tiny_overrides, *SHORTEST_RUN]) == 0
    options = ["--probe-lengths", "2", "--probe-rows", "2", "--device", "cpu"]
    assert cli.main(["eval", str(run), "--tasks", "echo", *options]) == 0
    assert "echo: the beginning" in capsys.readouterr().out
    record = TaskResults.load(run / "tasks.json").probes["echo"]
    assert record.lengths == [96]
    assert set(record.shares) == {"student", "far_off"}
    assert "**echo**: the beginning of the row again" in (run / "report.md").read_text()
