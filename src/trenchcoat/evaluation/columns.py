"""The columns of the report's table: a heading, and how a row's scores become a cell.

To add a column, write a class here and list it in ``REPORT_COLUMNS``; its values also appear in the row's ``summary``
in ``results.json``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from trenchcoat.evaluation.report.texts import bytes_text
from trenchcoat.evaluation.statistics import NOTHING, Estimate, RowSums

if TYPE_CHECKING:
    from trenchcoat.evaluation.results import Results, Scores


def percent(share: Estimate) -> str:
    """``93.1 % ± 0.8``; the error is omitted where it is exactly zero, as for the two ends of a gap."""
    exact = share.error < 5e-7
    digits = 1 if abs(share.value) < 2 and not exact else 0
    noise = f" ± {100 * share.error:.{digits}f}" if math.isfinite(share.error) and not exact else ""
    return f"{100 * share.value:.{digits}f} %{noise}".replace("-0 %", "0 %")


def whole_percent(share: Estimate) -> str:
    """``93 %``."""
    return f"{100 * share.value:.0f} %".replace("-0 %", "0 %")


def number(value: Estimate, digits: int) -> str:
    """``2.104 ± 0.031``; the error is omitted where there are too few rows for one."""
    noise = f" ± {value.error:.{digits}f}" if math.isfinite(value.error) else ""
    return f"{value.value:.{digits}f}{noise}"


class ReportColumn:
    """One column of the tables. By default cells are percentages."""

    key: str
    """Its key in the summary of a row in ``results.json``, where it must not be the key of another figure."""
    heading: str
    short_heading: str
    """The heading on a terminal, three lines high."""
    description: ClassVar[str] = ""
    """Its explanation in the report; empty: none."""
    absent: ClassVar[str] = "–"
    """The cell of a row without a value."""
    control: ClassVar[bool] = False
    """Shown in the second table of the report, "controls and cost", and not in the first, "quality"."""
    on_terminal: bool = True
    """Also a column of the terminal's table."""

    @property
    def title(self) -> str:
        """What its explanation in the report begins with."""
        return self.heading.partition(", {tokens}")[0]

    def at_lengths(self, results: Results) -> Sequence[ReportColumn]:
        """The column, or the columns that it stands for, one for each length of the rows."""
        return (self,)

    def value(self, results: Results, row: str) -> Estimate | None:
        """The value for ``row``; None if there is none.

        ``results.rows[row]`` holds the row's ``Scores``. What was measured of two models only, such as the time of
        a step, is in ``results.decode``.
        """
        raise NotImplementedError

    def text(self, value: Estimate) -> str:
        """A formatted value, its standard error after " ±"."""
        return percent(value)

    def cell(self, results: Results, row: str, *, noise: bool = True) -> str:
        """The cell of ``row``; ``noise`` adds the standard error."""
        value = self.value(results, row)
        if value is None or math.isnan(value.value):
            return self.absent
        return self.text(value) if noise else self.short(value)

    def short(self, value: Estimate) -> str:
        """A formatted value without its error, for the terminal."""
        return self.text(value).partition(" ±")[0]


class LengthColumn(ReportColumn):
    """A column for each length of the rows of text."""

    terminal_lengths: ClassVar[tuple[int, ...]] = (0,)
    """Which of the lengths, in ascending order, the terminal shows."""

    def __init__(self, factor: int = 1, tokens: int | None = None, *, on_terminal: bool = True) -> None:
        self.factor = factor
        self.on_terminal = on_terminal
        if tokens is not None:
            self.heading = self.heading.replace("{tokens}", f"{tokens:,}")
            short = f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
            self.short_heading = self.short_heading.replace("{tokens}", short)
        self.key = self.key if factor == 1 else f"{self.key}_{factor}x"

    def at_lengths(self, results: Results) -> Sequence[ReportColumn]:
        """One for each length that a row was scored at."""
        factors = results.factors()
        shown = {factors[place] for place in self.terminal_lengths}
        return [type(self)(factor, factor * results.seq_len, on_terminal=factor in shown) for factor in factors]


class PerplexityColumn(ReportColumn):
    """exp(mean loss) over all counted tokens."""

    key, heading, short_heading = "perplexity", "perplexity, all tokens", "\nppl\nall"
    absent = "no tokens"
    control = True
    on_terminal = False

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


class FarPerplexityColumn(LengthColumn, PerplexityColumn):
    """exp(mean loss) over tokens past 2W."""

    key, heading, short_heading = "perplexity_past_2w", "perplexity past 2W, {tokens} tokens", "ppl\n>2W\n@{tokens}"
    control = False

    def losses(self, scores: Scores) -> RowSums:
        """Losses of the tokens that this column covers."""
        part = scores.at(self.factor)
        return NOTHING if part is None else part.far


class RecallColumn(ReportColumn):
    """Share of the recall probes whose token the model ranks first."""

    key, heading, short_heading = "recall_accuracy", "recall probe", "\nrecall\nprobe"
    description = (
        "tokens that can hardly be predicted without what was read more than 2W tokens ago: the same three tokens were "
        "there before, the token itself is not among the last 2W, and the three occur together in no other row. The "
        "column is the share of them that the model ranks first."
    )
    absent = "no probes"
    on_terminal = False

    def value(self, results: Results, row: str) -> Estimate | None:
        """The accuracy."""
        return results.rows[row].recall_hits.estimate


class FarGapColumn(LengthColumn):
    """Share of the gap between the untrained window and the teacher that is closed past 2W."""

    key, heading, short_heading = "closed_past_2w", "closed past 2W, {tokens} tokens", "closed\n>2W\n@{tokens}"
    terminal_lengths: ClassVar[tuple[int, ...]] = (0, -1)
    description = (
        "how much of the loss past 2W between window + sinks, untrained and without kept groups (0 %), and the teacher "
        "(100 %) a row closes, on rows of so many tokens. It is negative where a row is worse than the window alone; – "
        "means that there is no such gap or that it is within the noise."
    )

    def value(self, results: Results, row: str) -> Estimate | None:
        """The share."""
        return results.far_closed(row, self.factor)

    def short(self, value: Estimate) -> str:
        """Without decimals."""
        return whole_percent(value)


class CorrectedGapColumn(FarGapColumn):
    """The same, corrected for the domain shift."""

    key, heading, short_heading = (
        "closed_corrected",
        "closed past 2W, corrected, {tokens} tokens",
        "closed\ncorr.\n@{tokens}",
    )
    description = (
        "the same share after the row's shift (*below 2W minus the teacher*) was taken off its loss: what remains came "
        "from text past 2W, and not from having learned the kind of text."
    )
    control = True
    terminal_lengths = ()

    def value(self, results: Results, row: str) -> Estimate | None:
        """The share."""
        return results.far_closed(row, self.factor, corrected=True)


class ShiftColumn(ReportColumn):
    """Loss below 2W minus the teacher's."""

    key, heading, short_heading = "shift_below_2w", "below 2W minus the teacher", "\nbelow\n2W"
    description = (
        "the mean loss of tokens whose whole past is in the near part, minus the teacher's on them, in nats. "
        "There an untrained student is the teacher, so the difference is what training did to the weights: near 0 is "
        "right. Below 0 the model learned the kind of text, which looks like recovered context in every other figure; "
        "above 0 it was damaged."
    )
    control = True

    def value(self, results: Results, row: str) -> Estimate | None:
        """The difference; None for the teacher itself."""
        return results.shift(row)

    def text(self, value: Estimate) -> str:
        """With its sign."""
        return self._signed(value, number(value, 3))

    def short(self, value: Estimate) -> str:
        """Two decimals."""
        return self._signed(value, f"{value.value:.2f}")

    def _signed(self, value: Estimate, text: str) -> str:
        zero = text.partition(" ")[0].strip("-0.") == ""
        return text.lstrip("-") if zero else f"{'+' if value.value > 0 else ''}{text}"


class CopyColumn(LengthColumn):
    """Share of the gap in copying that is closed."""

    key, heading, short_heading = "copy_closed", "copy closed, {tokens} tokens", "copy\nclosed\n@{tokens}"
    description = (
        "a held-out text of half so many tokens, followed by itself; the loss on its second half, as a share of the "
        "gap between window + sinks, untrained (0 %), and the teacher (100 %)."
    )

    def value(self, results: Results, row: str) -> Estimate | None:
        """The share."""
        return results.copy_closed(row, self.factor)

    def short(self, value: Estimate) -> str:
        """Without decimals."""
        return whole_percent(value)


class CopyHitsColumn(ReportColumn):
    """Share of the right tokens in the second half of a copied text."""

    key, heading, short_heading = "copy_accuracy", "copy, right tokens", "copy\nright\n"
    description = "the share of the tokens of that second half that the model ranks first, at the shortest length."
    on_terminal = False

    def hits(self, scores: Scores) -> RowSums:
        """Right tokens."""
        return scores.copy_hits

    def value(self, results: Results, row: str) -> Estimate | None:
        """The accuracy."""
        return self.hits(results.rows[row]).estimate


class RandomHitsColumn(CopyHitsColumn):
    """The same on random tokens."""

    key, heading, short_heading = "random_accuracy", "random copy, right tokens", "random\ncopy\nright"
    description = "the same for random tokens, which nothing but the copy can predict."

    def hits(self, scores: Scores) -> RowSums:
        """Right tokens."""
        return scores.random_hits


class CacheColumn(ReportColumn):
    """Size of the cache after so many tokens."""

    description = (
        "bytes of the generation cache of one sequence after so many tokens, computed from its size after a few "
        "(constant bytes + bytes a token), and as a share of the teacher's. Kept groups take up to half as much again "
        "while their memory grows."
    )
    control = True

    def __init__(self, tokens: int, name: str, *, on_terminal: bool) -> None:
        self.tokens, self.on_terminal = tokens, on_terminal
        self.key, self.heading = f"cache_bytes_{name}", f"cache at {tokens:,} tokens"
        self.short_heading = f"cache\n@{name}"

    @property
    def title(self) -> str:
        """Without the number of tokens."""
        return "cache"

    def value(self, results: Results, row: str) -> Estimate | None:
        """The bytes."""
        cache = results.rows[row].cache
        return None if cache is None else Estimate(float(cache.at(self.tokens)), 0.0)

    def cell(self, results: Results, row: str, *, noise: bool = True) -> str:
        """Bytes, and their share of the teacher's; without ``noise`` the share alone."""
        value, teacher = self.value(results, row), results.rows.get("teacher")
        if value is None:
            return self.absent
        if teacher is None or teacher.cache is None:
            return bytes_text(round(value.value))
        share = value.value / teacher.cache.at(self.tokens)
        return f"{bytes_text(round(value.value))} ({100 * share:.1f} %)" if noise else f"{100 * share:.0f} %"


REPORT_COLUMNS: dict[str, ReportColumn] = {
    column.key: column
    for column in (
        FarPerplexityColumn(),
        FarGapColumn(),
        CopyColumn(),
        CopyHitsColumn(),
        RandomHitsColumn(),
        RecallColumn(),
        ShiftColumn(),
        CorrectedGapColumn(),
        PerplexityColumn(),
        CacheColumn(8192, "8k", on_terminal=False),
        CacheColumn(32768, "32k", on_terminal=True),
    )
}
"""Every column by key, in table order. Add yours here."""


def report_columns(results: Results) -> list[ReportColumn]:
    """The columns of ``REPORT_COLUMNS`` at every length that was scored."""
    return [column for kind in REPORT_COLUMNS.values() for column in kind.at_lengths(results)]
