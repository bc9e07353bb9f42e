"""A new column of the report: one class and one line. The example: bits per token."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from report_kit import made_results
from trenchcoat.evaluation.columns import REPORT_COLUMNS, ReportColumn, number
from trenchcoat.evaluation.report.run import report_text, terminal_table
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.statistics import Estimate


class BitsColumn(ReportColumn):
    """The mean loss in bits."""

    key, heading, short_heading = "bits", "bits per token", "\nbits per\ntoken"

    def value(self, results: Results, row: str) -> Estimate:
        """Convert nats to bits."""
        loss = results.rows[row].all.estimate
        return Estimate(loss.value / math.log(2), loss.error / math.log(2))

    def text(self, value: Estimate) -> str:
        """Two decimals."""
        return number(value, 2)


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPORT_COLUMNS, "bits", BitsColumn())


@pytest.mark.usefixtures("_registered")
def test_a_column_is_in_the_report_the_terminal_table_and_the_results(tmp_path: Path) -> None:
    results = made_results()
    loss = results.rows["teacher"].all.mean / math.log(2)
    assert "| bits per token |" in report_text(results, {})
    teacher = next(line for line in report_text(results, {}).splitlines() if line.startswith("| teacher | "))
    assert f"| {loss:.2f} ± " in teacher
    stream = io.StringIO()
    Console(file=stream, width=80).print(terminal_table(results))
    assert "bits per" in stream.getvalue()
    assert "…" not in stream.getvalue()
    results.save(tmp_path / "results.json")
    summary = json.loads((tmp_path / "results.json").read_text())["rows"]["teacher"]["summary"]
    assert summary["bits"]["value"] == pytest.approx(loss)
    assert Results.load(tmp_path / "results.json").rows == results.rows
