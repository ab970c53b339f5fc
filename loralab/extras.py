"""Optional libraries that a recipe calls for: one that is missing is told of before any row is read."""

from __future__ import annotations

from collections.abc import Iterator

from loralab.config import Recipe
from loralab.errors import check_installed


def check_extras(recipe: Recipe) -> None:
    """Raises MissingExtra where a library is not installed that the recipe's model or its trackers need."""
    for library, extra in _needed(recipe):
        check_installed(library, extra)


def _needed(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(library, the extra that brings it)."""
    if recipe.model.quantize:
        yield "bitsandbytes", "quantize"
    for tracker in recipe.training.trackers:
        yield tracker, tracker
