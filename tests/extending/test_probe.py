"""A new probe: one class and one line. The example: recall the start of a row at its end."""

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
    """The row's first tokens are repeated at its end, and the model must predict those that followed."""

    name = "echo"
    description = "the start of the row again, then its next tokens"

    def question(self, hay: Haystack, rng: random.Random, length: int, depth: float) -> Question:
        """Eight tokens repeated, four to predict."""
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
    assert "echo: the start" in capsys.readouterr().out
    record = TaskResults.load(run / "tasks.json").probes["echo"]
    assert record.lengths == [96]
    assert set(record.shares) == {"student", "far_off"}
    assert "**echo**: the start of the row again" in (run / "report.md").read_text()
