"""Using what was trained: scoring it again, merging it. generate.py answers with it."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from loralab.adapters.files import CARD
from loralab.config.extras import check_extras
from loralab.config.recipe import Recipe
from loralab.console.progress import say
from loralab.console.tables import empty_row
from loralab.data.row_records import describe_rows
from loralab.data.training_rows import read_training_rows
from loralab.engine import Engine, load_engine, merge, open_engine
from loralab.errors import RecipeError, UserError
from loralab.evaluation.evaluate import evaluate
from loralab.evaluation.rows import encode_asked, read_evaluation_rows
from loralab.metrics.labels import Labels
from loralab.runs.find_saved_model import NO_DATA, NO_ROWS, find_saved_model
from loralab.runs.folder import check_free, size_on_disk
from loralab.tasks import task_of


def evaluate_saved(trained: Path, overrides: list[str], base: str | None) -> dict[str, Any]:
    """Scores a finished run or an adapter; the row of a table."""
    recipe, saved = find_saved_model(trained, overrides, base, NO_DATA)
    if recipe.data.name == NO_ROWS:
        given = f" --base {quote(base)}" if base else ""
        raise RecipeError(
            f"{trained} does not say on which data it is to be scored, as it is no run of loralab's. Give its columns: "
            f"loralab evaluate {quote(str(trained))}{given} data.name=FOLDER data.source=COLUMN data.target=COLUMN "
            "data.prompt='Text: {COLUMN}' evaluation.split=test"
        )
    check_extras(recipe, trains=False)
    rows = read_evaluation_rows(recipe)
    task = task_of(recipe.data)
    settles = task.classifies and not _brings_labels(saved)
    engine = open_trained(recipe, saved, task.settle_labels(read_training_rows(recipe)) if settles else None)
    task.check_labels(engine.labels, rows)
    lengths = trained_lengths(engine, recipe, reads_rows=True)
    training = read_training_rows(recipe) if recipe.evaluation.shots else None
    asked = encode_asked(engine, recipe, rows, lengths, training)
    scores = evaluate(engine, recipe, rows, asked, None)
    return {
        **empty_row(recipe.name, recipe.training.method),
        "trainable": engine.trainable,
        "total": engine.total,
        "adapter_bytes": size_on_disk(saved) if saved else 0,
        "peak_memory_bytes": engine.peak_memory(),
        "metrics": scores.summary(),
        **({} if scores.labels is None else {"labels": scores.labels}),
        "evaluated": describe_rows(rows, asked),
    }


def open_trained(recipe: Recipe, saved: Path | None, labels: Labels | None = None) -> Engine:
    """Loads the model of a finished run, or a base as it is (`saved` None).

    Args:
        labels: of a classifier that was saved without its own.
    """
    engine = open_engine(recipe, labels=labels) if saved is None else load_engine(recipe, saved, labels)
    if engine.note:
        say(engine.note)
    return engine


def _brings_labels(saved: Path | None) -> bool:
    """Tells whether our own card says them."""
    return saved is not None and (saved / CARD).exists()


def merge_saved(trained: Path, out: Path, base: str | None) -> str:
    """Writes a run's base and adapter as one plain model; gives the dtype that its sums are rounded to, the base's on disk."""
    recipe, saved = find_saved_model(trained, [], base, NO_DATA)
    if saved is None and recipe.data.name == NO_ROWS:
        raise UserError(f"{trained} is a plain model: there is nothing to merge. Give a run's folder, or an adapter's.")
    if recipe.training.method not in ("lora", "head") or saved is None:
        raise UserError(f"{trained} has no adapter to merge: its method is {recipe.training.method}.")
    check_free(out)
    return merge(recipe.model.name, saved, out)


def trained_lengths(engine: Engine, recipe: Recipe, reads_rows: bool = False) -> tuple[int, int]:
    """Returns the longest source and target in tokens: those of the training, unless an override says otherwise.

    Args:
        reads_rows: whether a percentile that an override gives may be taken of the training rows.

    Raises:
        RecipeError: the lengths do not fit the model; a percentile is given, and no rows are read.
    """
    task, (source, target) = task_of(recipe.data), (recipe.data.max_source_length, recipe.data.max_target_length)
    if not (isinstance(source, int) and isinstance(target, int)):
        if not reads_rows:
            given = source if isinstance(source, str) else target
            raise RecipeError(
                f"{given} is a percentile of training rows, and no rows are read here. Give a number of tokens, such as "
                "data.max_source_length=512 data.max_target_length=64."
            )
        lengths = task.resolve_lengths(engine, read_training_rows(recipe))
    else:
        lengths = task.within_positions((source, target), engine)
    task.check_lengths(lengths, recipe.evaluation.max_new_tokens, engine.causal, engine.positions)
    return lengths
