"""Predicted and measured cost of a run's first step.

The prediction is a plan's (plan.py), made for the very batches of that step; both count tensors alone, without the process
around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.config.recipe import Recipe
from loralab.console.tables import Cell, Row, layout, markdown_cells, memory
from loralab.engine import BatchShape, CannotTrace, ModelFacts, trace
from loralab.errors import UserError
from loralab.models.lookup import find_base
from loralab.planning.plan import step_settings
from loralab.planning.report import operations
from loralab.runs.folder import FIRST_STEP
from loralab.runs.record import read_json
from loralab.tasks import task_of

HEADER = ["first step: predicted", "trained", "FLOPs", "memory"]


def predicted_and_measured(recipe: Recipe, record: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """{"trainable", "flops", "peak_bytes"}, of each (predicted, measured); None where nothing was trained, or where the
    architecture's steps cannot be predicted."""
    file = folder / FIRST_STEP
    if not file.exists():
        return None
    watched = read_json(file)
    if not watched["batches"]:
        return None
    task = task_of(recipe.data)
    labels = len(record.get("labels", {}).get("names", ())) if task.classifies else None
    try:
        traced = trace(recipe, find_base(recipe.model, labels))
        facts = traced.facts
        shapes = [_shape(facts, batch, task.packed_length is not None) for batch in watched["batches"]]
        cost = traced.step_cost(step_settings(recipe, record["dtype"], record["device"]), shapes, first=True)
    except (UserError, CannotTrace):
        return None
    return {
        "trainable": (facts.trainable, record["trainable"]),
        "flops": (cost.flops, watched["flops"]),
        "peak_bytes": (cost.peak, watched["peak_bytes"]),
    }


def _shape(facts: ModelFacts, batch: dict[str, Any], packed: bool) -> BatchShape:
    """Returns the shape of a batch: in a decoder, source and target of the longest row form one sequence; packed rows are all target."""
    source = 0 if packed else batch["longest"] - batch["target"] if facts.causal else batch["source"]
    return BatchShape(batch["rows"], source, batch["target"], batch["padded"], batch["target_tokens"], packed)


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
