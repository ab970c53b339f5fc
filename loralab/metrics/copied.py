"""Copied text: the share of its word 3-grams that stand in the source, in percent.

100 less this is the novelty of See, Liu and Manning (figure 6 of "Get To The Point", ACL 2017,
https://aclanthology.org/P17-1099). Words are runs of letters, digits and apostrophes, lower-cased; a 3-gram that occurs
twice in the prediction counts twice. A prediction of fewer than three words has no 3-gram and copies 0.

Neither direction is better by itself: the start of the source copies 100, a text about something else 0.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence

import numpy as np

from loralab.metrics.metric import Column, Floats, check_rows

ID = "share of the prediction's word 3-grams that the source has, percent, mean of rows"
COLUMNS: tuple[Column, ...] = (Column("copied_3grams", "copied 3-grams", better="neither"),)
NEEDS_SOURCES = True

WORD = re.compile(r"[\w']+")
Trigram = tuple[str, str, str]


def version() -> str:
    """Counted here: the rule is that of this version of loralab."""
    return importlib.metadata.version("loralab")


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str] | None = None
) -> dict[str, Floats]:
    """The share of each row, shape (rows,), in percent. Raises DataError as `check_rows` does."""
    check_rows("The share of copied 3-grams", predictions, references, sources, needs_sources=True)
    assert sources is not None
    return {"copied_3grams": np.array([_share(*row) for row in zip(predictions, sources, strict=True)])}


def _share(prediction: str, source: str) -> float:
    written, known = _trigrams(prediction), set(_trigrams(source))
    return 100.0 * sum(each in known for each in written) / max(len(written), 1)


def _trigrams(text: str) -> list[Trigram]:
    words = WORD.findall(text.lower().replace("’", "'"))
    return list(zip(words, words[1:], words[2:], strict=False))
