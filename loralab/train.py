"""One training run, from a recipe to a run folder: rows, model, steps, adapter, proof, scores, record."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralab import checkpoint
from loralab.config import Recipe
from loralab.data.batches import collate
from loralab.data.encode import EncodedSplit, encode, resolve_lengths
from loralab.data.prompts import Prompt
from loralab.data.sources import Split, read_split
from loralab.engine import Engine, Proof, open_engine
from loralab.errors import RunError, Stopped
from loralab.evaluate import evaluate, leaked_rows, read_evaluation_rows
from loralab.loop import Course, plan_steps, run_steps
from loralab.plot import write_curves
from loralab.progress import say
from loralab.run import (
    RECORD,
    check_free,
    environment,
    new_folder,
    open_again,
    read_record,
    size_on_disk,
    write_json,
    write_recipe,
)
from loralab.trackers import check_installed
from loralab.validation import Validator, best_of, chose_reported_rows, make_validator, read_validation_rows

PROOF_ROWS = 4  # on which the saved model is held against the live one


def train(recipe: Recipe, out: Path | None, resume: bool = False) -> tuple[Path, dict[str, Any]]:
    """Trains, saves, proves and evaluates.

    Args:
        out: the run's folder, new or empty; None takes the next free runs/NAME.
        resume: go on with the run in `out`, which must be of this very recipe.

    Returns:
        The run's folder and the record in it.
    """
    if resume:
        open_again(out, recipe)
        if out is not None and (out / RECORD).exists():
            say(f"{out} has finished already.")
            return out, read_record(out)
    else:
        check_free(out)
    check_installed(recipe.training.trackers)
    rows = read_evaluation_rows(recipe)  # first, so that a missing split or column is found before an hour of training
    training_rows = read_training_rows(recipe)
    validation_rows = read_validation_rows(recipe)
    if warning := chose_reported_rows(recipe):
        say(warning)
    if leaked := leaked_rows(training_rows, rows):
        say(f"{leaked:,} of the {len(rows):,} {rows.split} rows have a source that is among the training rows too.")
    engine = open_engine(recipe)
    say(f"{recipe.model.name} on {engine.device} in {engine.dtype} ({engine.dtype_reason})\n{engine.summary}")
    lengths = resolve_lengths(
        training_rows, engine.tokenizer, recipe.data.max_source_length, recipe.data.max_target_length
    )
    folder = (
        out if resume and out is not None else new_folder(out, recipe.name)
    )  # nothing is left behind by a mistake above
    with checkpoint.locked(folder):
        write_recipe(folder, recipe)
        validator = make_validator(recipe, validation_rows, engine, lengths)
        return folder, _run(engine, recipe, training_rows, rows, validator, lengths, folder)


def _run(
    engine: Engine,
    recipe: Recipe,
    training_rows: Split,
    rows: Split,
    validator: Validator | None,
    lengths: tuple[int, int],
    folder: Path,
) -> dict[str, Any]:
    record: dict[str, Any] = {"name": recipe.name, "method": recipe.training.method}
    record |= {"trainable": engine.trainable, "total": engine.total}
    if recipe.training.method != "none":
        record |= _train_and_save(engine, recipe, training_rows, validator, lengths, folder)
    record["peak_memory_bytes"] = engine.peak_memory()
    scores = evaluate(engine, recipe, rows, lengths, folder)
    record |= {"metrics": scores.summary(), "evaluated": describe_rows(rows)}
    record["evaluated"]["leaked"] = leaked_rows(training_rows, rows)
    record |= {"lengths": lengths, "device": engine.device, "dtype": engine.dtype, **environment()}
    write_json(folder / RECORD, record)
    checkpoint.remove(folder)
    return record


def read_training_rows(recipe: Recipe) -> Split:
    """The training split's rows."""
    data = recipe.data
    return read_split(data.name, "train", data.source, data.target, data.max_train_rows)


def _train_and_save(
    engine: Engine,
    recipe: Recipe,
    rows: Split,
    validator: Validator | None,
    lengths: tuple[int, int],
    folder: Path,
) -> dict[str, Any]:
    encoded = encode(rows, engine.tokenizer, Prompt(recipe.data.prompt, recipe.data.source), *lengths)
    say(_counts(rows, encoded))
    course = _steps(engine, recipe, encoded, validator, folder)
    card = {"recipe": recipe.model_dump(mode="json"), "lengths": lengths, "versions": environment()["versions"]}
    saved = engine.save(folder, card)
    peak = engine.peak_memory()  # before the proof, which holds the model twice
    some = plan_steps(recipe, encoded)[0][0][:PROOF_ROWS]
    proof = engine.prove(saved, collate(encoded, some, engine.pad_id))
    _check(proof, saved)
    return {
        "saved": str(saved),
        "adapter_bytes": size_on_disk(saved),
        "steps": course.steps,
        "seconds": course.seconds,
        "tokens_per_second": course.tokens_per_second,
        "training_peak_memory_bytes": peak,
        "proof": asdict(proof),
        "trained_on": describe_rows(rows),
        "validation": None if validator is None else _validations(recipe, validator, course),
    }


def _steps(engine: Engine, recipe: Recipe, encoded: EncodedSplit, validator: Validator | None, folder: Path) -> Course:
    """All steps, and their curves, also of a run that was stopped."""
    try:
        course = run_steps(engine, recipe, encoded, folder, validator)
    except (Stopped, RunError):
        with suppress(Exception):  # what stopped the run is the news, not that it cannot be drawn
            write_curves(folder, recipe.validation.metric)
        raise
    write_curves(folder, recipe.validation.metric)
    return course


def _validations(recipe: Recipe, validator: Validator, course: Course) -> dict[str, Any]:
    metric, best = recipe.validation.metric, best_of(course.validations, recipe.validation.metric)
    return {
        **describe_rows(validator.split),
        "metric": metric,
        "best": None if best is None else {"step": best["step"], "value": best[metric]},
        "kept_step": course.kept,
        "stopped_early": course.steps < course.planned,
        "chose_reported_rows": chose_reported_rows(recipe) is not None,
        "validations": list(course.validations),
    }


def _check(proof: Proof, saved: Path) -> None:
    if not proof.reloaded_equal:
        raise RunError(
            f"What was saved in {saved} does not give the trained model's logits when read back. Do not use it; please report this."
        )
    error, tolerance = proof.merged_error, proof.merged_tolerance
    if error is not None and tolerance is not None and error > tolerance:
        say(
            f"Merged into the base, the adapter's logits differ by {error:.1e}, more than this dtype's {tolerance:.0e}."
        )


def _counts(rows: Split, encoded: EncodedSplit) -> str:
    skipped = f", {len(rows.skipped_empty)} empty ones skipped" if rows.skipped_empty else ""
    return (
        f"{rows.name}: {len(rows):,} training rows{skipped}; sources cut to {encoded.max_source_length} tokens: {encoded.cut_sources:,}, "
        f"targets cut to {encoded.max_target_length}: {encoded.cut_targets:,}"
    )


def describe_rows(rows: Split) -> dict[str, Any]:
    """What a record says of the rows that it used."""
    return {
        "data": rows.name,
        "split": rows.split,
        "rows": len(rows),
        "skipped_empty": len(rows.skipped_empty),
        "hash": rows.content_hash,
    }
