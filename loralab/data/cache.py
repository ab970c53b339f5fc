"""Work on disk that a later run, or another variant of a comparison, need not do again.

    CACHE/<kind>-<hash of the key>/   arrays (.npy), entry.json: format, facts, and size and checksum of each file

CACHE is the folder that the environment variable LORALAB_CACHE names, else loralab in $XDG_CACHE_HOME or ~/.cache. An
entry is written beside its place and moved there when it is whole, so that processes may race and die as they like. One
whose files are not what entry.json says is made anew. What was not used for thirty days is removed when an entry is
added. Everything in it may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.errors import DataError

FORMAT = 1  # to be raised when what is in an entry changes, or how it comes about
ENTRY = "entry.json"
UNUSED_DAYS, UNFINISHED_DAYS = 30, 1
BLOCK = 1 << 20  # bytes

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole entry."""

    folder: Path
    facts: Facts
    reused: bool
    """It was there before."""

    def array(self, name: str) -> NDArray[Any]:
        """An array of the entry, mapped: it takes memory as it is read, which the system takes back."""
        return np.asarray(np.load(self.folder / f"{name}.npy", mmap_mode="r"))


def cache_folder() -> Path:
    """Returns where entries are kept."""
    if place := os.environ.get("LORALAB_CACHE"):
        return Path(place).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loralab"


def cached(kind: str, key: Mapping[str, object], build: Callable[[Path], Facts]) -> Entry:
    """The entry of this key, made by `build`, which writes files into the folder it is given and returns facts.

    Raises:
        DataError: the cache's folder cannot be written to; whatever `build` raises.
    """
    text = json.dumps({"format": FORMAT, "kind": kind, **key}, sort_keys=True)
    folder = cache_folder() / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"
    if (facts := whole(folder)) is not None:
        return Entry(folder, facts, reused=True)
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    try:
        part.mkdir(parents=True)
        seal(part, build(part))
        move_into_place(part, folder)
        remove_unused(folder.parent)
    except OSError as error:
        raise DataError(
            f"The cache {folder.parent} cannot be written to ({error}). Make room there, or let the environment variable "
            "LORALAB_CACHE name another folder."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    facts = whole(folder)
    assert facts is not None, f"{folder} was just written"
    return Entry(folder, facts, reused=False)


def whole(folder: Path) -> Facts | None:
    """The facts of an entry whose files are all there and as they were written; None otherwise."""
    try:
        entry = json.loads((folder / ENTRY).read_text(encoding="utf-8"))
        files = {name: list(size_and_checksum(folder / name)) for name in entry["files"]}
        facts: Facts | None = entry["facts"] if files == entry["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with suppress(OSError):  # a cache that may only be read serves as well
        os.utime(folder)
    return facts


def seal(part: Path, facts: Facts) -> None:
    """Writes entry.json and waits until all is on the disk: a name must not be there before its content is."""
    files = {file.name: size_and_checksum(file) for file in sorted(part.iterdir())}
    (part / ENTRY).write_text(json.dumps({"facts": facts, "files": files}), encoding="utf-8")
    for file in part.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def size_and_checksum(file: Path) -> tuple[int, int]:
    """(bytes, checksum)."""
    size = checksum = 0
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return size, checksum


def move_into_place(part: Path, folder: Path) -> None:
    """Gives a sealed entry its name. One that is there and whole stays: another process was faster."""
    try:
        part.rename(folder)
    except OSError:
        if whole(folder) is not None:
            return
        folder.rename(part.with_suffix(".damaged.part"))  # at once, so that nobody sees half of it
        part.rename(folder)
        shutil.rmtree(part.with_suffix(".damaged.part"), ignore_errors=True)


def remove_unused(cache: Path) -> None:
    """Removes entries that nobody has used for long, and what processes that died have left."""
    now = time.time()
    for folder in cache.iterdir():
        days = UNFINISHED_DAYS if folder.suffix == ".part" else UNUSED_DAYS
        with suppress(OSError):  # another process may be removing it too
            if now - folder.stat().st_mtime > 86400 * days:
                shutil.rmtree(folder)


class ArrayFile:
    """A one-dimensional .npy file that grows; its length is written when it is closed."""

    def __init__(self, path: Path, dtype: str) -> None:
        """`dtype` with its byte order, such as "<i4"."""
        self.file, self.dtype, self.length = path.open("wb"), np.dtype(dtype), 0
        self._write_header()

    def append(self, values: Any) -> None:
        """Adds numbers at the end."""
        converted = np.ascontiguousarray(values, dtype=self.dtype)
        self.file.write(converted.data)
        self.length += len(converted)

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the longest length
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = self.file.tell()
        self.file.seek(0)
        self._write_header()
        self.file.seek(end)
        self.file.close()
