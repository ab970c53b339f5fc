"""A metric: a module with an identity, columns, and `score`, which gives every row its own number.

Row by row, so that `significance` can put an interval around the mean and a p-value on a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from loralab.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Column:
    """One number of each row, and how to read its mean."""

    name: str
    """In recipes, records and JSON."""
    title: str
    """In tables."""
    better: Literal["higher", "lower", "neither"]
    """Direction of better values; nothing is said to beat another in a column where neither is."""
    digits: int = 2
    """Behind the point, in tables."""
    statistic: Callable[[Floats], Floats] | None = None
    """The number made of sums over rows, [..., k] -> [...], where it is no mean: each row then has k values."""


class Metric(Protocol):
    """Interface of a metric's module."""

    ID: str
    """The rule in a line, for records."""
    COLUMNS: tuple[Column, ...]
    NEEDS_SOURCES: bool
    """True if it reads the sources."""

    def version(self) -> str:
        """Returns the version of the library that computes it."""

    def score(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        sources: Sequence[str] | None = None,
    ) -> dict[str, Floats]:
        """[rows] for each column, [rows, k] for one with a statistic.

        Raises:
            DataError: lists do not fit together, or sources are lacking.
        """


def check_rows(
    who: str,
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    sources: Sequence[str] | None = None,
    needs_sources: bool = False,
) -> None:
    """Raises DataError where there are no rows, where lengths differ, or where a row lacks what `who` needs."""
    if len(predictions) != len(references):
        raise DataError(
            f"{who} got {len(predictions)} predictions and references for {len(references)} rows. "
            "It needs one list of references for each prediction, in the same order."
        )
    if len(predictions) == 0:
        raise DataError(
            f"{who} got no rows. It needs at least one prediction with a reference: check the data's split."
        )
    for row, texts in enumerate(references):
        if isinstance(texts, str):
            raise DataError(f"The references of row {row} are one text. Expected a list: put the text into brackets.")
        if len(texts) == 0:
            raise DataError(f"Row {row} has no reference. {who} needs at least one for each row: leave the row out.")
    if needs_sources and sources is None:
        raise DataError(f"{who} looks at the sources and got none. Give the text that each prediction was made from.")
    if sources is not None and len(sources) != len(predictions):
        raise DataError(f"{who} got {len(sources)} sources for {len(predictions)} predictions. Expected one for each.")
