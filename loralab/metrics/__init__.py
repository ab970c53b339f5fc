"""The metrics that a recipe's `evaluation.metrics` can name. A new one is a module beside this file and a METRICS line.

A metric scores each row by itself, so that `significance` can put an interval around the mean and a p-value on a
difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loralab.metrics import rouge


class Metric(Protocol):
    """What a metric's module has: its identity for the run record, its columns, its library's version, and `score`."""

    ID: str
    NAMES: tuple[str, ...]

    def version(self) -> str: ...

    def score(
        self, predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, NDArray[np.float64]]: ...


METRICS: Mapping[str, Metric] = {
    "rouge": rouge,
}
