"""Any number of runs side by side: one table, one page of pictures, 95 % intervals; Markdown and HTML.

Runs scored on the same rows are compared row by row with the first one named; others only side by side.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from trenchcoat.config import UserError
from trenchcoat.evaluation.report.html import write_page
from trenchcoat.evaluation.report.plots import LOOK, log_bins, name_lines
from trenchcoat.evaluation.report.tasks import TASKS_FILE, shown_tasks
from trenchcoat.evaluation.results import TEACHER, Difference, Results, RowSums, Scores, paired_difference
from trenchcoat.evaluation.task_results import NORMAL_95, STUDENT, TaskResults, interval, paired, pooled_rows
from trenchcoat.evaluation.task_results import TEACHER as TASK_TEACHER
from trenchcoat.runtime.files import write_text

RESULTS_FILE = "results.json"
MARKDOWN, PAGE, PICTURE = "comparison.md", "comparison.html", "comparison.png"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c8c8c")
HEADINGS = (
    "run",
    "student",
    "perplexity",
    "past 2W",
    "loss above the teacher",
    "past 2W",
    "loss less the first run's",
    "past 2W",
)


@dataclass(frozen=True)
class Run:
    """What one run left."""

    name: str
    results: Results | None
    tasks: TaskResults | None

    @property
    def converted(self) -> Scores | None:
        """Scores of the model that the run was for."""
        if self.results is None:
            return None
        return self.results.rows.get(self.results.converted() or "")

    @property
    def teacher(self) -> Scores | None:
        """Scores of its teacher."""
        return None if self.results is None else self.results.rows.get(TEACHER)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders (``results.json``, ``tasks.json``) and files that ``eval --out`` wrote.

    Raises ``UserError`` naming the one that holds neither.
    """
    names = [path.name for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        shown = name if names.count(name) == 1 and name else str(path)
        if path.is_file():
            runs.append(Run(shown, None, TaskResults.load(path)))
            continue
        results, tasks = path / RESULTS_FILE, path / TASKS_FILE
        if not results.is_file() and not tasks.is_file():
            raise UserError(
                f"{path} has no {RESULTS_FILE} and no {TASKS_FILE}; expected a run's folder that was evaluated "
                "(trenchcoat linearize, or eval), or a file of eval --out"
            )
        runs.append(
            Run(
                shown,
                Results.load(results) if results.is_file() else None,
                TaskResults.load(tasks) if tasks.is_file() else None,
            )
        )
    return runs


def same_rows(a: Results, b: Results) -> bool:
    """Whether two runs were scored on the same tokens: the same teacher and text, and the teacher's row to show it."""
    left, right = a.rows.get(TEACHER), b.rows.get(TEACHER)
    if left is None or right is None or left.all.counts != right.all.counts:
        return False
    return all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(left.all.sums, right.all.sums, strict=True))


def between(value: float, error: float, show: Callable[[float], str] = "{:.3f}".format) -> str:
    """``0.021 [0.011, 0.031]``, a 95 % interval; without one where the error is not known."""
    if not math.isfinite(value):
        return "–"
    if not math.isfinite(error):
        return show(value)
    return f"{show(value)} [{show(value - NORMAL_95 * error)}, {show(value + NORMAL_95 * error)}]"


def _perplexity(losses: RowSums) -> str:
    return between(losses.mean, losses.error, lambda loss: f"{math.exp(loss):.3f}" if loss < 700 else "inf")


def _gap(gap: Difference | None) -> str:
    return "–" if gap is None else between(gap.value, gap.error, "{:+.4f}".format)


def loss_rows(runs: Sequence[Run]) -> list[list[str]]:
    """One list of texts a run, under ``HEADINGS``."""
    first = runs[0]
    rows = []
    for run in runs:
        own, teacher = run.converted, run.teacher
        if run.results is None or own is None:
            rows.append([run.name, *["–"] * (len(HEADINGS) - 1)])
            continue
        student = run.results.recipe.get("student", {})
        cells = [run.name, f"{student.get('name', '?')}, W {run.results.window}", _perplexity(own.all)]
        cells.append(_perplexity(own.far))
        cells += [_gap(_above(own, teacher, part)) for part in ("all", "far")]
        comparable = run is not first and first.results is not None and same_rows(run.results, first.results)
        cells += [_gap(_above(own, first.converted if comparable else None, part)) for part in ("all", "far")]
        rows.append(cells)
    return rows


def _above(own: Scores, other: Scores | None, part: str) -> Difference | None:
    """Paired difference of losses; None where the tokens are not the same (past 2W of another W, say)."""
    a, b = getattr(own, part), None if other is None else getattr(other, part)
    return None if b is None or a.counts != b.counts else paired_difference(a, b)


def task_rows(runs: Sequence[Run]) -> list[list[str]]:
    """[task, metric, one cell a run]: the value with its interval, and the paired difference from the first run."""
    rows = []
    for name, alias, metric in _shown(runs):
        cells = [alias, metric]
        for run in runs:
            found = _estimate(run, name, metric)
            if found is None or run.tasks is None:
                cells.append("–")
                continue
            value, ends = found
            text = f"{100 * value:.1f}" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "") + " %"
            gap = None
            if run is not runs[0] and runs[0].tasks is not None:
                gap = paired(run.tasks, runs[0].tasks, name, metric, (STUDENT, STUDENT))
            if gap is not None:
                text += f"; {between(100 * gap.value, 100 * gap.error, '{:+.1f}'.format)} points against the first"
            cells.append(text)
        rows.append(cells)
    return rows


def _shown(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(task, its title, metric) of everything that some run has."""
    found: dict[tuple[str, str], str] = {}
    for run in runs:
        for record in shown_tasks(run.tasks) if run.tasks is not None else []:
            for score in record.scores.values():
                found |= {(record.name, metric): record.alias for metric in score.metrics}
    return [(name, alias, metric) for (name, metric), alias in found.items()]


def _estimate(
    run: Run, name: str, metric: str, model: str = STUDENT
) -> tuple[float, tuple[float, float] | None] | None:
    if run.tasks is None or name not in run.tasks.tasks or model not in run.tasks.tasks[name].scores:
        return None
    estimate = run.tasks.tasks[name].scores[model].metrics.get(metric)
    if estimate is None:
        return None
    return estimate.value, interval(estimate, pooled_rows(run.tasks, name, model, metric)[1])


def terminal_table(runs: Sequence[Run]) -> Table:
    """The table of losses without its intervals, to print with rich."""
    title = "Runs (the files have 95 % intervals, tasks and probes)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left")
    for cells in loss_rows(runs):
        table.add_row(*(cell.partition(" [")[0] for cell in cells))
    return table


def write_comparison(runs: Sequence[Run], out: Path) -> Path:
    """Write ``comparison.md``, ``comparison.png`` and ``comparison.html`` (self-contained) into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = plot_runs(runs, out / PICTURE)
    if not drawn:
        (out / PICTURE).unlink(missing_ok=True)
    text = comparison_text(runs, drawn=drawn)
    write_text(out / MARKDOWN, text)
    write_page(out / PAGE, text, out)
    return out / MARKDOWN


def comparison_text(runs: Sequence[Run], *, drawn: bool) -> str:
    """The comparison in Markdown."""
    lines = [f"# {len(runs)} runs side by side", ""]
    if any(run.converted for run in runs):
        lines += _table(HEADINGS, loss_rows(runs))
        lines += [
            "Losses in nats a token, of the model that each run was for; perplexity is exp(loss). Brackets: 95 % "
            "intervals, bootstrap over the rows of text. Differences are taken row by row, so their intervals are "
            "narrower than the two sides suggest; – means that the rows are not the same ones.",
            "",
        ]
    tasks = task_rows(runs)
    if tasks:
        lines += ["## Tasks", "", *_table(["task", "metric", *(run.name for run in runs)], tasks)]
        lines += ["Brackets: 95 % intervals (Wilson's for right or wrong); differences are over the same rows.", ""]
    probes = probe_rows(runs)
    if probes:
        lines += ["## Long-context probes", "", *_table(["probe", "run", "share of right tokens by length"], probes)]
    if drawn:
        lines += ["## Pictures", "", f"![The runs' losses, tasks and probes]({PICTURE})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    shown = [[cell.replace("|", "\\|") for cell in row] for row in (headings, *rows)]
    rule = "|---" + "|---:" * (len(headings) - 1) + "|"
    lines = [f"| {' | '.join(row)} |" for row in shown]
    return [lines[0], rule, *lines[1:], ""]


def probe_rows(runs: Sequence[Run]) -> list[list[str]]:
    """[probe, run, shares by length] of the converted models."""
    rows = []
    for name in dict.fromkeys(name for run in runs if run.tasks for name in run.tasks.probes):
        for run in runs:
            curve = _probe_curve(run, name)
            if curve:
                rows.append([name, run.name, ", ".join(f"{x:g}x {100 * y:.0f} %" for x, y in curve)])
    return rows


def _probe_curve(run: Run, name: str, model: str = STUDENT) -> list[tuple[float, float]]:
    record = run.tasks.probes.get(name) if run.tasks is not None else None
    if record is None or model not in record.shares:
        return []
    means = [statistics.fmean(row for cell in cells for row in cell) for cells in record.shares[model]]
    return [(length / record.trained, mean) for length, mean in zip(record.lengths, means, strict=True)]


def plot_runs(runs: Sequence[Run], path: Path) -> bool:
    """One page: loss above the teacher, the same by position, tasks, probes; what no run has is left out."""
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    if any(run.converted and run.teacher for run in runs):
        panels.append((1.2 + 0.4 * len(runs), lambda axes: _draw_losses(axes, runs)))
        panels.append((3.4, lambda axes: _draw_positions(axes, runs)))
    tasks = [shown for shown in _shown(runs) if shown[2] == "acc"]
    if tasks:
        panels.append((1.2 + 0.22 * len(tasks) * (len(runs) + 1), lambda axes: _draw_tasks(axes, runs, tasks)))
    for name in dict.fromkeys(name for run in runs if run.tasks for name in run.tasks.probes):
        panels.append((2.6, lambda axes, name=name: _draw_probe(axes, runs, name)))  # type: ignore[misc]
    if not panels:
        return False
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(9, sum(height for height, _ in panels)), layout="constrained")
        grid: Any = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[height for height, _ in panels])
        for axes, (_, draw) in zip(grid[:, 0], panels, strict=True):
            draw(axes)
        figure.savefig(path)
    return True


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _draw_losses(axes: Axes, runs: Sequence[Run]) -> None:
    axes.set_title("Loss above the teacher's, all tokens (dots) and past 2W (squares); bars: 95 %")
    axes.set_xlabel("nats a token, paired over the rows of text")
    for number, run in enumerate(runs):
        for part, marker, shift in (("all", "o", -0.12), ("far", "s", 0.12)):
            gap = None if run.converted is None else _above(run.converted, run.teacher, part)
            if gap is not None and math.isfinite(gap.value):
                error = NORMAL_95 * gap.error if math.isfinite(gap.error) else 0.0
                axes.errorbar(gap.value, number + shift, xerr=error, fmt=marker, color=_colour(number), capsize=3)
    axes.axvline(0, color="#000000", linewidth=1)
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)


def _draw_positions(axes: Axes, runs: Sequence[Run]) -> None:
    axes.set_title("Loss above the teacher's by position")
    axes.set_ylabel("nats a token")
    axes.set_xlabel("tokens of context")
    axes.set_xscale("log", base=2)
    ends = []
    for number, run in enumerate(runs):
        if run.converted is None or run.teacher is None:
            continue
        base = dict(log_bins(run.teacher))
        curve = [(x, y - base[x]) for x, y in log_bins(run.converted) if x in base]
        axes.plot(*zip(*curve, strict=True), color=_colour(number))
        ends.append((curve[-1][1], run.name, _colour(number)))
    axes.axhline(0, color="#000000", linewidth=1)
    name_lines(axes, ends, gap=0.08)


def _draw_tasks(axes: Axes, runs: Sequence[Run], tasks: Sequence[tuple[str, str, str]]) -> None:
    axes.set_title("Tasks: accuracy (crosses: teachers); bars: 95 %")
    step = 0.8 / len(runs)
    for place, (name, _, metric) in enumerate(tasks):
        for number, run in enumerate(runs):
            height = place - 0.4 + step * (number + 0.5)
            for model, marker in ((STUDENT, "o"), (TASK_TEACHER, "x")):
                found = _estimate(run, name, metric, model)
                if found is not None:
                    value, ends = found
                    error = [[value - ends[0]], [ends[1] - value]] if ends and model == STUDENT else None
                    axes.errorbar(value, height, xerr=error, fmt=marker, color=_colour(number), capsize=2)
    axes.set_yticks(range(len(tasks)), [alias for _, alias, _ in tasks])
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    for number, run in enumerate(runs):
        axes.plot([], [], "o", color=_colour(number), label=run.name)
    axes.legend(fontsize=8, loc="best")


def _draw_probe(axes: Axes, runs: Sequence[Run], name: str) -> None:
    axes.set_title(f"{name}: share of right tokens, over all depths (dashed: far part off)")
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("lengths of a training row")
    ends = []
    for number, run in enumerate(runs):
        for model, style in ((STUDENT, "-"), ("far_off", "--")):
            curve = _probe_curve(run, name, model)
            if curve:
                axes.plot(*zip(*curve, strict=True), style, color=_colour(number), marker="o", markersize=3)
                if model == STUDENT:
                    ends.append((curve[-1][1], run.name, _colour(number)))
    name_lines(axes, ends, gap=0.1)
