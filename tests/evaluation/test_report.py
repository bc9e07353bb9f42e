"""The report is complete, needs no model, and shows failures as prominently as successes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from report_kit import made_metrics, made_results
from trenchcoat.evaluation.report.plots import LOOK, log_bins, name_lines
from trenchcoat.evaluation.report.run import report_text, terminal_table, terminal_verdicts, write_report
from trenchcoat.evaluation.report.texts import duration
from trenchcoat.evaluation.results import Results, Sample
from trenchcoat.evaluation.rows import REPORT_ROWS

PICTURES = {"rows.png", "positions.png", "training.png", "decode.png"}


@pytest.fixture(scope="module", autouse=True)
def _coarse_pictures() -> Iterator[None]:
    """Small files, drawn fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LOOK, "savefig.dpi", 40)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, _coarse_pictures: None) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in made_metrics()))
    assert write_report(folder, made_results()) == folder / "report.md"
    return folder


def on_terminal(renderable: object, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(renderable)
    return stream.getvalue()


def test_all_pictures_are_drawn_and_shown(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert set(re.findall(r"\]\((\w+\.png)\)", text)) == PICTURES
    for name in PICTURES:
        assert (written / name).read_bytes().startswith(b"\x89PNG")
        assert (written / name).stat().st_size > 3_000


def test_every_row_setting_and_remark_is_shown(written: Path) -> None:
    text = (written / "report.md").read_text()
    for row in REPORT_ROWS.values():
        assert text.count(row.label) >= 2  # in the table, and explained
    for expected in (
        "transfer.lr | 0.01", "1,638,400", "1 min 15 s", "4 min 41 s", "chunkwise", "packages.torch | 2.13.0",
        "train/rows | 200", "A remark.", "16 rows of up to 512 tokens", "return a | 1",
    ):  # fmt: skip
        assert expected in text


def test_a_plot_without_data_is_left_out(tmp_path: Path) -> None:
    results = made_results()
    results.decode = {}
    (tmp_path / "decode.png").write_bytes(b"of an earlier run")
    text = write_report(tmp_path, results, []).read_text()
    assert not (tmp_path / "decode.png").exists()
    assert not (tmp_path / "training.png").exists()
    assert text.count("Not measured in this run.") == 2


def test_the_pictures_of_a_selection_come_first(tmp_path: Path) -> None:
    assert "What keeping" not in write_report(tmp_path, made_results(), []).read_text()
    (tmp_path / "frontier.png").write_bytes(b"\x89PNG")
    text = write_report(tmp_path, made_results(), []).read_text()
    assert re.findall(r"\]\((\w+\.png)\)", text)[:2] == ["frontier.png", "rows.png"]
    assert (tmp_path / "frontier.png").exists()
    assert text.index("**Worth using for long texts") < text.index("frontier.png") < text.index("### Quality")


def test_empty_results_still_give_a_report(tmp_path: Path) -> None:
    text = write_report(tmp_path, Results(window=4, seq_len=8), []).read_text()
    assert "Nothing was scored." in text
    assert "Whether this model is worth using was not measured" in text


def test_failures_are_shown_where_successes_are() -> None:
    good = report_text(made_results(), {})
    bad = report_text(made_results(window_sinks=(0.0, 0.0), far_off=(0.0, 0.0)), {})
    table = [line for line in bad.splitlines() if line.startswith("| ❌ **NO**")]
    assert any("does NOT beat 'window + sinks'" in line for line in table)
    assert any("does NOT need its linear part" in line for line in table)
    assert "❌" not in good
    assert good.count("| ✅ **YES**") == bad.count("| ✅ **YES**") + len(table) + bad.count("not measured |")
    assert "NO" in on_terminal(terminal_verdicts(made_results(window_sinks=(0.0, 0.0))))


def test_the_terminal_shows_the_reports_numbers(written: Path) -> None:
    shown, text = on_terminal(terminal_table(made_results())), (written / "report.md").read_text()
    assert "…" not in shown
    for line in shown.splitlines():
        match = re.match(r" (transfer \+ stage 2|teacher|window\+sinks, stage 2) +(\d+\.\d+) +(\d+) %", line)
        if match:
            row = next(
                row for row in text.splitlines() if re.match(rf"\| (\*\*)?{re.escape(match[1])}(\*\*)? \| ", row)
            )
            assert match[2] in row
            closed = re.findall(r"([\d.]+) %", row)
            assert abs(float(closed[0]) - int(match[3])) < 0.56
    assert len(re.findall(r"^ (teacher|transfer \+ stage 2)  ", shown, re.MULTILINE)) == 2


def test_text_cannot_break_the_markdown() -> None:
    results = made_results()
    results.samples = [Sample("a ```` b", {"teacher": "```\n# not a heading\n```"})]
    results.recipe["model"] = {"path": "a|b"}
    text = report_text(results, {})
    assert "`````text\na ```` b\n`````" in text
    assert "````text\n```\n# not a heading\n```\n````" in text
    assert "model.path | a\\|b |" in text


def test_a_log_of_one_step_and_one_layer_is_drawn(tmp_path: Path) -> None:
    write_report(tmp_path, made_results(), made_metrics(layers=1, steps=1))
    assert (tmp_path / "training.png").exists()


def test_many_layers_and_numbers_that_are_not_finite_are_drawn(tmp_path: Path) -> None:
    lines = made_metrics(layers=32, steps=20)
    lines[3]["loss/layer_00"] = "nan"
    write_report(tmp_path, made_results(), lines)
    assert (tmp_path / "training.png").exists()


def test_log_bins_keep_the_mean() -> None:
    scores = made_results().rows["teacher"]
    bins = log_bins(scores)
    assert bins[0] == (pytest.approx(1.0), pytest.approx(scores.position_loss[0]))
    assert [x for x, _ in bins] == sorted(x for x, _ in bins)
    assert len(bins) < 40
    assert bins[-1][1] == pytest.approx(sum(scores.position_loss[455:]) / len(scores.position_loss[455:]), abs=0.02)


def test_labels_of_lines_never_overlap() -> None:
    axes = Figure().subplots()
    axes.set_ylim(0, 1)
    name_lines(axes, [(y, str(y), "k") for y in (0.5, 0.5, 0.51, 0.99, 1.5, 0.02)], gap=0.05)
    heights = sorted(text.xy[1] for text in axes.texts)
    assert all(b - a > 0.0499 for a, b in pairwise(heights))
    assert heights[0] >= 0
    assert heights[-1] <= 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.2 s"), (245, "4 min 05 s"), (7260, "2 h 01 min"), (float("nan"), "–")]
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
