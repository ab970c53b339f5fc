"""Summary of a comparison for a terminal: a few answers, the tables, and remarks."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from loralab.console.progress import clock
from loralab.console.tables import WIDTH, Row, directions, p_text, score_names, terminal_tables, titles
from loralab.data.few_shot import shots_in_words
from loralab.metrics import BITS, COLUMNS
from loralab.metrics.floors import FLOOR_NAMES
from loralab.planning.predicted import prediction_table
from loralab.reports.epochs import epochs_table
from loralab.reports.samples import ComparedRow, samples_in_terminal


def report(results: dict[str, Any]) -> str:
    """Everything that `loralab compare` prints at its end."""
    samples = [ComparedRow(**sample) for sample in results["samples"]]
    parts = [samples_in_terminal(samples), terminal_tables(results["rows"], results["published"])]
    parts.append(prediction_table(results["rows"]))
    parts += [
        epochs_table(results["epochs"], column, results.get("published_epochs", {}))
        for column in _watched(results["epochs"])
    ]
    parts.append("\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in remarks(results)))
    files = "table.md, table.tex, samples.md, results.json, pictures, and a run folder per variant"
    parts.append(textwrap.fill(f"Files in {results['out']}: {files}.", WIDTH, break_on_hyphens=False))
    parts.append(
        "\n".join(["Next:", *(f"  {step}" for step in results["next_steps"])] if results["next_steps"] else [])
    )
    return "\n\n".join(part for part in parts if part)


def _watched(epochs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Loss, and the first score that was measured."""
    first = next((lines[0] for lines in epochs.values()), {})
    scores = [name for name in first if name in COLUMNS and name != "loss"]
    return ["loss", *scores[:1]] if first else []


def remarks(results: dict[str, Any]) -> list[str]:
    """In words: what the columns are, which variants beat the first, and which are still under a floor."""
    rows, evaluated = results["rows"], results["evaluated"]
    floors = [row for row in rows if row["method"] == "floor"]
    scored = [row for row in rows if row["method"] != "floor" and row["metrics"]]
    lines = [
        f"{evaluated['rows']:,} rows of {evaluated['data']}, {evaluated['split']}. [low, high]: 95 % bootstrap interval by source. "
        f"p: paired bootstrap against {rows[0]['variant']}. loss: nats per {_counted(rows)}. {directions(['loss', *score_names(rows)])}",
    ]
    if floors and results["constant"]:
        lines.append(
            f'"{FLOOR_NAMES["constant"]}" is one training summary for every row, the one closest to all others: {results["constant"]}'
        )
    if any(row.get("predicted") for row in rows):
        lines.append(
            "first step: as `loralab plan` predicts it, and measured. Its memory is that of tensors alone; "
            "peak memory is the whole process's."
        )
    if several := [row for row in scored if len(row.get("seeds", [])) > 1]:
        said = "; ".join(f"{row['variant']}: mean of {len(row['seeds'])} seeds" for row in several)
        lines.append(f"{said}. Their intervals include the spread between seeds.")
    lines += [
        f"{row['variant']} starts from another variant, whose training took {clock(row['seconds_before'])} before its own time."
        for row in scored
        if row.get("seconds_before")
    ]
    if tested := [row for row in scored if "p_mcnemar" in row["metrics"].get("accuracy", {})]:
        said = ", ".join(f"{row['variant']} {p_text(row['metrics']['accuracy']['p_mcnemar'])}" for row in tested)
        lines.append(f"McNemar's test of accuracy against {rows[0]['variant']}, exact, two-sided: {said}.")
    lines += [f"{row['variant']}: learning rate {_rate(row['pilot'])}." for row in scored if row.get("pilot")]
    lines += [f"{row['variant']}: {shots_in_words(row['shots'])}." for row in scored if "shots" in row]
    lines += [f"{name}: {turn}." for name, turn in results["turns"].items()]
    lines += [f"{name} FAILED: {reason}." for name, reason in results["failures"].items()]
    lines += _elsewhere(rows)
    if evaluated["leaked"]:
        lines.append(f"{evaluated['leaked']:,} of these rows have a source that is among the training rows too.")
    if results["published"]:
        lines.append(f"pub.: the published figure. {results['published_source']}.")
    lines += [line for row in scored if row is not rows[0] for line in _against_first(row, rows[0])]
    return lines + [line for row in scored for line in _under_floors(row, floors)]


def _elsewhere(rows: Sequence[Row]) -> list[str]:
    """Returns what the columns of forgetting are."""
    measured = {name: of for row in rows for name, of in row.get("forgetting", {}).items()}
    lines = [
        f"loss on {name}: {of['rows']:,} rows of {of['data']}, {of['split']}, after the training."
        + (f" Of these rows {of['leaked']:,} have a source that is among the training rows." if of["leaked"] else "")
        for name, of in measured.items()
    ]
    what = "In parentheses what the training added to it, in brackets the 95 % paired bootstrap interval of that."
    return [*lines, what] if lines else []


def _counted(rows: Sequence[Row]) -> str:
    """Returns what a loss is the mean of: a classifier's rows, a writer's tokens."""
    return "row" if any("accuracy" in row["metrics"] for row in rows) else "target token"


def _rate(pilot: dict[str, Any]) -> str:
    points = ", ".join(
        f"{point['learning_rate']:g} {'not finite' if point['loss'] is None else format(point['loss'], '.3f')}"
        for point in pilot["points"]
    )
    return f"{pilot['chosen']:g}, by pilots of {pilot['steps']} steps (loss on rows that are not reported: {points})"


def _against_first(row: Row, first: Row) -> list[str]:
    better = titles([name for name in row["metrics"] if name in first["metrics"] and _apart(row, first, name)])
    return [f"{row['variant']} beats {first['variant']}, intervals apart, in {', '.join(better)}."] if better else []


def _apart(row: Row, other: Row, name: str) -> bool:
    """Tells whether the row is better than the other by more than both intervals."""
    a, b = row["metrics"][name], other["metrics"][name]
    if COLUMNS[name].better == "lower":
        a, b = b, a
    return bool(COLUMNS[name].better != "neither" and a["low"] > b["high"])


def _under_floors(row: Row, floors: Sequence[Row]) -> list[str]:
    under: dict[str, list[str]] = {}
    for floor in floors:
        # a floor is one for scores: a copy of the source makes up no name, which is no merit
        floored = [name for name in floor["metrics"] if COLUMNS[name].better == "higher" or name == BITS.name]
        scores = [name for name in floored if name in row["metrics"]]
        if names := titles([name for name in scores if _apart(floor, row, name)]):
            under.setdefault(", ".join(names), []).append(f'"{floor["variant"]}"')
    return [f"{row['variant']} is UNDER {' and '.join(which)} in {names}." for names, which in under.items()]
