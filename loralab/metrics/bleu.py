"""Sentence BLEU, computed by the `sacrebleu` library: how many words, and runs of up to four words, are shared.

The rule, in full: case kept, tokens as mteval-v13a makes them; the geometric mean of the precisions of 1- to 4-grams,
of a shorter prediction those orders that it has; an order without a match is smoothed (exponentially, the library's
default); the brevity penalty by the reference nearest in length; n-grams clipped by the reference that has most of
them. In percent. A prediction without a single shared word scores 0.

The mean of the rows' BLEU is NOT the corpus BLEU of papers, which counts the n-grams of all rows together, once, and is
no mean: never compare the two. Rows are scored by themselves so that intervals and p-values are those of a mean.

Sources: Papineni et al., "BLEU", ACL 2002, https://aclanthology.org/P02-1040; the smoothing is method 3 of Chen and
Cherry, WMT 2014, https://aclanthology.org/W14-3346.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

import numpy as np

from loralab.metrics.metric import Column, Floats, check_rows

ID = "sacrebleu: BLEU of a sentence, mean of rows, case:mixed|eff:yes|tok:13a|smooth:exp"
COLUMNS: tuple[Column, ...] = (Column("bleu", "sent. BLEU", better="higher"),)
NEEDS_SOURCES = False


def version() -> str:
    """The version of the library that computes the scores."""
    return importlib.metadata.version("sacrebleu")


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str] | None = None
) -> dict[str, Floats]:
    """BLEU of each row by the rule above, shape (rows,), in percent. Raises DataError as `check_rows` does."""
    from sacrebleu.metrics.bleu import BLEU

    check_rows("BLEU", predictions, references)
    metric = BLEU(effective_order=True)
    rows = zip(predictions, references, strict=True)
    return {"bleu": np.array([metric.sentence_score(prediction, list(texts)).score for prediction, texts in rows])}
