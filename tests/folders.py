"""Data sets on disk for tests: a few hostile rows, writers, and readers with as few words as a test wants."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

from loralab.config.data import DataSettings
from loralab.data.rows import Example, Findings
from loralab.data.splits import Split, StreamedSplit, index_split, read_split

INSTRUCTION = "Summarize the following conversation.\n\n{dialogue}\n\nSummary: "
ROWS = [
    {"id": "a", "dialogue": 'A: one, "two"\r\nB: three', "summary": "Numbers."},
    {"id": "b", "dialogue": "A: é {x} 😀\nB: {dialogue}", "summary": "Signs, in braces."},
    {"id": "c", "dialogue": "A: bye", "summary": "A leaves."},
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def settings(place: Path | str, **others: Any) -> DataSettings:
    """Dialogues and summaries of a folder or a file."""
    return DataSettings(**{"name": str(place), "source": "dialogue", "target": "summary", **others})


def read(place: Path | str, split: str = "train", **others: Any) -> Split:
    return read_split(settings(place, **others), split)


def index(place: Path | str, split: str = "train", **others: Any) -> StreamedSplit:
    return index_split(settings(place, **others), split)


def real_rows(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.decompress((folder / f"{split}.jsonl.gz").read_bytes()).splitlines()]


def split_of(*rows: tuple[str, ...]) -> Split:
    """A split of (source, reference, reference, ...) rows."""
    return Split("name", "train", tuple(Example(n, row[0], row[1:]) for n, row in enumerate(rows, 1)), Findings())
