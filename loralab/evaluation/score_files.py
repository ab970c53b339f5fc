"""Scores of predictions that are there already, whoever made them: `loralab score FILE`.

Every system gets each metric's mean with its 95 % interval, and every pair of systems their difference with its
interval and its p, all from the same resamples of the same groups of rows (metrics/significance.py). Among many pairs
some differ by chance, so p stands beside p corrected over the pairs, by Holm, for each column by itself.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

from loralab.console.progress import Progress
from loralab.console.tables import WIDTH, Cell, directions, layout, p_text, score_names, titles, value_cell
from loralab.errors import DataError, nearest
from loralab.evaluation.prediction_files import Columns, Predictions, read_predictions
from loralab.metrics import COLUMNS, LABELS, METRICS, NUMBERS
from loralab.metrics.classification import ACCURACY, names_in
from loralab.metrics.metric import Floats
from loralab.metrics.scores import score
from loralab.metrics.significance import Bootstrap, holm, mcnemar


def score_files(paths: Sequence[Path], columns: Columns, metrics: Sequence[str]) -> dict[str, Any]:
    """Returns what `--json` prints: "rows" with each system's scores, "pairs" with their differences, and what was compared.

    Args:
        paths: files with predictions, or runs' folders.
        metrics: keys of METRICS; one that is named twice counts once.

    Raises:
        DataError: an unknown metric, a metric without the sources that it needs, or files that are wrong.
    """
    metrics = list(dict.fromkeys(map(str.strip, metrics)))
    for name in metrics:
        if name not in METRICS:
            raise DataError(f"Unknown metric {name!r}. {nearest(name, METRICS)}")
    rows = read_predictions(paths, columns, LABELS in metrics, NUMBERS in metrics)
    if rows.sources is None and (lacking := [name for name in metrics if METRICS[name].NEEDS_SOURCES]):
        raise DataError(
            f"{' and '.join(lacking)} look at what each prediction was made from, and {paths[0]} has no column 'source'. "
            "Name it with --source COLUMN."
        )
    values = _values(rows, metrics)
    bootstrap = Bootstrap(rows.groups)
    return {
        "rows": [_row(name, rows, values[name], bootstrap) for name in values],
        "pairs": [pair for column in next(iter(values.values())) for pair in _pairs(column, values, bootstrap)],
        "groups": bootstrap.groups,
        "examples": len(rows.references),
        "grouping": rows.grouping,
        "metrics": {name: {"id": METRICS[name].ID, "version": METRICS[name].version()} for name in metrics},
    }


def _values(rows: Predictions, metrics: Sequence[str]) -> dict[str, dict[str, Floats]]:
    """System -> column -> [rows]; the columns are the same of all systems."""
    values: dict[str, dict[str, Floats]] = {}
    labels = _labels(rows) if LABELS in metrics else []
    certain = rows.probabilities if len(rows.probabilities) == len(rows.systems) else {}
    progress = Progress("score", len(rows.systems))
    for name, texts in rows.systems.items():
        values[name] = score(texts, rows.references, rows.sources, metrics, certain.get(name), labels)
        progress.update(len(values))
    return values


def _labels(rows: Predictions) -> list[str]:
    """Returns those of all systems: first those that have probabilities, in their order, then the others."""
    certain = [name for table in rows.probabilities.values() for name in table[0]]
    return list(dict.fromkeys([*certain, *names_in([row[0] for row in rows.references], *rows.systems.values())]))


def _row(name: str, rows: Predictions, values: dict[str, Floats], bootstrap: Bootstrap) -> dict[str, Any]:
    return {
        "system": name,
        "empty": sum(not text for text in rows.systems[name]),
        "metrics": {
            column: asdict(bootstrap.interval(numbers, None, COLUMNS[column].statistic))
            for column, numbers in values.items()
        },
    }


def _pairs(column: str, values: dict[str, dict[str, Floats]], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """One column's difference of every two systems, the earlier less the later."""
    pairs, statistic = list(combinations(values, 2)), COLUMNS[column].statistic
    found = [bootstrap.difference(values[a][column], values[b][column], None, statistic) for a, b in pairs]
    tests = [_mcnemar(values[a][column], values[b][column]) if column == ACCURACY.name else {} for a, b in pairs]
    corrected = holm([each.p for each in found])
    return [
        {
            "a": a, "b": b, "metric": column, "difference": each.value, "low": each.low, "high": each.high,
            "p": each.p, "p_corrected": p, **test,
        }
        for (a, b), each, p, test in zip(pairs, found, corrected, tests, strict=True)
    ]  # fmt: skip


def _mcnemar(a: Floats, b: Floats) -> dict[str, Any]:
    test = mcnemar(a > 0, b > 0)
    return {"p_mcnemar": test.p, "first_alone_right": test.first_alone, "second_alone_right": test.second_alone}


# For a terminal


def report(results: dict[str, Any]) -> str:
    """The tables, and in words what they are."""
    parts = [_scores(results["rows"])]
    if results["pairs"]:
        parts.append(_differences(results["pairs"]))
    parts.append("\n".join(textwrap.fill(line, WIDTH, subsequent_indent="  ") for line in remarks(results)))
    return "\n\n".join(parts)


def _scores(rows: Sequence[dict[str, Any]]) -> str:
    names = score_names(rows)
    cells = [[[row["system"]], *(value_cell(name, row["metrics"][name]) for name in names)] for row in rows]
    return layout(["system", *titles(names)], cells)


def _differences(pairs: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(pair["metric"] for pair in pairs))
    by_pair = {(pair["a"], pair["b"]): pair for pair in pairs}
    found = {(pair["a"], pair["b"], pair["metric"]): pair for pair in pairs}
    cells = [
        [[a, f"− {b}"], *(_difference(found[a, b, name], many=len(by_pair) > 1) for name in names)] for a, b in by_pair
    ]
    return layout(["difference", *titles(names)], cells)


def _difference(pair: dict[str, Any], many: bool) -> Cell:
    """Difference, interval, p and, among several pairs, p corrected."""
    cell = value_cell(pair["metric"], {**pair, "value": pair["difference"]}, pair["p"], sign="+")
    return [*cell, f"Holm {p_text(pair['p_corrected'])}"] if many else cell


def remarks(results: dict[str, Any]) -> list[str]:
    """In words: rows and groups, what the columns are, and who said nothing how often."""
    rows, pairs, groups = results["rows"], results["pairs"], results["groups"]
    names = score_names(rows)
    lines = [
        f"{results['examples']:,} rows in {groups:,} groups: {results['grouping']}.",
        f"[low, high]: 95 % bootstrap interval by group. {directions(names)}",
    ]
    if pairs:
        count = len(pairs) // len(names)
        holms = f" Holm: the same corrected over the {count} pairs, for each column by itself." if count > 1 else ""
        lines.append(f"p: paired bootstrap of the difference, two-sided.{holms}")
        lines += [
            f"McNemar's test, {pair['a']} against {pair['b']}: {pair['first_alone_right']:,} rows right in the first alone, "
            f"{pair['second_alone_right']:,} in the second alone, {p_text(pair['p_mcnemar'])} (exact, two-sided)."
            for pair in pairs
            if "p_mcnemar" in pair
        ]
    if groups == 1:
        lines.append("A single group says nothing of how others would score: intervals have no width, and p is 1.")
    lines += [
        f"{row['system']}: {row['empty']:,} of the predictions are empty and score 0." for row in rows if row["empty"]
    ]
    return lines + [f"{name}: {used['id']}; version {used['version']}." for name, used in results["metrics"].items()]
