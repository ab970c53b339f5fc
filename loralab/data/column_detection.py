"""Detects the source and target columns of a user's data, by their names or else by their contents.

Names that the field knows (`SOURCES`, `TARGETS`) decide, whole or as a word of a longer name. What they leave open is
measured: ids, numbers, dates, columns that are mostly blank or nearly always the same are ruled out; of two columns
of text the longer one is read and the shorter written; beside a single text, a few values that come again are its
labels. Anything else is not clear, which is an error that lists the columns.
"""

from __future__ import annotations

import re
import shlex
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from loralab.console.tables import WIDTH
from loralab.data.readers import Record
from loralab.errors import DataError, nearest

SOURCES = {
    "article", "body", "content", "context", "conversation", "dialog", "dialogue", "document", "input", "instruction",
    "passage", "prompt", "question", "report", "review", "source", "text", "transcript",
}  # fmt: skip
TARGETS = {
    "answer", "completion", "headline", "highlights", "label", "output", "reply", "response", "summary", "target", "title", "tldr",
    "translation",
}  # fmt: skip
OTHERS = {
    "author", "date", "email", "id", "idx", "index", "lang", "language", "link", "split", "time", "topic", "url", "user", "username",
}  # fmt: skip
KNOWN = {"source": SOURCES, "target": TARGETS}
TRAINABLE = ("text", "labels", "numbers", "dates", "ids or addresses")  # where a whole name says so

NUMBER = re.compile(r"\s*[-+]?[\d.,]*\d\s*%?\s*")
DATE = re.compile(r"\s*\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T\s]+\d{1,2}:\d{2}.*)?\s*")
CODE = re.compile(r"(?=\S*\d)[!-~]+|https?://\S+")  # an id, an address
LONGEST_CODE = 200  # characters
MOST = 0.95  # of the filled cells: what they look like is what the column is
ALWAYS = 0.98  # of them: the same value, from which nothing is learnt
HALF = 0.5  # of the rows: a column that is filled in fewer is mostly blank
FEW_VALUES = 100  # that come again, each in twenty rows or more: labels
CLEARLY_LONGER = 1.5  # times, on average
AS_GIVEN = "as you say"
CLASSIFIER = "minilm-imdb"  # the recipe of one that takes any labels
SHOWN = 50  # characters of an example


@dataclass
class DetectedColumn:
    """Statistics of one column."""

    name: str
    filled: int = 0
    lists: int = 0
    chats: int = 0
    """Cells that are lists of {role, content}."""
    numbers: int = 0
    """Cells that are whole numbers or truth values."""
    odd: str = ""
    """A cell that is neither text, nor a list of texts, nor blank."""
    example: str = ""
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    """Bytes of each filled cell."""
    values: Counter[str] = field(default_factory=Counter)
    """Count of each of the first hundred different values."""
    shapes: Counter[str] = field(default_factory=Counter)
    """Cells that look like a number, a date, a code."""

    def see(self, record: Record) -> None:
        """Takes in the cell of one row."""
        cell = record.cells.get(self.name)
        parts: list[Any] = [part for part in (cell if isinstance(cell, list) else [cell]) if part is not None]
        texts = [part for part in parts if isinstance(part, str)]
        self.numbers += isinstance(cell, int)
        if parts and all(isinstance(part, Mapping) and {"role", "content"} <= part.keys() for part in parts):
            self.chats += 1
            texts = [str(parts[-1]["content"])]
        elif len(texts) < len(parts):
            self.odd = self.odd or f"{cell!r:.30} ({type(cell).__name__}) in row {record.row}"
            texts = [str(cell)]
        text = next((text for text in texts if text.strip()), "")
        if not text:
            return
        self.filled += 1
        self.lists += isinstance(cell, list)
        self.example = self.example or " ".join(text.split())[:SHOWN]
        self.lengths.append(len(text.encode(errors="replace")))
        if text in self.values or len(self.values) <= FEW_VALUES:
            self.values[text] += 1
        self.shapes[shape(text)] += 1

    @property
    def mean_length(self) -> float:
        """Bytes of a filled cell, on average."""
        return float(np.mean(self.lengths)) if self.lengths else 0.0

    @property
    def coded(self) -> bool:
        """Tells whether it is made of whole numbers or truth values that come again, as labels for a classifier are."""
        return 0 < self.numbers == self.filled and 1 < len(self.values) <= min(FEW_VALUES, self.filled / 2)

    def kind(self, rows: int) -> str:
        """ "text", "labels" (some values that come again), "a chat", or why the column is neither, in words."""
        if self.filled < HALF * rows:
            return "blank in most rows"
        if self.chats == self.filled:
            return "a chat"
        if self.odd or self.chats:
            return f"no text: {self.odd}"
        if self.filled > 1 and max(self.values.values()) >= ALWAYS * self.filled:
            return f"nearly always {self.values.most_common(1)[0][0]!r:.30}"
        found = next((what for what, count in self.shapes.items() if what and count >= MOST * self.filled), "")
        if found:
            return found
        return "labels" if len(self.values) <= min(FEW_VALUES, self.filled / 20) else "text"


def shape(text: str) -> str:
    """ "numbers", "dates", "ids or addresses", or "" for anything else."""
    if len(text) > LONGEST_CODE:
        return ""
    known = (("dates", DATE), ("numbers", NUMBER), ("ids or addresses", CODE))
    return next((what for what, pattern in known if pattern.fullmatch(text)), "")


class Table(NamedTuple):
    """The columns of some rows, in the order of their first appearance, and how many rows there are."""

    title: str
    rows: int
    columns: Mapping[str, DetectedColumn]

    def kind(self, name: str) -> str:
        """Returns that of `DetectedColumn`."""
        return self.columns[name].kind(self.rows)

    def in_words(self) -> list[str]:
        """One line a column: what it is, with an example."""
        width = max((len(name) for name in self.columns), default=0)
        lines = [f"  {name:<{width}}  {self._described(name)}" for name in self.columns]
        return [line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines]

    def _described(self, name: str) -> str:
        column, kind = self.columns[name], self.kind(name)
        what = f"text, {column.mean_length:,.0f} bytes on average" if kind == "text" else kind
        if kind == "labels":
            what = f"{len(column.values)} values that come again"
        return f"{what}, such as {column.example!r}" if column.example and not column.odd else what


class Choice(NamedTuple):
    """A column, and why it is this one."""

    column: str | None
    reason: str


Choices = dict[str, Choice]
"""The choice for "source" and "target", or for "messages": keys of a recipe's `data`."""


def look_at(title: str, records: Iterable[Record]) -> Table:
    """Goes through all rows once. Raises `DataError` where there are none."""
    columns: dict[str, DetectedColumn] = {}
    rows = 0
    for record in records:
        rows += 1
        for name in record.cells:
            columns.setdefault(name, DetectedColumn(name)).see(record)
    if not rows:
        raise DataError(f"{title} has no rows.")
    return Table(title, rows, columns)


def choose(table: Table, given: Mapping[str, str | None], command: str) -> Choices:
    """The source and the target column, or the only column of chats.

    Args:
        given: "source", "target" -> the column that the user has named (None: there is none).
        command: what the user types, to which columns can be added.

    Raises:
        DataError: a given column is not there, or it is not clear which ones are meant.
    """
    for name in given.values():
        if name is not None and name not in table.columns:
            raise DataError(f"{table.title}: there is no column {name!r}. {nearest(name, table.columns)}")
    target = given.get("target")
    if target is not None and table.columns[target].coded:
        raise DataError(f"{table.title}: {for_classifier(target)}")
    chats = [name for name in table.columns if table.kind(name) == "a chat"]
    if len(chats) == 1 and not given:
        return {"messages": Choice(chats[0], "the only chat")}
    choices = {role: Choice(name, AS_GIVEN) for role, name in given.items()}
    for role in KNOWN.keys() - given.keys():
        named = [name for name in by_name(table, role) if name not in given.values()]
        if len(named) > 1:
            raise unclear(table, f"each of {', '.join(map(repr, named))} may be the {role}", command)
        if named:
            choices[role] = Choice(named[0], "by its name")
    if len(choices) < len(KNOWN):
        choices |= by_measure(table, choices, command)
    return choices


def by_name(table: Table, role: str) -> list[str]:
    """The columns whose whole name is known for this role; where there is none, those of which a word is."""
    usable = [name for name in table.columns if role == "target" or not table.columns[name].lists]
    exact = [name for name in usable if name.strip().casefold() in KNOWN[role] and table.kind(name) in TRAINABLE]
    if exact:
        return exact
    others = TARGETS if role == "source" else set()  # a summary_text is a summary
    return [
        name
        for name in usable
        if words_of(name) & KNOWN[role] and not words_of(name) & others and table.kind(name) in ("text", "labels")
    ]


def by_measure(table: Table, chosen: Choices, command: str) -> Choices:
    """Returns what names have left open, by what stands in the other columns; raises `DataError` where that is not clear."""
    taken = [choice.column for choice in chosen.values()]
    pool = [name for name in table.columns if name not in taken and not words_of(name) & OTHERS]
    texts = [name for name in pool if table.kind(name) == "text" and not table.columns[name].lists]
    labels = [name for name in pool if table.kind(name) == "labels"]
    if len(chosen) == 1:
        role = "source" if "target" in chosen else "target"
        some = texts or (labels if role == "target" else [])
        if len(some) != 1:
            raise unclear(table, f"{len(some) or 'no'} columns may be the {role}", command)
        return {role: Choice(some[0], "the only other text" if texts else "its values come again")}
    if len(texts) == 1 and len(labels) == 1:
        return {"source": Choice(texts[0], "the only text"), "target": Choice(labels[0], "its values come again")}
    if len(texts) != 2:
        raise unclear(table, f"{len(texts) or 'no'} column{'s'[len(texts) == 1 :]} of text", command)
    short, long = sorted(texts, key=lambda name: table.columns[name].mean_length)
    if table.columns[long].mean_length < CLEARLY_LONGER * table.columns[short].mean_length:
        raise unclear(table, f"{short!r} and {long!r} are about equally long", command)
    return {"source": Choice(long, "the longer text"), "target": Choice(short, "the shorter text")}


def words_of(name: str) -> set[str]:
    """The words of a column's name: of `articleText_2`, article, text and 2."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return set(re.split(r"[\W_]+", apart.casefold()))


def unclear(table: Table, why: str, command: str) -> DataError:
    """The error that lists the columns and says what to type."""
    lines = "\n".join(table.in_words())
    texts = [name for name, column in table.columns.items() if not column.odd]
    labels = next((name for name, column in table.columns.items() if column.coded and name not in OTHERS), None)
    advice = []
    if labels is None or len(texts) > 1:
        advice.append(f"Say it, with two of these names:\n  {command} data.source=COLUMN data.target=COLUMN")
    if labels is not None:
        advice.append(for_classifier(labels))
    return DataError(
        f"{table.title}: it is not clear which column is read and which is written: {why}. There are:\n{lines}\n"
        + "\n".join(advice)
    )


def for_classifier(column: str) -> str:
    """Returns what to do with a column of labels that are no text."""
    return (
        f"{column!r} holds no text to write, but values that come again, as labels do. To learn these name a recipe of a classifier, "
        f"such as {CLASSIFIER}, and add:\n  data.source=COLUMN {shlex.quote(f'data.label={column}')}"
    )
