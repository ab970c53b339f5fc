"""Rows of a data set: a record's texts (columns.py) -> `Example(row, source, targets)`, and what was found wrong on the way.

What may be wrong with a row is counted by kind, with the numbers of the first rows; the recipe says what happens then:

    empty         a cell is blank                            data.empty_rows      skip or stop
    missing       a cell is null, or not there at all        data.empty_rows
    repeated      source and targets of an earlier row,      data.duplicate_rows  keep, skip or stop
                  white space apart
    crlf          Windows line ends                          always made LF
    html_breaks   <br />                                     data.html_breaks     keep, newline or stop
    long_sources, long_targets, in tokens (tokenization.py)        data.long_rows       cut, skip or stop

A column that no row has is an error always.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from json.encoder import encode_basestring_ascii
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.config.data import DataSettings
from loralab.data.columns import RowColumns
from loralab.data.readers import Record
from loralab.errors import DataError

NUMBERS_KEPT, NUMBERS_SHOWN = 100, 5  # of the rows of one kind: in a record, in a message
RECENT = 50_000  # hashes that wait to be sorted in among the others

POLICY = {
    "empty": "empty_rows",
    "missing": "empty_rows",
    "repeated": "duplicate_rows",
    "html_breaks": "html_breaks",
    "long_sources": "long_rows",
    "long_targets": "long_rows",
}
WORDS = {
    "empty": "with an empty cell",
    "missing": "with a missing cell",
    "repeated": "equal to an earlier row",
    "crlf": "with CRLF line ends",
    "html_breaks": "with HTML breaks",
    "long_sources": "with a source over data.max_source_length",
    "long_targets": "with a target over data.max_target_length",
}
DEED = {"skip": "skipped", "keep": "kept", "cut": "cut", "newline": "made line ends", "": "made LF"}


@dataclass(frozen=True, slots=True)
class Example:
    """One row: its 1-based number in the file, its text, one or more references."""

    row: int
    source: str
    targets: tuple[str, ...]

    @property
    def subject(self) -> str:
        """Returns that of `subject`."""
        return subject(self.source, self.targets)

    def line(self) -> bytes:
        """One JSON line, a list: no two rows of different text give the same."""
        quoted = map(encode_basestring_ascii, (self.source, *self.targets))  # json.dumps, three times as fast
        return f"[{', '.join(quoted)}]\n".encode()


@dataclass(slots=True)
class Finding:
    """Rows of one kind: how many, and the numbers of the first hundred."""

    count: int = 0
    rows: list[int] = field(default_factory=list)


class Findings(dict[str, Finding]):
    """Kind -> the rows found to be of it."""

    def note(self, kind: str, row: int) -> None:
        """Counts one row."""
        finding = self.setdefault(kind, Finding())
        finding.count += 1
        if len(finding.rows) < NUMBERS_KEPT:
            finding.rows.append(row)

    def as_json(self) -> dict[str, dict[str, Any]]:
        """For a record."""
        return {kind: {"count": finding.count, "rows": finding.rows} for kind, finding in self.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Mapping[str, Any]]) -> Findings:
        """Returns what `as_json` gave."""
        return cls({kind: Finding(**finding) for kind, finding in stored.items()})

    def in_file(self, numbers: NDArray[np.int64]) -> Findings:
        """Returns the same, where rows were counted from 0 among those used, by their numbers in the file."""
        return Findings({kind: Finding(found.count, numbers[found.rows].tolist()) for kind, found in self.items()})

    def lines(self, policies: Mapping[str, str]) -> list[str]:
        """ "3 with an empty cell, skipped (rows 2, 5, 9)" for each kind; `policies` are the recipe's data settings."""
        return [
            f"{finding.count:,} {WORDS[kind]}, {DEED[policies.get(POLICY.get(kind, ''), '')]} ({row_numbers(finding)})"
            for kind, finding in self.items()
        ]

    def in_words(self, policies: Mapping[str, str]) -> str:
        """Returns the same in one line, each kind after "; "."""
        return "".join(f"; {line}" for line in self.lines(policies))

    def stop(self, title: str, policies: Mapping[str, str]) -> None:
        """Raises `DataError` where the recipe wants a stop at what was found."""
        found = [
            f"{finding.count:,} {WORDS[kind]} ({row_numbers(finding)}), and data.{POLICY[kind]} is stop"
            for kind, finding in self.items()
            if policies.get(POLICY.get(kind, "")) == "stop"
        ]
        if found:
            keys = sorted({POLICY[kind] for kind in self if policies.get(POLICY.get(kind, "")) == "stop"})
            raise DataError(f"{title}: rows {'; '.join(found)}. Mend them, or change {' and '.join(keys)} in data.")


def row_numbers(finding: Finding) -> str:
    """ "row 7" or "rows 1, 2, 3, 4, 5, ..."."""
    shown = ", ".join(map(str, finding.rows[:NUMBERS_SHOWN]))
    return f"row {shown}" if finding.count == 1 else f"rows {shown}{', ...' if finding.count > NUMBERS_SHOWN else ''}"


def policies_of(data: DataSettings) -> dict[str, str]:
    """The settings that say what happens to rows with something wrong."""
    return {key: getattr(data, key) for key in sorted({*POLICY.values()})}


def checked_rows(
    title: str, records: Iterable[Record], columns: RowColumns, findings: Findings, max_rows: int | None
) -> Iterator[Example]:
    """The rows to use, in order, at most `max_rows`; what is wrong with any row goes into `findings`.

    Raises:
        DataError: a row that cannot be read; at the end, one that the recipe wants a stop at, or none left to use.
    """
    data = columns.data
    seen, used, policies = Seen(), 0, policies_of(data)
    for example, kinds in (examine(record, columns) for record in records):
        if not (kinds & {"empty", "missing"}) and seen.before(row_hash(example)):
            kinds.add("repeated")
        for kind in sorted(kinds):
            findings.note(kind, example.row)
        if kinds & {"empty", "missing"} or (data.duplicate_rows == "skip" and "repeated" in kinds):
            continue
        yield example
        used += 1
        if used == max_rows:
            break
    findings.stop(title, policies)
    if not used:
        raise DataError(
            f"{title}: {none_left(findings, columns)} At least one row with text in {' and '.join(map(repr, columns.names))} is needed."
        )


def none_left(findings: Findings, columns: RowColumns) -> str:
    empty = sum(findings[kind].count for kind in ("empty", "missing") if kind in findings)
    return (
        f"each of the {empty} rows has an empty {' or '.join(map(repr, columns.names))}." if empty else "has no rows."
    )


def examine(record: Record, columns: RowColumns) -> tuple[Example, set[str]]:
    """Returns the row, and what is remarkable about it; a text that is empty or missing is "" or no target at all."""
    found: set[str] = set()
    source, targets = columns.texts(record, found)
    if any(record.cells.get(column) is None for column in columns.names):
        found = {"missing"}
    elif not columns.complete(source, targets):
        found = {"empty"}
    return Example(record.row, source, targets), found


def clean_row(record: Record, columns: RowColumns) -> Example:
    """Returns the row alone."""
    return examine(record, columns)[0]


# Hashes: what stays of a row.


def short_hash(content: bytes) -> int:
    """64 bits: among a million rows two differing ones share them once in 40 million data sets."""
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def subject(source: str, targets: Sequence[str]) -> str:
    """Returns what rows that belong together have in common: their source, or the text itself where there is no source."""
    return source or next(iter(targets), "")


def source_hash(source: str) -> int:
    """Returns that of a source's words: white space apart, equal sources have equal hashes."""
    return short_hash(words(source).encode())


def row_hash(example: Example) -> int:
    """Returns that of source and targets, white space apart."""
    return short_hash(Example(0, words(example.source), tuple(map(words, example.targets))).line())


def words(text: str) -> str:
    return " ".join(text.split())


class Seen:
    """A set of hashes that takes 8 bytes each: a sorted array, and a small set of those that are not in it yet."""

    def __init__(self) -> None:
        self.sorted = np.zeros(0, dtype=np.uint64)
        self.recent: set[int] = set()

    def before(self, number: int) -> bool:
        """Tells whether this hash was asked for before; from now on it was."""
        if number in self.recent or self._among_sorted(number):
            return True
        self.recent.add(number)
        if len(self.recent) >= RECENT:
            fresh = np.frombuffer(array("Q", self.recent), dtype=np.uint64)
            self.sorted = np.sort(np.concatenate([self.sorted, fresh]))
            self.recent.clear()
        return False

    def _among_sorted(self, number: int) -> bool:
        place = int(self.sorted.searchsorted(np.uint64(number)))
        return place < len(self.sorted) and int(self.sorted[place]) == number
