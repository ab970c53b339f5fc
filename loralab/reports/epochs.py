"""Validation scores after each epoch, of every variant: a table with the best marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from loralab.console.tables import Cell, layout
from loralab.metrics import COLUMNS
from loralab.runs.folder import VALIDATION
from loralab.runs.record import read_lines
from loralab.runs.validation_lines import Line, best_of

MOST = 12  # validations that are shown; of more, evenly chosen ones and the last


def by_epoch(runs: Mapping[str, Sequence[Path]]) -> dict[str, list[Line]]:
    """Variant -> its validations, of several seeds the mean; those only that every seed has come to."""
    measured = {}
    for name, folders in runs.items():
        seeds = [read_lines(folder / VALIDATION) for folder in folders if (folder / VALIDATION).exists()]
        if seeds and all(seeds):
            measured[name] = [_mean(lines) for lines in zip(*seeds, strict=False)]
    return measured


def _mean(lines: Sequence[Line]) -> Line:
    known = [name for name in lines[0] if name in COLUMNS and all(line.get(name) is not None for line in lines)]
    return {"step": lines[0]["step"], "epoch": lines[0]["epoch"]} | {
        name: float(np.mean([line[name] for line in lines])) for name in known
    }


Published = Mapping[str, Mapping[str, Sequence[float]]]


def epochs_table(measured: Mapping[str, Sequence[Line]], column: str, published: Published | None = None) -> str:
    """One row a variant, one column a validation; an asterisk at the best. Empty where no variant has two.

    Args:
        published: variant -> column -> values from the first epoch on, each a row below its variant's.
    """
    longest = max(measured.values(), key=len, default=[])
    if len(longest) < 2:
        return ""
    places = sorted({round(place) for place in np.linspace(0, len(longest) - 1, min(MOST, len(longest)))})
    header = [COLUMNS[column].title, *(f"{longest[place]['epoch']:g}" for place in places)]
    rows: list[list[Cell]] = []
    for name, lines in measured.items():
        rows.append([[name], *(_cell(lines, place, column) for place in places)])
        if figures := (published or {}).get(name, {}).get(column):
            theirs = [{"epoch": epoch, column: figure} for epoch, figure in enumerate(figures, 1)]
            shown = [longest[place]["epoch"] for place in places]
            rows.append([[" published"], *(_published_cell(theirs, epoch, column) for epoch in shown)])
    return "After each epoch (* best):\n" + layout(header, rows)


def _published_cell(theirs: Sequence[Line], epoch: float, column: str) -> list[str]:
    places = [place for place, line in enumerate(theirs) if line["epoch"] == epoch]
    return _cell(theirs, places[0], column) if places else ["-"]


def _cell(lines: Sequence[Line], place: int, column: str) -> list[str]:
    if place >= len(lines) or column not in lines[place]:
        return ["-"]
    star = "*" if lines[place] is best_of(lines, column) else ""
    return [f"{lines[place][column]:.{COLUMNS[column].digits}f}{star}"]
