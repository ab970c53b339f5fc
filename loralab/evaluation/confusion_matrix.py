"""Results per label of a classifier: a table for terminals, and the confusion matrix as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loralab.console.tables import layout
from loralab.reports.run_plots import side_by_side, write_figure
from loralab.runs.folder import CONFUSION

MOST = 30  # labels in a picture or a table
WITH_NUMBERS = 12  # labels of which each cell shows its number
SCORES = ("precision", "recall", "f1")


def labels_table(about: dict[str, Any]) -> str:
    """One row a label: precision, recall, F1, rows; and of single labels how many rows were given which label."""
    names = about["names"][:MOST]
    confusion = about["confusion"] if len(names) <= WITH_NUMBERS else None
    header = ["label", *SCORES, "rows", *([f"as {name}" for name in names] if confusion else [])]
    rows = [
        [
            [name],
            *([f"{about['per_label'][name][score]:.2f}"] for score in SCORES),
            [f"{about['per_label'][name]['rows']:,}"],
            *([f"{count:,}"] for count in (confusion[place] if confusion else ())),
        ]
        for place, name in enumerate(names)
    ]
    return layout(header, rows)


def write_confusion(run: Path, about: dict[str, Any]) -> None:
    """Draws the confusion matrix into a run's folder: a row for each true label, in percent of its rows."""
    names, confusion = about["names"], about["confusion"]
    if confusion is None or len(names) > MOST:
        return
    figure, (axes,) = side_by_side(1, f"{run.resolve().name}: which label was given to which")
    shares = [[100 * count / max(sum(row), 1) for count in row] for row in confusion]
    axes.grid(False)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    ticks = range(len(names))
    axes.set_xticks(ticks, names, rotation=45 if len(names) > 3 else 0)
    axes.set_yticks(ticks, names)
    axes.set(xlabel="given", ylabel="true")
    if len(names) <= WITH_NUMBERS:
        for i in ticks:
            for j in ticks:
                colour = "white" if shares[i][j] > 50 else "black"
                axes.text(j, i, f"{confusion[i][j]:,}", ha="center", va="center", color=colour)
    figure.colorbar(picture, ax=axes, label="% of the true label's rows")
    write_figure(figure, run / CONFUSION)
