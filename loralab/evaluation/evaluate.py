"""Scores of a model on real rows: loss per target token, and metrics of what it answers, each with a bootstrap interval.

Rows with the same source (one dialogue, three references) are answered once, and resampled together: they are not
independent. How a task is scored stands in `tasks/`.
"""

from __future__ import annotations

from pathlib import Path

from loralab.config.recipe import Recipe
from loralab.data.encoded import Encoded
from loralab.data.splits import Split
from loralab.engine import Engine
from loralab.metrics.scores import Scores
from loralab.runs.folder import PREDICTIONS
from loralab.tasks import task_of


def evaluate(engine: Engine, recipe: Recipe, rows: Split, encoded: Encoded, folder: Path | None) -> Scores:
    """Scores the engine's model on the rows.

    Args:
        encoded: the rows' tokens.
        folder: takes predictions.jsonl; None writes nothing.
    """
    file = None if folder is None else folder / PREDICTIONS
    return task_of(recipe.data).evaluate(engine, recipe.evaluation, rows, encoded, file)
