"""The training split's rows: an index of them, and what was found in them."""

from __future__ import annotations

from loralab.config.recipe import Recipe
from loralab.data.splits import StreamedSplit, index_split


def read_training_rows(recipe: Recipe) -> StreamedSplit:
    """The index of the training split's rows."""
    return index_split(recipe.data, "train")
