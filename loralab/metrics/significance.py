"""How sure a score is: intervals and p-values by the bootstrap over groups of rows.

A statistic here is sum(w * v) / sum(w) over the rows: the plain mean where there are no weights, and the loss per
target token where v is a row's loss per token and w its number of target tokens. Rows of one group (one dialogue with
three reference summaries) are not independent, so whole groups are drawn, with replacement, as many as there are. Each
draw gives the statistic of one test set that might have been.

Sources:
- Efron and Tibshirani, "An Introduction to the Bootstrap", Chapman & Hall 1993, section 13.3: the percentile interval.
- Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004,
  https://aclanthology.org/W04-3250: paired resampling, both systems scored on the same draws.
- Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979.
- Davison and Hinkley, "Bootstrap Methods and their Application", Cambridge 1997, chapter 4: the +1 of the p-value.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loralab.errors import DataError

LEVEL = 0.95  # of every interval
CHUNK = 2**18  # groups drawn at a time (never less than one whole draw): 2 MB an array, which stays in the cache

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A statistic on the rows as they are, and the percentile interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """The first system's statistic less the second's, its interval, and the paired two-sided p-value."""

    p: float


class Bootstrap:
    """The same resamples of the same groups for every call, so that any two systems are compared on the same draws.

    `groups` names the group of each row, in the order of the rows of all values given later. Raises DataError where it
    is empty. An interval from a single group has no width, it is the value itself: nothing is known about how another
    group would score.
    """

    def __init__(self, groups: Sequence[Hashable], draws: int = 10_000, seed: int = 0) -> None:
        assert draws > 0
        if len(groups) == 0:
            raise DataError("There are no rows to resample. Expected at least one row: check the data's split.")
        number: dict[Hashable, int] = {}
        self._group_of_row = np.array([number.setdefault(group, len(number)) for group in groups])
        self.groups = len(number)
        self.draws = draws
        self.seed = seed

    def interval(self, values: ArrayLike, weights: ArrayLike | None = None) -> Interval:
        """The statistic of `values`, shape (rows,), with its 95 % percentile interval.

        Raises DataError for values or weights of another length, or not finite, and for weights that are not positive.
        """
        value, draws = self._statistic(values, weights)
        return Interval(value, *_percentiles(draws))

    def difference(self, values_a: ArrayLike, values_b: ArrayLike, weights: ArrayLike | None = None) -> Difference:
        """The statistic of a - b of two systems on the same rows, each drawn with the same groups.

        p is twice the share of draws in which the difference has the rarer of its two signs (a tie counts for both), so
        that it is below 0.05 where the 95 % interval leaves out 0. One is added above and below the fraction line, so
        that p is never 0. Identical systems have p = 1, and so has a single group. Raises DataError as `interval` does.
        """
        a, b = self._column("values", values_a), self._column("values", values_b)
        value, draws = self._statistic(a - b, weights)
        rarer = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
        p = min(1.0, 2 * (rarer + 1) / (self.draws + 1)) if self.groups > 1 else 1.0
        return Difference(value, *_percentiles(draws), p)

    def p_value(self, values_a: ArrayLike, values_b: ArrayLike, weights: ArrayLike | None = None) -> float:
        """The p of `difference` alone."""
        return self.difference(values_a, values_b, weights).p

    def _statistic(self, values: ArrayLike, weights: ArrayLike | None) -> tuple[float, Floats]:
        """The statistic on the rows as they are, and in each draw."""
        v = self._column("values", values)
        w = self._column("weights", np.ones(len(v)) if weights is None else weights)
        if not (w > 0).all():
            row = int(np.argmin(w > 0))
            raise DataError(f"The weight of row {row} is {w[row]}. Weights must be positive: leave the row out.")
        above = np.bincount(self._group_of_row, weights=w * v)
        below = np.bincount(self._group_of_row, weights=w)
        draws = [above.take(drawn).sum(axis=1) / below.take(drawn).sum(axis=1) for drawn in self._resamples()]
        return float(above.sum() / below.sum()), np.concatenate(draws)

    def _resamples(self) -> Iterator[NDArray[np.int64]]:
        """The numbers of the groups drawn, shape (some draws, groups), until all draws are done."""
        generator = np.random.default_rng(self.seed)
        size = max(1, CHUNK // self.groups)
        for start in range(0, self.draws, size):
            yield generator.integers(self.groups, size=(min(size, self.draws - start), self.groups))

    def _column(self, what: str, given: ArrayLike) -> Floats:
        column = np.asarray(given, dtype=np.float64)
        rows = len(self._group_of_row)
        if column.shape != (rows,):
            raise DataError(
                f"Got {what} of shape {column.shape} for {rows} rows. Expected one number for each row, in their order."
            )
        if not np.isfinite(column).all():
            row = int(np.argmin(np.isfinite(column)))
            raise DataError(
                f"The {what} of row {row} are {column[row]}. Expected finite numbers: find out why the row has none."
            )
        return column


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, in their order, corrected for being so many: Holm's step-down procedure.

    The smallest of m is multiplied by m, the next by m - 1, and so on, each at least as large as the one before and at
    most 1. Where the corrected ones below 0.05 are called differences, the chance that even one of those calls is
    wrong is at most 5 %, however the comparisons hang together.
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for done, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[i]))
        corrected[i] = largest
    return corrected


def _percentiles(draws: Floats) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
