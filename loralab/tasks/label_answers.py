"""Answers of a classifier: logits [rows, C] ──> losses, labels, probabilities."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.data.batches import collate, evaluation_batches, with_token_types
from loralab.data.encoded import Encoded
from loralab.data.text_pairs import PairPrompt, encode_pairs, has_token_types
from loralab.data.tokenization import encode_sources
from loralab.metrics.labels import Labels, RegressionOutput, as_list
from loralab.tasks.task import Done, TaskModel

Floats = NDArray[np.float64]
TOKENS = 8192  # padded tokens of a batch
EVEN_ODDS = 0.5  # above which a label of several is given


@dataclass(frozen=True)
class Answers:
    """Answers of a classifier to rows."""

    labels: Labels
    logits: Floats
    """[rows, C]"""

    @property
    def numbers(self) -> bool:
        """Tells whether each row's answer is a number, and no label."""
        return isinstance(self.labels, RegressionOutput)

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
        """The likeliest label of each row; of several a row, those above even odds, as a list in JSON; of a regression its number."""
        names = self.labels.names
        if self.numbers:
            return [repr(float(number)) for number in self.logits[:, 0].astype(np.float32)]
        if self.labels.multi:
            return [as_list([names[i] for i in np.flatnonzero(row > EVEN_ODDS)]) for row in self.table]
        return [names[i] for i in self.logits.argmax(axis=1)]

    @property
    def probabilities(self) -> list[dict[str, float]]:
        """Returns the probabilities of each row, by the label's name, in the labels' order."""
        return [dict(zip(self.labels.names, row, strict=True)) for row in self.table.tolist()]

    def as_json(self) -> list[dict[str, Any]]:
        """One object a text: its label, or list of labels, and every label's probability."""
        if self.numbers:
            return [{"number": float(text)} for text in self.predictions]
        return [
            {"label": json.loads(text) if self.labels.multi else text, "probabilities": each}
            for text, each in zip(self.predictions, self.probabilities, strict=True)
        ]

    def losses(self, targets: Sequence[NDArray[np.int32]]) -> Floats:
        """[rows]: nats, summed over a row's targets: one label's number, or a 0 or 1 for each label. Of numbers squared errors."""
        if self.numbers:
            return np.asarray((self.logits - np.stack(targets)).squeeze(1) ** 2, dtype=np.float64)
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


def answer_texts(model: TaskModel, sources: Sequence[str], max_length: int, on_done: Done) -> Answers:
    """Asks the model for the label of each source, of which none is known; of two texts a source is as `join_pair` makes it."""
    assert model.labels is not None
    prompt, second = model.prompt, None
    if isinstance(prompt, PairPrompt):
        pairs = encode_pairs(sources, model.tokenizer, max_length)
        rows = [pair.ids for pair in pairs]
        second = np.array([pair.second for pair in pairs], dtype=np.int32) if has_token_types(model.tokenizer) else None
    else:
        rows = encode_sources(sources, model.tokenizer, prompt, max_length)[0]
    lengths, none = np.array([len(row) for row in rows], dtype=np.int64), np.zeros(1, dtype=np.int32)
    table, done = np.zeros((len(rows), len(model.labels.names))), 0
    for places in evaluation_batches(lengths, np.ones_like(lengths), tokens_per_batch=TOKENS):
        ids = [np.array(rows[place], dtype=np.int32) for place in places]
        batch = collate(places, ids, [none] * len(ids), model.pad_id)
        table[places] = model.logits(batch if second is None else with_token_types(batch, second[places]))
        on_done(done := done + len(places))
    return Answers(model.labels, table)
