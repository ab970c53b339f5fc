"""`embedded:documentation`: prose to train a small language model on, what people have written about their code.

Of each text of `embedded:code` (corpus.py) that is Python the docstrings, in the order of the file, dedented, a blank line
between them; a text that is not, a package's description or a .md or .rst file, as it is. So splits, packages and their
licences are those of `embedded:code`: validation and test are the standard library's. Texts of less than 200 characters are
left out, and those most of whose lines stood there before. Columns: text, origin, version, licence.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

from loralab.builtin_data import corpus
from loralab.builtin_data.corpus import Row
from loralab.builtin_data.definitions import definitions, syntax_of

SHORTEST = 200  # characters
BETWEEN = "\n\n"  # docstrings


@functools.cache
def rows(split: str) -> tuple[Row, ...]:
    """The texts of a split, in the order of `embedded:code`."""
    texts = [row | {"text": prose} for row in corpus.rows(split) if len(prose := prose_of(row["text"])) >= SHORTEST]
    return tuple(corpus.new_texts(texts) if split == "train" else texts)


def card() -> dict[str, Any]:
    """Counts by split, and the packages with their versions, licences and sizes."""
    return corpus.corpus_card(rows)


def prose_of(text: str) -> str:
    """The docstrings of Python's source; any other text itself."""
    if (tree := syntax_of(text)) is None:
        return text
    nodes = [tree, *sorted(definitions(tree), key=lambda node: node.lineno)]
    return BETWEEN.join(docstring for node in nodes if (docstring := ast.get_docstring(node)))
