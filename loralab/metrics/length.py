"""The length of a prediction as a ratio: its words to those of the reference.

Words are what white space separates; of several references, the mean of their words counts. 1 is the reference's
length; neither a longer nor a shorter text is better by itself, but a score that was bought with length shows here. An
empty prediction has the ratio 0.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import numpy as np

from loralab.metrics.metric import Column, Floats, check_rows

ID = "words of the prediction / mean words of its references, mean of rows"
COLUMNS: tuple[Column, ...] = (Column("length_ratio", "length ratio", better="neither"),)
NEEDS_SOURCES = False


def version() -> str:
    """Counted here: the rule is that of this version of loralab."""
    return importlib.metadata.version("loralab")


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str] | None = None
) -> dict[str, Floats]:
    """The ratio of each row, shape (rows,). Raises DataError as `check_rows` does."""
    check_rows("The length ratio", predictions, references)
    return {"length_ratio": np.array([_ratio(*row) for row in zip(predictions, references, strict=True)])}


def _ratio(prediction: str, references: Sequence[str]) -> float:
    words = float(np.mean([len(text.split()) for text in references]))
    return len(prediction.split()) / max(words, 1.0)  # a reference without words counts as one
