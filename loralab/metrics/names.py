"""Names that a prediction made up: the share of its names that its source lacks, in percent.

A rule for English, without a model. A name is a speaker's tag such as #Person1#, or a word with a capital first letter
that does not begin a sentence: Ann, Monday, TV. The first word of a sentence may be any word and is left out, as are
"I" with its short forms and titles (Mr., Dr.). A sentence ends at . ! or ? before a space (not behind a title), with the
line, and where a quotation opens. Each name of a prediction counts once, without a possessive 's; the source has it
where the same word stands anywhere in it, in capitals or not. A prediction without names has made up none: 0.

Fewer is better, other things being equal; yet a text that says nothing has none either, so read it beside a score.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence

import numpy as np

from loralab.metrics.metric import Column, Floats, check_rows

ID = "share of the prediction's names (tags, capitals within sentences) that the source lacks, percent, mean of rows"
COLUMNS: tuple[Column, ...] = (Column("new_names", "new names", better="lower"),)
NEEDS_SOURCES = True

WORD = re.compile(r"#\w+#|\w+(?:['-]\w+)*")
TITLE = re.compile(r"\b(Mr|Mrs|Ms|Dr|Prof|St)\b\.?")
NEW_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s|\n|\s\"")


def version() -> str:
    """Counted here: the rule is that of this version of loralab."""
    return importlib.metadata.version("loralab")


def score(
    predictions: Sequence[str], references: Sequence[Sequence[str]], sources: Sequence[str] | None = None
) -> dict[str, Floats]:
    """The share of each row, shape (rows,), in percent. Raises DataError as `check_rows` does."""
    check_rows("The share of new names", predictions, references, sources, needs_sources=True)
    assert sources is not None
    return {"new_names": np.array([_share(*row) for row in zip(predictions, sources, strict=True)])}


def _share(prediction: str, source: str) -> float:
    written = names_of(prediction)
    words = {word.lower() for word in _words(source)}
    known = words | {part for word in words for part in word.split("-")}
    return 100.0 * len(written - known) / max(len(written), 1)


def names_of(text: str) -> set[str]:
    """The names of a text by the rule above, in lower case."""
    names = set()
    for sentence in NEW_SENTENCE.split(TITLE.sub(r"\1", text)):
        for place, word in enumerate(_words(sentence)):
            capital = place > 0 and word[0].isupper() and word.split("'")[0] != "I" and not TITLE.fullmatch(word)
            if capital or word.startswith("#"):
                names.add(word.lower())
    return names


def _words(text: str) -> list[str]:
    return [word.removesuffix("'s") for word in WORD.findall(text.replace("’", "'"))]
