"""The evaluated rows, as text and as tokens."""

from __future__ import annotations

import numpy as np

from loralab.config.recipe import Recipe
from loralab.data.encoded import Encoded
from loralab.data.splits import AnySplit, Split, read_split
from loralab.engine import Engine
from loralab.tasks import task_of


def read_evaluation_rows(recipe: Recipe) -> Split:
    """Reads the rows that the reported numbers come from."""
    return read_split(recipe.data, recipe.evaluation.split)


def leaked_rows(training: AnySplit, rows: AnySplit, *more: AnySplit) -> int:
    """Counts the evaluated rows whose source the model was trained on, white space apart; `more` was trained on too."""
    hashes = np.concatenate([each.source_hashes for each in (training, *more)])
    return int(np.isin(rows.source_hashes, hashes).sum())


def encode_asked(
    engine: Engine, recipe: Recipe, rows: Split, lengths: tuple[int, int], training: AnySplit | None
) -> Encoded:
    """Returns the tokens of the rows that are reported: after worked examples from the training rows, where the recipe wants any."""
    seed = recipe.training.one_seed
    return task_of(recipe.data).encode_evaluated(engine, rows, lengths, seed, recipe.evaluation, training)
