"""Regression: the model gives a number for a text; the loss is the squared error, as Transformers' problem_type regression has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loralab.config.generation import Decoding
from loralab.config.recipe import EvaluationSettings
from loralab.console.progress import Progress, say
from loralab.data.encoded import Encoded
from loralab.data.splits import AnySplit, Split, StreamedSplit
from loralab.errors import DataError
from loralab.metrics import regression
from loralab.metrics.labels import Labels, RegressionOutput
from loralab.metrics.scores import Scores, score, value_of
from loralab.tasks.encoder_head import EncoderHeadTask
from loralab.tasks.label_answers import answer_rows
from loralab.tasks.predictions import write_predictions
from loralab.tasks.task import Done, TaskModel


class RegressionTask(EncoderHeadTask):
    """`data.label` is a column of numbers."""

    num_outputs = 1

    def settle_labels(self, training: AnySplit) -> Labels | None:
        if len(training.label_counts) < 2:
            raise DataError(
                f"{training.name}, {training.split}: all rows have the number {next(iter(training.label_counts))}, and there is "
                "nothing to learn. Does data.label name the right column?"
            )
        return RegressionOutput()

    def check_labels(self, labels: Labels | None, rows: AnySplit, quietly: bool = False) -> None:
        if not quietly:
            numbers, counts = zip(*((float(text), count) for text, count in rows.label_counts.items()), strict=True)
            mean = float(np.average(numbers, weights=counts))
            say(f"{rows.name}, {rows.split}, numbers: {min(numbers):g} to {max(numbers):g}, mean {mean:.4g}")

    def evaluate(
        self, model: TaskModel, settings: EvaluationSettings, rows: Split, encoded: Encoded, file: Path | None
    ) -> Scores:
        answers = answer_rows(model, encoded, Progress("predict", len(encoded)).update)
        predictions, references = answers.predictions, [example.targets for example in rows.examples]
        scores = self.loss_scores(rows, encoded, answers.losses(targets_of(encoded)))
        scores = replace(scores, values=scores.values | score(predictions, references, None, settings.metrics))
        if file is not None:
            write_predictions(file, rows, self.sources(rows), predictions, scores)
        return scores

    def validate(
        self,
        model: TaskModel,
        metrics: Sequence[str],
        decoding: Decoding,
        rows: Split,
        encoded: Encoded,
        on_done: Done,
    ) -> dict[str, float]:
        answers = answer_rows(model, encoded, on_done)
        loss = float(answers.losses(targets_of(encoded)).mean())
        columns = score(answers.predictions, [example.targets for example in rows.examples], None, metrics)
        return {"loss": loss} | {name: value_of(name, column) for name, column in columns.items()}

    def validation_columns(self, labels: Labels | None) -> list[str] | None:
        return [column.name for column in regression.COLUMNS]

    def floors(
        self, training: StreamedSplit, rows: Split, metrics: Sequence[str], labels: Labels | None
    ) -> Mapping[str, Scores]:
        """The mean of the training rows, for every row; a constant has no correlation."""
        counts = training.label_counts
        mean = float(np.average([float(text) for text in counts], weights=list(counts.values())))
        references = [example.targets for example in rows.examples]
        columns = score([repr(mean) for _ in references], references, None, metrics)
        values = {name: column for name, column in columns.items() if column.ndim == 1}
        return {f"always {mean:.4g}": Scores([example.subject for example in rows], values, None)}


def targets_of(encoded: Encoded) -> list[np.ndarray]:
    """Returns [rows]: the number of each."""
    return [encoded.target(row) for row in range(len(encoded))]
