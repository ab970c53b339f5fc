"""Two summaries that need no model. Every summarization table shows them: a score below them is no success.

`lead` copies the start of the source (lead-3 in See, Liu and Manning, "Get To The Point", ACL 2017,
https://aclanthology.org/P17-1099). `constant` gives one text to every row, the training summary closest to all others:
the typical wording and length of a summary, which say nothing about the source.

On DialogSum's 500 validation dialogues (speakers' tags left in), ROUGE-1 and ROUGE-2 are 28.15 and 7.52 for the lead,
27.75 and 2.70 for the constant.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loralab.errors import DataError

FLOOR_NAMES = {"lead": "first two lines", "constant": "one sentence"}  # as tables name them
TIE = 1e-10  # means nearer than this differ by rounding alone

Ints = NDArray[np.int64]


def lead(source: str, turns: int = 2) -> str:
    """The first non-empty lines, joined by a space: of a dialogue its first turns, speakers' tags and all.

    Where the text has a single line: its first sentences. A sentence ends at a . ! or ? that stands before a space, so
    "Mr. Smith" counts as two. A text with fewer turns is given whole, an empty one as "".
    """
    assert turns > 0
    units = [line.strip() for line in re.split(r"[\r\n]+", source) if line.strip()]
    if len(units) == 1:
        units = re.split(r"(?<=[.!?])\s+", units[0])
    return " ".join(units[:turns])


def constant(targets: Sequence[str]) -> str:
    """The target closest to all others: of the highest mean ROUGE-1 F over all other targets, the first of equals.

    Tokens are those of `rouge_score` with stemming. Exact. Raises DataError where there are no targets.

    Two texts of a and b tokens that share s have F = 2s / (a + b), and s counts the features they have in common, where
    the feature (token, k) says that a text has the token at least k times. So each feature of a candidate of a tokens
    adds 2 / (a + b) for every text of b tokens that has it too, and all it takes to know is how many texts of each
    length have each feature. Time grows with tokens times distinct lengths, never with pairs of texts.
    """
    if len(targets) == 0:
        raise DataError("There are no training targets to choose the constant floor from. Expected at least one.")
    rows, features = _features(targets)
    lengths = np.bincount(rows, minlength=len(targets))
    longest = int(lengths.max())
    holders, counts = np.unique(features * (longest + 1) + lengths[rows], return_counts=True)
    held, held_length = np.divmod(holders, longest + 1)  # counts[i] texts of held_length[i] tokens have feature held[i]

    total = np.zeros(len(targets))
    for length in np.unique(lengths[rows]):
        worth = np.bincount(held, weights=counts * 2 / (length + held_length))
        own = lengths[rows] == length
        total += np.bincount(rows[own], weights=worth[features[own]], minlength=len(targets))
    mean = (total - (lengths > 0)) / max(1, len(targets) - 1)  # a text with tokens has F = 1 with itself
    return targets[int(np.argmax(mean >= mean.max() - TIE))]


def _features(texts: Sequence[str]) -> tuple[Ints, Ints]:
    """(row, feature) of each token of each text, where a feature is a number for (token, how often so far)."""
    from rouge_score.tokenize import tokenize  # type: ignore[import-untyped]
    from rouge_score.tokenizers import DefaultTokenizer  # type: ignore[import-untyped]

    stem = functools.cache(DefaultTokenizer(use_stemmer=True).tokenize)  # stemming is nearly all of the time
    number: dict[tuple[str, int], int] = {}
    rows, features = [], []
    for row, text in enumerate(texts):
        seen: Counter[str] = Counter()
        for token in itertools.chain.from_iterable(map(stem, tokenize(text, stemmer=None))):
            seen[token] += 1
            rows.append(row)
            features.append(number.setdefault((token, seen[token]), len(number)))
    return np.array(rows, dtype=np.int64), np.array(features, dtype=np.int64)
