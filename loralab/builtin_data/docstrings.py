"""`embedded:docstrings`: the source of a function or class → the first line of its docstring, from Python's standard library.

    source                                                       target
    def f(x): ...   (its docstring removed, dedented)            the docstring's first line
    what follows that line in the docstring                      the same line

A first line is used where it is a summary: the only line of its paragraph (PEP 257), of 4 to 30 words, mostly letters,
and not a signature. Sources are cut after 60 lines. Rows are dropped whose source stood there before, or whose target
stood there twice before ("Return self."); training rows too whose source or target a held-out row has. Every module is
in one split with all of its rows (stdlib.py). Columns: source, target, kind, module, name.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from loralab.builtin_data.definitions import Definition, definitions, syntax_of
from loralab.builtin_data.stdlib import SPLITS, source_files, split_of

WORDS = (4, 30)  # the fewest and the most of a target
LETTERS = 0.75  # of a target's characters at least so many are letters or spaces
LONGEST_SOURCE = 60  # lines
SHORTEST_BODY = 8  # words of a docstring's rest that is a source of its own
REPEATS = 2  # rows of a split with the same target
CALL = re.compile(r"(?:\w+\.)*(\w+)\s*\(")  # a signature's beginning
LICENCE = (
    "PSF-2.0, and the permissive licences of software within the standard library (https://docs.python.org/3/license.html); "
    "read from the installed Python, not shipped"
)

Row = dict[str, str]


@functools.cache
def rows(split: str) -> tuple[Row, ...]:
    """The rows of a split, by module, then in the order of the files."""
    return tuple(_by_split()[split])


def card() -> dict[str, Any]:
    """Counts by split and kind, and what they were made from."""
    splits = {split: rows(split) for split in SPLITS}
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "licence": LICENCE,
        "rows": {split: len(held) for split, held in splits.items()},
        "modules": {split: len({row["module"] for row in held}) for split, held in splits.items()},
        "kinds": {split: dict(sorted(Counter(row["kind"] for row in held).items())) for split, held in splits.items()},
    }


@functools.cache
def _by_split() -> dict[str, list[Row]]:
    pairs: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for module, path in source_files():
        pairs[split_of(module)] += pairs_of(path.read_bytes(), module)
    kept: dict[str, list[Row]] = {}
    taken: set[str] = set()
    for split in reversed(SPLITS):  # what two splits share stays with the one that is held out
        kept[split] = list(_without_repeats(pairs[split], taken))
        taken |= {normal(row[column]) for row in kept[split] for column in ("source", "target")}
    return kept


def _without_repeats(pairs: Iterable[Row], taken: set[str]) -> Iterator[Row]:
    sources: set[str] = set()
    targets: Counter[str] = Counter()
    for row in pairs:
        source, target = normal(row["source"]), normal(row["target"])
        if source in sources or targets[target] == REPEATS or taken & {source, target}:
            continue
        sources.add(source)
        targets[target] += 1
        yield row


def normal(text: str) -> str:
    """A text for comparing: case, white space and closing marks do not count."""
    return " ".join(text.split()).lower().rstrip(".!: ")


# One file


def pairs_of(source: bytes, module: str) -> Iterator[Row]:
    """The rows of one file; none where it is not this Python's syntax."""
    if (tree := syntax_of(source)) is None:
        return
    lines = source.decode("utf-8", "replace").splitlines()
    for node in definitions(tree):
        if docstring := ast.get_docstring(node):
            first, _, rest = docstring.partition("\n")
            if is_summary(first, rest, node.name):
                yield from _rows(node, lines, first.strip(), rest, module)


def _rows(node: Definition, lines: list[str], target: str, rest: str, module: str) -> Iterator[Row]:
    row = {"target": target, "module": module, "name": node.name}
    kind = "class" if isinstance(node, ast.ClassDef) else "function"
    if source := source_without_docstring(node, lines):
        yield {"source": source, "kind": kind, **row}
    body = textwrap.dedent(rest).strip()
    if len(body.split()) >= SHORTEST_BODY:
        yield {"source": cut(body), "kind": "docstring", **row}


def is_summary(first: str, rest: str, name: str) -> bool:
    """Tells whether a docstring's first line says in a sentence what the thing is."""
    first, goes_on = first.strip(), rest.partition("\n")[0].strip()
    letters = sum(c.isalpha() or c == " " for c in first)
    return (
        not goes_on
        and WORDS[0] <= len(first.split()) <= WORDS[1]
        and letters >= LETTERS * len(first)
        and not ((call := CALL.match(first)) and call[1] == name)
        and "->" not in first
    )


def source_without_docstring(node: Definition, lines: list[str]) -> str:
    """The definition's lines, dedented and cut, without decorators and docstring; "" where others share the docstring's lines."""
    docstring = node.body[0]
    start, end = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
    alone = not lines[start][: docstring.col_offset].strip() and start >= node.lineno
    if not alone or (len(node.body) > 1 and node.body[1].lineno <= end):
        return ""
    kept = lines[node.lineno - 1 : start] + lines[end : node.end_lineno]
    indent = node.col_offset  # a string of several lines may stand further left
    dedented = [line[indent:] if not line[:indent].strip() else line for line in kept if line.strip()]
    return cut("\n".join(dedented))


def cut(text: str) -> str:
    """The first lines."""
    return "\n".join(text.splitlines()[:LONGEST_SOURCE])
