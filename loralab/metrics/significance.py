"""Statistical significance: intervals and p-values by the bootstrap over groups of rows.

A statistic here is sum(w * v) / sum(w) over the rows: the plain mean where there are no weights, and the loss per
target token where v is a row's loss per token and w its number of target tokens. Rows of one group (one dialogue with
three reference summaries) are not independent, so whole groups are drawn, with replacement, as many as there are. Each
draw gives the statistic of one test set that might have been.

Sources:
- Efron and Tibshirani, "An Introduction to the Bootstrap", Chapman & Hall 1993, section 13.3: the percentile interval.
- Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004,
  https://aclanthology.org/W04-3250: paired resampling, both systems scored on the same draws.
- Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of Statistics 6, 1979.
- McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", Psychometrika 12,
  1947; exact, by the binomial distribution.
- Davison and Hinkley, "Bootstrap Methods and their Application", Cambridge 1997, chapter 4: the +1 of the p-value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loralab.errors import DataError

LEVEL = 0.95  # of every interval
CHUNK = 2**18  # groups drawn at a time (never less than one whole draw): 2 MB an array, which stays in the cache

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]


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
    """Bootstrap over groups of rows; every call uses the same resamples, so that any two systems are compared on the same draws.

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

    def interval(
        self, values: ArrayLike, weights: ArrayLike | None = None, statistic: Statistic | None = None
    ) -> Interval:
        """The statistic of `values`, shape (rows,) or (seeds, rows), with its 95 % percentile interval.

        Of several seeds it is the mean, and seeds are drawn as well as groups: the interval then says how far another
        training on other seeds, scored on other rows, may lie. With two or three seeds it is somewhat too narrow.

        Where a number is no mean (F1), a row has k values, (rows, k) or (seeds, rows, k), and `statistic` makes the number of
        their sums over rows, [..., k] -> [...]; such rows have no weights.

        Raises DataError for values or weights of another length, or not finite, and for weights that are not positive.
        """
        if statistic is not None:
            value, draws = self._of_sums(_tables(values), statistic)
        else:
            value, draws = self._statistic(self._columns(values), weights)
        return Interval(value, *_percentiles(draws))

    def difference(
        self,
        values_a: ArrayLike,
        values_b: ArrayLike,
        weights: ArrayLike | None = None,
        statistic: Statistic | None = None,
    ) -> Difference:
        """The statistic of a - b of two systems on the same rows, each drawn with the same groups and its own seeds.

        p is twice the share of draws in which the difference has the rarer of its two signs (a tie counts for both), so
        that it is below 0.05 where the 95 % interval leaves out 0. One is added above and below the fraction line, so
        that p is never 0. Identical systems have p = 1, and so has a single group. Raises DataError as `interval` does.
        """
        if statistic is not None:
            of_both = [self._of_sums(_tables(each), statistic, i) for i, each in enumerate((values_a, values_b))]
            return self._between(of_both[0][0] - of_both[1][0], of_both[0][1] - of_both[1][1])
        a, b = self._columns(values_a), self._columns(values_b)
        if len(a) == len(b) == 1:  # row by row first: what is equal is then a tie, and no rounding
            value, draws = self._statistic(a - b, weights)
        else:
            (value_a, draws_a), (value_b, draws_b) = (
                self._statistic(each, weights, i) for i, each in enumerate((a, b))
            )
            value, draws = value_a - value_b, draws_a - draws_b
        return self._between(value, draws)

    def _between(self, value: float, draws: Floats) -> Difference:
        rarer = min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
        p = min(1.0, 2 * (rarer + 1) / (self.draws + 1)) if self.groups > 1 else 1.0
        return Difference(value, *_percentiles(draws), p)

    def p_value(
        self,
        values_a: ArrayLike,
        values_b: ArrayLike,
        weights: ArrayLike | None = None,
        statistic: Statistic | None = None,
    ) -> float:
        """The p of `difference` alone."""
        return self.difference(values_a, values_b, weights, statistic).p

    def _statistic(self, values: Floats, weights: ArrayLike | None, stream: int = 0) -> tuple[float, Floats]:
        """The statistic on the rows as they are, and in each draw; `values` is (seeds, rows). Streams draw other seeds."""
        w = self._column("weights", np.ones(values.shape[1]) if weights is None else weights)
        if not (w > 0).all():
            row = int(np.argmin(w > 0))
            raise DataError(f"The weight of row {row} is {w[row]}. Weights must be positive: leave the row out.")
        above = [np.bincount(self._group_of_row, weights=w * one) for one in values]
        below = np.bincount(self._group_of_row, weights=w)
        shares = self._shares(len(values), stream)
        draws, done = [], 0
        for drawn in self._resamples():
            tops = np.stack([one.take(drawn).sum(axis=1) for one in above], axis=1)
            part = shares[done : done + len(drawn)]
            draws.append((tops * part).sum(axis=1) / below.take(drawn).sum(axis=1))
            done += len(drawn)
        return float(np.mean([one.sum() for one in above]) / below.sum()), np.concatenate(draws)

    def _of_sums(self, tables: Floats, statistic: Statistic, stream: int = 0) -> tuple[float, Floats]:
        """Returns the same of sums over rows; `tables` is (seeds, rows, k)."""
        if tables.shape[1] != len(self._group_of_row):
            raise DataError(f"Got values of shape {tables.shape[1:]} for {len(self._group_of_row)} rows.")
        sums = np.zeros((len(tables), self.groups, tables.shape[2]))
        for one, into in zip(tables, sums, strict=True):
            np.add.at(into, self._group_of_row, one)
        shares, draws, done = self._shares(len(tables), stream), [], 0
        for drawn in self._resamples():
            places = drawn + np.arange(len(drawn))[:, None] * self.groups
            counts = np.bincount(places.ravel(), minlength=drawn.shape[0] * self.groups).reshape(
                len(drawn), self.groups
            )
            values = np.stack([statistic(counts.astype(np.float64) @ one) for one in sums], axis=1)
            draws.append((values * shares[done : done + len(drawn)]).sum(axis=1))
            done += len(drawn)
        return float(np.mean([statistic(one.sum(axis=0)) for one in sums])), np.concatenate(draws)

    def _shares(self, seeds: int, stream: int) -> Floats:
        """Returns how much each seed weighs in each draw, shape (draws, seeds): as many are drawn as there are, with replacement."""
        if seeds == 1:
            return np.ones((self.draws, 1))
        generator = np.random.default_rng([self.seed, 1 + stream])
        return generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=self.draws) / seeds

    def _resamples(self) -> Iterator[NDArray[np.int64]]:
        """The numbers of the groups drawn, shape (some draws, groups), until all draws are done."""
        generator = np.random.default_rng(self.seed)
        size = max(1, CHUNK // self.groups)
        for start in range(0, self.draws, size):
            yield generator.integers(self.groups, size=(min(size, self.draws - start), self.groups))

    def _columns(self, values: ArrayLike) -> Floats:
        """(seeds, rows), from that or from a single (rows,)."""
        table = np.asarray(values, dtype=np.float64)
        return np.stack([self._column("values", one) for one in (table if table.ndim == 2 else [table])])

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


@dataclass(frozen=True)
class McNemar:
    """Two classifiers on the same rows: in how many the first alone is right, in how many the second alone, and p."""

    first_alone: int
    second_alone: int
    p: float


def mcnemar(right_a: ArrayLike, right_b: ArrayLike) -> McNemar:
    """Tells whether two classifiers are right equally often, told by the rows on which one of them alone is: exact, two-sided.

    If neither is better, each such row is a coin's throw. Rows are taken for independent. Raises DataError where the two
    differ in length.
    """
    a, b = np.asarray(right_a, dtype=bool), np.asarray(right_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise DataError(f"McNemar's test got {a.shape} and {b.shape} answers. Expected one a row, of the same rows.")
    first, second = int((a & ~b).sum()), int((~a & b).sum())
    throws = first + second
    heads = np.arange(min(first, second) + 1)
    logs = [math.lgamma(throws + 1) - math.lgamma(k + 1) - math.lgamma(throws - k + 1) for k in heads.tolist()]
    tail = np.exp(np.array(logs) - throws * math.log(2)).sum()
    return McNemar(first, second, float(min(1.0, 2 * tail)))


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


def _tables(values: ArrayLike) -> Floats:
    """(seeds, rows, k), from that or from a single (rows, k)."""
    tables = np.asarray(values, dtype=np.float64)
    return tables if tables.ndim == 3 else tables[None]


def _percentiles(draws: Floats) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
