"""The rows of a comparison's table, gathered from its run folders, floors below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from loralab.config.recipe import Recipe
from loralab.console.tables import Row, empty_row
from loralab.data.row_records import describe_rows
from loralab.data.splits import Split, StreamedSplit
from loralab.evaluation.forgetting import read_forgotten
from loralab.evaluation.rows import leaked_rows
from loralab.evaluation.scores import read_scores
from loralab.experiments.variants import PlannedRun
from loralab.metrics import BITS
from loralab.metrics.labels import Labels
from loralab.metrics.scores import Scores, stack
from loralab.planning.predicted import predicted_and_measured
from loralab.reports.epochs import by_epoch
from loralab.reports.run_plots import read_curves
from loralab.reports.samples import IN_TERMINAL, read_compared_rows
from loralab.reports.turning_point import first_turn
from loralab.runs.folder import METRICS, missing_results
from loralab.runs.record import read_record
from loralab.tasks import task_of


def gather(
    recipe: Recipe,
    runs: Sequence[PlannedRun],
    folder: Path,
    rows: Split,
    training_rows: Sequence[StreamedSplit],
    failures: dict[str, str],
) -> dict[str, Any]:
    """Returns what results.json holds: the rows of the table from the run folders, floors below.

    `training_rows` are those of the main data, then those of further data that any variant is trained on.
    """
    finished = {name: finished_runs(runs, name) for name in recipe.variants}
    scores = {name: stack([read_scores(run.folder) for run in some]) for name, some in finished.items() if some}
    first = scores.get(next(iter(recipe.variants)))
    table = [_row(name, recipe, finished[name], scores.get(name), first) for name in recipe.variants]
    sentence, task = "", task_of(recipe.data)
    for name, value in task.compression_floors(training_rows[0], rows).items():
        figures = {"value": value, "low": value, "high": value, "p_vs_first": None}
        table.append({**empty_row(name, "floor"), "metrics": {BITS.name: figures}})
    if recipe.evaluation.metrics:  # the loss alone has no floors
        sentence = task.constant_answer(training_rows[0])
        labels = _labels_of(first_seeds(finished)) if task.classifies else None
        for name, floor in task.floors(training_rows[0], rows, recipe.evaluation.metrics, labels).items():
            table.append({**empty_row(name, "floor"), "metrics": floor.summary(first)})
    return {
        "name": recipe.name,
        "out": str(folder),
        "rows": table,
        "epochs": by_epoch({name: [run.folder for run in some] for name, some in finished.items()}),
        "turns": _turns([run for some in finished.values() for run in some]),
        "samples": [asdict(sample) for sample in read_compared_rows(first_seeds(finished), IN_TERMINAL)],
        "failures": {str(Path(place).relative_to(folder)): reason for place, reason in failures.items()},
        "constant": sentence,
        "published": recipe.published,
        "published_epochs": recipe.published_epochs,
        "published_source": recipe.published_source,
        "next_steps": recipe.next_steps,
        "evaluated": {**describe_rows(rows), "leaked": leaked_rows(training_rows[0], rows, *training_rows[1:])},
    }


def finished_runs(runs: Sequence[PlannedRun], variant: str) -> list[PlannedRun]:
    return [run for run in runs if run.variant == variant and not missing_results(run.folder, run.recipe)]


def _turns(runs: Sequence[PlannedRun]) -> dict[str, str]:
    """Run -> where its training loss began to rise again, in words."""
    curves = {run.name: read_curves(run.folder) for run in runs if (run.folder / METRICS).exists()}
    turns = {name: first_turn(each.losses.tolist(), each.rates.tolist()) for name, each in curves.items()}
    return {name: str(turn) for name, turn in turns.items() if turn is not None}


def first_seeds(finished: dict[str, list[PlannedRun]]) -> dict[str, Path]:
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
    """Returns what the training of all that a run starts from has taken."""
    if run.after is None:
        return 0.0
    record = read_record(run.after)
    return float(record.get("seconds", 0.0) + record.get("seconds_before", 0.0))


def _labels_of(folders: dict[str, Path]) -> Labels | None:
    """Returns the labels of the first variant; None where none has finished."""
    return Labels.from_json(read_record(folder)["labels"]) if (folder := next(iter(folders.values()), None)) else None
