"""Classification: the model chooses one label of a text, or several.

training rows ──> Labels ──> checked against every other split ──> logits [rows, C] ──> losses, labels, probabilities
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loralab.config.generation import Decoding
from loralab.config.recipe import EvaluationSettings
from loralab.console.progress import Progress, say
from loralab.data.encoded import Encoded
from loralab.data.splits import AnySplit, Split, StreamedSplit
from loralab.metrics import classification
from loralab.metrics.labels import Labels, balance, settle
from loralab.metrics.metric import Floats
from loralab.metrics.scores import Scores, score, value_of
from loralab.tasks.encoder_head import EncoderHeadTask
from loralab.tasks.label_answers import Answers, answer_rows
from loralab.tasks.predictions import write_predictions
from loralab.tasks.task import Done, TaskModel

if TYPE_CHECKING:
    pass


class ClassificationTask(EncoderHeadTask):
    """`data.label` is a column of labels, or of lists of them."""

    def settle_labels(self, training: AnySplit) -> Labels | None:
        return settle(training.label_counts, self.data.labels, f"{training.name}, {training.split}")

    def check_labels(self, labels: Labels | None, rows: AnySplit, quietly: bool = False) -> None:
        assert labels is not None
        title = f"{rows.name}, {rows.split}"
        labels.check(rows.label_counts, title)
        if not quietly:
            say("\n".join(balance(rows.label_counts, labels, title)))

    def evaluate(
        self, model: TaskModel, settings: EvaluationSettings, rows: Split, encoded: Encoded, file: Path | None
    ) -> Scores:
        labels = model.labels
        assert labels is not None
        answers = answer_rows(model, encoded, Progress("classify", len(encoded)).update)
        named = with_names(rows, labels)
        references = [example.targets[0] for example in named.examples]
        scores = self.loss_scores(rows, encoded, losses_of(answers, encoded))
        scores = replace(
            scores,
            values=scores.values | self._columns(answers, references, settings.metrics),
            labels=classification.details(answers.predictions, references, labels.names, labels.multi),
        )
        if file is not None:
            sources, shares = self.sources(rows), answers.probabilities
            write_predictions(file, named, sources, answers.predictions, scores, None, shares)
        return scores

    def _columns(self, answers: Answers, references: Sequence[str], metrics: Sequence[str]) -> dict[str, Floats]:
        return score(answers.predictions, [[text] for text in references], None, metrics, answers.probabilities)

    def validate(
        self,
        model: TaskModel,
        metrics: Sequence[str],
        decoding: Decoding,
        rows: Split,
        encoded: Encoded,
        on_done: Done,
    ) -> dict[str, float]:
        assert model.labels is not None
        answers = answer_rows(model, encoded, on_done)
        references = [example.targets[0] for example in with_names(rows, model.labels).examples]
        columns = self._columns(answers, references, metrics)
        loss = float(losses_of(answers, encoded).sum() / encoded.target_tokens.sum())
        return {"loss": loss} | {name: value_of(name, column) for name, column in columns.items()}

    def validation_columns(self, labels: Labels | None) -> list[str] | None:
        assert labels is not None
        return classification.columns_of(len(labels.names), labels.multi)

    def floors(
        self, training: StreamedSplit, rows: Split, metrics: Sequence[str], labels: Labels | None
    ) -> Mapping[str, Scores]:
        """The label that most training rows have, for every row."""
        if labels is None:
            return {}
        often = labels.named(max(training.label_counts, key=lambda text: training.label_counts[text]))
        certain = [{name: float(i in labels.places(often)) for i, name in enumerate(labels.names)} for _ in rows]
        references = [example.targets for example in with_names(rows, labels).examples]
        values = classification.score([often for _ in rows], references, None, certain)
        return {f"always {often}": Scores([example.subject for example in rows], values, None)}


def losses_of(answers: Answers, encoded: Encoded) -> Floats:
    """Returns [rows]: nats, summed over a row's labels."""
    return answers.losses([encoded.target(row) for row in range(len(encoded))])


def with_names(rows: Split, labels: Labels) -> Split:
    """Returns the rows with the labels' names in the place of what stands in the data."""
    return replace(rows, examples=tuple(replace(row, targets=(labels.named(row.targets[0]),)) for row in rows.examples))
