"""Metrics of numbers: squared and absolute error, Pearson's and Spearman's correlation.

Correlations are in percent, as the GLUE benchmark tells them (Wang et al. 2018, https://arxiv.org/abs/1804.07461, on STS-B).
They are no means of rows: a row gives the products that sums are made of, also in each draw of a bootstrap. Spearman's is
Pearson's of ranks, equal numbers sharing their mean rank; in a draw of a bootstrap ranks stay those among all rows.
Where one side is constant a correlation is 0.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence

import numpy as np

from loralab.errors import DataError
from loralab.metrics.metric import Column, Floats, check_rows

ID = "mean squared error, mean absolute error; Pearson's and Spearman's correlation in percent"
NEEDS_SOURCES = False


def _correlation(sums: Floats) -> Floats:
    """Pearson's correlation in percent.

    Args:
        sums: [..., 6]: of x, y, x², y², xy and 1 over rows.
    """
    x, y, xx, yy, xy, count = np.moveaxis(sums, -1, 0)
    spread = np.sqrt(np.maximum(count * xx - x * x, 0) * np.maximum(count * yy - y * y, 0))
    correlation: Floats = np.divide(
        count * xy - x * y, spread, out=np.zeros_like(spread), where=spread > 1e-12 * count**2
    )
    return 100.0 * correlation


MSE = Column("mse", "MSE", better="lower", digits=3)
MAE = Column("mae", "MAE", better="lower", digits=3)
PEARSON = Column("pearson", "Pearson", better="higher", statistic=_correlation)
SPEARMAN = Column("spearman", "Spearman", better="higher", statistic=_correlation)
COLUMNS: tuple[Column, ...] = (PEARSON, SPEARMAN, MSE, MAE)


def version() -> str:
    """Returns loralab's own version: the metrics are computed here."""
    return importlib.metadata.version("loralab")


def score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    sources: Sequence[str] | None = None,
) -> dict[str, Floats]:
    """Scores each row.

    Args:
        predictions, references: numbers as text; one reference a row.

    Returns:
        [rows] for the errors, [rows, 6] for the correlations.

    Raises:
        DataError: a text is no finite number, or a row has two references.
    """
    check_rows("MSE", predictions, references)
    if more := [row for row, texts in enumerate(references) if len(texts) > 1]:
        raise DataError(f"Row {more[0]} has {len(references[more[0]])} references. A row has one number.")
    given = np.array([number_of(text, f"prediction of row {row}") for row, text in enumerate(predictions)])
    true = np.array([number_of(texts[0], f"reference of row {row}") for row, texts in enumerate(references)])
    errors = given - true
    return {
        PEARSON.name: _products(given, true),
        SPEARMAN.name: _products(_ranks(given), _ranks(true)),
        MSE.name: errors**2,
        MAE.name: np.abs(errors),
    }


def number_of(text: str, what: str) -> float:
    """Returns the number that a text stands for.

    Raises:
        DataError: it is none, or not finite.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"The {what} is {text!r:.60}, where a number is needed.")
    return number


def _products(x: Floats, y: Floats) -> Floats:
    """[rows, 6]; shifted by the means, which changes no correlation and keeps digits."""
    x, y = x - x.mean(), y - y.mean()
    return np.stack([x, y, x * x, y * y, x * y, np.ones_like(x)], axis=1)


def _ranks(values: Floats) -> Floats:
    """[rows]: from 1 on; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2)[places]
    return ranks
