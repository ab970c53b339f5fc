"""One training run, from a recipe to a run folder: rows, model, steps, adapter, proof, scores, record."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loralab.atomic_files import write_json
from loralab.config.extras import check_extras
from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.console.progress import say
from loralab.data.row_records import hashes_of
from loralab.engine import Engine, open_engine
from loralab.errors import UserError
from loralab.evaluation.confusion_matrix import write_confusion
from loralab.evaluation.evaluate import evaluate
from loralab.evaluation.forgetting import measure_after, measure_before
from loralab.runs import checkpoint
from loralab.runs.environment import environment
from loralab.runs.folder import (
    RECIPE,
    RECORD,
    check_free,
    check_resumable,
    check_whole,
    missing_files,
    new_folder,
    write_recipe,
)
from loralab.runs.record import read_record
from loralab.tasks import task_of
from loralab.training.datasets import (
    RunDatasets,
    TokenizedDatasets,
    describe_datasets,
    describe_forgetting,
    read_run_datasets,
    tokenize_run_datasets,
)
from loralab.training.from_scratch import check_sizes, make_random_base, remove_base
from loralab.training.save_and_verify import train_and_save
from loralab.training.starting_point import starting_point
from loralab.training.text_samples import check_sample_length
from loralab.training.validation import make_validator


def train(recipe: Recipe, out: Path | None, resume: bool = False) -> tuple[Path, dict[str, Any]]:
    """Trains, saves, proves and evaluates.

    Args:
        out: the run's folder, new or empty; None takes the next free runs/NAME.
        resume: go on with the run in `out`, which must be of this very recipe.

    Returns:
        The run's folder and the record in it.
    """
    recipe, start = starting_point(recipe)
    if resume:
        check_resumable(out, recipe)
        if out is not None and (out / RECORD).exists():
            check_whole(out, missing_files(out, recipe))
            record = read_record(out)
            if not (record.get("stopped") == "max_minutes" and _more_time(out, recipe)):
                say(f"{out} has finished already.")
                return out, record
    else:
        check_free(out)
    check_extras(recipe, trains=True)
    check_sizes(recipe)
    task = task_of(recipe.data)
    task.check()
    datasets = read_run_datasets(recipe)  # first, so that a missing split or column is found before an hour of training
    place = out if resume else None
    with _place_for_base(recipe, place, out) as place:
        base = (
            None
            if place is None or recipe.model.init != "random"
            else make_random_base(recipe, datasets.trained_on, place)
        )
        engine = open_engine(recipe, base, start, datasets.labels)
        say(f"{recipe.model.name} on {engine.device} in {engine.dtype} ({engine.dtype_reason})\n{engine.summary}")
        lengths = task.resolve_lengths(engine, datasets.training)
        task.check_lengths(lengths, recipe.evaluation.max_new_tokens, engine.causal, engine.positions)
        if recipe.validation.samples:
            check_sample_length(recipe.evaluation.max_new_tokens, engine.positions)
        tokens = tokenize_run_datasets(engine, recipe, datasets, lengths)
        about = describe_datasets(datasets, tokens)
    folder = place or new_folder(out, recipe.name)  # nothing is left behind by a mistake above
    with checkpoint.locked(folder):
        write_recipe(folder, recipe)
        checkpoint.check_same_rows(folder, hashes_of(about))
        return folder, _run(engine, recipe, datasets, tokens, lengths, folder, about)


def _more_time(out: Path, recipe: Recipe) -> bool:
    """Tells whether the recipe gives a run more minutes than the stored one, which stopped it."""
    before, now = load_recipe(out / RECIPE).training.max_minutes, recipe.training.max_minutes
    return before is not None and (now is None or now > before)


@contextmanager
def _place_for_base(recipe: Recipe, place: Path | None, out: Path | None) -> Iterator[Path | None]:
    """The run's folder, made now where a base is to be written into it; a mistake within removes it again."""
    if place is not None or recipe.model.init != "random":
        yield place
        return
    folder = new_folder(out, recipe.name)
    write_recipe(folder, recipe)  # from here on the run can be gone on with
    try:
        yield folder
    except UserError:
        shutil.rmtree(folder)
        raise


def _run(
    engine: Engine,
    recipe: Recipe,
    datasets: RunDatasets,
    tokens: TokenizedDatasets,
    lengths: tuple[int, int],
    folder: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    record: dict[str, Any] = {"name": recipe.name, "method": recipe.training.method}
    record |= {"trainable": engine.trainable, "total": engine.total}
    before = measure_before(engine, recipe, datasets.held_out, tokens.held_out)
    if tokens.training is not None:
        validator = make_validator(recipe, datasets.choosing, engine, lengths)
        record |= train_and_save(engine, recipe, tokens.training, validator, lengths, folder)
    record["peak_memory_bytes"] = engine.peak_memory()
    scores = evaluate(engine, recipe, datasets.evaluated, tokens.evaluated, folder)
    record |= {"metrics": scores.summary(), **about}
    if floors := task_of(recipe.data).compression_floors(datasets.training, datasets.evaluated):
        record["floors"] = floors
    if engine.labels is not None:
        record["labels"] = engine.labels.as_json() | (scores.labels or {})
    if scores.labels is not None:
        write_confusion(folder, scores.labels)
    after = before if tokens.training is None else measure_after(engine, recipe, datasets.held_out, tokens.held_out)
    record["forgetting"] = describe_forgetting(datasets, tokens.held_out, before, after, folder)
    record |= {
        "lengths": list(lengths),
        "device": engine.device,
        "dtype": engine.dtype,
        "quantize": recipe.model.quantize,
    }
    record |= environment()
    write_json(folder / RECORD, record)
    if record.get("stopped") != "max_minutes":  # which can be gone on with
        checkpoint.remove(folder)
        remove_base(folder)
    return record
