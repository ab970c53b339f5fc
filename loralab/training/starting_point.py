"""The adapter or model that a training starts from (`training.start_from`)."""

from __future__ import annotations

from pathlib import Path

from loralab.config.recipe import Recipe
from loralab.errors import RunError
from loralab.runs.find_saved_model import NO_DATA, find_saved_model


def starting_point(recipe: Recipe) -> tuple[Recipe, Path | None]:
    """(the recipe, on the base that `training.start_from` means; the adapter to go on with, if it is one).

    Raises:
        RunError: there is nothing to start from, or the method cannot start from it.
    """
    if recipe.training.start_from is None or recipe.training.method == "none":
        return recipe, None
    place = Path(recipe.training.start_from)
    earlier, saved = find_saved_model(place, [], None, NO_DATA)
    if saved is None:
        raise RunError(f"training.start_from: {place} has trained nothing (its method is {earlier.training.method}).")
    if earlier.training.method == "full":
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(saved)})}), None
    return recipe, saved
