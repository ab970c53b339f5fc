"""The standard library's source files, and which split each module is in.

A top-level module or package is in one split with all of its files. Which one is drawn from a hash of its name alone,
so that it is the same on every machine and for every version of Python: a model that was pretrained on one version's
training modules has not read another's test modules.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from loralab.errors import DataError

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.1  # of the modules for validation, and as many for the test
SALT = "loralab-36"  # drawn once, so that the splits fall about 80/10/10 for Python 3.10 to 3.13 and no large module makes up one

# Tests, and what some systems leave out or add: the data set should not depend on where Python came from.
LEFT_OUT = {"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo", "venv"}
LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
# An accelerated module and its Python twin, or the parts of one: a name here has the split of the other.
TWINS = {
    "sre": "re",
    "ntpath": "posixpath",
    "genericpath": "posixpath",
    "nturl2path": "urllib",
    "collections_abc": "collections",
}


def source_files() -> Iterator[tuple[str, Path]]:
    """(top-level module, file) of every source file, in the order of the names.

    Raises:
        DataError: this Python has no source files of its library, as in a zip file or a frozen program.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    count = 0
    for module in sorted(sys.stdlib_module_names - LEFT_OUT):
        for path in _files(folder, module):
            count += 1
            yield module, path
    if count < 100:
        raise DataError(
            f"This Python ({sys.version.split()[0]}) has {count} source files of its standard library in {folder}, where hundreds are "
            "needed: the embedded data are made from them. Use a Python that is installed with its sources, as from python.org, "
            "a package manager or conda."
        )


def _files(folder: Path, module: str) -> list[Path]:
    if (path := folder / f"{module}.py").is_file():
        return [path]
    found = (path for path in (folder / module).rglob("*.py") if path.is_file())
    return sorted(path for path in found if not LEFT_OUT_FOLDERS & set(path.relative_to(folder).parts))


def split_of(module: str) -> str:
    """The split of a top-level module; `_pydatetime`, `_datetime` and `datetime` are one."""
    name = module.removeprefix("_").removeprefix("py") if module.startswith("_py") else module.removeprefix("_")
    name = TWINS.get(name, name)
    share = int.from_bytes(hashlib.sha256(f"{SALT}:{name}".encode()).digest()[:8], "big") / 2**64
    return "test" if share < HELD_OUT else "validation" if share < 2 * HELD_OUT else "train"
