"""The columns of a data set, and how their cells become the texts of a row: a source, and one or more references.

    TextColumns    source and target; a target is one text or a list of equally good ones; without a source, plain texts
    DocumentColumn the source alone, of which an objective makes targets
    ChatColumn     a list of {role, content}: the last message is the target, those before it are the source, as JSON
    LabelColumns   source and label, or source, a second text, and label

Cells are cleaned on the way: Windows line ends become LF, `<br />` stays or becomes a line end. A number where a text is
needed, or half a surrogate pair, is an error always.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping

from loralab.config.data import DataSettings
from loralab.data.chat_template import split_conversation
from loralab.data.readers import Record
from loralab.data.text_pairs import join_pair
from loralab.errors import DataError, nearest
from loralab.metrics.labels import label_text, number_text

HTML_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


class RowColumns(ABC):
    """The columns of a row, and how they become its texts."""

    labelled = False
    """The target is a label, whose rows are counted."""

    def __init__(self, data: DataSettings) -> None:
        self.data = data

    @property
    def names(self) -> list[str]:
        """The columns that every row needs."""
        data = self.data
        every = (data.source, data.text_pair, data.target, data.messages, data.label)
        return [name for name in every if name is not None]

    @property
    def key(self) -> list[str | None]:
        """Part of the key of what is cached of these rows."""
        data = self.data
        more = [each for each in (data.text_pair, data.problem_type) if each is not None]
        return [data.source, data.target, data.messages, data.label, *more]

    @abstractmethod
    def texts(self, record: Record, found: set[str]) -> tuple[str, tuple[str, ...]]:
        """Reads one record.

        Args:
            record: the cells.
            found: what is remarkable about the row is added to it.

        Returns:
            The source, "" where it is blank or there is no such column; and the references that are not blank.
        """

    def complete(self, source: str, targets: tuple[str, ...]) -> bool:
        """Tells whether a row has all texts that it needs."""
        return bool(targets) and bool(source or self.data.source is None)

    def clean(self, value: object, record: Record, column: str, found: set[str]) -> str:
        """Cleans one cell's text as the recipe wants it."""
        return clean(value, record, column, found, self.data.html_breaks)


class TextColumns(RowColumns):
    """A source and its references, or plain texts."""

    def texts(self, record: Record, found: set[str]) -> tuple[str, tuple[str, ...]]:
        source, target = self.data.source, self.data.target
        assert target is not None
        text = "" if source is None else self.clean(record.cells.get(source), record, source, found)
        return text, target_texts(record, target, found, self.data.html_breaks)


class DocumentColumn(RowColumns):
    """Documents, which have no targets."""

    def texts(self, record: Record, found: set[str]) -> tuple[str, tuple[str, ...]]:
        source = self.data.source
        assert source is not None
        return self.clean(record.cells.get(source), record, source, found), ()

    def complete(self, source: str, targets: tuple[str, ...]) -> bool:
        return bool(source)


class ChatColumn(RowColumns):
    """Conversations."""

    def texts(self, record: Record, found: set[str]) -> tuple[str, tuple[str, ...]]:
        column = self.data.messages
        assert column is not None
        messages = record.cells.get(column)
        if messages is None:
            return "", ()
        if isinstance(messages, list):
            messages = [self._message(each, record, column, found) for each in messages]
        source, target = split_conversation(messages, f"{record.where}: column {column!r}")
        return source, (target,)

    def _message(self, value: object, record: Record, column: str, found: set[str]) -> object:
        """Cleans a message; anything else stays as it is, for `split_conversation` to refuse."""
        if not (isinstance(value, Mapping) and isinstance(value.get("content"), str)):
            return value
        return {**value, "content": self.clean(value["content"], record, column, found)}


class LabelColumns(RowColumns):
    """A text, or a pair of texts, and its label or number."""

    labelled = True

    def texts(self, record: Record, found: set[str]) -> tuple[str, tuple[str, ...]]:
        column = self.data.label
        assert column is not None
        read = number_text if self.data.problem_type else label_text
        label = read(record.cells.get(column), record.where, column)
        texts = [
            self.clean(record.cells.get(name), record, name, found)
            for name in (self.data.source, self.data.text_pair)
            if name is not None
        ]
        source = texts[0] if len(texts) == 1 else join_pair(*texts) if all(texts) else ""
        return source, (label,) if label else ()


COLUMNS: Mapping[str, type[RowColumns]] = {
    "seq2seq": TextColumns,
    "language_modeling": TextColumns,
    "denoising": DocumentColumn,
    "chat": ChatColumn,
    "classification": LabelColumns,
    "regression": LabelColumns,
}


def row_columns(data: DataSettings) -> RowColumns:
    """The columns of the recipe's task."""
    return COLUMNS[data.task](data)


def with_columns(records: Iterable[Record], columns: RowColumns, uneven: bool) -> Iterator[Record]:
    """Passes records on if they have the columns.

    Args:
        uneven: records may lack columns, as lines of JSON may; a column that none of them has is an error then, at the end.

    Raises:
        DataError: a column is not there.
    """
    needed, known = {*columns.names}, dict[str, object]()
    first: Record | None = None
    for record in records:
        first = first or record
        if needed - known.keys():
            known.update(record.cells)
            if not uneven:
                check_columns(record, *columns.names)
        yield record
    if first is not None:
        check_columns(first._replace(cells=known), *columns.names)


def check_columns(record: Record, *columns: str) -> None:
    """Raises `DataError` where the record lacks one of the columns."""
    missing = [column for column in columns if column not in record.cells]
    if missing:
        got = " and ".join(f"no column {column!r} ({nearest(column, record.cells)})" for column in missing)
        raise DataError(f"{record.where}: {got}. Its columns are: {', '.join(record.cells)}.")


def source_text(record: Record, column: str) -> str:
    """Returns a cell's text."""
    return clean(record.cells.get(column), record, column, set())


def target_texts(
    record: Record, column: str, found: set[str] | None = None, html_breaks: str = "keep"
) -> tuple[str, ...]:
    """Returns the references of a row without the blank ones; none where all are blank."""
    value, found = record.cells.get(column), set() if found is None else found
    values = value if isinstance(value, list) else [value]
    return tuple(text for each in values if (text := clean(each, record, column, found, html_breaks)))


def clean(value: object, record: Record, column: str, found: set[str], html_breaks: str = "keep") -> str:
    """Returns the cell's text with LF line ends; "" for a blank cell, and for a null, which the hub's CSV reader makes of one.

    Raises:
        DataError: the cell holds something else than text, or half of a surrogate pair.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        got = f"{value!r:.60} ({type(value).__name__})"
        raise DataError(f"{record.where}: column {column!r} holds {got}, where text is needed.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which no tokenizer takes
        raise DataError(f"{record.where}: column {column!r} is not Unicode text ({error}). Mend the row.") from error
    if "\r\n" in value:
        found.add("crlf")
        value = value.replace("\r\n", "\n")
    if "<" in value and HTML_BREAK.search(value):
        found.add("html_breaks")
        if html_breaks == "newline":
            value = HTML_BREAK.sub("\n", value)
    return value if value.strip() else ""
