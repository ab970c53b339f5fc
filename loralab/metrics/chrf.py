"""chrF for summaries and translations, computed by the `sacrebleu` library: how many pieces of words are shared.

The rule, in full: character 1- to 6-grams without white space, case kept; precision and recall averaged over those
orders that both texts have; F with recall weighing twice, in percent. Of several references the one with the best F. A
text without characters scores 0. Each row is scored by itself and the table shows the mean of the rows, which is not
the chrF of the whole file, where the n-grams of all rows are counted together.

Source: Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015, https://aclanthology.org/W15-3049
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import numpy as np

from loralab.metrics.metric import Column, Floats, check_rows

ID = "sacrebleu: chrF2, mean of rows, case:mixed|eff:yes|nc:6|nw:0|space:no"
COLUMNS: tuple[Column, ...] = (Column("chrf", "chrF", better="higher"),)
NEEDS_SOURCES = False


def version() -> str:
    """The version of the library that computes the scores."""
    return importlib.metadata.version("sacrebleu")


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str] | None = None
) -> dict[str, Floats]:
    """chrF of each row by the rule above, shape (rows,), in percent. Raises DataError as `check_rows` does."""
    from sacrebleu.metrics.chrf import CHRF

    check_rows("chrF", predictions, references)
    metric = CHRF()
    rows = zip(predictions, references, strict=True)
    return {"chrf": np.array([metric.sentence_score(prediction, list(texts)).score for prediction, texts in rows])}
