"""Optional libraries that a recipe calls for: one that is missing is told of before any row is read."""

from __future__ import annotations

from loralab.config.recipe import Recipe
from loralab.errors import check_installed


def check_extras(recipe: Recipe, trains: bool) -> None:
    """Raises MissingExtra where a library is not installed that the recipe's model needs, or, where it `trains`, its trackers."""
    if recipe.model.quantize:
        check_installed("bitsandbytes", "quantize")
    for tracker in recipe.training.trackers if trains else ():
        check_installed(tracker, tracker)
