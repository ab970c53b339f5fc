"""Rows of a data set, from a folder of files or from the Hugging Face hub, checked one by one.

    name, split, columns ──> records (one mapping a row) ──> Example(row, source, targets) ──> Split

A folder holds one file per split, named after it: `train.jsonl`, `validation.jsonl.gz`, `test.csv`. Formats are JSON
lines (https://jsonlines.org) and CSV (RFC 4180), in UTF-8; each is one line in `READERS`, a function from a path to
records. Every mistake in the data is a `DataError` that names the file and the line.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from loralab.errors import DataError, nearest


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its 1-based number (the line of a .jsonl, the record of a .csv), its text, one or more references."""

    row: int
    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """The rows of one split that are used, in the file's order, and the numbers of those passed over as empty."""

    name: str
    split: str
    examples: tuple[Example, ...]
    skipped_empty: tuple[int, ...]
    content_hash: str  # sha256 of the texts used, in hexadecimal: one for a file and for its copy on the hub

    def __len__(self) -> int:
        return len(self.examples)


class Record(NamedTuple):
    """One row as it stands in the file; `where` is the place for an error message."""

    row: int
    where: str
    cells: Mapping[str, object]


def read_split(name: str, split: str, source: str, target: str, max_rows: int | None = None) -> Split:
    """The rows of `split` of the folder or hub data set `name`: text in column `source`, text or a list in `target`.

    A row whose source or target is null or blank is passed over and counted. `max_rows` keeps the first so many of the
    others. CRLF becomes LF. Raises `DataError` for whatever else is wrong, and where no row is left.
    """
    assert max_rows is None or max_rows > 0
    place, records = open_split(name, split)
    examples: list[Example] = []
    skipped: list[int] = []
    for record in records:
        check_columns(record, source, target)
        text, targets = source_text(record, source), target_texts(record, target)
        if not text or not targets:
            skipped.append(record.row)
            continue
        examples.append(Example(record.row, text, targets))
        if len(examples) == max_rows:
            break
    if not examples:
        found = f"each of the {len(skipped)} rows has an empty {source!r} or {target!r}" if skipped else "has no rows"
        raise DataError(f"{place}: {found}. At least one row with text in both columns is needed.")
    return Split(name, split, tuple(examples), tuple(skipped), content_hash(examples))


def splits_of(name: str) -> list[str]:
    """The names of the splits that the folder or hub data set `name` has, sorted."""
    folder = local_folder(name)
    return sorted(hub_splits(name) if folder is None else split_files(folder))


def open_split(name: str, split: str) -> tuple[str, Iterator[Record]]:
    """(the file or the hub's split, for messages; its records)."""
    folder = local_folder(name)
    if folder is None:
        place = f"{name}, split {split!r}"
        return place, hub_records(name, split, place)
    files = split_files(folder)
    if split not in files:
        raise DataError(
            f"{folder} has no split {split!r}: no file {split}{{{','.join(READERS)}}}. "
            f"The splits are: {', '.join(sorted(files)) or 'none'}."
        )
    path = files[split]
    return str(path), READERS[suffix_of(path)](path)


def content_hash(examples: list[Example]) -> str:
    """sha256 over one JSON line a row: no two lists of rows give the same lines."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.source, *example.targets]).encode() + b"\n")
    return digest.hexdigest()


# Cells.


def check_columns(record: Record, *columns: str) -> None:
    missing = [column for column in columns if column not in record.cells]
    if missing:
        got = " and ".join(f"no column {column!r} ({nearest(column, record.cells)})" for column in missing)
        raise DataError(f"{record.where}: {got}. Its columns are: {', '.join(record.cells)}.")


def source_text(record: Record, column: str) -> str:
    return checked_text(record.cells[column], record, column)


def target_texts(record: Record, column: str) -> tuple[str, ...]:
    """The references of a row without the blank ones; none where all are blank."""
    value = record.cells[column]
    values = value if isinstance(value, list) else [value]
    return tuple(text for text in (checked_text(each, record, column) for each in values) if text)


def checked_text(value: object, record: Record, column: str) -> str:
    """The cell's text with LF line ends; "" for a blank cell or a null, which the hub's CSV reader makes of one."""
    if value is None:
        return ""
    if not isinstance(value, str):
        got = f"{value!r:.60} ({type(value).__name__})"
        raise DataError(f"{record.where}: column {column!r} holds {got}, where text is needed.")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which no tokenizer takes
        raise DataError(f"{record.where}: column {column!r} is not Unicode text ({error}). Mend the row.") from error
    return value.replace("\r\n", "\n") if value.strip() else ""


# Folders.


def local_folder(name: str) -> Path | None:
    """The folder that `name` stands for, or None where it is a hub id (`owner/name`)."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise DataError(f"{name} is a file. A data set is a folder of files named after their splits: {path.parent}?")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise DataError(
            f"{name}: there is no such folder (seen from {Path.cwd()}). "
            "A data set is a folder of files named after their splits, or a hub id such as owner/name."
        )
    return None


def split_files(folder: Path) -> dict[str, Path]:
    """{split: its file} for every file of a known format in the folder."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = suffix_of(path)
        if suffix not in READERS:
            continue
        split = path.name.removesuffix(suffix)
        if split in files:
            raise DataError(f"{folder} holds split {split!r} twice: {files[split].name} and {path.name}. Remove one.")
        files[split] = path
    return files


def suffix_of(path: Path) -> str:
    """`.jsonl.gz` of `train.jsonl.gz`: the last suffix, with the one before it where the last is a compression."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def jsonl_records(path: Path) -> Iterator[Record]:
    for number, line in numbered_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            got = f"not JSON ({error}): {line.strip()!r:.60}"
            raise DataError(f"{where}: {got}. Each line must be one JSON object.") from error
        if not isinstance(cells, dict):
            got = f"a JSON {type(cells).__name__}, {line.strip()!r:.60}"
            raise DataError(f"{where}: {got}. Each line must be one JSON object, {{column: value, ...}}.")
        yield Record(number, where, cells)


def csv_records(path: Path) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the default refuses a document of more than 131,072 characters
    # strict: else a quote left open swallows the rest of the file in silence
    rows = csv.reader((line for _, line in numbered_lines(path)), strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}, line 1: a column's name stands there twice: {', '.join(header)}. Rename one.")
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
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
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


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": jsonl_records,
    ".jsonl.gz": jsonl_records,
    ".csv": csv_records,
}


# The hub.


def hub_records(name: str, split: str, place: str) -> Iterator[Record]:
    rows = from_hub(name, f"split {split!r}", lambda datasets: datasets.load_dataset(name, split=split))
    for number, cells in enumerate(rows, start=1):
        yield Record(number, f"{place}, row {number}", cells)


def hub_splits(name: str) -> list[str]:
    splits: list[str] = from_hub(name, "its splits", lambda datasets: datasets.get_dataset_split_names(name))
    return splits


def from_hub(name: str, what: str, ask: Callable[[ModuleType], Any]) -> Any:
    """What the library `datasets` answers; each of its dozen kinds of error (offline, unknown id) as a `DataError`."""
    import datasets

    try:
        return ask(datasets)
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise DataError(
            f"{name}: there is no folder of this name, and the hub did not give {what} "
            f"({type(error).__name__}: {reason}). Check the id and the connection, or give a folder of files."
        ) from error
