"""The steps of a run, then saving what was trained and verifying what was saved."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralab.config.recipe import Recipe
from loralab.console.progress import Progress, say
from loralab.data.encoded import Trained
from loralab.data.row_records import describe_rows
from loralab.engine import Engine, SavedModelCheck
from loralab.errors import RunError, Stopped
from loralab.reports.run_plots import write_curves
from loralab.runs.environment import environment
from loralab.runs.folder import (
    size_on_disk,
)
from loralab.runs.validation_lines import best_of
from loralab.training.loop import TrainingResult, plan_steps, run_steps
from loralab.training.lr_search import find_rate
from loralab.training.validation import Validator

PROOF_ROWS = 4  # on which the saved model is held against the live one


def train_and_save(
    engine: Engine,
    recipe: Recipe,
    encoded: Trained,
    validator: Validator | None,
    lengths: tuple[int, int],
    folder: Path,
) -> dict[str, Any]:
    for rows in (*encoded.parts, *([] if validator is None else [validator.encoded])):
        engine.cache_frozen_features(rows, Progress("once for all epochs", len(rows)).update)
    pilot = None
    if recipe.optimizer.learning_rate == "pilot":
        assert validator is not None
        pilot = find_rate(engine, recipe, encoded, validator, folder)
        optimizer = recipe.optimizer.model_copy(update={"learning_rate": pilot["chosen"]})
        recipe = recipe.model_copy(update={"optimizer": optimizer})
    result = _steps(engine, recipe, encoded, validator, folder)
    card = {"recipe": recipe.model_dump(mode="json"), "lengths": lengths, "versions": environment()["versions"]}
    saved = engine.save(folder, card)
    peak = engine.peak_memory()  # before the proof, which holds the model twice
    some = plan_steps(recipe, encoded)[0][0][:PROOF_ROWS]
    proof = engine.verify_saved(saved, encoded.collate(some, engine.pad_id))
    _check(proof, saved)
    return {
        "saved": str(saved),
        "adapter_bytes": size_on_disk(saved),
        "steps": result.steps,
        **({} if result.stopped is None else {"stopped": result.stopped}),
        "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "training_peak_memory_bytes": peak,
        "proof": asdict(proof),
        "pilot": pilot,
        "validation": None if validator is None else _validations(recipe, validator, result),
    }


def _steps(
    engine: Engine, recipe: Recipe, encoded: Trained, validator: Validator | None, folder: Path
) -> TrainingResult:
    """All steps, and their curves, also of a run that was stopped."""
    try:
        result = run_steps(engine, recipe, encoded, folder, validator)
    except (Stopped, RunError):
        with suppress(Exception):  # what stopped the run is the news, not that it cannot be drawn
            write_curves(folder, recipe.validation.metric)
        raise
    write_curves(folder, recipe.validation.metric)
    return result


def _validations(recipe: Recipe, validator: Validator, result: TrainingResult) -> dict[str, Any]:
    metric, best = recipe.validation.metric, best_of(result.validations, recipe.validation.metric)
    return {
        **describe_rows(validator.choosing.rows),
        "metric": metric,
        "best": None if best is None else {"step": best["step"], "value": best[metric]},
        "kept_step": result.kept,
        "stopped_early": result.stopped == "patience",
        "held_out": validator.choosing.held_out,
        "validations": list(result.validations),
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
