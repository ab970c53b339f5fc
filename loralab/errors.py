"""Every error that loralab raises on purpose.

    LoralabError
    ├── UserError (also a ValueError)   a mistake that the user can mend; the command line prints it and exits with 2
    │   ├── RecipeError                 the recipe or an override
    │   ├── TargetError                 a LoRA rule that selects nothing, or something that LoRA cannot wrap
    │   ├── DataError                   a data set, a file of it, or a row
    │   ├── ModelError                  a base model's folder, its files, or its settings
    │   ├── AdapterError                an adapter's files, or an adapter that does not fit its base
    │   └── RunError                    a run folder
    ├── MissingExtra (also an ImportError)   an optional library that is not installed; names the extra
    └── Stopped                         work was stopped from outside, after it was saved; says how to go on; exit code 130

Each message says what was got, what was expected, and what to do. A broken promise of our own is an `assert`.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError


class LoralabError(Exception):
    """The root of the tree."""


class UserError(LoralabError, ValueError):
    """A mistake that the user can mend."""


class RecipeError(UserError):
    """The recipe, or an override of it, is wrong."""


class TargetError(UserError):
    """A LoRA rule selects nothing, or something that LoRA cannot wrap."""


class DataError(UserError):
    """A data set, one of its files, or a row of it is wrong."""


class ModelError(UserError):
    """A base model's folder, its files, or its settings are wrong."""


class AdapterError(UserError):
    """An adapter's files are wrong, or do not fit the base."""


class RunError(UserError):
    """A run folder is missing, incomplete, or already taken."""


class Stopped(LoralabError):
    """Work was stopped from outside, after it was saved."""


class MissingExtra(LoralabError, ImportError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed. It comes with an extra: pip install 'loralab[{extra}]'")


def check_installed(library: str, extra: str) -> None:
    """Raises MissingExtra where there is no such library."""
    if importlib.util.find_spec(library) is None:
        raise MissingExtra(library, extra)


@contextmanager
def about(key: str) -> Iterator[None]:
    """Whatever mistake of the user's is told within is told of this key of the recipe."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{key}: {error}") from error


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """ "Did you mean ...?" with the known names nearest to `word`, or all of them where none is near."""
    names = sorted({str(name) for name in known})
    near = difflib.get_close_matches(word, names, n=count, cutoff=0.6)
    if near:
        return "Did you mean " + " or ".join(repr(name) for name in near) + "?"
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"There are: {listed or 'none'}."


def nearest_file(path: Path) -> str:
    """ " Did you mean ...?" with the names beside a path that is not there, or "" where none is near."""
    folder = path.parent
    try:
        beside = [str(folder / each.name) for each in folder.iterdir() if each.name != path.name]
    except OSError:
        return ""
    near = nearest(str(path), beside) if beside else ""
    return f" {near}" if near.startswith("Did you mean") else ""


def invalid_settings(error: ValidationError) -> str:
    """Returns what is wrong with the values of a record's fields, in one line."""
    return "; ".join(_explain(dict(mistake)) for mistake in error.errors())


def _explain(mistake: dict[str, Any]) -> str:
    message = str(mistake["msg"]).removeprefix("Value error, ").replace("Input should be", "it must be")
    return f"{'.'.join(map(str, mistake['loc']))} is {mistake['input']!r}; {message}" if mistake["loc"] else message
