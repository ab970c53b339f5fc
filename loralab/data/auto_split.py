"""A single file as three splits: each source has its place, told by its hash alone.

Of a file's distinct sources about 90 % are train, 5 % validation and 5 % test. Rows with the same source (white space
apart) fall into the same split, so nothing leaks, and a row keeps its split when others are added to the file. Where
that leaves a split of a small file empty, its sources are ranked by their hashes, and the first ones become test and
validation.
"""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np

from loralab.data.cache import cached
from loralab.data.columns import RowColumns, with_columns
from loralab.data.rows import clean_row, source_hash
from loralab.data.sources import SPLITS, Place
from loralab.errors import DataError

SHARE = 0.05  # of the sources, for test and for validation each
IN_WORDS = (
    "one file, parted by a hash of the source: about 90 % of the sources are train, 5 % validation and 5 % test; "
    "rows with the same source are in the same split"
)


def part_bounds(place: Place, columns: RowColumns) -> tuple[int, int]:
    """(where validation begins, where train begins) among the hashes of sources; test begins at 0.

    Raises:
        DataError: the file has fewer than three different sources.
    """
    key = {
        "file": place.fingerprint(),
        "columns": columns.key,
        "html_breaks": columns.data.html_breaks,
    }

    def build(_: Path) -> dict[str, Any]:
        rows = (clean_row(record, columns) for record in with_columns(place.records(), columns, place.uneven))
        hashes = array(
            "Q",
            (source_hash(row.subject) for row in rows if columns.complete(row.source, row.targets)),
        )
        return {"bounds": bounds(np.unique(np.frombuffer(hashes, dtype=np.uint64)), place.title)}

    validation, train = cached("parts", key, build).facts["bounds"]
    return validation, train


def bounds(hashes: np.ndarray[Any, np.dtype[np.uint64]], title: str) -> tuple[int, int]:
    """`part_bounds` of sorted, distinct hashes."""
    if len(hashes) < len(SPLITS):
        raise DataError(
            f"{title}: {len(hashes)} different sources. A single file is parted into {', '.join(SPLITS)} by its sources "
            f"and needs at least {len(SPLITS)} rows with different ones; or give a folder with a file for each split."
        )
    fixed = int(SHARE * 2**64), int(2 * SHARE * 2**64)
    places = np.searchsorted(hashes, np.array(fixed, dtype=np.uint64))
    if 0 < places[0] < places[1] < len(hashes):
        return fixed
    count = max(1, int(SHARE * len(hashes)))
    return int(hashes[count]), int(hashes[2 * count])


def part_of(source: str, bounds: tuple[int, int]) -> str:
    """The split that a source belongs to."""
    place = source_hash(source)
    return "test" if place < bounds[0] else "validation" if place < bounds[1] else "train"
