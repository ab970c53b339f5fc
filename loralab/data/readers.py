"""A file of rows -> records, one mapping a row: JSON lines (https://jsonlines.org), a JSON list, CSV (RFC 4180, also with
semicolons or tabs), Parquet.

Each format is one line in `READERS`. Text is UTF-8. Every reader goes through its file row by row, and every mistake is
a `DataError` that names the file and the line. Of a JSON list alone the text is in memory at once.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from loralab.errors import DataError

DELIMITERS = ",;\t"  # of a .csv: that which its header has most of, the comma first
A_LINE = "Each line must be one JSON object, {column: value, ...}."
A_LIST = "A .json is a list of objects, [{column: value, ...}, ...], or one object a line."
BLANK, DECODER = re.compile(r"\s*"), json.JSONDecoder()
LONGEST_NAME = 100  # characters of a column's name: what is longer is a row in a header's place
PARQUET_ROWS = 1000  # decoded at once: a row group may be the whole file


class Record(NamedTuple):
    """One row as it stands in the file: its 1-based number, its place for an error message, its cells."""

    row: int
    """The line of a .jsonl, the record of a .csv, the row of a .json or .parquet."""
    where: str
    cells: Mapping[str, object]


def jsonl_records(path: Path, expected: str = A_LINE) -> Iterator[Record]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        cells, _ = _object(line, _after_blanks(line, 0), where, expected, alone=True)
        yield Record(number, where, cells)


def json_records(path: Path) -> Iterator[Record]:
    """The objects of a list; or of the lines, as in many a file of this name."""
    text = "".join(line for _, line in numbered_lines(path))
    at = _after_blanks(text, 0)
    if text[at : at + 1] != "[":
        yield from jsonl_records(path, A_LIST)
        return
    line, number = 1 + text.count("\n", 0, at), 0
    while text[at : at + 1] != "]":  # at the list's bracket, or at a comma
        begin = _after_blanks(text, at + 1)
        line += text.count("\n", at, begin)
        if not number and text[begin : begin + 1] == "]":
            at = begin
            break
        number, where = number + 1, f"{path}, line {line}"
        cells, end = _object(text, begin, where, A_LIST, alone=False)
        yield Record(number, where, cells)
        at = _after_blanks(text, end)
        line += text.count("\n", begin, at)
        if text[at : at + 1] not in ("]", ","):
            got = f"{text[at : at + 20]!r}" if text[at:] else "the end of the file"
            raise DataError(f"{path}, line {line}: not JSON: after row {number} stands {got}, and no comma. {A_LIST}")
    if rest := text[at + 1 :].strip():
        raise DataError(f"{path}, line {line}: not JSON: after the list stands {rest!r:.60}. {A_LIST}")


def _object(text: str, at: int, where: str, expected: str, alone: bool) -> tuple[dict[str, object], int]:
    """The JSON object that begins there, and where it ends; alone: with which the text ends."""
    got = text[at : at + 100].strip()
    try:
        cells, end = DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}): {got!r:.60}. {expected}") from error
    if alone and (rest := text[end:].strip()):
        raise DataError(f"{where}: not JSON: after what is whole stands {rest!r:.60}. {expected}")
    if not isinstance(cells, dict):
        raise DataError(f"{where}: a JSON {type(cells).__name__}, {got!r:.60}. {expected}")
    return cells, end


def _after_blanks(text: str, at: int) -> int:
    blank = BLANK.match(text, at)
    assert blank is not None, "no blank is one too"
    return blank.end()


def csv_records(path: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a document of more than 131,072 characters
    lines = (line for _, line in numbered_lines(path))
    first = next(lines, "")
    # strict: else a quote left open swallows the rest of the file in silence
    delimiter = "\t" if suffix_of(path).startswith(".tsv") else max(DELIMITERS, key=first.count)
    rows = csv.reader(chain([first], lines), strict=True, delimiter=delimiter)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}, line 1: a column's name stands there twice: {', '.join(header)}. Rename one.")
        if long := [name for name in header if len(name) > LONGEST_NAME]:
            raise DataError(
                f"{path}, line 1: {long[0]!r:.60} is no column's name but a cell. "
                "Begin the file with a line of names, such as source,target."
            )
        for number, cells in enumerate((row for row in rows if row), start=1):
            where = f"{path}, line {rows.line_num}"
            if len(cells) != len(header):
                expected = f"{len(header)} columns ({', '.join(header)})"
                raise DataError(f"{where}: {len(cells)} cells, where the header names {expected}.")
            yield Record(number, where, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        advice = "A cell with commas, quotes or line ends stands in double quotes."
        raise DataError(f"{path}, line {rows.line_num}: not CSV ({error}). {advice}") from error


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(1-based number, line with its line end), decoded one by one so that an error can name the line."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        got = f"not UTF-8 ({error.reason} at byte {error.start})"
        raise DataError(f"{path}, line {number}: {got}. Save the file as UTF-8.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        got = f"the compressed file is truncated or damaged ({error})"
        raise DataError(f"{path}, after line {number}: {got}. Fetch or write it again.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def parquet_records(path: Path) -> Iterator[Record]:
    """Rows of the row groups, a thousand at a time; cells as Python has them (text, list, None)."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(PARQUET_ROWS, use_threads=False):
                for cells in batch.to_pylist():
                    number += 1
                    yield Record(number, f"{path}, row {number}", cells)
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file.") from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}, after row {number}: not Parquet, or damaged ({reason}). Write it again.") from error


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": jsonl_records,
    ".jsonl.gz": jsonl_records,
    ".json": json_records,
    ".json.gz": json_records,
    ".csv": csv_records,
    ".csv.gz": csv_records,
    ".tsv": csv_records,
    ".tsv.gz": csv_records,
    ".parquet": parquet_records,
}


def suffix_of(path: Path) -> str:
    """`.jsonl.gz` of `TRAIN.JSONL.GZ`: the last suffix, with the one before it where the last is a compression, in small letters."""
    last = path.suffix.lower()
    return "".join(path.suffixes[-2:]).lower() if last == ".gz" else last


def stem_of(path: Path) -> str:
    """The file's name without that suffix."""
    return path.name[: len(path.name) - len(suffix_of(path))]
