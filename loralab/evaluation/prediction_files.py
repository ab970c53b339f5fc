"""Files with the predictions of one or several systems -> one aligned set of rows, to be scored by score_files.py.

A file is of one of the formats in readers.py, with a column of references (a text, or in JSON a list) and one or several
columns of predictions; our own predictions.jsonl is one. Several files hold the same rows in the same order, which is checked.

    files ──> columns of each ──> the rows of each, as texts ──> aligned ──> groups of rows that share a source
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loralab.data.columns import check_columns, source_text, target_texts
from loralab.data.readers import READERS, Record, stem_of, suffix_of
from loralab.data.rows import subject
from loralab.errors import DataError, nearest
from loralab.metrics.labels import is_list, label_text, number_text
from loralab.runs.folder import PREDICTIONS

REFERENCES = ("references", "reference", "target", "summary")
PREDICTION = "prediction"
SOURCE = "source"


@dataclass(frozen=True)
class Columns:
    """Columns as the user named them; an empty one or None is found by its usual name. "a,b" stands for a and b."""

    predictions: Sequence[str] = ()
    references: Sequence[str] = ()
    source: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Predictions:
    """Rows that every system has answered, in one order."""

    systems: Mapping[str, list[str]]
    """[rows] each; "" where a system said nothing."""
    references: list[tuple[str, ...]]
    """[rows], at least one text each."""
    sources: list[str] | None
    """[rows], where the files have them."""
    groups: list[Hashable]
    """[rows]: rows with the same one share a source."""
    grouping: str
    """Origin of the groups, in words."""
    probabilities: Mapping[str, list[dict[str, float]]]
    """System -> [rows]: each label's probability, where the file is a classifier's own."""


@dataclass(frozen=True)
class _File:
    """One file's rows; `where` holds each row's place for messages."""

    path: Path
    where: list[str]
    systems: dict[str, list[str]]
    references: list[tuple[str, ...]]
    sources: list[str] | None
    groups: list[Hashable] | None
    references_column: str
    probabilities: list[dict[str, float]] | None


def read_predictions(
    paths: Sequence[Path], columns: Columns, labels: bool = False, numbers: bool = False
) -> Predictions:
    """Reads the rows of all files, side by side.

    Args:
        paths: files with predictions, or runs' folders.
        columns: which columns hold what.
        labels: predictions and references are read as metrics/labels.py reads a label.
        numbers: they are read as numbers.

    Raises:
        DataError: a file that cannot be read, a missing or doubtful column, a row without a reference, a system that
            said nothing at all, or files whose rows differ; the message names the place.
    """
    files = [_read(_file_of(path), columns, labels, numbers) for path in paths]
    for file in files[1:]:
        _check_aligned(files[0], file)
    names = _names(files)
    systems = dict(zip(names, (texts for file in files for texts in file.systems.values()), strict=True))
    sources = next((file.sources for file in files if file.sources is not None), None)
    given = next((file.groups for file in files if file.groups is not None), None)
    subjects = None if sources is None else _subjects(sources, files[0].references, labels or numbers)
    groups, grouping = _grouped(systems, subjects, given, columns, labels or numbers)
    certain = {
        name: file.probabilities for name, file in zip(names, files, strict=False) if file.probabilities is not None
    }
    return Predictions(
        systems, files[0].references, sources, groups, grouping, certain if len(names) == len(files) else {}
    )


# One file


def _file_of(path: Path) -> Path:
    """The file itself; of a run's folder its predictions."""
    path = path / PREDICTIONS if path.is_dir() else path
    if not path.is_file():
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {path}. {nearest(path.name, beside)} Expected {', '.join(READERS)}.")
    if suffix_of(path) not in READERS:
        raise DataError(f"{path}: unknown kind of file {suffix_of(path)!r}. Expected {', '.join(READERS)}.")
    return path


def _read(path: Path, columns: Columns, labels: bool, numbers: bool) -> _File:
    records = list(READERS[suffix_of(path)](path))
    if not records:
        raise DataError(f"{path} has no rows. Expected at least one prediction with its reference.")
    known, place = list(records[0].cells), str(path)
    references = _named(columns.references, known) or [_reference_column(known, place)]
    predictions = _named(columns.predictions, known) or _prediction_columns(known, place)
    source = columns.source or (SOURCE if SOURCE in known else None)
    needed = [*predictions, *references, *(name for name in (source, columns.group) if name is not None)]
    for record in records:
        check_columns(record, *needed)
    if both := [name for name in predictions if name in references]:
        raise DataError(f"{path}: column {both[0]!r} is both prediction and reference. Name the two with options.")
    reader = _label if labels else _number if numbers else source_text
    systems = {name: _answers(records, name, path, reader) for name in predictions}
    several = any(is_list(text) for texts in systems.values() for text in texts)
    truth = partial(_true_labels, several=several) if labels else _true_number if numbers else target_texts
    return _File(
        path,
        [record.where for record in records],
        systems,
        [_references_of(record, references, truth) for record in records],
        None if source is None else [source_text(record, source) for record in records],
        None if columns.group is None else [_group_of(record, columns.group) for record in records],
        ", ".join(references),
        _probabilities(records) if predictions == [PREDICTION] else None,
    )


def _probabilities(records: Sequence[Record]) -> list[dict[str, float]] | None:
    """Returns those of a classifier's predictions.jsonl, every row of which has them."""
    found = [record.cells.get("probabilities") for record in records]
    return [dict(each) for each in found if isinstance(each, dict)] if all(map(_is_object, found)) else None


def _is_object(value: object) -> bool:
    return isinstance(value, dict) and bool(value)


def _named(given: Sequence[str], known: Sequence[str]) -> list[str]:
    """The columns that a user named, each once; a comma separates two, unless a column's name has it."""
    names = (each for name in given for each in ([name] if name in known else name.split(",")))
    return list(dict.fromkeys(names))


def _reference_column(known: Sequence[str], place: str) -> str:
    found = [name for name in REFERENCES if name in known]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} columns that could be the references ({', '.join(found)})" if found else "no reference column"
    raise DataError(
        f"{place} has {what}; looked for {', '.join(REFERENCES)}. Its columns are: {', '.join(known)}. "
        "Name the one with --reference COLUMN."
    )


def _prediction_columns(known: Sequence[str], place: str) -> list[str]:
    found = [PREDICTION] if PREDICTION in known else [name for name in known if name.startswith(PREDICTION)]
    if not found:
        raise DataError(
            f"{place} has no column whose name starts with {PREDICTION!r}. Its columns are: {', '.join(known)}. "
            "Name the predictions' with --prediction COLUMN, once for each system."
        )
    return found


def _label(record: Record, column: str) -> str:
    return label_text(record.cells[column], record.where, column) or ""


def _number(record: Record, column: str) -> str:
    return number_text(record.cells[column], record.where, column) or ""


def _true_number(record: Record, column: str) -> tuple[str, ...]:
    """Reads the reference of a row; predictions.jsonl has it as a list of one."""
    value = record.cells[column]
    values = value if isinstance(value, list) else [value]
    return tuple(text for each in values if (text := number_text(each, record.where, column)))


def _true_labels(record: Record, column: str, several: bool) -> tuple[str, ...]:
    """The references of a row; a list holds them, or where predictions are lists too, the several labels of one."""
    value = record.cells[column]
    values = value if isinstance(value, list) else [value]
    if several and not any(isinstance(each, list) or is_list(str(each)) for each in values):
        values = [value]
    return tuple(text for each in values if (text := label_text(each, record.where, column)))


def _answers(records: Sequence[Record], column: str, path: Path, read: Callable[[Record, str], str]) -> list[str]:
    texts = [read(record, column) for record in records]
    if not any(texts):
        raise DataError(
            f"{path}: all {len(texts)} predictions in column {column!r} are empty, so there is nothing to score. "
            "Is it the right column, and did the model write anything?"
        )
    return texts


def _references_of(
    record: Record, columns: Sequence[str], read: Callable[[Record, str], tuple[str, ...]]
) -> tuple[str, ...]:
    texts = tuple(text for column in columns for text in read(record, column))
    if not texts:
        raise DataError(
            f"{record.where}: no reference in column {', '.join(columns)}. Each row needs one: leave the row out."
        )
    return texts


def _group_of(record: Record, column: str) -> Hashable:
    value = record.cells[column]
    if value is None or value == "":
        raise DataError(f"{record.where}: the group in column {column!r} is empty. Each row needs one.")
    return json.dumps(value, sort_keys=True)


# Several files


def _check_aligned(first: _File, other: _File) -> None:
    """Raises DataError at the first row in which two files are not about the same thing."""
    _check_equal("reference", first, other, lambda file: file.references)
    _check_equal("source", first, other, lambda file: file.sources)
    _check_equal("group", first, other, lambda file: file.groups)
    lengths = len(first.where), len(other.where)
    if lengths[0] != lengths[1]:
        longer = first if lengths[0] > lengths[1] else other
        raise DataError(
            f"{first.path} has {lengths[0]} rows and {other.path} has {lengths[1]}: row {min(lengths) + 1} "
            f"({longer.where[min(lengths)]}) has no counterpart. Files are compared row by row."
        )


def _check_equal(what: str, first: _File, other: _File, column: Callable[[_File], Sequence[Hashable] | None]) -> None:
    a, b = column(first), column(other)
    for row, (mine, theirs) in enumerate(zip(a or [], b or [], strict=False)):
        if mine != theirs:
            raise DataError(
                f"Row {row + 1}: the {what} differs: {mine!r:.60} at {first.where[row]}, {theirs!r:.60} at "
                f"{other.where[row]}. The files must hold the same rows in the same order."
            )


def _names(files: Sequence[_File]) -> list[str]:
    """A name for each system: the file's, the column's, or both where both are needed."""
    if len({file.path.resolve() for file in files}) < len(files):
        raise DataError(f"A file is given twice: {', '.join(str(file.path) for file in files)}. Give each once.")
    short = [_short(file.path) for file in files]
    names = short if len(set(short)) == len(files) else [str(file.path) for file in files]
    if len(files) == 1 and list(files[0].systems) != [PREDICTION]:
        return list(files[0].systems)
    return [
        name if len(file.systems) == 1 else f"{name}: {column}"
        for name, file in zip(names, files, strict=True)
        for column in file.systems
    ]


def _short(path: Path) -> str:
    """A file's name without its suffix; of a run's predictions.jsonl the run's."""
    return path.resolve().parent.name if path.name == PREDICTIONS else stem_of(path)


# Groups


def _subjects(sources: Sequence[str], references: Sequence[Sequence[str]], labels: bool) -> list[Hashable]:
    """Returns what each row is about; a label says nothing of it."""
    rows = enumerate(zip(sources, references, strict=True))
    return [source or row if labels else subject(source, texts) for row, (source, texts) in rows]


def _grouped(
    systems: Mapping[str, Sequence[str]],
    sources: Sequence[Hashable] | None,
    given: Sequence[Hashable] | None,
    columns: Columns,
    labels: bool,
) -> tuple[list[Hashable], str]:
    """The group of each row, and how it was found."""
    if given is not None:
        return list(given), f"by column {columns.group!r}"
    if sources is not None:
        return list(sources), f"by column {columns.source or SOURCE!r}"
    answers = list(zip(*systems.values(), strict=True))
    if labels:
        return list(range(len(answers))), "each row by itself, as labels and numbers repeat without a common source"
    counts = Counter(answers)
    groups: list[Hashable] = [
        row if not any(texts) or counts[texts] == 1 else texts for row, texts in enumerate(answers)
    ]
    if len(counts) == 1 and len(answers) > 1:
        return list(range(len(answers))), "each row by itself, as the predictions are the same everywhere"
    if len(set(groups)) == len(groups):
        return groups, "each row by itself, as no predictions repeat"
    return groups, (
        "rows whose predictions repeat, in every system, are taken for one source with several references; "
        "--group COLUMN says otherwise"
    )
