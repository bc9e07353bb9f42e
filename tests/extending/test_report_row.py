"""A new row of the report: one class and one line. The example: the window alone, half as wide, untrained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trenchcoat.config import Recipe, StudentConfig
from trenchcoat.config.recipe_io import load_recipe
from trenchcoat.conversion import stages
from trenchcoat.evaluation.report.verdicts import verdicts
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.rows import REPORT_ROWS, ReportRow, asked_rows


class HalfWindowRow(ReportRow):
    """Half the window, without sinks."""

    name, label = "half_window", "half the window"
    description = "each token sees half of the window, and nothing else."
    question = "Does it beat half of its window alone?"
    colour = "#56B4E9"

    def student(self, recipe: Recipe) -> StudentConfig:
        """A different student, with nothing to train."""
        return dataclasses.replace(recipe.student, name="window_sinks", window=recipe.student.window // 2, sinks=0)


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPORT_ROWS, "half_window", HalfWindowRow())


@pytest.mark.usefixtures("_registered")
def test_a_row_is_scored_reported_and_asked_about(tiny_overrides: list[str]) -> None:
    recipe = load_recipe("demo", [*tiny_overrides, "eval.baselines=false", "eval.decode_lengths=[]"])
    assert "half_window" in asked_rows(recipe)
    results = stages.linearize(recipe).results
    kept = Results.load(Path(recipe.run.dir) / "results.json")
    assert kept.rows["half_window"].all.mean != kept.rows["window_sinks"].all.mean
    assert list(dict(kept.ordered_rows()))[-1] == "half_window"
    report = (Path(recipe.run.dir) / "report.md").read_text()
    assert "| half the window |" in report
    assert "- **half the window**: each token sees half of the window" in report
    [verdict] = [verdict for verdict in verdicts(results) if verdict.key == "beats_half_window"]
    assert verdict.outcome in ("yes", "no")
    assert f"{verdict.question} | '" in report
