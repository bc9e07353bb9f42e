"""Tasks and probes in the report: a table with paired differences, and heat maps of the probes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from trenchcoat.evaluation.report.plots import LOOK
from trenchcoat.evaluation.task_results import (
    MODEL_LABELS,
    STUDENT,
    TEACHER,
    Estimate,
    ProbeRecord,
    TaskRecord,
    TaskResults,
    interval,
    paired,
    pooled_rows,
)

TASKS_FILE = "tasks.json"
PROBES_PICTURE = "probes.png"
HEADINGS = ("task", "shots", "rows", "metric", "linear %", "teacher %", "difference")
WORDS = {
    "needle": "a passage hidden at some depth, its next tokens asked for at the end",
    "recall": "one of eight scattered pairs asked for at the end",
    "copy": "half a row of text, then the same again",
}


def percent(estimate: Estimate | None) -> str:
    """``43.2 ± 0.4``, in per cent: the value with one standard error, or a dash."""
    if estimate is None or not math.isfinite(estimate.value):
        return "–"
    error = estimate.error
    return f"{100 * estimate.value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def shown_tasks(results: TaskResults) -> list[TaskRecord]:
    """Groups and the tasks outside them, and a group's subgroups; not the dozens of tasks inside."""
    inside = {member for record in results.tasks.values() for member in record.members}
    return [record for name, record in results.tasks.items() if name not in inside]


def task_cells(results: TaskResults) -> list[list[str]]:
    """One list of texts for each task and metric, under ``HEADINGS``."""
    cells = []
    for record in shown_tasks(results):
        metrics = dict.fromkeys(metric for score in record.scores.values() for metric in score.metrics)
        for metric in metrics:
            gap = paired(results, results, record.name, metric)
            cells.append(
                [
                    record.alias,
                    str(record.settings.get("fewshot", "–")),
                    f"{record.count:,}",
                    metric,
                    percent(_metric(record, STUDENT, metric)),
                    percent(_metric(record, TEACHER, metric)),
                    "–" if gap is None else percent(Estimate(gap.value, gap.error)),
                ]
            )
    return cells


def _metric(record: TaskRecord, model: str, metric: str) -> Estimate | None:
    return record.scores[model].metrics.get(metric) if model in record.scores else None


def terminal_tables(results: TaskResults) -> list[Table]:
    """Tasks and probes, to print with rich."""
    tables = []
    if results.tasks:
        table = Table(
            title="Tasks (± one standard error)",
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for number, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for row in task_cells(results):
            table.add_row(*row)
        tables.append(table)
    for record in results.probes.values():
        table = Table(
            title=f"{record.name}: {WORDS[record.name]}",
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for number, heading in enumerate(["model", *(f"{length:,}" for length in record.lengths)]):
            table.add_column(heading, justify="right" if number else "left", no_wrap=True)
        for name, values in probe_rows(record):
            table.add_row(name, *values)
        tables.append(table)
    return tables


def probe_rows(record: ProbeRecord) -> list[tuple[str, list[str]]]:
    """(model, share at each length, over all depths) for each model; then the controls."""
    found = []
    for model in (m for m in MODEL_LABELS if m in record.shares):
        means = [_share([row for cell in cells for row in cell]) for cells in record.shares[model]]
        found.append((MODEL_LABELS[model], means))
    for model in (m for m in MODEL_LABELS if any(record.controls.get(m, []))):
        found.append((f"{MODEL_LABELS[model]}, without it", [_share(rows) for rows in record.controls[model]]))
    if record.chance is not None:
        found.append(("chance", [f"{100 * record.chance:.1f} %"] * len(record.lengths)))
    return found


def _share(rows: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(rows):.1f} %"


def markdown_sections(results: TaskResults, *, drawn: bool) -> list[str]:
    """The report's sections on tasks and probes; ``drawn`` says whether the heat maps exist."""
    lines: list[str] = []
    if results.tasks:
        lines += ["## Tasks", "", f"| {' | '.join(HEADINGS)} |", "|---" + "|---:" * (len(HEADINGS) - 1) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in task_cells(results)]
        lines += [
            "",
            "In per cent, ± one standard error over the rows. The last column is linear minus teacher over the same "
            "rows, compared one by one; its error is that of the difference. 95 % intervals: "
            + (_intervals(results) or "none")
            + ".",
            "",
        ]
    if results.probes:
        lines += ["## Long-context probes", "", *_probe_lines(results), ""]
        if drawn:
            lines += [f"![Share of right tokens by length and depth]({PROBES_PICTURE})", ""]
    return lines


def _intervals(results: TaskResults) -> str:
    parts = []
    for record in shown_tasks(results):
        for model in (m for m in MODEL_LABELS if m in record.scores):
            for metric, estimate in record.scores[model].metrics.items():
                found = interval(estimate, pooled_rows(results, record.name, model, metric)[1])
                if found is not None:
                    low, high = found
                    parts.append(
                        f"{record.alias} {metric}, {MODEL_LABELS[model]}: {100 * low:.1f} to {100 * high:.1f} %"
                    )
    return "; ".join(parts)


def _probe_lines(results: TaskResults) -> list[str]:
    lines = []
    for record in results.probes.values():
        count = record.settings.get("rows", "?")
        lines += [
            f"**{record.name}**: {WORDS[record.name]}. Rows of each length: {count}. The model was trained on rows of "
            f"{record.trained:,} tokens.",
            "",
            f"| share of right tokens | {' | '.join(f'{n:,} tokens' for n in record.lengths)} |",
            "|---" + "|---:" * len(record.lengths) + "|",
            *(f"| {name} | {' | '.join(values)} |" for name, values in probe_rows(record)),
            "",
        ]
    return lines


def plot_probes(results: TaskResults, path: Path) -> bool:
    """Heat maps: needle by length and depth, one panel a model; recall and copy by length. False without probes."""
    panels: list[tuple[str, list[str], list[str], list[list[float]], float]] = []
    for record in results.probes.values():
        models = [model for model in MODEL_LABELS if model in record.shares]
        columns = [f"{n:,}\n({n / record.trained:g}x)" for n in record.lengths]
        if len(record.depths) > 1:
            for model in models:
                cells = [
                    [record.mean(model, i, j) for i in range(len(record.lengths))] for j in range(len(record.depths))
                ]
                rows = [f"{100 * depth:.0f} %" for depth in record.depths]
                panels.append(
                    (f"{record.name}, {MODEL_LABELS[model]} (by depth)", rows, columns, cells, record.trained)
                )
        else:
            cells = [[record.mean(model, i, 0) for i in range(len(record.lengths))] for model in models]
            panels.append((record.name, [MODEL_LABELS[m] for m in models], columns, cells, record.trained))
    if not panels:
        return False
    heights = [0.9 + 0.38 * len(rows) for _, rows, *_ in panels]
    with matplotlib.rc_context({**LOOK, "axes.grid": False}):
        figure = Figure(figsize=(8, sum(heights) + 0.6), layout="constrained")
        axes: Any = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for place, (title, rows, columns, cells, _) in enumerate(panels):
            _heat(axes[place, 0], title, rows, columns, cells)
        figure.supxlabel("tokens of the row (lengths of a training row)", fontsize=10)
        figure.savefig(path)
    return True


def _heat(axes: Axes, title: str, rows: list[str], columns: list[str], cells: list[list[float]]) -> None:
    axes.imshow(cells, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_title(title)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for y, line in enumerate(cells):
        for x, share in enumerate(line):
            colour = "black" if share > 0.6 else "white"
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=9)
