"""Tasks whose answers are texts, which the model writes: losses of the references, and metrics of what it writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loralab.config.generation import Decoding
from loralab.config.recipe import EvaluationSettings
from loralab.console.progress import Progress, say
from loralab.data.encoded import Encoded
from loralab.data.few_shot import Shots, draw_shots, shots_in_words, with_shots
from loralab.data.rows import Example
from loralab.data.splits import AnySplit, Split, StreamedSplit
from loralab.data.stop_sequences import truncate_at_stop
from loralab.data.tokenization import NO_LIMIT, encode_sources, flat
from loralab.data.tokenized_split import EncodedSplit
from loralab.metrics.floors import FLOOR_NAMES, constant, lead
from loralab.metrics.labels import Labels
from loralab.metrics.metric import Floats
from loralab.metrics.scores import Scores, score
from loralab.tasks.predictions import write_predictions
from loralab.tasks.task import Done, Task, TaskModel, row_losses


class TextAnswerTask(Task):
    """A row asks for a text."""

    def encode_evaluated(
        self,
        model: TaskModel,
        rows: Split,
        lengths: tuple[int, int],
        seed: int,
        settings: EvaluationSettings | None = None,
        training: AnySplit | None = None,
    ) -> Encoded:
        encoded = super().encode_evaluated(model, rows, lengths, seed)
        if settings is None or not settings.shots:
            return encoded
        assert isinstance(encoded, EncodedSplit) and training is not None
        numbered = [(example.row, example.source) for example in rows.examples]
        drawn = draw_shots(numbered, rows.source_hashes, training, settings.shots, settings.seed)
        alone = [encoded.source(i).tolist() for i in range(len(encoded))]
        preceded, shots = after_shots(
            model, alone, [source for _, source in numbered], drawn, encoded.max_source_length
        )
        ids, offsets = flat(preceded)
        return replace(encoded, source_ids=ids, source_offsets=offsets, shots=shots)

    def loss_scores(self, rows: Split, encoded: Encoded, losses: Floats) -> Scores:
        tokens = encoded.target_tokens.astype(np.float64)
        return Scores([example.subject for example in rows.examples], {"loss": losses / tokens}, tokens)

    def evaluate(
        self, model: TaskModel, settings: EvaluationSettings, rows: Split, encoded: Encoded, file: Path | None
    ) -> Scores:
        scores = self.loss_scores(rows, encoded, row_losses(model, encoded, Progress("loss", len(encoded)).update))
        sources, predictions = self.sources(rows), None
        if settings.metrics:
            progress = Progress("generate", num_sources(rows))
            predictions = write_answers(model, rows, encoded, settings, progress.update)
            references = [example.targets for example in rows.examples]
            values = scores.values | score(predictions, references, sources, settings.metrics)
            scores = replace(scores, values=values)
        if file is not None:
            write_predictions(file, rows, sources, predictions, scores, encoded.shots)
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
        values = super().validate(model, metrics, decoding, rows, encoded, on_done)
        if not metrics:
            return values
        answers = write_answers(model, rows, encoded, decoding, lambda done: on_done(len(encoded) + done))
        columns = score(answers, [row.targets for row in rows.examples], self.sources(rows), metrics)
        return values | {name: float(column.mean()) for name, column in columns.items()}

    def num_validated(self, rows: Split, encoded: Encoded, metrics: Sequence[str]) -> int:
        return len(encoded) + (num_sources(rows) if metrics else 0)

    def floors(
        self, training: StreamedSplit, rows: Split, metrics: Sequence[str], labels: Labels | None
    ) -> Mapping[str, Scores]:
        """The first lines of each source, and one sentence for all of them (metrics/floors.py)."""
        sources, sentence = self.sources(rows), self.constant_answer(training)
        predictions = {
            FLOOR_NAMES["lead"]: [lead(source) for source in sources],
            FLOOR_NAMES["constant"]: [sentence for _ in sources],
        }
        groups = [example.subject for example in rows.examples]
        references = [example.targets for example in rows.examples]
        return {
            name: Scores(groups, score(texts, references, sources, metrics), None)
            for name, texts in predictions.items()
        }

    def constant_answer(self, training: StreamedSplit) -> str:
        return constant(training.sample_of_targets())


def num_sources(rows: Split) -> int:
    """Returns the number of different sources, each of which is answered once."""
    return len({example.source for example in rows.examples})


def write_answers(model: TaskModel, rows: Split, encoded: Encoded, decoding: Decoding, on_done: Done) -> list[str]:
    """Generates one prediction a row; rows with the same source share it. `on_done` hears how many sources are done."""
    first_row: dict[str, int] = {}
    for row, example in enumerate(rows.examples):
        first_row.setdefault(example.source, row)
    sources = list(first_row)
    ids = model.generate([encoded.source(first_row[source]).tolist() for source in sources], decoding, on_done)
    texts = dict(zip(sources, model.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True))
    return [truncate_at_stop(texts[example.source], decoding.stop).strip() for example in rows.examples]


def after_shots(
    model: TaskModel, ids: list[list[int]], sources: list[str], drawn: list[list[Example]], max_length: int
) -> tuple[list[list[int]], Shots]:
    """Puts worked examples before each row's tokens, as many as fit; says how many that are.

    Args:
        ids: the tokens of each row, by itself.
        sources: the text of each.
        drawn: the training rows that are its examples.
        max_length: tokens of a row with its examples.
    """

    def ask(source: str) -> list[int]:
        return encode_sources([source], model.tokenizer, model.prompt, NO_LIMIT)[0][0]

    preceded, shots = with_shots(ids, sources, drawn, model.prompt, ask, max_length)
    say(f"{shots_in_words(shots.as_json()).capitalize()}.")
    return preceded, shots
