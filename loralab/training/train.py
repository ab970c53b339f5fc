"""One training run, from a recipe to a run folder: rows, model, steps, adapter, proof, scores, record."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralab.atomic_files import write_json
from loralab.config.extras import check_extras
from loralab.config.recipe import Recipe
from loralab.console.progress import Progress, say
from loralab.data import span_corruption
from loralab.data.batches import collate
from loralab.data.mixture import Mixture, Trained
from loralab.data.tokenization import check_lengths, resolve_lengths
from loralab.engine import Engine, SavedModelCheck, open_engine
from loralab.errors import RunError, Stopped, UserError
from loralab.evaluation.classification import within_positions
from loralab.evaluation.confusion_matrix import write_confusion
from loralab.evaluation.evaluate import evaluate, text_floors
from loralab.evaluation.forgetting import measure_after, measure_before
from loralab.reports.run_plots import write_curves
from loralab.runs import checkpoint
from loralab.runs.environment import environment
from loralab.runs.folder import (
    NO_DATA,
    RECORD,
    check_free,
    check_resumable,
    check_whole,
    find_saved_model,
    missing_files,
    new_folder,
    read_record,
    size_on_disk,
    write_recipe,
)
from loralab.runs.validation_lines import best_of
from loralab.training.datasets import (
    RunDatasets,
    TokenizedDatasets,
    describe_datasets,
    describe_forgetting,
    describe_rows,
    hashes_of,
    read_run_datasets,
    tokenize_run_datasets,
)
from loralab.training.from_scratch import check_sizes, make_random_base, remove_base
from loralab.training.loop import TrainingResult, plan_steps, run_steps
from loralab.training.lr_search import find_rate
from loralab.training.text_samples import check_sample_length
from loralab.training.validation import Validator, make_validator

PROOF_ROWS = 4  # on which the saved model is held against the live one


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
            say(f"{out} has finished already.")
            return out, record
    else:
        check_free(out)
    check_extras(recipe, trains=True)
    check_sizes(recipe)
    span_corruption.check_lengths(recipe.data)
    material = read_run_datasets(recipe)  # first, so that a missing split or column is found before an hour of training
    place = out if resume else None
    with _place_for_base(recipe, place, out) as place:
        base = (
            None
            if place is None or recipe.model.init != "random"
            else make_random_base(recipe, material.trained_on, place)
        )
        engine = open_engine(recipe, base, start, material.labels)
        say(f"{recipe.model.name} on {engine.device} in {engine.dtype} ({engine.dtype_reason})\n{engine.summary}")
        settings = recipe.data.max_source_length, recipe.data.max_target_length
        lengths = resolve_lengths(material.training, engine.tokenizer, *settings, engine.prompt)
        lengths = within_positions(lengths, engine.positions) if engine.labels is not None else lengths
        check_lengths(recipe.data, lengths, recipe.evaluation.max_new_tokens, engine.causal, engine.positions)
        if recipe.validation.samples:
            check_sample_length(recipe.evaluation.max_new_tokens, engine.positions)
        tokens = tokenize_run_datasets(engine, recipe, material, lengths)
        about = describe_datasets(material, tokens)
    folder = place or new_folder(out, recipe.name)  # nothing is left behind by a mistake above
    with checkpoint.locked(folder):
        write_recipe(folder, recipe)
        checkpoint.check_same_rows(folder, hashes_of(about))
        return folder, _run(engine, recipe, material, tokens, lengths, folder, about)


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
    material: RunDatasets,
    tokens: TokenizedDatasets,
    lengths: tuple[int, int],
    folder: Path,
    about: dict[str, Any],
) -> dict[str, Any]:
    record: dict[str, Any] = {"name": recipe.name, "method": recipe.training.method}
    record |= {"trainable": engine.trainable, "total": engine.total}
    before = measure_before(engine, material.held_out, tokens.held_out)
    if tokens.training is not None:
        validator = make_validator(recipe, material.choosing, engine, lengths)
        record |= _train_and_save(engine, recipe, tokens.training, validator, lengths, folder)
    record["peak_memory_bytes"] = engine.peak_memory()
    scores = evaluate(engine, recipe, material.evaluated, tokens.evaluated, folder)
    record |= {"metrics": scores.summary(), **about}
    if recipe.data.packing:
        record["floors"] = text_floors(material.training, material.evaluated)
    if scores.labels is not None:
        assert engine.labels is not None
        record["labels"] = engine.labels.as_json() | scores.labels
        write_confusion(folder, scores.labels)
    after = before if tokens.training is None else measure_after(engine, material.held_out, tokens.held_out)
    record["forgetting"] = describe_forgetting(material, tokens.held_out, before, after, folder)
    record |= {"lengths": lengths, "device": engine.device, "dtype": engine.dtype, "quantize": recipe.model.quantize}
    record |= environment()
    write_json(folder / RECORD, record)
    checkpoint.remove(folder)
    remove_base(folder)
    return record


def _train_and_save(
    engine: Engine,
    recipe: Recipe,
    encoded: Trained,
    validator: Validator | None,
    lengths: tuple[int, int],
    folder: Path,
) -> dict[str, Any]:
    parts = encoded.parts if isinstance(encoded, Mixture) else (encoded,)
    for rows in (*parts, validator.encoded) if validator is not None else parts:
        engine.cache_frozen_features(rows, Progress("once for all epochs", len(rows)).update)
    pilot = None
    if recipe.optimizer.learning_rate == "pilot":
        assert validator is not None
        pilot = find_rate(engine, recipe, encoded, validator, folder)
        optimizer = recipe.optimizer.model_copy(update={"learning_rate": pilot["chosen"]})
        recipe = recipe.model_copy(update={"optimizer": optimizer})
    course = _steps(engine, recipe, encoded, validator, folder)
    card = {"recipe": recipe.model_dump(mode="json"), "lengths": lengths, "versions": environment()["versions"]}
    saved = engine.save(folder, card)
    peak = engine.peak_memory()  # before the proof, which holds the model twice
    some = plan_steps(recipe, encoded)[0][0][:PROOF_ROWS]
    proof = engine.verify_saved(saved, collate(encoded, some, engine.pad_id))
    _check(proof, saved)
    return {
        "saved": str(saved),
        "adapter_bytes": size_on_disk(saved),
        "steps": course.steps,
        "seconds": course.seconds,
        "tokens_per_second": course.tokens_per_second,
        "training_peak_memory_bytes": peak,
        "proof": asdict(proof),
        "pilot": pilot,
        "validation": None if validator is None else _validations(recipe, validator, course),
    }


def _steps(
    engine: Engine, recipe: Recipe, encoded: Trained, validator: Validator | None, folder: Path
) -> TrainingResult:
    """All steps, and their curves, also of a run that was stopped."""
    try:
        course = run_steps(engine, recipe, encoded, folder, validator)
    except (Stopped, RunError):
        with suppress(Exception):  # what stopped the run is the news, not that it cannot be drawn
            write_curves(folder, recipe.validation.metric)
        raise
    write_curves(folder, recipe.validation.metric)
    return course


def _validations(recipe: Recipe, validator: Validator, course: TrainingResult) -> dict[str, Any]:
    metric, best = recipe.validation.metric, best_of(course.validations, recipe.validation.metric)
    return {
        **describe_rows(validator.choosing.rows),
        "metric": metric,
        "best": None if best is None else {"step": best["step"], "value": best[metric]},
        "kept_step": course.kept,
        "stopped_early": course.steps < course.planned,
        "held_out": validator.choosing.held_out,
        "validations": list(course.validations),
    }


def _check(proof: SavedModelCheck, saved: Path) -> None:
    if not proof.reloaded_equal:
        raise RunError(
            f"What was saved in {saved} does not give the trained model's logits when read back. Do not use it; please report this."
        )
    error, tolerance = proof.merged_error, proof.merged_tolerance
    if error is not None and tolerance is not None and error > tolerance:
        say(
            f"Merged into the base, the adapter's logits differ by {error:.1e}, more than this dtype's {tolerance:.0e}."
        )
