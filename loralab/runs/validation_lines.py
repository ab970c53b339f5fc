"""The lines of validation.jsonl: one for each validation of a run, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loralab.metrics import COLUMNS

Line = dict[str, Any]


def best_of(validations: Sequence[Line], metric: str) -> Line | None:
    """Returns the best line by this column, the first of equals; None where no value is finite."""
    known = [line for line in validations if line.get(metric) is not None]
    sign = 1 if COLUMNS[metric].better == "lower" else -1
    return min(known, key=lambda line: sign * line[metric], default=None)
