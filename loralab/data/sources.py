"""Finds the rows of a split: in a file of a folder, in a single file, or on the Hugging Face hub.

A folder holds one file per split, named after it: `train.jsonl`, `validation.csv.gz`, `test.parquet`. A single file
holds all of them, parted by its rows' sources (auto_split.py). What the library datasets has laid out, by `save_to_disk` or as
a repository of the hub, is read by it. `embedded:…` is made by loralab/embedded. Any other name is a hub id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from loralab import builtin_data
from loralab.data.readers import READERS, Record, json_records, jsonl_records, stem_of, suffix_of
from loralab.errors import DataError, nearest_file

SPLITS = ("train", "validation", "test")  # of a single file
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves, of several splits and of one
ABOUT = ("dataset_dict", "dataset_info", "dataset_infos", "state")  # files of datasets that hold no rows
SHARD = re.compile(r".+-\d{5}-of-\d{5}")


@dataclass(frozen=True, slots=True)
class Place:
    """Rows that can be read again and again."""

    title: str
    """For messages: the file, or the hub's split."""
    records: Callable[[], Iterator[Record]]
    fingerprint: Callable[[], str]
    """Changes whenever the rows do; told without decoding them."""
    single_file: bool = False
    """The records are those of all splits."""
    uneven: bool = False
    """A row may lack columns that others have."""


def open_place(name: str, split: str) -> Place:
    """Returns where the rows of this split are. Raises `DataError` where there is no such file, folder or split."""
    if name.startswith(builtin_data.PREFIX):
        return embedded_place(name, split)
    path = local_path(name)
    if path is None:
        return hub_place(name, split)
    if path.is_file():
        if split not in SPLITS:
            raise DataError(f"{path} is parted into {', '.join(SPLITS)}; there is no {split!r}.")
        return file_place(path, single_file=True)
    if of_datasets(path):
        return saved_place(path, split)
    files = split_files(path)
    if split not in files:
        raise DataError(
            f"{path} has no split {split!r}: no file {split}{{{','.join(READERS)}}}. "
            f"The splits are: {', '.join(sorted(files)) or 'none'}."
        )
    return file_place(files[split])


def splits_of(name: str) -> list[str]:
    """The names of the splits that the folder, file or hub data set has, sorted."""
    if name.startswith(builtin_data.PREFIX):
        return sorted(SPLITS)
    path = local_path(name)
    if path is None:
        return sorted(hub_splits(name))
    if path.is_dir() and of_datasets(path):
        saved = read_saved(path)
        return sorted(saved if isinstance(saved, dict) else SPLITS)
    return sorted(SPLITS if path.is_file() else split_files(path))


def embedded_place(name: str, split: str) -> Place:
    title, rows = f"{name}, split {split!r}", builtin_data.read_rows(name, split)

    def records() -> Iterator[Record]:
        for number, cells in enumerate(rows, start=1):
            yield Record(number, f"{title}, row {number}", cells)

    return Place(title, records, lambda: f"{name} {split} {builtin_data.content_hash(rows)}")


# Files and folders.


def local_path(name: str) -> Path | None:
    """The folder or file that `name` stands for, or None where it is a hub id (`owner/name`)."""
    path = Path(name).expanduser()
    known = suffix_of(path) in READERS
    if path.is_dir() or (path.is_file() and known):
        return path
    if path.exists():
        raise DataError(f"{name} is a file of an unknown format. The formats are: {', '.join(READERS)}.")
    if known or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise DataError(
            f"{name}: there is no such {'file' if known else 'folder'} (seen from {Path.cwd()}).{nearest_file(path)} "
            f"A data set is a file ({', '.join(READERS)}), a folder of files named after their splits, "
            "or a hub id such as owner/name."
        )
    return None


def split_files(folder: Path) -> dict[str, Path]:
    """{split: its file} for every file of a known format in the folder."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        split = stem_of(path)
        if suffix_of(path) not in READERS or split in ABOUT:
            continue
        if split in files:
            raise DataError(f"{folder} holds split {split!r} twice: {files[split].name} and {path.name}. Remove one.")
        files[split] = path
    return files


def file_place(path: Path, single_file: bool = False) -> Place:
    suffix = suffix_of(path)
    uneven = READERS[suffix] in (jsonl_records, json_records)
    return Place(str(path), lambda: READERS[suffix](path), lambda: f"{suffix} {bytes_hash(path)}", single_file, uneven)


def bytes_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error
    return digest.hexdigest()


# The hub.


def hub_place(name: str, split: str) -> Place:
    rows = from_hub(name, f"split {split!r}", lambda datasets: datasets.load_dataset(name, split=split))
    return rows_place(f"{name}, split {split!r}", f"hub {name} {split}", rows)


def hub_splits(name: str) -> list[str]:
    splits: list[str] = from_hub(name, "its splits", lambda datasets: datasets.get_dataset_split_names(name))
    return splits


def from_hub(name: str, what: str, ask: Callable[[ModuleType], Any]) -> Any:
    """Returns what the library `datasets` answers, or a `DataError`: there is no connection, or no such id."""
    there_is_none = f"{name}: there is no folder or file of this name, and the hub did not give {what}"
    advice = f"Check the id and the connection, or give a folder of files.{nearest_file(Path(name))}"
    return from_datasets(ask, there_is_none, advice)


def from_datasets(ask: Callable[[ModuleType], Any], got: str, advice: str) -> Any:
    """Returns what the library `datasets` answers; each of its dozen kinds of error as a `DataError`."""
    import datasets

    try:
        return ask(datasets)
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise DataError(f"{got} ({type(error).__name__}: {reason}). {advice}") from error


def rows_place(title: str, name: str, rows: Any, single_file: bool = False) -> Place:
    """The rows of one of the library's data sets."""

    def records() -> Iterator[Record]:
        for number, cells in enumerate(rows, start=1):
            yield Record(number, f"{title}, row {number}", cells)

    # the library's own name for these rows, which its cache goes by too
    return Place(title, records, lambda: f"{name} {rows._fingerprint}", single_file)


# Folders that the library datasets has laid out.


def of_datasets(folder: Path) -> bool:
    """Tells whether it is what `save_to_disk` writes, or a copy of a hub's repository: shards, or files below data/ or a split's name."""
    if is_saved(folder) or any(map(SHARD.fullmatch, split_files(folder))):
        return True
    below = (path for name in ("data", *SPLITS) for path in (folder / name).glob("*"))
    return not split_files(folder) and any(suffix_of(path) in READERS for path in below)


def is_saved(folder: Path) -> bool:
    """Tells whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in SAVED)


def read_saved(folder: Path) -> Any:
    """{split: rows}, or the rows where they have no splits."""
    return from_datasets(
        lambda datasets: datasets.load_from_disk(folder) if is_saved(folder) else datasets.load_dataset(str(folder)),
        f"{folder} cannot be read as the library datasets writes it",
        "Write it again, or give a folder of files named after their splits.",
    )


def saved_place(folder: Path, split: str) -> Place:
    saved = read_saved(folder)
    if not isinstance(saved, dict):
        return rows_place(str(folder), f"saved {folder}", saved, single_file=True)
    if split not in saved:
        raise DataError(f"{folder} has no split {split!r}. The splits are: {', '.join(sorted(saved))}.")
    return rows_place(f"{folder}, split {split!r}", f"saved {folder} {split}", saved[split])
