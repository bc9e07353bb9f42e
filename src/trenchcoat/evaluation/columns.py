"""The columns of the report's table: a heading, and how a row's scores become a cell.

To add a column, write a class here and list it in ``REPORT_COLUMNS``; its values also appear in the row's ``summary``
in ``results.json``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from trenchcoat.evaluation.statistics import Estimate, RowSums

if TYPE_CHECKING:
    from trenchcoat.evaluation.results import Results, Scores


def percent(share: Estimate) -> str:
    """``93.1 % ± 0.8``; the error is omitted where it is exactly zero, as for the two ends of a gap."""
    digits = 1 if abs(share.value) < 2 and share.error != 0 else 0
    noise = f" ± {100 * share.error:.{digits}f}" if math.isfinite(share.error) and share.error != 0 else ""
    return f"{100 * share.value:.{digits}f} %{noise}"


def number(value: Estimate, digits: int) -> str:
    """``2.104 ± 0.031``; the error is omitted where there are too few rows for one."""
    noise = f" ± {value.error:.{digits}f}" if math.isfinite(value.error) else ""
    return f"{value.value:.{digits}f}{noise}"


class ReportColumn:
    """One column of the table. By default cells are percentages."""

    key: ClassVar[str]
    """Its key in the summary of a row in ``results.json``, where it must not be the key of another figure."""
    heading: ClassVar[str]
    short_heading: ClassVar[str]
    """The heading on a terminal, three lines high."""
    description: ClassVar[str] = ""
    """Its explanation in the report, ``{window_row}`` for the better window-only row; empty: none."""
    absent: ClassVar[str] = "–"
    """The cell of a row without a value."""

    def value(self, results: Results, row: str) -> Estimate | None:
        """The value for ``row``; None if there is none.

        ``results.rows[row]`` holds the row's ``Scores``. What was measured of two models only, such as the size of
        their caches, is in ``results.decode``.
        """
        raise NotImplementedError

    def text(self, value: Estimate) -> str:
        """A formatted value, its standard error after " ±"."""
        return percent(value)

    def cell(self, results: Results, row: str, *, noise: bool = True) -> str:
        """The cell of ``row``; ``noise`` adds the standard error."""
        value = self.value(results, row)
        text = self.absent if value is None or math.isnan(value.value) else self.text(value)
        return text if noise else text.partition(" ±")[0]


class PerplexityColumn(ReportColumn):
    """exp(mean loss) over all counted tokens."""

    key, heading, short_heading = "perplexity", "perplexity, all tokens", "\nppl\nall"
    absent = "no tokens"

    def losses(self, scores: Scores) -> RowSums:
        """Losses of the tokens that this column covers."""
        return scores.all

    def value(self, results: Results, row: str) -> Estimate | None:
        """The perplexity with its error."""
        losses = self.losses(results.rows[row])
        return Estimate(losses.perplexity, losses.perplexity * losses.error) if losses.count else None

    def text(self, value: Estimate) -> str:
        """Three decimals below 100, else one."""
        if not math.isfinite(value.value):
            return "not finite"
        return number(value, 3 if value.value < 100 else 1)


class FarPerplexityColumn(PerplexityColumn):
    """exp(mean loss) over tokens past 2W."""

    key, heading, short_heading = "perplexity_past_2w", "perplexity, past 2W", "\nppl\npast 2W"

    def losses(self, scores: Scores) -> RowSums:
        """Losses of the tokens that this column covers."""
        return scores.far


class RecallColumn(ReportColumn):
    """Share of the recall probes whose token the model ranks first."""

    key, heading, short_heading = "recall_accuracy", "recall probe", "\nrecall\nprobe"
    description = (
        "tokens that can hardly be predicted without what was read more than 2W tokens ago: the same three tokens were "
        "there before, the token itself is not among the last 2W, and the three occur together in no other row. The "
        "column is the share of them that the model ranks first."
    )
    absent = "no probes"

    def value(self, results: Results, row: str) -> Estimate | None:
        """The accuracy."""
        return results.rows[row].recall_hits.estimate


class GapColumn(ReportColumn):
    """Share of the gap between the untrained swap and the teacher that is closed."""

    key, heading, short_heading = "share_closed", "gap closed, all tokens", "gap\nclosed\nall"
    description = (
        "how much of the loss between the untrained swap (0 %) and the teacher (100 %) is closed. Negative is worse "
        "than the untrained swap; – means that there is no such gap or that it is within the noise."
    )

    def value(self, results: Results, row: str) -> Estimate | None:
        """The share."""
        return results.share_closed(row)


class FarGapColumn(ReportColumn):
    """Share of the gap between the better window-only row and the teacher that is closed past 2W."""

    key, heading, short_heading = "far_share_closed", "gap closed, past 2W", "gap\nclosed\npast 2W"
    description = (
        "the same, measured from the better window + sinks row{window_row} to the teacher: what the far part adds."
    )

    def value(self, results: Results, row: str) -> Estimate | None:
        """The share."""
        return results.far_share_closed(row)


REPORT_COLUMNS: dict[str, ReportColumn] = {
    column.key: column
    for column in (
        PerplexityColumn(),
        FarPerplexityColumn(),
        RecallColumn(),
        GapColumn(),
        FarGapColumn(),
    )
}
"""Every column by key, in table order. Add yours here."""
