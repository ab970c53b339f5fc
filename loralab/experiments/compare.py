"""Several variants of one recipe, side by side on the same rows: what each cost, what it scored, and how sure that is.

Each variant runs as a process of its own, `loralab train` on its stored recipe, so that its memory is its own and a
crash takes no other along; with several seeds, once for each (variants.py). Two floor rows that need no model stand
below: a score under them is no success (metrics/floors.py).

    OUT/<variant>/           a run folder each (runs/folder.py); of several seeds, OUT/<variant>/seed-<n>/
    OUT/results.json         the rows        OUT/table.md, table.tex    the same for people
    OUT/samples.md           the same inputs, answered by each variant (reports/samples.py)
    OUT/*.png                losses, scores by epoch, score against cost (reports/comparison_plots.py)
    OUT/replaced/            what an earlier form of the recipe had left
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.atomic_files import write_json, write_text
from loralab.config.extras import check_extras
from loralab.config.recipe import Recipe
from loralab.console.tables import latex_table, markdown_table
from loralab.data.training_rows import read_training_rows
from loralab.errors import RecipeError
from loralab.evaluation.forgetting import read_held_out
from loralab.evaluation.rows import read_evaluation_rows
from loralab.experiments.results import finished_runs, first_seeds, gather
from loralab.experiments.resume import check_comparison, check_unchanged_rows
from loralab.experiments.run_variants import run_all
from loralab.experiments.variants import PlannedRun, plan_runs
from loralab.models.checkpoint_files import model_folder, read_config, weight_files
from loralab.planning.predicted import prediction_markdown
from loralab.reports.samples import IN_FILE, read_compared_rows, samples_markdown
from loralab.runs.folder import (
    RECIPES,
    RESULTS,
    check_free,
    new_folder,
    write_recipe,
)
from loralab.training.mixture import read_mixture


def compare(recipe: Recipe, out: Path | None, resume: bool = False) -> dict[str, Any]:
    """Runs every variant and writes the table; returns what results.json holds.

    Args:
        out: a new or empty folder; None takes the next free runs/NAME.
        resume: keep the runs of `out` that have finished, go on with those that have not, and run those anew whose
            recipe is another now, with all that starts from them.

    Raises:
        RecipeError: the recipe has no variants, or one of them starts from nothing that is there.
        RunError: `out` is not a comparison's, or what is to be kept has lost files, or is of other rows than are there now.
    """
    if not recipe.variants:
        raise RecipeError(f"The recipe {recipe.name!r} has no variants to compare; `loralab train` runs it alone.")
    if not resume:
        check_free(out)
    else:
        check_comparison(out)
    planned = plan_runs(recipe, out or Path(recipe.name))  # mistakes show here, before anything is written
    unfinished = not resume or any(run.state != "finished" for run in planned)
    for run in planned:
        check_extras(run.recipe, trains=unfinished)
    check_bases([run.recipe for run in planned if run.state != "finished"])
    _check_columns(recipe)
    rows = read_evaluation_rows(recipe)  # a missing split or column is found here, not after an hour
    training_rows = [read_training_rows(recipe)]
    for variant in map(recipe.variant, recipe.variants):
        training_rows += read_mixture(variant).values()
    held_out = read_held_out(recipe)
    if resume:
        check_unchanged_rows(planned, held_out)
    folder = out if resume and out is not None else new_folder(out, recipe.name)
    (folder / RECIPES).mkdir(exist_ok=True)  # by which it is known as a comparison's
    write_recipe(folder, recipe)
    runs = plan_runs(recipe, folder)
    failures = run_all(runs, folder)
    results = gather(recipe, runs, folder, rows, training_rows, failures)
    _write(results, runs, recipe, folder)
    return results


def check_bases(recipes: Sequence[Recipe]) -> None:
    """Finds the base of each recipe, once, before anything is trained; what is on the hub is downloaded.

    Raises:
        ModelError: there is no such base, or it lacks its config or whole weight files.
    """
    trained = (recipe for recipe in recipes if recipe.training.start_from is None and recipe.model.init != "random")
    for name in dict.fromkeys(recipe.model.name for recipe in trained):
        folder = model_folder(name)
        read_config(folder)
        weight_files(folder)


def _check_columns(recipe: Recipe) -> None:
    """Raises RecipeError where a variant measures forgetting on other rows than the others do: a column is of the same rows."""
    for name in recipe.variants:
        if recipe.variant(name).forgetting != recipe.forgetting:
            raise RecipeError(f"variants.{name} changes forgetting, which has to be the same for all variants.")


def _write(results: dict[str, Any], runs: Sequence[PlannedRun], recipe: Recipe, folder: Path) -> None:
    """The files for people."""
    from loralab.reports.comparison_plots import draw_comparison

    write_json(folder / RESULTS, results)
    tables = [markdown_table(results["rows"], recipe.published), prediction_markdown(results["rows"])]
    write_text(folder / "table.md", "\n".join(filter(None, tables)))
    write_text(folder / "table.tex", latex_table(results["rows"], recipe.published))
    finished = {name: finished_runs(runs, name) for name in recipe.variants}
    write_text(folder / "samples.md", samples_markdown(read_compared_rows(first_seeds(finished), IN_FILE)))
    draw_comparison(results, {run.name: run.folder for some in finished.values() for run in some}, folder)
