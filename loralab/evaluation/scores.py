"""Reading the scores of a run's rows from its predictions.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loralab.data.rows import subject
from loralab.metrics import classification, regression
from loralab.metrics.metric import Floats
from loralab.metrics.scores import Scores
from loralab.runs.folder import PREDICTIONS
from loralab.runs.record import read_lines


def read_scores(folder: Path) -> Scores:
    """The scores behind a folder's predictions.jsonl."""
    rows = read_lines(folder / PREDICTIONS)
    known = {"row", "source", "references", "shots", "prediction", "probabilities", "target_tokens", "bytes"}
    values = {name: _column(rows, name) for name in rows[0] if name not in known}
    if "probabilities" in rows[0]:  # what is no mean of rows is made again
        predictions, references = ([row[name] for row in rows] for name in ("prediction", "references"))
        values |= classification.score(predictions, references, None, [row["probabilities"] for row in rows])
    elif regression.MSE.name in rows[0]:
        values |= regression.score([row["prediction"] for row in rows], [row["references"] for row in rows])
    tokens, num_bytes = (_column(rows, name) if name in rows[0] else None for name in ("target_tokens", "bytes"))
    subjects = [subject(row["source"], row["references"]) if "source" in row else str(row["row"]) for row in rows]
    plain = num_bytes is not None or all(row.get("source") == "" for row in rows)
    return Scores(subjects, values, tokens, None, plain, num_bytes)


def _column(rows: Sequence[dict[str, Any]], name: str) -> Floats:
    return np.array([row[name] for row in rows], dtype=np.float64)
