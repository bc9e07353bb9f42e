"""The statistics of the reports: means, standard errors, paired differences, shares of a gap, intervals.

Losses are in nats. Their standard errors come from a bootstrap (B. Efron, 1979) over the evaluated rows of text: rows
are resampled, not tokens, because the tokens of one row are not independent.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BOOTSTRAP_DRAWS = 2000
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


@cache
def _bootstrap_weights(rows: int) -> Tensor:
    """[BOOTSTRAP_DRAWS, rows] float64: how often each row is drawn; the same draws for every model."""
    generator = torch.Generator().manual_seed(20)
    drawn = torch.randint(rows, (BOOTSTRAP_DRAWS, rows), generator=generator)
    counts = torch.zeros(BOOTSTRAP_DRAWS, rows, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


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

    def replicates(self) -> Tensor:
        """[BOOTSTRAP_DRAWS] float64: the mean in each resampling of the rows."""
        weights = _bootstrap_weights(len(self.counts))
        sums = torch.tensor(self.sums, dtype=torch.float64)
        counts = torch.tensor(self.counts, dtype=torch.float64)
        return (weights @ sums) / (weights @ counts)

    @property
    def estimate(self) -> Estimate:
        """The mean with its standard error."""
        return Estimate(self.mean, self.error)

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN with fewer than two rows that count."""
        if sum(1 for count in self.counts if count) < 2:
            return math.nan
        return _spread(self.replicates())


def _spread(values: Tensor) -> float:
    """Standard deviation over the resamplings in which the quantity is defined."""
    finite = values[torch.isfinite(values)]
    return float(finite.std()) if len(finite) > 1 else math.nan


def paired_difference(a: RowSums, b: RowSums) -> Estimate:
    """Mean of ``a`` minus mean of ``b`` on the same tokens; the error is of the difference, not of each.

    Raises ``ValueError`` if they do not cover the same tokens.
    """
    if a.counts != b.counts:
        raise ValueError(
            f"cannot compare scores of different tokens: {a.count} tokens in {len(a.counts)} rows against "
            f"{b.count} in {len(b.counts)}. Score both models on the same rows with the same window."
        )
    return RowSums([x - y for x, y in zip(a.sums, b.sums, strict=True)], a.counts).estimate


def gap_closed(row: RowSums, bottom: RowSums, top: RowSums) -> Estimate | None:
    """Share (bottom - row) / (bottom - top) of the loss gap that ``row`` closes: 0 is ``bottom``, 1 is ``top``.

    None if the gap itself is within its noise, where a share has no meaning.
    """
    gap = paired_difference(bottom, top)
    if not (gap.clear and gap.value > 0):
        return None
    closed = paired_difference(bottom, row)
    if row.sums == top.sums:
        return Estimate(1.0, 0.0)
    low, high = bottom.replicates(), top.replicates()
    return Estimate(closed.value / gap.value, _spread((low - row.replicates()) / (low - high)))


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
