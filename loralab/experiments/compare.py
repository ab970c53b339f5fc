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

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from loralab.atomic_files import write_json, write_text
from loralab.config.extras import check_extras
from loralab.config.loading import to_yaml
from loralab.config.recipe import Recipe
from loralab.console.progress import clock, say
from loralab.console.tables import Row, empty_row, latex_table, markdown_table
from loralab.data.rows import subject
from loralab.data.splits import Split, StreamedSplit
from loralab.errors import RecipeError, Stopped
from loralab.evaluation.evaluate import (
    Scores,
    leaked_rows,
    read_evaluation_rows,
    read_scores,
    score,
    source_texts,
    stack,
    text_floors,
)
from loralab.evaluation.forgetting import read_forgotten, read_held_out
from loralab.experiments.resume import check_comparison, check_unchanged_rows
from loralab.experiments.variants import PlannedRun, plan_runs, set_aside, states_of
from loralab.metrics import BITS, classification
from loralab.metrics.floors import FLOOR_NAMES, constant, lead
from loralab.metrics.labels import Labels
from loralab.models.checkpoint_files import model_folder, read_config
from loralab.planning.predicted import predicted_and_measured, prediction_markdown
from loralab.reports.epochs import by_epoch
from loralab.reports.run_plots import read_curves
from loralab.reports.samples import IN_FILE, IN_TERMINAL, markdown, read_compared_rows
from loralab.reports.turning_point import first_turn
from loralab.runs.folder import (
    METRICS,
    PREDICTIONS,
    RECIPE,
    RECIPES,
    RESULTS,
    check_free,
    missing_results,
    new_folder,
    read_lines,
    read_record,
    resume_command,
    write_recipe,
)
from loralab.training.datasets import describe_rows, read_training_rows
from loralab.training.mixture import read_mixture

STOPPED = 130  # the exit code of a run that was stopped after saving


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
        ModelError: there is no such base.
    """
    trained = (recipe for recipe in recipes if recipe.training.start_from is None and recipe.model.init != "random")
    for name in dict.fromkeys(recipe.model.name for recipe in trained):
        read_config(model_folder(name))


def _check_columns(recipe: Recipe) -> None:
    """Raises RecipeError where a variant measures forgetting on other rows than the others do: a column is of the same rows."""
    for name in recipe.variants:
        if recipe.variant(name).forgetting != recipe.forgetting:
            raise RecipeError(f"variants.{name} changes forgetting, which has to be the same for all variants.")


# Running


def run_all(runs: Sequence[PlannedRun], folder: Path) -> dict[str, str]:
    """Runs what is not there yet; returns what failed, by the run's folder, and why."""
    failures: dict[str, str] = {}
    states = states_of(runs)
    taken: list[float] = []  # seconds of each training so far; what is not trained takes little
    for index, run in enumerate(runs):
        state = states[run.folder]
        if run.after is not None and str(run.after) in failures:
            failures[str(run.folder)] = f"it starts from {run.after.relative_to(folder)}, which failed"
            continue
        left = fmean(taken) * sum(_trains(other) for other in runs[index:]) if taken else 0
        say(f"\n[{index + 1}/{len(runs)}] {run.name}{f', about {clock(left)} left in all' if left else ''}")
        if state == "finished":
            say("It has finished already.")
            continue
        if state == "changed":
            say(f"Its recipe is another now; what was there lies in {set_aside(run.folder, folder)}.")
        started = time.monotonic()
        if failure := _run(run, folder):
            failures[str(run.folder)] = failure
            say(f"{run.name} failed: {failure}. The others go on.")
        elif _trains(run):
            taken.append(time.monotonic() - started)
    return failures


def _trains(run: PlannedRun) -> bool:
    return run.recipe.training.method != "none"


def _run(run: PlannedRun, folder: Path) -> str | None:
    """Runs `loralab train` in a process; why it failed, where it did."""
    recipe_file = folder / RECIPES / f"{run.name.replace('/', '-')}.yaml"
    write_text(recipe_file, to_yaml(run.recipe))
    again = ["--resume"] if (run.folder / RECIPE).exists() else []
    command = [*python_of_loralab(), "train", str(recipe_file), "--out", str(run.folder), "--json", *again]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # a terminal has told it too, other senders have not; it saves its checkpoint and ends
        process.wait()
        code = STOPPED
    if code == STOPPED:
        raise Stopped(f"Stopped in {run.name}. Go on with: {resume_command(folder)}")
    return None if code == 0 else "it was killed; too little memory?" if code == -9 else f"exit code {code}, see above"


def python_of_loralab() -> list[str]:
    """The beginning of a command that runs loralab in a process of its own, without importing from the working folder, in which a
    stranger's json.py may lie. Where loralab itself is imported from there, that folder stays on the path."""
    home = Path(__file__).resolve().parents[1]
    return [sys.executable, *([] if home == Path.cwd() else ["-P"]), "-m", "loralab"]


# Gathering


def gather(
    recipe: Recipe,
    runs: Sequence[PlannedRun],
    folder: Path,
    rows: Split,
    training_rows: Sequence[StreamedSplit],
    failures: dict[str, str],
) -> dict[str, Any]:
    """What results.json holds: the rows of the table from the run folders, floors below.

    `training_rows` are those of the main data, then those of further data that any variant is trained on.
    """
    finished = {name: _finished(runs, name) for name in recipe.variants}
    scores = {name: stack([read_scores(run.folder) for run in some]) for name, some in finished.items() if some}
    first = scores.get(next(iter(recipe.variants)))
    table = [_row(name, recipe, finished[name], scores.get(name), first) for name in recipe.variants]
    sentence = ""
    if recipe.data.packing:
        for name, value in text_floors(training_rows[0], rows).items():
            figures = {"value": value, "low": value, "high": value, "p_vs_first": None}
            table.append({**empty_row(name, "floor"), "metrics": {BITS.name: figures}})
    if recipe.evaluation.metrics:  # the loss alone has no floors
        if recipe.data.label is None:
            sentence = constant(training_rows[0].sample_of_targets())
            floors = _floors(recipe, rows, sentence)
        else:
            floors = _label_floor(training_rows[0], _first_runs(finished))
        for name, floor in floors.items():
            table.append({**empty_row(name, "floor"), "metrics": floor.summary(first)})
    return {
        "name": recipe.name,
        "out": str(folder),
        "rows": table,
        "epochs": by_epoch({name: [run.folder for run in some] for name, some in finished.items()}),
        "turns": _turns([run for some in finished.values() for run in some]),
        "samples": [asdict(sample) for sample in read_compared_rows(_first_runs(finished), IN_TERMINAL)],
        "failures": {str(Path(place).relative_to(folder)): reason for place, reason in failures.items()},
        "constant": sentence,
        "published": recipe.published,
        "published_epochs": recipe.published_epochs,
        "published_source": recipe.published_source,
        "next_steps": recipe.next_steps,
        "evaluated": {**describe_rows(rows), "leaked": leaked_rows(training_rows[0], rows, *training_rows[1:])},
    }


def _finished(runs: Sequence[PlannedRun], variant: str) -> list[PlannedRun]:
    return [run for run in runs if run.variant == variant and not missing_results(run.folder, run.recipe)]


def _turns(runs: Sequence[PlannedRun]) -> dict[str, str]:
    """Run -> where its training loss began to rise again, in words."""
    curves = {run.name: read_curves(run.folder) for run in runs if (run.folder / METRICS).exists()}
    turns = {name: first_turn(each.losses.tolist(), each.rates.tolist()) for name, each in curves.items()}
    return {name: str(turn) for name, turn in turns.items() if turn is not None}


def _first_runs(finished: dict[str, list[PlannedRun]]) -> dict[str, Path]:
    """Variant -> the folder of its first seed."""
    return {name: runs[0].folder for name, runs in finished.items() if runs}


def _row(name: str, recipe: Recipe, runs: Sequence[PlannedRun], scores: Scores | None, first: Scores | None) -> Row:
    """One row: of several seeds the mean time and size, and the highest peak."""
    method = recipe.variant(name).training.method
    if scores is None:
        return {**empty_row(name, method), "failed": True, "metrics": {}}
    records = [read_record(run.folder) for run in runs]
    keys = ("trainable", "total", "steps", "tokens_per_second", "proof", "pilot")
    peaks = [record.get("training_peak_memory_bytes", record["peak_memory_bytes"]) for record in records]
    row = {**empty_row(name, method), **{key: records[0][key] for key in keys if key in records[0]}}
    row |= {key: float(np.mean([record.get(key, 0) for record in records])) for key in ("adapter_bytes", "seconds")}
    row["adapter_bytes"] = round(row["adapter_bytes"])
    row |= {"seeds": [run.seed for run in runs], "runs": [str(run.folder) for run in runs]}
    row["peak_memory_bytes"] = max(peaks)
    row["seconds_before"] = float(np.mean([_seconds_before(run) for run in runs]))
    row["predicted"] = predicted_and_measured(runs[0].recipe, records[0], runs[0].folder)
    row["flops"] = None if row["predicted"] is None else row["predicted"]["flops"][1]
    row["forgetting"] = _forgetting(runs, records[0].get("forgetting", {}))
    if shots := records[0]["evaluated"].get("shots"):  # drawn by evaluation.seed: the same in every run
        row["shots"] = shots
    return {**row, "metrics": scores.summary(None if scores is first else first)}


def _forgetting(runs: Sequence[PlannedRun], first: dict[str, Any]) -> dict[str, Any]:
    """Each other data set: which rows, and the loss on them before and after, of all seeds; `first` is the first one's record."""
    forgotten = read_forgotten([run.folder for run in runs]) if first else {}
    about = {name: {key: first[name][key] for key in ("data", "split", "rows", "leaked")} for name in first}
    return {name: about[name] | each.summary() for name, each in forgotten.items()}


def _seconds_before(run: PlannedRun) -> float:
    """What the training of all that a run starts from has taken."""
    if run.after is None:
        return 0.0
    record = read_record(run.after)
    return float(record.get("seconds", 0.0) + record.get("seconds_before", 0.0))


def _floors(recipe: Recipe, rows: Split, sentence: str) -> dict[str, Scores]:
    sources = source_texts(rows, bool(recipe.data.messages))
    predictions = {
        FLOOR_NAMES["lead"]: [lead(source) for source in sources],
        FLOOR_NAMES["constant"]: [sentence for _ in rows.examples],
    }
    groups = [example.subject for example in rows.examples]
    references = [example.targets for example in rows.examples]
    return {
        name: Scores(groups, score(texts, references, sources, recipe.evaluation.metrics), None)
        for name, texts in predictions.items()
    }


def _label_floor(training_rows: StreamedSplit, folders: dict[str, Path]) -> dict[str, Scores]:
    """The label that most training rows have, for every row; names and order are those of the first variant's answers."""
    if not folders:
        return {}
    lines = read_lines(next(iter(folders.values())) / PREDICTIONS)
    labels = Labels.from_json(read_record(next(iter(folders.values())))["labels"])
    often = labels.named(max(training_rows.label_counts, key=lambda text: training_rows.label_counts[text]))
    certain = [{name: float(i in labels.places(often)) for i, name in enumerate(labels.names)} for _ in lines]
    references = [line["references"] for line in lines]
    values = classification.score([often for _ in lines], references, None, certain)
    groups = [subject(line["source"], line["references"]) for line in lines]
    return {f"always {often}": Scores(groups, values, None)}


def _write(results: dict[str, Any], runs: Sequence[PlannedRun], recipe: Recipe, folder: Path) -> None:
    """The files for people."""
    from loralab.reports.comparison_plots import draw_comparison

    write_json(folder / RESULTS, results)
    tables = [markdown_table(results["rows"], recipe.published), prediction_markdown(results["rows"])]
    write_text(folder / "table.md", "\n".join(filter(None, tables)))
    write_text(folder / "table.tex", latex_table(results["rows"], recipe.published))
    finished = {name: _finished(runs, name) for name in recipe.variants}
    write_text(folder / "samples.md", markdown(read_compared_rows(_first_runs(finished), IN_FILE)))
    draw_comparison(results, {run.name: run.folder for some in finished.values() for run in some}, folder)
