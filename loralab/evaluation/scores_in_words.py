"""The scores of a run as lines of text, for a terminal or a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loralab.evaluation.confusion_matrix import labels_table
from loralab.evaluation.forgetting import forgetting_in_words


def scores_in_words(row: Mapping[str, Any]) -> str:
    """Returns a line for each metric with its interval, and a classifier's table of labels.

    Args:
        row: a record, or what `evaluate_saved` gives.
    """
    lines = [
        f"{name:<13} {metric['value']:8.3f}  [{metric['low']:.3f}, {metric['high']:.3f}]"
        for name, metric in row["metrics"].items()
    ]
    lines += [f"  {name:<23} {value:8.3f}" for name, value in row.get("floors", {}).items()]
    table = labels_table(row["labels"]) if "per_label" in row.get("labels", {}) else ""
    return "\n".join(lines) + (f"\n\n{table}" if table else "")


def run_summary(record: Mapping[str, Any]) -> str:
    """Returns the scores of a finished run, and what it forgot."""
    parts = [scores_in_words(record), forgetting_in_words(record.get("forgetting", {}))]
    return "\n".join(filter(None, parts))
