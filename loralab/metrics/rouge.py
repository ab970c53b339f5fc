"""ROUGE for summaries, computed by the `rouge_score` library.

The rule, in full: the F-measure in percent; lower-cased tokens of a-z and 0-9, those of more than three characters cut
to their Porter stem; no stop words removed. Of several references, each metric takes the one with the best F
(`score_multi`). rougeLsum splits a text into sentences at newlines only, exactly as `rouge_score` and the `evaluate`
library do, so it equals rougeL where both texts have a single line. A text without tokens scores 0.

Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, https://aclanthology.org/W04-1013
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import numpy as np

from loralab.metrics.metric import Column, Floats, check_rows

ID = "rouge_score: F, Porter stems, best of several references, sentences by newline"
NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
COLUMNS: tuple[Column, ...] = tuple(Column(name, name.replace("rouge", "ROUGE-"), better="higher") for name in NAMES)
NEEDS_SOURCES = False


def version() -> str:
    """The version of the library that computes the scores."""
    return importlib.metadata.version("rouge_score")


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str] | None = None
) -> dict[str, Floats]:
    """ROUGE of each row by the rule above: for each of `NAMES` an array of shape (rows,), in percent (0-100).

    `references` has one list of texts for each prediction. Raises DataError where there are no rows, where the two
    differ in length, or where a row has no reference.
    """
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    check_rows("ROUGE", predictions, references)
    scorer = RougeScorer(NAMES, use_stemmer=True)
    rows = [scorer.score_multi(texts, prediction) for prediction, texts in zip(predictions, references, strict=True)]
    return {name: np.array([100.0 * row[name].fmeasure for row in rows]) for name in NAMES}
