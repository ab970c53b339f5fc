"""Checks of a comparison's folder before it is resumed: whole runs of the rows that are there now, as one table needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loralab.config.recipe import Recipe
from loralab.data.row_records import hashes_of
from loralab.data.splits import AnySplit
from loralab.data.training_rows import read_training_rows
from loralab.errors import RecipeError, RunError
from loralab.evaluation.rows import read_evaluation_rows
from loralab.experiments.variants import PlannedRun, states_of
from loralab.runs import checkpoint
from loralab.runs.folder import RECIPE, RECORD, check_whole, is_comparison, missing_results, resume_command
from loralab.runs.record import read_record
from loralab.training.mixture import read_mixture


def check_comparison(out: Path | None) -> None:
    """Raises UserError where a folder holds no comparison to go on with."""
    if out is None or not (out / RECIPE).exists():
        raise RecipeError("There is nothing to resume: give the folder, as in `loralab compare runs/NAME --resume`.")
    if not is_comparison(out):
        raise RunError(f"{out} is a training run, not a comparison. Go on with it: {resume_command(out)}")


def check_unchanged_rows(runs: Sequence[PlannedRun], held_out: Mapping[str, AnySplit]) -> None:
    """Holds every run that is kept, or gone on with, against the rows as they are now.

    Raises:
        RunError: one began with other rows, or has lost files.
    """
    states, known = states_of(runs), dict[str, dict[str, str]]()
    forgetting = {_held_out(name): rows.content_hash for name, rows in held_out.items()}
    for run in runs:
        if states[run.folder] not in ("finished", "stopped"):
            continue
        if states[run.folder] == "finished":
            check_whole(run.folder, missing_results(run.folder, run.recipe))
        key = repr((run.recipe.data, run.recipe.mixture, run.recipe.evaluation.split))
        if key not in known:
            known[key] = _hashes(run.recipe) | forgetting
        checkpoint.compare_rows(run.folder, _began_with(run.folder), known[key])


def _hashes(recipe: Recipe) -> dict[str, str]:
    """Returns those of the rows as they are now, named as in a run's folder."""
    training = {"trained on": read_training_rows(recipe)}
    training |= {f"trained on as {name}": rows for name, rows in read_mixture(recipe).items()}
    hashes = {name: rows.content_hash for name, rows in training.items()}
    return hashes | {"evaluated": read_evaluation_rows(recipe).content_hash}


def _began_with(run: Path) -> dict[str, str]:
    if not (run / RECORD).exists():
        return checkpoint.began_with(run)
    record = read_record(run)
    hashes = hashes_of({key: record[key] for key in ("evaluated", "trained_on") if key in record})
    return hashes | {_held_out(name): rows["hash"] for name, rows in record.get("forgetting", {}).items()}


def _held_out(name: str) -> str:
    return f"held out as {name}"
