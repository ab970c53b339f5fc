"""Texts to answer: a file with a source column, a file of lines, or stdin; and the same rows with their answers."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loralab.data.chat_template import request_of
from loralab.data.columns import check_columns, source_text
from loralab.data.readers import READERS, Record, numbered_lines, suffix_of
from loralab.data.text_pairs import join_pair
from loralab.errors import DataError, nearest

PREDICTION = "prediction"
OUT_FORMATS = (".jsonl", ".csv")


@dataclass(frozen=True)
class InputTexts:
    """Rows as they stand in a file, and the text of each; "" where a row has none."""

    rows: Sequence[Mapping[str, object]]
    texts: Sequence[str]

    def table(self, predictions: Sequence[str], suffix: str) -> str:
        """The rows with one more column, in the format of this suffix."""
        rows = [{**row, PREDICTION: text} for row, text in zip(self.rows, predictions, strict=True)]
        if suffix == ".jsonl":
            return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
        return file.getvalue()


def _text_of(record: Record, column: str, chat: bool, pair: str | None) -> str:
    """Returns the text of the column; a conversation stays one, as JSON, and so do two texts; "" where one is blank."""
    value = record.cells[column]
    if pair is not None:
        both = source_text(record, column), source_text(record, pair)
        return join_pair(*both) if all(both) else ""
    if chat and isinstance(value, list):
        return request_of(value, f"{record.where}: column {column!r}")
    return source_text(record, column)


def _cell(value: object) -> object:
    """A list or a mapping goes into a CSV as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def read_texts(place: str, column: str, chat: bool = False, pair: str | None = None) -> InputTexts:
    """The rows of a file: of a .jsonl, .csv or another of READERS with its `column`; of a .txt, or of stdin for `-`, one a line.

    With `chat` the column holds conversations, or a user's message each. With a second column `pair` a row's text is both texts,
    as `join_pair` makes it.

    Raises:
        DataError: the file cannot be read, lacks the column, has a column `prediction` already, or holds no text at all.
    """
    path = Path(place)
    suffix = "" if place == "-" else suffix_of(path)
    if suffix in READERS:
        records = list(READERS[suffix](path))
        for record in records:
            check_columns(record, column, *([] if pair is None else [pair]))
            if PREDICTION in record.cells:
                raise DataError(f"{record.where}: there is a column {PREDICTION!r} already. Rename or remove it.")
        texts = InputTexts(
            [record.cells for record in records], [_text_of(record, column, chat, pair) for record in records]
        )
    elif pair is not None:
        raise DataError(f"{place}: a file of rows is needed, with the columns {column!r} and {pair!r}.")
    elif suffix == ".txt" or place == "-":
        given = io.StringIO(read_stdin()) if place == "-" else (line for _, line in numbered_lines(path))
        lines = [line.rstrip("\r\n") for line in given]
        texts = InputTexts([{column: line} for line in lines], [line if line.strip() else "" for line in lines])
    else:
        known = [*READERS, ".txt"]
        raise DataError(
            f"{place}: expected a file of rows or texts, or - for stdin, not one that ends in {suffix!r}. {nearest(suffix, known)}"
        )
    if not any(texts.texts):
        raise DataError(
            f"{'stdin' if place == '-' else place}: there is no text to answer in its {len(texts.rows)} rows."
        )
    return texts


def read_stdin() -> str:
    """All that comes in, as text."""
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin is not UTF-8 ({error.reason} at byte {error.start}).") from error
