"""Compare runs: one table, one page of plots, 95 % intervals; Markdown and HTML.

Runs scored on the same rows are compared row by row with the first one; others are only shown side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich import table as rich_table

from trenchcoat.config import UserError
from trenchcoat.evaluation.report.html import write_page
from trenchcoat.evaluation.report.plots import log_bins, name_lines, page
from trenchcoat.evaluation.report.table import Table
from trenchcoat.evaluation.report.tasks import shown_tasks
from trenchcoat.evaluation.report.texts import with_interval
from trenchcoat.evaluation.results import RESULTS_FILE, Results, Scores
from trenchcoat.evaluation.statistics import NORMAL_95, Estimate, interval, paired_difference
from trenchcoat.evaluation.task_results import FAR_OFF, STUDENT, TASKS_FILE, TEACHER, TaskResults, paired, pooled_rows
from trenchcoat.runtime.files import write_text

MARKDOWN, PAGE, PICTURE = "comparison.md", "comparison.html", "comparison.png"
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8c8c8c")
RUN_HEADINGS = (
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
    """The results of one run; empty where it has none."""

    name: str
    results: Results = field(default_factory=lambda: Results(window=0, seq_len=0))
    tasks: TaskResults = field(default_factory=lambda: TaskResults(""))

    @property
    def converted(self) -> Scores | None:
        """Scores of the converted model."""
        return self.results.rows.get(self.results.converted() or "")

    @property
    def teacher(self) -> Scores | None:
        """Scores of its teacher."""
        return self.results.rows.get(TEACHER)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders (``results.json``, ``tasks.json``) and files that ``eval --out`` wrote.

    Raises ``UserError`` naming a path with neither.
    """
    names = [path.name for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        results, tasks = path / RESULTS_FILE, path if path.is_file() else path / TASKS_FILE
        if not results.is_file() and not tasks.is_file():
            raise UserError(
                f"{path} has no {RESULTS_FILE} and no {TASKS_FILE}; expected a run's folder that was evaluated "
                "(trenchcoat linearize, or eval), or a file of eval --out"
            )
        left: dict[str, Any] = {"results": Results.load(results)} if results.is_file() else {}
        left |= {"tasks": TaskResults.load(tasks)} if tasks.is_file() else {}
        runs.append(Run(name if names.count(name) == 1 and name else str(path), **left))
    return runs


def same_rows(a: Results, b: Results) -> bool:
    """Whether two runs were scored on the same tokens: the losses of their teachers are equal row by row."""
    left, right = a.rows.get(TEACHER), b.rows.get(TEACHER)
    if left is None or right is None or left.all.counts != right.all.counts:
        return False
    return all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(left.all.sums, right.all.sums, strict=True))


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.3f}" if loss < 700 else "inf"


def loss_table(runs: Sequence[Run]) -> Table:
    """One row per run, with 95 % intervals."""
    first = runs[0]
    rows = []
    for run in runs:
        own = run.converted
        if own is None:
            rows.append([run.name, *["–"] * (len(RUN_HEADINGS) - 1)])
            continue
        student = run.results.recipe.get("student", {})
        comparable = run is not first and same_rows(run.results, first.results)
        gaps = [_above(own, other, part) for other in (run.teacher, first.converted if comparable else None)
                for part in ("all", "far")]  # fmt: skip
        rows.append([
            run.name,
            f"{student.get('name', '?')}, W {run.results.window}",
            *(with_interval(losses.estimate, _perplexity) for losses in (own.all, own.far)),
            *(with_interval(gap, "{:+.4f}".format) for gap in gaps),
        ])  # fmt: skip
    return Table(RUN_HEADINGS, rows)


def _above(own: Scores, other: Scores | None, part: str) -> Estimate | None:
    """Paired difference of losses; None where the tokens differ (past 2W of another W, for example)."""
    a, b = getattr(own, part), None if other is None else getattr(other, part)
    return None if b is None or a.counts != b.counts else paired_difference(a, b)


def task_table(runs: Sequence[Run]) -> Table:
    """One row per task and metric, one column per run: the value with its interval, and the paired difference from the
    first run."""
    rows = [[alias, metric, *(_task_cell(run, runs[0], name, metric) for run in runs)]
            for name, alias, metric in _shown(runs)]  # fmt: skip
    return Table(["task", "metric", *(run.name for run in runs)], rows)


def _task_cell(run: Run, first: Run, name: str, metric: str) -> str:
    found = _estimate(run, name, metric)
    if found is None:
        return "–"
    value, ends = found
    text = f"{100 * value:.1f}" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "") + " %"
    gap = paired(run.tasks, first.tasks, name, metric, (STUDENT, STUDENT))
    if run is first or gap is None:
        return text
    in_points = with_interval(Estimate(100 * gap.value, 100 * gap.error), "{:+.1f}".format)
    return f"{text}; {in_points} points against the first"


def _shown(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(task, its title, metric) of everything that at least one run has."""
    records = [record for run in runs for record in shown_tasks(run.tasks)]
    found = {(record.name, metric): record.alias for record in records for metric in record.metrics()}
    return [(name, alias, metric) for (name, metric), alias in found.items()]


def _estimate(
    run: Run, name: str, metric: str, model: str = STUDENT
) -> tuple[float, tuple[float, float] | None] | None:
    """(value, 95 % interval) of a metric, if the run has it."""
    record = run.tasks.tasks.get(name)
    estimate = None if record is None else record.metric(model, metric)
    if estimate is None:
        return None
    return estimate.value, interval(estimate, pooled_rows(run.tasks, name, model, metric)[1])


def terminal_comparison(runs: Sequence[Run]) -> rich_table.Table:
    """The table of losses without its intervals, to print with rich."""
    short = [[cell.partition(" [")[0] for cell in cells] for cells in loss_table(runs).cells]
    title = "Runs (the files have 95 % intervals, tasks and probes)"
    return Table(RUN_HEADINGS, short).as_rich(title, compact=True, wrap=True)


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
        lines += [
            *loss_table(runs).as_markdown(),
            "Losses in nats per token, of each run's converted model; perplexity is exp(loss). Brackets: 95 % "
            "intervals, jackknife over the rows of text. Differences are taken row by row, so their intervals are "
            "narrower than the two sides suggest; – means that the rows differ.",
            "",
        ]
    tasks = task_table(runs)
    if tasks.cells:
        lines += ["## Tasks", "", *tasks.as_markdown()]
        lines += ["Brackets: 95 % intervals (Wilson's for right or wrong); differences are over the same rows.", ""]
    probes = probe_table(runs)
    if probes.cells:
        lines += ["## Long-context probes", "", *probes.as_markdown()]
    if drawn:
        lines += ["## Plots", "", f"![The runs' losses, tasks and probes]({PICTURE})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _probe_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.tasks.probes))


def probe_table(runs: Sequence[Run]) -> Table:
    """Shares by length of the converted models."""
    curves = [(name, run.name, _probe_curve(run, name)) for name in _probe_names(runs) for run in runs]
    rows = [[name, run, ", ".join(f"{x:g}x {100 * y:.0f} %" for x, y in curve)] for name, run, curve in curves if curve]
    return Table(("probe", "run", "share of right tokens by length"), rows)


def _probe_curve(run: Run, name: str, model: str = STUDENT) -> list[tuple[float, float]]:
    record = run.tasks.probes.get(name)
    if record is None or model not in record.shares:
        return []
    return [(n / record.trained, mean) for n, mean in zip(record.lengths, record.means(model), strict=True)]


def plot_runs(runs: Sequence[Run], path: Path) -> bool:
    """One page: loss above the teacher's, the same by position, tasks, probes; panels without data are left out."""
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    if any(run.converted and run.teacher for run in runs):
        panels.append((1.2 + 0.4 * len(runs), lambda axes: _draw_losses(axes, runs)))
        panels.append((3.4, lambda axes: _draw_positions(axes, runs)))
    tasks = [shown for shown in _shown(runs) if shown[2] == "acc"]
    if tasks:
        panels.append((1.2 + 0.22 * len(tasks) * (len(runs) + 1), lambda axes: _draw_tasks(axes, runs, tasks)))
    for name in _probe_names(runs):
        panels.append((2.6, lambda axes, name=name: _draw_probe(axes, runs, name)))  # type: ignore[misc]
    if not panels:
        return False
    heights = [height for height, _ in panels]
    with page(path, (9, sum(heights)), len(panels), height_ratios=heights) as (_, grid):
        for axes, (_, draw) in zip(grid, panels, strict=True):
            draw(axes)
    return True


def _colour(number: int) -> str:
    return RUN_COLOURS[number % len(RUN_COLOURS)]


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
    axes.set(title="Loss above the teacher's by position", ylabel="nats a token", xlabel="tokens of context")
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
            for model, marker in ((STUDENT, "o"), (TEACHER, "x")):
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
    axes.set(ylim=(-0.03, 1.03), xlabel="lengths of a training row")
    ends = []
    for number, run in enumerate(runs):
        for model, style in ((STUDENT, "-"), (FAR_OFF, "--")):
            curve = _probe_curve(run, name, model)
            if curve:
                axes.plot(*zip(*curve, strict=True), style, color=_colour(number), marker="o", markersize=3)
                if model == STUDENT:
                    ends.append((curve[-1][1], run.name, _colour(number)))
    name_lines(axes, ends, gap=0.1)
