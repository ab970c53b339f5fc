"""What a run's first step was predicted to take, beside what it took.

The prediction is a plan's (plan.py), made for the very batches of that step; both count tensors alone, without the process
around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.config.recipe import Recipe
from loralab.console.tables import Cell, Row, layout, markdown_cells, memory
from loralab.cost.base import Base, Unknown, find_base
from loralab.cost.model import Shape
from loralab.cost.variant import PRECISIONS, cost_of, run_of, sizes_of, trained_by
from loralab.errors import UserError
from loralab.planning.report import operations
from loralab.runs.folder import FIRST_STEP
from loralab.runs.record import read_json

HEADER = ["first step: predicted", "trained", "FLOPs", "memory"]


def predicted_and_measured(recipe: Recipe, record: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """{"trainable", "flops", "peak_bytes"}, of each (predicted, measured); None where nothing was trained, or where the
    architecture's steps cannot be predicted."""
    file = folder / FIRST_STEP
    if not file.exists():
        return None
    watched = read_json(file)
    labels = record.get("labels", {}).get("names") if recipe.data.label is not None else None
    try:
        base = find_base(recipe.model, None if recipe.data.label is None else len(labels or ()))
        trained = trained_by(recipe, base)
    except (UserError, Unknown):
        return None
    itemsize = PRECISIONS[record["dtype"]]
    run = run_of(recipe, base, itemsize, record["device"] == "cpu")
    cost = cost_of(
        recipe,
        base,
        trained,
        run,
        [_shape(base, batch, recipe.data.packing) for batch in watched["batches"]],
        first=True,
    )
    return {
        "trainable": (sizes_of(base, trained, itemsize).trainable, record["trainable"]),
        "flops": (cost.flops, watched["flops"]),
        "peak_bytes": (cost.peak, watched["peak_bytes"]),
    }


def _shape(base: Base, batch: dict[str, Any], packed: bool) -> Shape:
    """Of a decoder, source and target of the longest row stand one after the other; packed rows are all target."""
    source = 0 if packed else batch["longest"] - batch["target"] if base.causal else batch["source"]
    return Shape(batch["rows"], source, batch["target"], batch["padded"], batch["target_tokens"], packed)


def prediction_table(rows: Sequence[Row]) -> str:
    """For a terminal; empty where nothing was predicted."""
    cells = _cells(rows)
    return layout(HEADER, cells) if cells else ""


def prediction_markdown(rows: Sequence[Row]) -> str:
    """For documents."""
    cells = _cells(rows)
    return markdown_cells(HEADER, cells) if cells else ""


def _cells(rows: Sequence[Row]) -> list[list[Cell]]:
    return [_row(row) for row in rows if row.get("predicted")]


def _row(row: Row) -> list[Cell]:
    found = row["predicted"]
    shown = [(found["trainable"], "{:,}".format), (found["flops"], operations), (found["peak_bytes"], memory)]
    pairs = [[show(each) for each in pair] for pair, show in shown]
    off = [f"{100 * (predicted / measured - 1):+.1f} %" for predicted, measured in (pair for pair, _ in shown)]
    return [[row["variant"], " measured", " off by"], *([*pair, each] for pair, each in zip(pairs, off, strict=True))]
