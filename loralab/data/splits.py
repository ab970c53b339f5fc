"""The rows of a split that are used: held in memory (`read_split`, for evaluation), or an index of them (`index_split`,
for training), whose texts are read from their file again each time they are gone through.

Of a row that is trained on, 16 bytes stay: its number and the hash of its source. The index is cached on disk by the
bytes of the data and the settings that choose rows.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loralab.config.data import DataSettings
from loralab.data.auto_split import IN_WORDS, part_bounds, part_of
from loralab.data.cache import ArrayFile, Entry, Facts, cached
from loralab.data.columns import RowColumns, row_columns, with_columns
from loralab.data.readers import Record
from loralab.data.rows import (
    Example,
    Findings,
    checked_rows,
    clean_row,
    policies_of,
    row_hash,
    source_hash,
)
from loralab.data.sources import Place, open_place
from loralab.errors import DataError

SAMPLE = 20_000  # targets that an index keeps, each as likely as any other


class AnySplit(Protocol):
    """Interface of `Split` and `StreamedSplit`."""

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def findings(self) -> Findings: ...
    @property
    def parted(self) -> bool: ...
    @property
    def content_hash(self) -> str: ...
    @property
    def numbers(self) -> NDArray[np.int64]: ...
    @property
    def source_hashes(self) -> NDArray[np.uint64]: ...
    @property
    def label_counts(self) -> dict[str, int]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Example]: ...


@dataclass(frozen=True)
class Split:
    """Rows held in memory, in the file's order."""

    name: str
    """The data set's."""
    split: str
    examples: tuple[Example, ...]
    findings: Findings
    parted: bool = False
    """The split is a part of a single file."""

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    @cached_property
    def content_hash(self) -> str:
        """sha256 of the texts used, in hexadecimal: one for a file and for its copy on the hub."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(example.line())
        return digest.hexdigest()

    @property
    def numbers(self) -> NDArray[np.int64]:
        """[rows]: the number of each in its file, rising."""
        return np.array([example.row for example in self.examples], dtype=np.int64)

    @property
    def source_hashes(self) -> NDArray[np.uint64]:
        """[rows]: a hash of the words of each source, or of the text itself where there is none."""
        return np.array([source_hash(example.subject) for example in self.examples], dtype=np.uint64)

    @property
    def label_counts(self) -> dict[str, int]:
        """Returns the number of rows of each label, by its text."""
        return dict(Counter(example.targets[0] for example in self.examples))


@dataclass(frozen=True)
class StreamedSplit:
    """The index of a split's rows; going through it reads them again."""

    data: DataSettings
    split: str
    place: Place
    index: Entry

    @property
    def name(self) -> str:
        return self.data.name

    @property
    def parted(self) -> bool:
        return self.place.single_file

    @property
    def content_hash(self) -> str:
        """Returns that of `Split`."""
        return str(self.index.facts["content_hash"])

    @property
    def findings(self) -> Findings:
        """Returns what was found in rows up to the last that is used."""
        return Findings.from_json(self.index.facts["findings"])

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Returns those of `Split`."""
        return self.index.array("numbers")

    @property
    def source_hashes(self) -> NDArray[np.uint64]:
        """Returns those of `Split`."""
        return self.index.array("source_hashes")

    @property
    def label_counts(self) -> dict[str, int]:
        """Returns that of `Split`."""
        counts: dict[str, int] = self.index.facts["label_counts"]
        return counts

    def sample_of_targets(self) -> list[str]:
        """First references: all of them up to 20,000, of more rows as many that were drawn evenly and for good."""
        sample: list[str] = json.loads((self.index.folder / "targets.json").read_text(encoding="utf-8"))
        return sample

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Example]:
        digest, wanted, columns = hashlib.sha256(), map(int, self.numbers), row_columns(self.data)
        number = next(wanted, None)
        for record in self.place.records():
            if record.row == number:
                example = clean_row(record, columns)
                digest.update(example.line())
                yield example
                if (number := next(wanted, None)) is None:
                    break
        if digest.hexdigest() != self.content_hash:
            raise DataError(f"{self.place.title} changed while it was in use. Start again.")


def announce(rows: AnySplit, data: DataSettings) -> str:
    """Counts how many rows there are, where they come from and what was found in them, for people."""
    text = f"{rows.name}, {rows.split}: {len(rows):,} rows{rows.findings.in_words(policies_of(data))}"
    return f"{text} ({IN_WORDS})" if rows.parted else text


def read_split(data: DataSettings, split: str) -> Split:
    """The rows of a split, in memory. Raises `DataError` for whatever is wrong with it (rows.py)."""
    place, findings = open_place(data.name, split), Findings()
    examples = tuple(chosen_rows(place, data, split, findings))
    return Split(data.name, split, examples, findings, place.single_file)


def index_split(data: DataSettings, split: str) -> StreamedSplit:
    """The index of a split's rows, from the cache where these settings have met these bytes. Raises as `read_split`."""
    place = open_place(data.name, split)
    key = {
        "rows": place.fingerprint(),
        "part": split if place.single_file else None,
        "columns": row_columns(data).key,
        "policies": policies_of(data),
        "max_rows": data.max_rows(split),
        "pick_rows": data.pick_rows,
    }
    return StreamedSplit(
        data, split, place, cached("index", key, lambda folder: write_index(folder, place, data, split))
    )


def chosen_rows(place: Place, data: DataSettings, split: str, findings: Findings) -> Iterator[Example]:
    """The rows of a split, up to the recipe's bound on their number."""
    bound, columns = data.max_rows(split), row_columns(data)

    def rows(findings: Findings, bound: int | None) -> Iterator[Example]:
        records = with_columns(place.records(), columns, place.uneven)
        if place.single_file:
            records = records_of_part(records, columns, split, part_bounds(place, columns))
        return checked_rows(place.title, records, columns, findings, bound)

    if bound is None or data.pick_rows == "first":
        return rows(findings, bound)
    picked = heapq.nsmallest(bound, ((row_hash(row), row.row) for row in rows(findings, None)))
    numbers = {number for _, number in picked}
    return (row for row in rows(Findings(), None) if row.row in numbers)


def records_of_part(
    records: Iterable[Record], columns: RowColumns, split: str, bounds: tuple[int, int]
) -> Iterator[Record]:
    """Returns those of a single file's records that belong to the split."""
    return (record for record in records if part_of(clean_row(record, columns).subject, bounds) == split)


def write_index(folder: Path, place: Place, data: DataSettings, split: str) -> Facts:
    """Goes through the rows once and writes what stays of them."""
    findings, digest, sample, labels = Findings(), hashlib.sha256(), TextReservoir(), Counter[str]()
    labelled = row_columns(data).labelled
    with ArrayFile(folder / "numbers.npy", "<i8") as numbers, ArrayFile(folder / "source_hashes.npy", "<u8") as hashes:
        rows = chosen_rows(place, data, split, findings)
        while chunk := list(islice(rows, 1000)):
            numbers.append([example.row for example in chunk])
            hashes.append(np.array([source_hash(example.subject) for example in chunk], dtype=np.uint64))
            for example in chunk:
                digest.update(example.line())
                if example.targets:
                    sample.add(example.targets[0])
                if labelled:
                    labels[example.targets[0]] += 1
    (folder / "targets.json").write_text(json.dumps(sample.texts), encoding="utf-8")
    return {"content_hash": digest.hexdigest(), "findings": findings.as_json(), "label_counts": dict(labels)}


class TextReservoir:
    """An even sample of a stream of texts (Vitter 1985, "Random sampling with a reservoir"); the same for the same stream."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.count, self.coins = 0, random.Random(0)

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.texts) < SAMPLE:
            self.texts.append(text)
        elif (place := self.coins.randrange(self.count)) < SAMPLE:
            self.texts[place] = text
