"""The report of a run: ``report.md`` with its plots, and the same table and answers for the terminal.

Everything is computed from a ``Results``; the text is written for first-time readers. Negative answers are shown as
prominently as positive ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import table as rich_table
from rich.text import Text

from trenchcoat.evaluation.columns import REPORT_COLUMNS, ReportColumn, report_columns
from trenchcoat.evaluation.report.html import write_page
from trenchcoat.evaluation.report.plots import plot_decode, plot_positions, plot_rows, plot_training
from trenchcoat.evaluation.report.recommendation import recommendation
from trenchcoat.evaluation.report.selection import FRONTIER_PICTURE, GROUPS_PICTURE
from trenchcoat.evaluation.report.table import Table
from trenchcoat.evaluation.report.tasks import PROBES_PICTURE, markdown_sections, plot_probes
from trenchcoat.evaluation.report.texts import bytes_text, duration
from trenchcoat.evaluation.report.verdicts import headline, verdicts
from trenchcoat.evaluation.results import RESULTS_FILE, Results
from trenchcoat.evaluation.rows import REPORT_ROWS, TEACHER, row_label
from trenchcoat.evaluation.task_results import TASKS_FILE, TaskResults
from trenchcoat.runtime.files import write_text
from trenchcoat.runtime.runlog import read_metrics

REPORT_FILE = "report.md"
PAGE_FILE = "report.html"
SELECTION_PICTURES = {
    FRONTIER_PICTURE: "Share of the gap closed against the share of the cache that is kept",
    GROUPS_PICTURE: "Score of every key/value group, layer by layer",
}
"""Written by the selection of groups, and shown first."""
MARKS = {"yes": "✅ **YES**", "no": "❌ **NO**", "not measured": "➖ not measured"}
TERMINAL_MARKS = {"yes": ("YES", "bold green"), "no": ("NO", "bold red"), "not measured": ("?", "dim")}


def report_tables(results: Results) -> tuple[Table, Table]:
    """(quality, controls and cost): the rows under the headings of their columns, the converted model's in bold."""
    columns = report_columns(results)
    quality, controls = (
        _rows_under([column for column in columns if column.control == control], results) for control in (False, True)
    )
    return quality, controls


def _rows_under(columns: Sequence[ReportColumn], results: Results, *, short: bool = False) -> Table:
    """``short``: three-line headings, and no standard errors (over the rows of text)."""
    names = [name for name, _ in results.ordered_rows()]
    headings = [column.short_heading if short else column.heading for column in columns]
    cells = [[row_label(name), *(c.cell(results, name, noise=not short) for c in columns)] for name in names]
    bold = [number for number, name in enumerate(names) if name == results.converted()]
    return Table(["\n\nrow" if short else "row", *headings], cells, bold)


def terminal_table(results: Results) -> rich_table.Table:
    """The report's most important columns without standard errors, to print with rich."""
    columns = [column for column in report_columns(results) if column.on_terminal]
    title = f"Loss, copying and cache (W = {results.window})"
    return _rows_under(columns, results, short=True).as_rich(title, compact=True)


def terminal_verdicts(results: Results) -> rich_table.Table:
    """The answers of the report, to print with rich."""
    found = verdicts(results)
    table = rich_table.Table(title=headline(found), title_justify="left", show_header=False, show_lines=True)
    table.add_column("answer", justify="center", no_wrap=True)
    table.add_column("question and numbers")
    for verdict in found:
        mark, style = TERMINAL_MARKS[verdict.outcome]
        table.add_row(Text(mark, style), Text.assemble((verdict.question, "bold"), "\n", verdict.sentence))
    return table


def write_report(run_dir: Path | str, results: Results, metrics: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Write ``report.md``, its PNG plots, a self-contained ``report.html`` and ``results.json`` into ``run_dir``.

    Returns the report's path. ``metrics``: the lines of the run's log, read from ``run_dir`` by default; tasks and
    probes come from its ``tasks.json``, if any. A plot whose numbers were not measured is left out, and the report
    says so. Raises ``SaveError`` when the folder cannot be written.
    """
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = read_metrics(folder) if metrics is None else metrics
    tasks = TaskResults.load(folder / TASKS_FILE) if (folder / TASKS_FILE).is_file() else None
    drawn = {
        "rows.png": plot_rows(results, folder / "rows.png"),
        "positions.png": plot_positions(results, folder / "positions.png"),
        "training.png": plot_training(lines, folder / "training.png"),
        "decode.png": plot_decode(results, folder / "decode.png"),
        PROBES_PICTURE: tasks is not None and plot_probes(tasks, folder / PROBES_PICTURE),
    }
    for name in (name for name, done in drawn.items() if not done):
        (folder / name).unlink(missing_ok=True)
    results.save(folder / RESULTS_FILE)
    drawn |= {name: (folder / name).is_file() for name in SELECTION_PICTURES}
    text = report_text(results, drawn, tasks)
    write_text(folder / REPORT_FILE, text)
    write_page(folder / PAGE_FILE, text, folder)
    return folder / REPORT_FILE


def report_text(results: Results, drawn: Mapping[str, bool], tasks: TaskResults | None = None) -> str:
    """The report in Markdown; ``drawn`` says which plots exist."""
    found = verdicts(results)
    stages = (("transfer", "attention transfer"), ("lora", "stage 2"))
    descriptions = {column.title: column.description for column in REPORT_COLUMNS.values() if column.description}
    answers = [(MARKS[verdict.outcome], verdict.question, verdict.sentence) for verdict in found]
    linear = _get(results.recipe, "student", "name") == "linear"
    missing = "- The teacher was not scored, so no share of a gap could be computed."
    text = Path(__file__).with_name("report_template.md").read_text(encoding="utf-8").format(
        model=_get(results.recipe, "model", "path") or "the model",
        trained=" and ".join(text for stage, text in stages if results.recipe.get(stage) is not None) or "not at all",
        recommendation=recommendation(results),
        headline=headline(found),
        answers=_lines(Table(("answer", "question", "numbers"), answers).as_markdown(numbers=False)),
        selection=_lines(_selection(drawn)),
        table=_lines(_table(results, drawn)),
        window=results.window,
        two_windows=2 * results.window,
        no_near_part=" (the student of this run, `linear`, has none)" if linear else "",
        columns=_lines(f"- **{heading[0].upper()}{heading[1:]}**: {text}" for heading, text in descriptions.items()),
        rows=_lines(f"- **{row.label}**: {row.description}" for row in REPORT_ROWS.values()).replace(
            "{sinks}", str(_get(results.recipe, "eval", "sinks") or "few")
        ),
        pictures=_lines(_pictures(drawn)),
        tasks="" if tasks is None else _lines(markdown_sections(tasks, drawn=drawn.get(PROBES_PICTURE, False))),
        samples=_lines(_samples(results)),
        making=_lines(_making(results)),
        notes=_lines([missing] * (bool(results.rows) and TEACHER not in results.rows))
        + _lines(f"- {note}" for note in results.notes),
    )  # fmt: skip
    return text.rstrip() + "\n"


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _table(results: Results, drawn: Mapping[str, bool]) -> list[str]:
    if not results.rows:
        return ["Nothing was scored.", ""]
    first = next(iter(results.rows.values()))
    quality, controls = report_tables(results)
    lines = [
        "### Quality",
        "",
        *quality.as_markdown(),
        f"Scored on the same {len(first.all.counts)} rows of up to {first.seq_len:,} tokens for every model: "
        f"{first.all.count:,} tokens, of which {first.far.count:,} past 2W, and {first.recall.count:,} recall probes. "
        "± is one standard error (jackknife over the rows of text). All models read the same text, so the error of a "
        "difference is much smaller than these errors; the answers above use that one.",
        "",
        "### Controls and cost",
        "",
        *controls.as_markdown(),
    ]
    picture = ["![Loss of each row above the teacher's, with noise](rows.png)", ""]
    return [*lines, *picture] if drawn.get("rows.png") else lines


def _selection(drawn: Mapping[str, bool]) -> list[str]:
    """The pictures of a selection of groups, if there was one."""
    shown = [f"![{text}]({name})" for name, text in SELECTION_PICTURES.items() if drawn.get(name)]
    text = "Without any training, on text and on copied text, against the same number of evenly spread groups."
    return ["## What keeping key/value groups brings", "", text, "", *shown, ""] if shown else []


def _pictures(drawn: Mapping[str, bool]) -> list[str]:
    shown = (
        (
            "positions.png",
            "Loss by position",
            "A curve that departs from the teacher's to the right of 2W shows lost context.",
        ),
        ("training.png", "Training", "Training loss of both stages, and the loss on held-out text."),
        ("decode.png", "Decoding", "Time per token and size of the state, against the length of the context."),
    )
    lines: list[str] = []
    for file, title, text in shown:
        body = [text, "", f"![{title}]({file})"] if drawn.get(file) else ["Not measured in this run."]
        lines += [f"## {title}", "", *body, ""]
    return lines


def _samples(results: Results) -> list[str]:
    if not results.samples:
        return []
    lines = ["## Texts side by side", "", "Continuations of the same held-out prompts; not selected.", ""]
    for number, sample in enumerate(results.samples, 1):
        lines += [f"### Prompt {number}", "", *_fenced(sample.prompt), ""]
        for name, text in sample.outputs.items():
            lines += [f"**{row_label(name)}**", "", *_fenced(text), ""]
    return lines


def _fenced(text: str) -> list[str]:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", text, fence]


def _making(results: Results) -> list[str]:
    lines = ["## How it was made", ""]
    if results.stages:
        stages = [
            (stage.name, f"{stage.steps:,}", f"{stage.tokens:,}", duration(stage.seconds),
             f"{stage.best_loss:.4f}" if math.isfinite(stage.best_loss) else "–")
            for stage in results.stages
        ]  # fmt: skip
        lines += Table(("stage", "steps", "tokens read", "time", "best held-out loss"), stages).as_markdown()
    facts = {"whole run": duration(results.seconds)} if math.isfinite(results.seconds) else {}
    if results.implementation:
        facts["implementation of the attention"] = results.implementation
    lines += [f"- {name}: {value}" for name, value in facts.items()] + [""] * bool(facts)
    for title, content in (("Data", results.data), ("Settings", results.recipe), ("Machine", results.environment)):
        if content:
            lines += [f"<details><summary>{title}</summary>", ""]
            lines += [*Table(("", ""), [*_flat_rows(content)]).as_markdown(numbers=False), "</details>", ""]
    if any(results.decode.values()):
        decode = [
            (mode, f"{point.context:,}", f"{point.ms_per_token:.2f}", f"{point.ms_mean:.2f}",
             f"{point.prefill_ms:.0f} ms", bytes_text(point.cache_bytes))
            for mode, points in results.decode.items() for point in points
        ]  # fmt: skip
        headings = ("model", "context", "ms per token, median", "mean", "reading the context", "cache")
        lines += ["### Decoding", "", *Table(headings, decode).as_markdown()]
        lines += ["The mean includes the step, one in every W tokens, that moves a chunk into the far sum.", ""]
    return lines


def _flat_rows(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """(a.b, value) of nested settings."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat_rows(value, f"{prefix}{key}.")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            yield prefix + str(key), "" if shown is None else str(shown)


def _get(content: Mapping[str, Any], *path: str) -> Any:
    """The value at ``path`` of nested mappings; None if missing."""
    value: Any = content
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
