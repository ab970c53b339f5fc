"""predictions.jsonl: one line for each evaluated row, with everything that its scores were made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from loralab.atomic_files import write_lines
from loralab.data.encoded import Encoded
from loralab.data.few_shot import Shots
from loralab.data.splits import Split
from loralab.metrics.scores import Scores


def write_predictions(
    file: Path,
    rows: Split,
    sources: Sequence[str],
    predictions: Sequence[str] | None,
    scores: Scores,
    shots: Shots | None = None,
    probabilities: Sequence[Mapping[str, float]] | None = None,
) -> None:
    """Writes one line a row.

    Args:
        sources: as people read them.
        predictions: what the model answers; None where it is not asked.
        shots: the numbers of the training rows before each row.
        probabilities: of each label.
    """
    tokens = scores.target_tokens
    by_row = {name: values for name, values in scores.values.items() if values.ndim == 1}
    write_lines(
        file,
        (
            {
                "row": example.row,
                "source": sources[i],
                "references": list(example.targets),
                **({} if shots is None else {"shots": shots.rows[i]}),
                **({} if predictions is None else {"prediction": predictions[i]}),
                **({} if probabilities is None else {"probabilities": probabilities[i]}),
                **({} if tokens is None else {"target_tokens": int(tokens[i])}),
                **{name: round(float(values[i]), 6) for name, values in by_row.items()},
            }
            for i, example in enumerate(rows.examples)
        ),
    )


def write_document_losses(file: Path, encoded: Encoded, scores: Scores) -> None:
    """Writes one line for each chunk or window of a document: its loss, its tokens, its bytes where they are counted."""
    assert scores.target_tokens is not None
    columns = {"row": encoded.numbers.tolist(), "target_tokens": scores.target_tokens.astype(np.int64).tolist()}
    if scores.num_bytes is not None:
        columns["bytes"] = scores.num_bytes.tolist()
    columns |= {name: values.round(6).tolist() for name, values in scores.values.items()}
    write_lines(file, (dict(zip(columns, line, strict=True)) for line in zip(*columns.values(), strict=True)))
