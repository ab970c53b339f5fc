"""Using what was trained: scoring it again, merging it. answer.py answers with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loralab.config import Recipe
from loralab.data.encode import check_lengths, resolve_lengths
from loralab.engine import Engine, load_engine, merge, open_engine
from loralab.errors import UserError
from loralab.evaluate import encode_asked, evaluate, read_evaluation_rows
from loralab.run import find_trained, new_folder, size_on_disk
from loralab.table import empty_row
from loralab.train import describe_rows, read_training_rows


def evaluate_saved(trained: Path, overrides: list[str], base: str | None) -> dict[str, Any]:
    """Scores a finished run or an adapter; the row of a table."""
    recipe, saved = find_trained(trained, overrides, base)
    rows = read_evaluation_rows(recipe)
    engine = open_engine(recipe) if saved is None else load_engine(recipe, saved)
    lengths = lengths_of(engine, recipe)
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
        "evaluated": describe_rows(rows, asked),
    }


def merge_saved(trained: Path, out: Path, base: str | None) -> None:
    """Writes a run's base and adapter as one plain model."""
    recipe, saved = find_trained(trained, [], base)
    if recipe.training.method != "lora" or saved is None:
        raise UserError(f"{trained} has no adapter to merge: its method is {recipe.training.method}.")
    merge(recipe.model.name, saved, new_folder(out, out.name))


def lengths_of(engine: Engine, recipe: Recipe) -> tuple[int, int]:
    """The lengths of the training; a percentile was settled then."""
    source, target = recipe.data.max_source_length, recipe.data.max_target_length
    if not (isinstance(source, int) and isinstance(target, int)):
        source, target = resolve_lengths(read_training_rows(recipe), engine.tokenizer, source, target, engine.prompt)
    check_lengths(recipe.data, (source, target), recipe.evaluation.max_new_tokens, engine.causal, engine.positions)
    return source, target
