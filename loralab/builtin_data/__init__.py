"""Data sets and bases that need no network: data sets that every Python carries, and bases that come with loralab, each in a folder here.

    stdlib.py (source files, and the split of each module) ──> docstrings.py (pairs), by definitions.py (functions and classes)
                                                          └──> corpus.py (whole texts, with those of installed packages)
                                                                └──> documentation.py (the prose in them)

The data are built when they are asked for, from source files that are on the machine. No file is imported or run, and
nothing of them is shipped.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loralab.builtin_data import corpus, docstrings, documentation
from loralab.builtin_data.stdlib import SPLITS
from loralab.errors import DataError, ModelError, nearest

PREFIX = "embedded:"

Rows = tuple[Mapping[str, str], ...]

DATA_SETS: Mapping[str, Callable[[str], Rows]] = {
    "docstrings": docstrings.rows,
    "code": corpus.rows,
    "documentation": documentation.rows,
}
CARDS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "docstrings": docstrings.card,
    "code": corpus.card,
    "documentation": documentation.card,
}


@functools.cache
def read_rows(name: str, split: str) -> Rows:
    """The rows of a split of `embedded:…`, a mapping of columns each.

    Raises:
        DataError: there is no such data set or split, or this Python came without its source files.
    """
    if split not in SPLITS:
        raise DataError(f"{name} has no split {split!r}. The splits are: {', '.join(SPLITS)}.")
    return DATA_SETS[_known(name)](split)


def content_hash(rows: Rows) -> str:
    """sha256 of the rows, in hexadecimal."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()


def card(name: str) -> dict[str, Any]:
    """Returns what an embedded data set holds on this machine: counts, Python's version, licences, rules."""
    return {"name": name, **CARDS[_known(name)]()}


def model_folder(name: str) -> Path:
    """The folder of an embedded base, such as embedded:tiny-t5, within the package.

    Raises:
        ModelError: there is none of this name.
    """
    folder = Path(__file__).parent / name.removeprefix(PREFIX)
    if (folder / "config.json").is_file():
        return folder
    there = [PREFIX + path.parent.name for path in Path(__file__).parent.glob("*/config.json")]
    raise ModelError(
        f"There is no embedded base {name!r}. {nearest(name, there)} "
        "To make one: loralab train pretrain-tiny-t5; then model.name is the folder `model` of that run."
    )


def _known(name: str) -> str:
    short = name.removeprefix(PREFIX)
    if short not in DATA_SETS:
        raise DataError(
            f"There is no embedded data set {name!r}. {nearest(name, [PREFIX + each for each in DATA_SETS])}"
        )
    return short
