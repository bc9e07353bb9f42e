"""Tasks and probes in the report: a table with paired differences, and heat maps of the probes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from rich import table as rich_table

from trenchcoat.evaluation.own_tasks import OWN_TASKS
from trenchcoat.evaluation.report.plots import page
from trenchcoat.evaluation.report.table import Table
from trenchcoat.evaluation.report.texts import points
from trenchcoat.evaluation.statistics import interval
from trenchcoat.evaluation.task_results import (
    MODEL_LABELS,
    STUDENT,
    TEACHER,
    ProbeRecord,
    TaskRecord,
    TaskResults,
    paired,
    pooled_rows,
)

PROBES_PICTURE = "probes.png"
LEAST_PAST = 0.05
"""Share of the scored tokens past 2W below which a task says nothing of what lies beyond the window."""


def shown_tasks(results: TaskResults) -> list[TaskRecord]:
    """Groups, their subgroups, and tasks outside groups; not the dozens of tasks inside a group."""
    inside = {member for record in results.tasks.values() for member in record.members}
    return [record for name, record in results.tasks.items() if name not in inside]


def task_table(results: TaskResults) -> Table:
    """One row per task and metric."""
    table = _task_table(results)
    past = [_past_2w(record) for record in shown_tasks(results) for _ in record.metrics()]
    cells = [[*row[:3], share, *row[3:]] for row, share in zip(table.cells, past, strict=True)]
    return Table([*table.headings[:3], "past 2W", *table.headings[3:]], cells)


def _task_table(results: TaskResults) -> Table:
    """Without the share past 2W, for which a terminal has no room."""
    cells = [
        [
            record.alias,
            str(record.settings.get("fewshot", "–")),
            f"{record.count:,}",
            metric,
            points(record.metric(STUDENT, metric)),
            points(record.metric(TEACHER, metric)),
            points(paired(results, results, record.name, metric)),
        ]
        for record in shown_tasks(results)
        for metric in record.metrics()
    ]
    return Table(("task", "shots", "rows", "metric", "model %", "teacher %", "difference"), cells)


def _past_2w(record: TaskRecord) -> str:
    """Share of the scored tokens that lie past 2W."""
    past, scored = record.past_2w or (0, 0)
    return f"{100 * past / scored:.1f} %" if scored else "–"


def past_2w_note(results: TaskResults) -> str:
    """What the scores say of text beyond the window; empty if no share is known."""
    known = [record for record in shown_tasks(results) if record.past_2w is not None and record.past_2w[1]]
    silent = [r.alias for r in known if r.past_2w is not None and r.past_2w[0] < LEAST_PAST * r.past_2w[1]]
    if not silent:
        return ""
    return (
        f"Of the tokens scored in {', '.join(silent)}, fewer than {LEAST_PAST:.0%} lie past 2W: there the window sees "
        "the whole text, so these scores say nothing of the linear part or of kept groups, only whether training "
        "changed the model."
    )


def probe_table(record: ProbeRecord, heading: str, unit: str = "") -> Table:
    """Shares of each model at each length, over all depths; then the controls, and chance."""
    models = [model for model in MODEL_LABELS if model in record.shares]
    cells = [[MODEL_LABELS[model], *map(_share, record.means(model))] for model in models]
    for model in (model for model in MODEL_LABELS if any(record.controls.get(model, []))):
        means = [_share(statistics.fmean(rows)) for rows in record.controls[model]]
        cells.append([f"{MODEL_LABELS[model]}, without it", *means])
    if record.chance is not None:
        cells.append(["chance", *[_share(record.chance)] * len(record.lengths)])
    return Table([heading, *(f"{length:,}{unit}" for length in record.lengths)], cells)


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _description(record: ProbeRecord) -> str:
    return OWN_TASKS[record.name].description if record.name in OWN_TASKS else "a probe of another version"


def terminal_tables(results: TaskResults) -> list[rich_table.Table | str]:
    """Tasks and probes, to print with rich."""
    found = {"Tasks (± one standard error)": _task_table(results)} if results.tasks else {}
    for record in results.probes.values():
        found[f"{record.name}: {_description(record)}"] = probe_table(record, "model")
    shown: list[rich_table.Table | str] = [table.as_rich(title, compact=True) for title, table in found.items()]
    shares = [f"{record.alias} {_past_2w(record)}" for record in shown_tasks(results) if record.past_2w is not None]
    note = f"Scored tokens past 2W: {', '.join(shares)}. {past_2w_note(results)}".rstrip()
    return [*shown[:1], note, *shown[1:]] if shares else shown


def markdown_sections(results: TaskResults, *, drawn: bool) -> list[str]:
    """The report's sections on tasks and probes; ``drawn`` says whether the heat maps exist."""
    lines: list[str] = []
    if results.tasks:
        lines += ["## Tasks", "", *task_table(results).as_markdown()]
        lines += [
            "In per cent, ± one standard error over the rows. The last column is linear minus teacher over the same "
            "rows, compared row by row; its error is that of the difference. 95 % intervals: "
            + (_intervals(results) or "none")
            + ". *Past 2W*: share of the scored tokens with more than 2W tokens before them.",
            "",
            *([past_2w_note(results), ""] if past_2w_note(results) else []),
        ]
    if results.probes:
        lines += ["## Long-context probes", ""]
        for record in results.probes.values():
            lines += [
                f"**{record.name}**: {_description(record)}. Rows of each length: {record.settings.get('rows', '?')}. "
                f"The model was trained on rows of {record.trained:,} tokens.",
                "",
                *probe_table(record, "share of right tokens", " tokens").as_markdown(),
            ]
        lines.append("")
        if drawn:
            lines += [f"![Share of right tokens by length and depth]({PROBES_PICTURE})", ""]
    return lines


def _intervals(results: TaskResults) -> str:
    parts = []
    for record in shown_tasks(results):
        for model in (model for model in MODEL_LABELS if model in record.scores):
            for metric, estimate in record.scores[model].metrics.items():
                found = interval(estimate, pooled_rows(results, record.name, model, metric)[1])
                if found is not None:
                    ends = f"{100 * found[0]:.1f} to {100 * found[1]:.1f} %"
                    parts.append(f"{record.alias} {metric}, {MODEL_LABELS[model]}: {ends}")
    return "; ".join(parts)


def plot_probes(results: TaskResults, path: Path) -> bool:
    """Heat maps: one panel per model by length and depth, or a single one by length for probes without a depth. False
    without probes."""
    panels: list[tuple[str, list[str], list[str], list[list[float]]]] = []
    for record in results.probes.values():
        models = [model for model in MODEL_LABELS if model in record.shares]
        columns = [f"{n:,}\n({n / record.trained:g}x)" for n in record.lengths]
        if len(record.depths) == 1:
            cells = [record.means(model) for model in models]
            panels.append((record.name, [MODEL_LABELS[model] for model in models], columns, cells))
            continue
        depths = [f"{100 * depth:.0f} %" for depth in record.depths]
        for model in models:
            cells = [[record.mean(model, i, j) for i in range(len(columns))] for j in range(len(depths))]
            panels.append((f"{record.name}, {MODEL_LABELS[model]} (by depth)", depths, columns, cells))
    if not panels:
        return False
    heights = [0.9 + 0.38 * len(rows) for _, rows, *_ in panels]
    size = (8, sum(heights) + 0.6)
    with page(path, size, len(panels), grid=False, height_ratios=heights) as (figure, grid):
        for axes, panel in zip(grid, panels, strict=True):
            _heat(axes, *panel)
        figure.supxlabel("tokens of the row (lengths of a training row)", fontsize=10)
    return True


def _heat(axes: Axes, title: str, rows: list[str], columns: list[str], cells: Sequence[Sequence[float]]) -> None:
    axes.imshow(cells, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_title(title)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for y, line in enumerate(cells):
        for x, share in enumerate(line):
            colour = "black" if share > 0.6 else "white"
            axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=9)
