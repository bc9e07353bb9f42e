"""The selection in pictures and tables: the scores layer by group, and what each share of the cache closes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from trenchcoat.evaluation.report.plots import name_lines, page
from trenchcoat.evaluation.report.table import Table
from trenchcoat.evaluation.selection import FrontierPoint, Selection

GROUPS_PICTURE, FRONTIER_PICTURE = "selection.png", "frontier.png"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def draw_selection(selection: Selection, folder: Path) -> list[str]:
    """Write both pictures into ``folder``; returns the names of those there was something to draw for."""
    pictures = ((GROUPS_PICTURE, plot_groups), (FRONTIER_PICTURE, plot_frontier))
    drawn = [name for name, draw in pictures if draw(selection, folder / name)]
    for name, _ in pictures:
        if name not in drawn:
            (folder / name).unlink(missing_ok=True)
    return drawn


def plot_groups(selection: Selection, path: Path) -> bool:
    """Scores layer by group, the kept ones framed. Layers that keep softmax in any case are empty."""
    columns = max((len(row) for row in selection.scores), default=0)
    if not columns:
        return False
    table = np.full((columns, selection.layers), np.nan)
    for layer, row in enumerate(selection.scores):
        table[: len(row), layer] = row
    size = (min(14.0, 2.5 + 0.26 * selection.layers), 1.7 + 0.3 * columns)
    with page(path, size, grid=False) as (figure, (axes,)):
        colours = matplotlib.colormaps["viridis"].with_extremes(bad="#dddddd")
        shown = axes.imshow(np.sqrt(np.clip(table, 0, None)), aspect="auto", cmap=colours, origin="lower")
        bar = figure.colorbar(shown, ax=axes)
        bar.set_label("score (root scale)")
        ticks = [float(tick) for tick in bar.get_ticks() if tick >= 0]
        bar.set_ticks(ticks, labels=[f"{tick * tick:.2g}" for tick in ticks])
        for entry in selection.kept:
            layer, group = map(int, entry.split("."))
            axes.add_patch(
                matplotlib.patches.Rectangle((layer - 0.5, group - 0.5), 1, 1, fill=False, edgecolor="#D55E00", lw=1.8)
            )
        kept = f", {len(selection.kept)} of {selection.groups} kept (framed)" if selection.kept else ""
        axes.set(title=f"Key/value groups scored by {selection.method}{kept}", xlabel="layer", ylabel="group")
        axes.set_yticks(range(columns))
    return True


def plot_frontier(selection: Selection, path: Path) -> bool:
    """Share of the gap closed against share of the cache kept, past 2W and on copies. False without a frontier."""
    parts = [part for part in ("text", "copy") if any(getattr(p, part) is not None for p in selection.frontier)]
    if not parts:
        return False
    titles = {"text": "Text, tokens past 2W", "copy": "Second half of a text that follows itself"}
    methods = list(dict.fromkeys(point.method for point in selection.frontier))
    with page(path, (4.9 * len(parts), 3.9), 1, len(parts), sharey=True) as (_, panels):
        for axes, part in zip(panels, parts, strict=True):
            ends = []
            for method, colour in zip(methods, _COLOURS, strict=False):
                points = [p for p in selection.frontier if p.method == method and getattr(p, part) is not None]
                _draw(axes, points, part, colour)
                near = min(points, key=lambda p: abs(p.share - 0.2))
                ends.append((100 * getattr(near, part), method, colour))
            if selection.kept:
                axes.axvline(100 * len(selection.kept) / selection.groups, color="#555555", lw=1, ls=(0, (2, 2)))
            axes.set(title=titles[part], xlabel="key/value cache kept (%)")
            name_lines(axes, ends)
        panels[0].set_ylabel("gap closed, no training (%)\n0: window + sinks, 100: teacher")
    return True


def _draw(axes: Axes, points: Sequence[FrontierPoint], part: str, colour: str) -> None:
    errors = [200 * (getattr(point, f"{part}_error") or 0.0) for point in points]
    axes.errorbar(
        [100 * point.share for point in points],
        [100 * getattr(point, part) for point in points],
        yerr=errors,
        color=colour,
        marker="o",
        markersize=4,
        capsize=3,
    )
    axes.set_xscale("symlog", linthresh=10)
    ticks = [0, 3, 7, 13, 20, 33, 100]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def frontier_table(selection: Selection) -> Table:
    """Shares closed in percent with standard errors, one line per number of groups."""
    methods = list(dict.fromkeys(point.method for point in selection.frontier))
    parts = (("text", "past 2W"), ("copy", "copy"))
    headings = ["groups", "cache", *(f"{title}, {method}" for _, title in parts for method in methods)]
    found = {(point.method, point.groups): point for point in selection.frontier}
    cells = []
    for number in sorted({point.groups for point in selection.frontier}):
        row = [found.get((method, number)) for method in methods]
        shares = [_percent(point, part) for part, _ in parts for point in row]
        cells.append([str(number), f"{100 * number / selection.groups:.1f} %", *shares])
    bold = [i for i, row in enumerate(cells) if selection.kept and row[0] == str(len(selection.kept))]
    return Table(headings, cells, bold)


def _percent(point: FrontierPoint | None, part: str) -> str:
    value = None if point is None else getattr(point, part)
    if value is None:
        return "–"
    error = getattr(point, f"{part}_error")
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error else "")
