"""Classifiers on real rows: which labels a data set has, and what a model answers with them.

training rows ──> Labels ──> checked against every other split ──> logits [rows, C] ──> losses, labels, probabilities
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.config.recipe import Recipe
from loralab.console.progress import say
from loralab.data.batches import Batch, collate, evaluation_batches, padded
from loralab.data.splits import AnySplit
from loralab.data.tokenization import encode_sources
from loralab.data.tokenized_split import EncodedSplit
from loralab.engine import Engine
from loralab.metrics.labels import Labels, as_list, balance, settle

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


def settle_labels(recipe: Recipe, training: AnySplit) -> Labels | None:
    """The labels of the training rows; None where the task is not one of labels. Raises DataError as `settle`."""
    if recipe.data.label is None:
        return None
    return settle(training.label_counts, recipe.data.labels, f"{training.name}, {training.split}")


def check_split(labels: Labels, rows: AnySplit, quietly: bool = False) -> None:
    """Raises DataError where a split has labels that are none of these; says how even they are."""
    title = f"{rows.name}, {rows.split}"
    labels.check(rows.label_counts, title)
    if not quietly:
        say("\n".join(balance(rows.label_counts, labels, title)))


def within_positions(lengths: tuple[int, int], positions: int | None) -> tuple[int, int]:
    """A classifier's lengths: of texts beyond its positions the rest is not read."""
    source, target = lengths
    if positions is None or source <= positions:
        return lengths
    say(
        f"data.max_source_length is {source}, and the model has {positions} positions: texts are cut to {positions} tokens."
    )
    return positions, target


def answer_rows(engine: Engine, encoded: EncodedSplit, on_done: Callable[[int], None]) -> Answers:
    """What the engine's model says to each row; `on_done` hears how many are done."""
    assert engine.labels is not None
    table, done = np.zeros((len(encoded), len(engine.labels.names))), 0
    for rows in evaluation_batches(encoded.source_lengths, encoded.target_lengths, tokens_per_batch=TOKENS):
        table[rows] = engine.logits(collate(encoded, rows, engine.pad_id))
        on_done(done := done + len(rows))
    return Answers(engine.labels, table)


def answer_texts(engine: Engine, texts: Sequence[str], max_length: int, on_done: Callable[[int], None]) -> Answers:
    """The same for texts without labels."""
    assert engine.labels is not None
    ids = [
        np.array(row, dtype=np.int32) for row in encode_sources(texts, engine.tokenizer, engine.prompt, max_length)[0]
    ]
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    table, done = np.zeros((len(ids), len(engine.labels.names))), 0
    for rows in evaluation_batches(lengths, np.ones_like(lengths), tokens_per_batch=TOKENS):
        table[rows] = engine.logits(_unlabelled([ids[row] for row in rows], rows, engine.pad_id))
        on_done(done := done + len(rows))
    return Answers(engine.labels, table)


def _unlabelled(ids: Sequence[NDArray[np.int32]], rows: NDArray[np.int64], pad_id: int) -> Batch:
    source_ids, mask = padded(ids, pad_id)
    return Batch(rows, source_ids, mask, np.zeros((len(ids), 1), dtype=np.int64), int(mask.sum()), len(ids))
