"""Formatting of numbers for reports."""

from __future__ import annotations

import math
from collections.abc import Callable

from trenchcoat.evaluation.statistics import NORMAL_95, Estimate


def signed(difference: Estimate) -> str:
    """``0.021 ± 0.004`` (the error is one standard error), with more digits when the error is smaller."""
    if not math.isfinite(difference.error):
        return f"{difference.value:.3f} (noise unknown)"
    digits = 3 if difference.error >= 0.002 else 4
    return f"{difference.value:.{digits}f} ± {difference.error:.{digits}f}"


def points(estimate: Estimate | None) -> str:
    """``43.2 ± 0.4``, in per cent: the value with one standard error, or a dash."""
    if estimate is None or not math.isfinite(estimate.value):
        return "–"
    return f"{100 * estimate.value:.1f}" + (f" ± {100 * estimate.error:.1f}" if math.isfinite(estimate.error) else "")


def with_interval(estimate: Estimate | None, show: Callable[[float], str]) -> str:
    """``0.021 [0.011, 0.031]``, a 95 % interval; without one where the error is not known."""
    if estimate is None or not math.isfinite(estimate.value):
        return "–"
    if not math.isfinite(estimate.error):
        return show(estimate.value)
    half = NORMAL_95 * estimate.error
    return f"{show(estimate.value)} [{show(estimate.value - half)}, {show(estimate.value + half)}]"


def bytes_text(count: int) -> str:
    """``1.5 MiB``."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"


def duration(seconds: float) -> str:
    """``4 min 05 s``; a dash if not measured."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
