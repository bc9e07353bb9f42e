"""The statistics of the reports: means, standard errors, paired differences, shares of a gap, intervals.

Losses are in nats. Their standard errors come from the jackknife (M. Quenouille, 1949; J. Tukey, 1958) over the
evaluated rows of text: the figure is computed without each row in turn. Rows are left out, not tokens, because the
tokens of one row are not independent. For a mean over rows of equal length it is the textbook standard error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)
"""Standard errors in half a 95 % interval."""


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error; NaN if the error is unknown."""

    value: float
    error: float = math.nan

    @property
    def clear(self) -> bool:
        """True when the value is more than two standard errors from zero."""
        return math.isfinite(self.value) and math.isfinite(self.error) and abs(self.value) > 2 * self.error


@dataclass(frozen=True)
class RowSums:
    """A quantity summed over the counted tokens of each evaluated row of text: lists of length N."""

    sums: list[float]
    counts: list[int]

    @property
    def count(self) -> int:
        """Tokens counted over all rows."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Mean over tokens; NaN when nothing was counted."""
        return sum(self.sums) / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        """exp(mean)."""
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def estimate(self) -> Estimate:
        """The mean with its standard error."""
        return Estimate(self.mean, self.error)

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN with fewer than two rows that count."""
        return jackknife([self], lambda mean: mean).error


NOTHING = RowSums([], [])
"""What was not measured."""


def jackknife(parts: Sequence[RowSums], compute: Callable[..., Tensor]) -> Estimate:
    """``compute(mean, mean, ...)`` of the means of ``parts``, with its jackknife error over the rows of text.

    ``parts`` are sums over the same N rows (N may be 0). ``compute`` is called with float64 tensors [1 + n]: first the
    means over all rows, then those without one of the n rows that count. The value is NaN where a part counts nothing,
    and the error is NaN with fewer than two rows.
    """
    counts_PN = torch.tensor([part.counts for part in parts], dtype=torch.float64)
    sums_PN = torch.tensor([part.sums for part in parts], dtype=torch.float64)
    if not counts_PN.numel():
        return Estimate(math.nan)
    counting = counts_PN.sum(0) > 0
    counts_PN, sums_PN = counts_PN[:, counting], sums_PN[:, counting]
    totals, rows = counts_PN.sum(1, keepdim=True), int(counting.sum())
    means = torch.cat([sums_PN.sum(1, keepdim=True) / totals,
                       (sums_PN.sum(1, keepdim=True) - sums_PN) / (totals - counts_PN)], dim=1)  # fmt: skip
    values = compute(*means)
    without = values[1:][torch.isfinite(values[1:])]
    if rows < 2 or len(without) < 2:
        return Estimate(float(values[0]))
    error = math.sqrt((rows - 1) / rows * float(((without - without.mean()) ** 2).sum()))
    return Estimate(float(values[0]), error)


def paired_difference(a: RowSums, b: RowSums) -> Estimate:
    """Mean of ``a`` minus mean of ``b`` on the same tokens; the error is of the difference, not of each.

    Raises ``ValueError`` if they do not cover the same tokens.
    """
    _check_same_tokens(a, b)
    return RowSums([x - y for x, y in zip(a.sums, b.sums, strict=True)], a.counts).estimate


def _check_same_tokens(a: RowSums, b: RowSums) -> None:
    if a.counts != b.counts:
        raise ValueError(
            f"cannot compare scores of different tokens: {a.count} tokens in {len(a.counts)} rows against "
            f"{b.count} in {len(b.counts)}. Score both models on the same rows with the same window."
        )


def gap_closed(
    row: RowSums, bottom: RowSums, top: RowSums, shift: tuple[RowSums, RowSums] | None = None
) -> Estimate | None:
    """Share (bottom - row) / (bottom - top) of the loss gap that ``row`` closes: 0 is ``bottom``, 1 is ``top``.

    ``shift``: losses of ``row`` and of ``top`` on other tokens of the same text, where the row's attention is that of
    ``top``; their difference is subtracted from the row's loss before the share is computed. None if the gap itself is
    within its noise, where a share has no meaning.
    """
    gap = paired_difference(bottom, top)
    if not (gap.clear and gap.value > 0):
        return None
    _check_same_tokens(bottom, row)
    parts: tuple[RowSums, ...] = (row, bottom, top)
    if shift is not None:
        _check_same_tokens(*shift)
        parts += shift
    if row.sums == top.sums:
        return Estimate(1.0, 0.0)

    def share(row: Tensor, bottom: Tensor, top: Tensor, *other: Tensor) -> Tensor:
        """The share, of means [1 + n]."""
        moved = other[0] - other[1] if other else 0.0
        return (bottom - (row - moved)) / (bottom - top)

    return jackknife(parts, share)


def mean_estimate(rows: Sequence[float]) -> Estimate:
    """Mean over rows and its standard error (sample standard deviation / sqrt(n))."""
    error = statistics.stdev(rows) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
    return Estimate(statistics.fmean(rows), error)


def interval(estimate: Estimate, rows: Sequence[float] = ()) -> tuple[float, float] | None:
    """95 % interval: Wilson's (1927) for rows that are 0 or 1, else the normal one; None where no error is known."""
    if rows and set(rows) <= {0.0, 1.0}:
        n, p, z2 = len(rows), statistics.fmean(rows), NORMAL_95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = NORMAL_95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        return centre - half, centre + half
    if not math.isfinite(estimate.error):
        return None
    return estimate.value - NORMAL_95 * estimate.error, estimate.value + NORMAL_95 * estimate.error
