"""`embedded:code`: whole texts to pretrain a small model on.

The training split is the standard library's training modules and, of each installed package with a permissive licence,
source files and documentation; validation and test are the standard library's own (stdlib.py). Which packages are
there differs from machine to machine: `card` lists them with versions and licences.

Left out are tests and vendored packages; files that hold a row of `embedded:docstrings` which is held out, as copies of
standard modules do; files most of whose lines stood there before; files that look generated; and of large packages all
but the first files in the order of a hash. Columns: text, origin, version, licence.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from loralab.builtin_data import docstrings
from loralab.builtin_data.docstrings import LICENCE, normal, pairs_of
from loralab.builtin_data.stdlib import SPLITS, source_files, split_of

PERMISSIVE = {"MIT", "BSD-2-Clause", "BSD-3-Clause", "BSD", "Apache-2.0", "PSF-2.0", "Python-2.0", "ISC"}
STATED = {
    "Apache 2.0 License": "Apache-2.0",
    "MIT License": "MIT",
    **{name: name for name in PERMISSIVE},
}  # in the old field
CLASSIFIERS = {
    "MIT License": "MIT",
    "BSD License": "BSD",
    "Apache Software License": "Apache-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "ISC License (ISCL)": "ISC",
}
SUFFIXES = {".py", ".md", ".rst"}
LEFT_OUT_FOLDERS = {
    "test",
    "tests",
    "testing",
    "_vendor",
    "vendor",
    "_vendored",
    "extern",
    "_extern",
    "licenses",
    "__pycache__",
}
LARGEST_FILE = 300_000  # bytes
LARGEST_PACKAGE = 6_000_000  # bytes of the texts taken
LONGEST_LINE = 500  # characters; beyond it a file is data, or was written by a program
KNOWN_LINES = 0.5  # of a file's lines; beyond it it is a copy
SHORTEST_KNOWN = 15  # characters of a line that counts there

Row = dict[str, str]


@functools.cache
def rows(split: str) -> tuple[Row, ...]:
    """The texts of a split: the standard library's by module, then those of packages by name."""
    texts = [_stdlib_row(module, path) for module, path in source_files() if split_of(module) == split]
    if split != "train":
        return tuple(texts)
    return tuple(new_texts([*texts, *_package_rows()]))


def card() -> dict[str, Any]:
    """Counts by split, and the packages with their versions, licences and sizes."""
    return corpus_card(rows)


def corpus_card(rows: Callable[[str], tuple[Row, ...]]) -> dict[str, Any]:
    """The card of texts like these."""
    splits = {split: rows(split) for split in SPLITS}
    packages: dict[str, dict[str, Any]] = {}
    for row in splits["train"]:
        package = packages.setdefault(
            row["origin"], {"version": row["version"], "licence": row["licence"], "texts": 0, "characters": 0}
        )
        package["texts"] += 1
        package["characters"] += len(row["text"])
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "licence": LICENCE + "; packages by their own, below",
        "rows": {split: len(held) for split, held in splits.items()},
        "characters": {split: sum(len(row["text"]) for row in held) for split, held in splits.items()},
        "packages": packages,
    }


def _stdlib_row(module: str, path: Path) -> Row:
    version = ".".join(map(str, sys.version_info[:3]))
    return {"text": path.read_text("utf-8", "replace"), "origin": "python", "version": version, "licence": "PSF-2.0"}


def new_texts(texts: Sequence[Row]) -> Iterator[Row]:
    """Returns the documents most of whose lines are new."""
    seen: set[int] = set()
    for row in texts:
        lines = {hash(line.strip()) for line in row["text"].splitlines() if len(line.strip()) >= SHORTEST_KNOWN}
        if lines and len(lines & seen) <= KNOWN_LINES * len(lines):
            yield row
        seen |= lines


# Packages


def _package_rows() -> Iterator[Row]:
    held_out = {normal(row["source"]) for split in ("validation", "test") for row in docstrings.rows(split)}
    named = {distribution.metadata["Name"]: distribution for distribution in metadata.distributions()}
    for name in sorted(named, key=str.lower):
        licence = licence_of(named[name].metadata)
        if licence is None or name == "loralab":
            continue
        row = {"origin": name, "version": named[name].version, "licence": licence}
        for text in _texts(named[name]):
            if not any(normal(pair["source"]) in held_out for pair in pairs_of(text.encode(), name)):
                yield {"text": text, **row}


def licence_of(fields: Any) -> str | None:
    """The SPDX name of a permissive licence that a package's metadata state, else None."""
    if expression := fields.get("License-Expression"):
        names = set(re.split(r"[\s()]+", expression)) - {"", "AND", "OR"}
        return expression if names <= PERMISSIVE else None
    stated = [line.split(" :: ")[-1] for line in fields.get_all("Classifier") or [] if line.startswith("License ::")]
    stated = [name for name in stated if name != "OSI Approved"]
    if not stated:
        return STATED.get(str(fields.get("License")))
    return " OR ".join(sorted({CLASSIFIERS[name] for name in stated})) if set(stated) <= CLASSIFIERS.keys() else None


def _texts(distribution: metadata.Distribution) -> Iterator[str]:
    """A package's long description and files, in the order of a hash, up to its share."""
    taken = 0
    description = (distribution.read_text("METADATA") or "").partition("\n\n")[2]
    paths = [
        path for path in distribution.files or [] if path.suffix in SUFFIXES and not LEFT_OUT_FOLDERS & set(path.parts)
    ]
    paths = [path for path in paths if not path.name.startswith(("test_", "conftest", "LICENSE", "NOTICE"))]
    paths.sort(key=lambda path: hashlib.sha256(str(path).encode()).digest())
    for text in (description, *(_read(Path(str(path.locate()))) for path in paths)):
        if taken + len(text) > LARGEST_PACKAGE:
            return
        if text.strip() and max(map(len, text.splitlines())) <= LONGEST_LINE:
            taken += len(text)
            yield text


def _read(path: Path) -> str:
    """The file's text; "" where it is missing, too large or not UTF-8."""
    try:
        return path.read_text("utf-8") if path.stat().st_size <= LARGEST_FILE else ""
    except (OSError, UnicodeDecodeError):
        return ""
