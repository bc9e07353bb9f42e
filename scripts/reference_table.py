"""Print the README's table of the reference results (docs/results), one line a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from trenchcoat.evaluation.report.texts import bytes_text
from trenchcoat.evaluation.results import Results
from trenchcoat.evaluation.statistics import Estimate

FOLDER = Path(__file__).parents[1] / "docs" / "results"
HEAD = """\
| SmolLM2-135M | closed past 2W, rows of {lengths} | copying, {copies} | below 2W minus the original | cache at 32k |
|---|---:|---:|---:|---:|
"""
ROWS = {
    "kept_window_sinks": "the kept groups and a window, untrained",
    "transfer_lora": "**the conversion**",
    "far_off": "the same, its linear part off",
}


def table(name: str = "smollm2_135m") -> str:
    """The table, in Markdown."""
    found = Results.load(FOLDER / name / "results.json")
    factors, seq_len = found.factors(), found.seq_len
    copied = [factor for factor in factors if found.copy_closed("transfer_lora", factor) is not None]
    head = HEAD.format(lengths=_listed(f * seq_len for f in factors), copies=_listed(f * seq_len for f in copied))
    lines = []
    for row, text in ROWS.items():
        shift, cache = found.shift(row), found.rows[row].cache
        teacher = found.rows["teacher"].cache
        assert cache is not None
        assert teacher is not None
        held, whole = cache.at(32768), teacher.at(32768)
        below = "0" if shift is None or abs(shift.value) < 5e-4 else f"{shift.value:+.3f} ± {shift.error:.3f}"
        closed = _shares(found.far_closed, row, factors, 0)
        copying = _shares(found.copy_closed, row, copied, 1)
        lines.append(f"| {text} | {closed} | {copying} | {below} | {bytes_text(held)} ({100 * held / whole:.1f} %) |\n")
    return head + "".join(lines)


def _listed(numbers: Iterable[int]) -> str:
    return " / ".join(f"{number:,}" for number in numbers)


def _shares(share: Callable[[str, int], Estimate | None], row: str, factors: list[int], digits: int) -> str:
    found = [share(row, factor) for factor in factors]
    return " / ".join(f"{100 * one.value:.{digits}f} ± {100 * one.error:.{digits}f}" for one in found if one) + " %"


if __name__ == "__main__":
    sys.stdout.write(table(*sys.argv[1:]))
