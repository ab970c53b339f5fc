"""Answers of a classifier: logits [rows, C] ──> losses, labels, probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.data.batches import Batch, evaluation_batches, padded
from loralab.data.encoded import Encoded
from loralab.data.tokenization import encode_sources
from loralab.metrics.labels import Labels, as_list
from loralab.tasks.task import Done, TaskModel

Floats = NDArray[np.float64]
TOKENS = 8192  # padded tokens of a batch
EVEN_ODDS = 0.5  # above which a label of several is given


@dataclass(frozen=True)
class Answers:
    """What a classifier says to each row."""

    labels: Labels
    logits: Floats
    """[rows, C]"""

    @property
    def table(self) -> Floats:
        """[rows, C]: probabilities, which sum to 1 unless a row may have several labels."""
        if self.labels.multi:
            sigmoid: Floats = np.exp(-np.logaddexp(0, -self.logits))
            return sigmoid
        shifted = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        table: Floats = shifted / shifted.sum(axis=1, keepdims=True)
        return table

    @property
    def predictions(self) -> list[str]:
        """The likeliest label of each row; of several a row, those above even odds, as a list in JSON."""
        names = self.labels.names
        if self.labels.multi:
            return [as_list([names[i] for i in np.flatnonzero(row > EVEN_ODDS)]) for row in self.table]
        return [names[i] for i in self.logits.argmax(axis=1)]

    @property
    def probabilities(self) -> list[dict[str, float]]:
        """Of each row, by the label's name, in the labels' order."""
        return [dict(zip(self.labels.names, row, strict=True)) for row in self.table.tolist()]

    def as_json(self) -> list[dict[str, Any]]:
        """One object a text: its label, or list of labels, and every label's probability."""
        return [
            {"label": json.loads(text) if self.labels.multi else text, "probabilities": each}
            for text, each in zip(self.predictions, self.probabilities, strict=True)
        ]

    def losses(self, targets: Sequence[NDArray[np.int32]]) -> Floats:
        """[rows]: nats, summed over a row's targets: one label's number, or a 0 or 1 for each label."""
        if not self.labels.multi:
            right = np.array([int(target[0]) for target in targets])
            top = self.logits.max(axis=1)
            normaliser = top + np.log(np.exp(self.logits - top[:, None]).sum(axis=1))
            return np.asarray(normaliser - self.logits[np.arange(len(right)), right])
        losses: Floats = (np.logaddexp(0, self.logits) - self.logits * np.stack(targets)).sum(axis=1)
        return losses


def answer_rows(model: TaskModel, encoded: Encoded, on_done: Done) -> Answers:
    """Asks the model for the label of each row; `on_done` hears how many are done."""
    assert model.labels is not None
    table, done = np.zeros((len(encoded), len(model.labels.names))), 0
    for rows in evaluation_batches(encoded.source_lengths, encoded.target_lengths, tokens_per_batch=TOKENS):
        table[rows] = model.logits(encoded.collate(rows, model.pad_id))
        on_done(done := done + len(rows))
    return Answers(model.labels, table)


def answer_texts(model: TaskModel, texts: Sequence[str], max_length: int, on_done: Done) -> Answers:
    """Asks the model for the label of each text, of which none is known."""
    assert model.labels is not None
    ids = [np.array(row, dtype=np.int32) for row in encode_sources(texts, model.tokenizer, model.prompt, max_length)[0]]
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    table, done = np.zeros((len(ids), len(model.labels.names))), 0
    for rows in evaluation_batches(lengths, np.ones_like(lengths), tokens_per_batch=TOKENS):
        table[rows] = model.logits(_unlabelled([ids[row] for row in rows], rows, model.pad_id))
        on_done(done := done + len(rows))
    return Answers(model.labels, table)


def _unlabelled(ids: Sequence[NDArray[np.int32]], rows: NDArray[np.int64], pad_id: int) -> Batch:
    source_ids, mask = padded(ids, pad_id)
    return Batch(rows, source_ids, mask, np.zeros((len(ids), 1), dtype=np.int64), int(mask.sum()), len(ids))
