"""The report's plots, as PNG files; drawn without a display.

The palette is Okabe and Ito's, which is safe for colour-blind readers; every line is also labelled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from trenchcoat.evaluation.report.texts import bytes_text
from trenchcoat.evaluation.results import Results, Scores
from trenchcoat.evaluation.rows import (
    REPORT_ROWS,
    TEACHER,
    UNTRAINED,
    ReportRow,
    TeacherRow,
    TransferLoraRow,
    row_label,
)
from trenchcoat.evaluation.statistics import paired_difference
from trenchcoat.runtime.runfolder import TEACHER_LORA, TRANSFER

LOOK: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
    "savefig.dpi": 130,
}
MOST_LAYER_LABELS = 8


@contextmanager
def page(
    path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1, *, grid: bool = True, **layout: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A new figure and its axes, row by row; saved to ``path`` on exit."""
    with matplotlib.rc_context({**LOOK, "axes.grid": grid}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False, **layout).flat)
        figure.savefig(path)


def name_lines(axes: Axes, names: Sequence[tuple[float, str, str]], gap: float = 0.052) -> None:
    """Label lines at the right of the axes, at the heights where they end, without overlap.

    ``names``: (y in data units, text, colour). ``gap``: least distance, as a share of the axes' height. Call it
    after setting the limits.
    """
    to_share = axes.transData + axes.transAxes.inverted()
    ordered = sorted((float(to_share.transform((1, y))[1]), text, colour) for y, text, colour in names)
    heights: list[float] = []
    for height, _, _ in ordered:
        heights.append(max(min(max(height, 0.0), 1.0), heights[-1] + gap if heights else 0.0))
    ceiling = max(1.0, gap * (len(heights) - 1))
    for i in range(len(heights) - 1, -1, -1):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    for height, (_, text, colour) in zip(heights, ordered, strict=True):
        axes.annotate(
            text, (1.01, height), xycoords="axes fraction", color=colour, va="center", fontsize=9, annotation_clip=False
        )


def log_bins(scores: Scores, per_octave: int = 3) -> list[tuple[float, float]]:
    """Mean loss in bins of context length that grow geometrically: (tokens of context, loss), empty bins left out."""
    bins: dict[int, list[float]] = {}
    for position, (loss, count) in enumerate(zip(scores.position_loss, scores.position_count, strict=True)):
        if not count or not math.isfinite(loss):
            continue
        total = bins.setdefault(round(per_octave * math.log2(position + 1)), [0.0, 0.0, 0.0])
        total[0] += count
        total[1] += count * loss
        total[2] += count * math.log(position + 1)
    return [(math.exp(c / n), loss / n) for _, (n, loss, c) in sorted(bins.items())]


def plot_positions(results: Results, path: Path) -> bool:
    """Loss against the tokens read, and its excess over the teacher's. False when there is nothing to draw."""
    rows = results.ordered_rows()
    if not rows:
        return False
    curves = {name: log_bins(scores) for name, scores in rows}
    with page(path, (9, 8.2), 2) if TEACHER in curves else page(path, (9, 4.4)) as (_, panels):
        _draw_positions(panels[0], curves, "Loss by position: how much a longer context helps")
        panels[0].set_ylabel("loss (nats a token)")
        if TEACHER in curves:
            base = dict(curves.pop(TEACHER))
            excess = {name: [(x, y - base[x]) for x, y in curve if x in base] for name, curve in curves.items()}
            _draw_positions(panels[1], excess, "Loss above the teacher's (0 = as good as the teacher)")
            panels[1].axhline(0, color=TeacherRow.colour, linewidth=1)
            panels[1].set_ylabel("excess loss (nats a token)")
        for axes in panels:
            _mark_window(axes, 2 * results.window)
        panels[-1].set_xlabel("tokens of context before the predicted token")
    return True


def _draw_positions(axes: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    for name, curve in curves.items():
        style = _look(name).line
        width = 2.6 if name == TransferLoraRow.name else 1.6
        axes.plot(*zip(*curve, strict=True), color=_colour(name), linestyle=style, linewidth=width, label=name)
    shown = [y for name, curve in curves.items() if name != UNTRAINED for x, y in curve if x >= 4]
    if shown:
        room = 0.08 * (max(shown) - min(shown)) or 0.1
        axes.set_ylim(min(shown) - room, max(shown) + room)
    top = axes.get_ylim()[1]
    ends = [(curve[-1][1], name) for name, curve in curves.items() if curve]
    names = [(y, row_label(name) + (" (off the scale)" if y > top else ""), _colour(name)) for y, name in ends]
    name_lines(axes, names)


def _mark_window(axes: Axes, tokens: int) -> None:
    """A vertical line where the near set ends."""
    axes.axvline(tokens, color="#555555", linewidth=1, linestyle=(0, (2, 2)))
    axes.annotate(
        f" 2W = {tokens}", (tokens, 1), xycoords=("data", "axes fraction"), va="top", fontsize=9, color="#555555"
    )


def _look(row: str) -> ReportRow:
    """Colour and line style of a row; the defaults for an unregistered one."""
    return REPORT_ROWS.get(row, ReportRow())


def _colour(row: str) -> str:
    return _look(row).colour


def plot_rows(results: Results, path: Path) -> bool:
    """Each row's loss above the teacher's, with its noise. False without a teacher or another row."""
    if TEACHER not in results.rows or len(results.rows) < 2:
        return False
    teacher = results.rows[TEACHER]
    rows = [(name, scores) for name, scores in results.ordered_rows() if name != TEACHER]
    with page(path, (9, 1.3 + 0.42 * len(rows)), 1, 2, sharey=True) as (figure, panels):
        pairs = (("all", "All tokens"), ("far", f"Tokens past 2W = {2 * results.window}"))
        for axes, (part, title) in zip(panels, pairs, strict=True):
            found = {name: paired_difference(getattr(s, part), getattr(teacher, part)) for name, s in rows}
            shown = [d for name, d in found.items() if name != UNTRAINED and math.isfinite(d.value)]
            noise = [2 * d.error if math.isfinite(d.error) else 0.0 for d in shown]
            low = min([0.0, *(d.value - e for d, e in zip(shown, noise, strict=True))])
            high = max([0.01, *(d.value + e for d, e in zip(shown, noise, strict=True))])
            limit = high + 0.12 * (high - low)
            axes.set_xlim(low - 0.06 * (high - low), limit)
            for height, (name, difference) in enumerate(found.items()):
                _dot(axes, height, difference.value, difference.error, limit, _colour(name))
            axes.axvline(0, color=TeacherRow.colour, linewidth=1)
            axes.set(title=title, ylim=(-0.7, len(rows) - 0.4))
        panels[0].set_yticks(range(len(rows)), [row_label(name) for name, _ in rows])
        panels[0].invert_yaxis()
        figure.supxlabel(
            "loss above the teacher's, in nats a token (0 = as good; bars: ± 2 standard errors)", fontsize=10
        )
    return True


def _dot(axes: Axes, height: int, value: float, error: float, limit: float, colour: str) -> None:
    if not math.isfinite(value):
        axes.annotate("not a number", (0, height), va="center", fontsize=9, color=colour)
    elif value > limit:
        axes.annotate(
            f"{value:.2f} →", (0.99, height), xycoords=("axes fraction", "data"), ha="right", va="center", color=colour
        )
    else:
        noise = 2 * error if math.isfinite(error) else 0.0
        axes.errorbar(value, height, xerr=noise, fmt="o", color=colour, capsize=3)
        axes.annotate(
            f"{value:+.3f}",
            (value, height),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colour,
        )


def plot_training(metrics: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Attention transfer layer by layer, and the loss of stage 2. False when neither was logged."""
    lines = [line for line in metrics if line.get("kind") in ("train", "eval") and "step" in line]
    transfer = [line for line in lines if line.get("stage") == "transfer"]
    lora = [line for line in lines if line.get("stage") in _lora_rows()]
    panels: list[Callable[[Axes], None]] = []
    if _layers(transfer, "loss"):
        panels.append(lambda axes: _draw_transfer_loss(axes, transfer))
    if _layers(transfer, "relative"):
        panels.append(lambda axes: _draw_relative_error(axes, transfer))
    if lora:
        panels.append(lambda axes: _draw_lora(axes, lora))
    if not panels:
        return False
    with page(path, (9, 3.7 * len(panels)), len(panels)) as (_, grid):
        for axes, draw in zip(grid, panels, strict=True):
            draw(axes)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return True


def _lora_rows() -> dict[str, str]:
    """Stages 2 that minimize the recipe's loss, and the row of each (the teacher's minimizes another one)."""
    others = (None, TRANSFER, TEACHER_LORA)
    return {row.stage: name for name, row in REPORT_ROWS.items() if row.stage not in others}


def _layers(lines: Sequence[Mapping[str, Any]], measure: str) -> list[str]:
    """Keys ``<measure>/layer_NN`` in the order of the layers."""
    return sorted({key for line in lines for key in line if key.startswith(f"{measure}/layer_")})


def _series(lines: Sequence[Mapping[str, Any]], kind: str, key: str) -> list[tuple[float, float]]:
    """(step, value) of the finite values of ``key`` in lines of ``kind``."""
    points = [(float(line["step"]), float(line[key])) for line in lines if line["kind"] == kind and key in line]
    return [point for point in points if math.isfinite(point[1])]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Running mean over 1/40 of the points."""
    width = max(1, len(points) // 40)
    values = [y for _, y in points]
    return [
        (x, sum(part) / len(part))
        for i, (x, _) in enumerate(points)
        for part in [values[max(0, i - width) : i + width + 1]]
    ]


def _draw_transfer_loss(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    axes.set(title="Stage 1, attention transfer: training loss of every layer", ylabel="transfer loss")
    axes.set_xlabel("optimizer steps   (lines: training, running mean; dots: held-out text)")
    _draw_layers(axes, lines, "loss", "train")


def _draw_relative_error(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("Stage 1: how far each layer's output is from softmax attention's")
    axes.set_ylabel("squared error / mean square")
    axes.set_xlabel("optimizer steps   (held-out text; 1 would be as wrong as answering zero)")
    _draw_layers(axes, lines, "relative", "eval")


def _draw_layers(axes: Axes, lines: Sequence[Mapping[str, Any]], measure: str, line_kind: str) -> None:
    """One line per layer from records of ``line_kind``, dots from held-out text; labels at the ends (some, if many)."""
    keys = _layers(lines, measure)
    every = math.ceil(len(keys) / MOST_LAYER_LABELS)
    ends = []
    axes.set_yscale("log")
    for number, key in enumerate(keys):
        colour = matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](0.88 * number / max(1, len(keys) - 1)))
        held_out = _series(lines, "eval", key)
        curve = _smooth(_series(lines, "train", key)) if line_kind == "train" else held_out
        if curve:
            axes.plot(*zip(*curve, strict=True), color=colour)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color=colour, marker="o", markersize=4, linestyle="none")
        last = (curve or held_out)[-1:]
        if last and (number % every == 0 or number == len(keys) - 1):
            ends.append((last[0][1], f"layer {int(key.rsplit('_', 1)[1])}", colour))
    _plain_log_ticks(axes)
    name_lines(axes, ends, gap=0.07)


def _plain_log_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    if low <= 0 or high / low < 1000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        if low > 0 and high / low < 20:
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))
            axes.tick_params(axis="y", which="minor", labelsize=7)
        else:
            axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_lora(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    axes.set(title="Stage 2: loss", ylabel="loss (nats a token)")
    axes.set_xlabel("optimizer steps   (thin: training, running mean; thick with dots: held-out)")
    ends = []
    for stage, row in _lora_rows().items():
        mine = [line for line in lines if line["stage"] == stage]
        train, held_out = _smooth(_series(mine, "train", "loss")), _series(mine, "eval", "loss")
        if train:
            axes.plot(*zip(*train, strict=True), color=_colour(row), linewidth=0.9, alpha=0.6)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color=_colour(row), linewidth=2, marker="o", markersize=4)
        last = (held_out or train)[-1:]
        if last:
            ends.append((last[0][1], row_label(row), _colour(row)))
    shown = [y for stage in _lora_rows() for _, y in _series([x for x in lines if x["stage"] == stage], "eval", "loss")]
    if shown:  # where the held-out curves are; training's scatter is cut off
        room = 0.15 * (max(shown) - min(shown)) or 0.1 * max(shown)
        axes.set_ylim(min(shown) - room, max(shown) + room)
    name_lines(axes, ends)


def plot_decode(results: Results, path: Path) -> bool:
    """Decoding time per token and cache size against the context length. False when decoding was not measured."""
    curves = {mode: points for mode, points in results.decode.items() if points}
    if not curves:
        return False
    looks = {"teacher": (TeacherRow.colour, "s"), "student": (TransferLoraRow.colour, "o")}
    texts = {"teacher": "teacher", "student": "converted"}
    with page(path, (9, 4), 1, 2) as (_, (speed, memory)):
        ends: list[list[tuple[float, str, str]]] = [[], []]
        for mode, points in curves.items():
            colour, marker = looks.get(mode, ("#666666", "^"))
            contexts, times = [p.context for p in points], [p.ms_per_token for p in points]
            spread = [
                [p.ms_per_token - p.ms_quartiles[0] for p in points],
                [p.ms_quartiles[1] - p.ms_per_token for p in points],
            ]
            speed.errorbar(contexts, times, yerr=spread, color=colour, marker=marker, capsize=3)
            memory.plot(contexts, [p.cache_bytes for p in points], color=colour, marker=marker)
            ends[0].append((times[-1], texts.get(mode, mode), colour))
            ends[1].append((points[-1].cache_bytes, texts.get(mode, mode), colour))
        crossing = results.crossing()
        if crossing is not None:
            speed.axvline(crossing, color="#999999", linewidth=0.8, linestyle=":")
            label = f" faster from {crossing:,} tokens on"
            speed.text(crossing, 0.02, label, transform=speed.get_xaxis_transform(), fontsize=8, color="#555555")
        speed.set_ylim(0, 1.15 * max(p.ms_quartiles[1] for points in curves.values() for p in points))
        speed.set(title="Decoding time, one sequence", ylabel="ms a token (median; bars: quartiles)")
        memory.set_yscale("log", base=2)
        memory.yaxis.set_major_formatter(FuncFormatter(lambda y, _: bytes_text(int(y))))
        memory.set(title="Size of the cache, one sequence", ylabel="bytes held")
        for axes, names in zip((speed, memory), ends, strict=True):
            axes.set_xscale("log", base=2)
            axes.set_xticks([p.context for p in next(iter(curves.values()))])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("tokens of context")
            name_lines(axes, names)
    return True
