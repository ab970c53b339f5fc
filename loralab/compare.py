"""Several variants of one recipe, side by side on the same rows: what each cost, what it scored, and how sure that is.

Each variant runs as a process of its own, `loralab train` on its stored recipe, so that its memory is its own and a
crash takes no other along. Two floor rows that need no model stand below: a score under them is no success
(metrics/floors.py).

    OUT/<variant>/       a run folder each (run.py)
    OUT/results.json     the rows          OUT/table.md     the same for people
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.config import Recipe
from loralab.data.splits import Split, StreamedSplit
from loralab.errors import RecipeError, Stopped
from loralab.evaluate import Scores, leaked_rows, read_evaluation_rows, read_scores, score
from loralab.metrics import COLUMNS
from loralab.metrics.floors import constant, lead
from loralab.progress import clock, say
from loralab.recipe_file import to_yaml
from loralab.run import (
    RECIPE,
    RECORD,
    check_free,
    new_folder,
    open_again,
    read_record,
    write_json,
    write_recipe,
    write_text,
)
from loralab.table import Row, directions, empty_row, markdown_table, score_names, terminal_tables, titles
from loralab.train import describe_rows, read_training_rows

STOPPED = 130  # the exit code of a run that was stopped after saving
FLOORS = {"lead": "first two turns", "constant": "one sentence"}


def compare(recipe: Recipe, out: Path | None, resume: bool = False) -> dict[str, Any]:
    """Runs every variant and writes the table; returns what results.json holds.

    Args:
        out: a new or empty folder; None takes the next free runs/NAME.
        resume: keep the variants of `out` that have finished, go on with those that have not.

    Raises:
        RecipeError: the recipe has no variants.
    """
    if not recipe.variants:
        raise RecipeError(f"The recipe {recipe.name!r} has no variants to compare; `loralab train` runs it alone.")
    if resume:
        open_again(out, recipe)
    else:
        check_free(out)
    rows = read_evaluation_rows(recipe)  # a missing split or column is found here, not after an hour
    training_rows = read_training_rows(recipe)
    folder = out if resume and out is not None else new_folder(out, recipe.name)
    write_recipe(folder, recipe)
    _run_variants(recipe, folder)
    results = gather(recipe, folder, rows, training_rows)
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", markdown_table(results["rows"], recipe.published))
    return results


def report(results: dict[str, Any]) -> str:
    """The tables and what they say, for a terminal."""
    parts = [terminal_tables(results["rows"], results["published"])]
    parts.append("\n".join(textwrap.fill(line, 80, subsequent_indent="  ") for line in remarks(results)))
    parts.append(f"Files: {results['out']}/table.md, results.json, and a run folder per variant.")
    return "\n\n".join(parts)


# Running


def _run_variants(recipe: Recipe, folder: Path) -> None:
    started, names = time.monotonic(), list(recipe.variants)
    for index, name in enumerate(names):
        left = (
            f", about {clock((time.monotonic() - started) / index * (len(names) - index))} left in all" if index else ""
        )
        say(f"\n[{index + 1}/{len(names)}] {name}{left}")
        recipe_file = folder / "recipes" / f"{name}.yaml"
        recipe_file.parent.mkdir(exist_ok=True)
        write_text(recipe_file, to_yaml(recipe.variant(name)))
        _run(recipe_file, folder / name)


def _run(recipe_file: Path, out: Path) -> None:
    again = ["--resume"] if (out / RECIPE).exists() else []
    command = [sys.executable, "-m", "loralab", "train", str(recipe_file), "--out", str(out), "--json", *again]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # a terminal has told it too, other senders have not; it saves its checkpoint and ends
        process.wait()
        code = STOPPED
    if code == STOPPED:
        raise Stopped(f"Stopped in {out.name}. Go on with: loralab compare {out.parent} --resume")
    if code:
        say(
            f"{out.name} failed with exit code {code}; the other variants go on."
            + (" It was killed: too little memory?" if code == -9 else "")
        )


# Gathering


def gather(recipe: Recipe, folder: Path, rows: Split, training_rows: StreamedSplit) -> dict[str, Any]:
    """The rows of the table from the run folders, floors below."""
    scores: dict[str, Scores] = {
        name: read_scores(folder / name) for name in recipe.variants if (folder / name / RECORD).exists()
    }
    first = scores.get(next(iter(recipe.variants)))
    table = [_row(folder / name, name, recipe, scores.get(name), first) for name in recipe.variants]
    sentence = ""
    if recipe.evaluation.metrics:  # the loss alone has no floors
        sentence = constant(training_rows.sample_of_targets())
        for name, floor in _floors(recipe, rows, sentence).items():
            table.append({**empty_row(name, "floor"), "metrics": floor.summary(first)})
    return {
        "name": recipe.name,
        "out": str(folder),
        "rows": table,
        "constant": sentence,
        "published": recipe.published,
        "published_source": recipe.published_source,
        "evaluated": {**describe_rows(rows), "leaked": leaked_rows(training_rows, rows)},
    }


def _row(folder: Path, name: str, recipe: Recipe, scores: Scores | None, first: Scores | None) -> Row:
    method = recipe.variant(name).training.method
    if scores is None:
        return {**empty_row(name, method), "failed": True, "metrics": {}}
    record = read_record(folder)
    keys = ("trainable", "total", "adapter_bytes", "seconds", "steps", "tokens_per_second", "proof")
    return {
        **empty_row(name, method),
        **{key: record[key] for key in keys if key in record},
        "peak_memory_bytes": record.get("training_peak_memory_bytes", record["peak_memory_bytes"]),
        "metrics": scores.summary(None if scores is first else first),
    }


def _floors(recipe: Recipe, rows: Split, sentence: str) -> dict[str, Scores]:
    predictions = {
        FLOORS["lead"]: [lead(example.source) for example in rows.examples],
        FLOORS["constant"]: [sentence for _ in rows.examples],
    }
    sources, references = [example.source for example in rows.examples], [example.targets for example in rows.examples]
    return {
        name: Scores(sources, score(texts, references, sources, recipe.evaluation.metrics), None)
        for name, texts in predictions.items()
    }


# Saying what the table says


def remarks(results: dict[str, Any]) -> list[str]:
    """In words: what the columns are, which variants beat the first, and which are still under a floor."""
    rows, evaluated = results["rows"], results["evaluated"]
    floors = [row for row in rows if row["method"] == "floor"]
    scored = [row for row in rows if row["method"] != "floor" and row["metrics"]]
    lines = [
        f"{evaluated['rows']:,} rows of {evaluated['data']}, {evaluated['split']}. [low, high]: 95 % bootstrap interval by source. "
        f"p: paired bootstrap against {rows[0]['variant']}. loss: nats per target token. {directions(['loss', *score_names(rows)])}",
    ]
    if floors:
        lines.append(
            f'"{FLOORS["constant"]}" is one training summary for every row, the one closest to all others: {results["constant"]}'
        )
    if evaluated["leaked"]:
        lines.append(f"{evaluated['leaked']:,} of these rows have a source that is among the training rows too.")
    if results["published"]:
        lines.append(f"pub.: the published figure. {results['published_source']}.")
    lines += [line for row in scored if row is not rows[0] for line in _against_first(row, rows[0])]
    return lines + [line for row in scored for line in _under_floors(row, floors)]


def _against_first(row: Row, first: Row) -> list[str]:
    better = titles([name for name in row["metrics"] if name in first["metrics"] and _apart(row, first, name)])
    return [f"{row['variant']} beats {first['variant']}, intervals apart, in {', '.join(better)}."] if better else []


def _apart(row: Row, other: Row, name: str) -> bool:
    """Whether the row is better than the other by more than both intervals."""
    a, b = row["metrics"][name], other["metrics"][name]
    if COLUMNS[name].better == "lower":
        a, b = b, a
    return bool(COLUMNS[name].better != "neither" and a["low"] > b["high"])


def _under_floors(row: Row, floors: Sequence[Row]) -> list[str]:
    under: dict[str, list[str]] = {}
    for floor in floors:
        # a floor is one for scores: a copy of the source makes up no name, which is no merit
        scores = [name for name in floor["metrics"] if name in row["metrics"] and COLUMNS[name].better == "higher"]
        if names := titles([name for name in scores if _apart(floor, row, name)]):
            under.setdefault(", ".join(names), []).append(f'"{floor["variant"]}"')
    return [f"{row['variant']} is UNDER {' and '.join(which)} in {names}." for names, which in under.items()]
