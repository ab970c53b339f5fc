"""Optional libraries that a recipe calls for: one that is missing is told of before any row is read."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from loralab.config import Recipe
from loralab.errors import MissingExtra


def check_extras(recipe: Recipe) -> None:
    """Raises MissingExtra where a library is not installed that the recipe's model or its trackers need."""
    for library, extra in _needed(recipe):
        check_installed(library, extra)


def check_installed(library: str, extra: str) -> None:
    """Raises MissingExtra where there is no such library."""
    if importlib.util.find_spec(library) is None:
        raise MissingExtra(library, extra)


def _needed(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(library, the extra that brings it)."""
    if recipe.model.quantize:
        yield "bitsandbytes", "quantize"
    for tracker in recipe.training.trackers:
        yield tracker, tracker
