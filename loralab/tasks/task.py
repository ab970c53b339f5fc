"""Base class of the tasks: rows to tokens, tokens to scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from loralab.config.data import DataSettings
from loralab.config.generation import Decoding
from loralab.config.recipe import EvaluationSettings
from loralab.data.batches import Batch, evaluation_batches
from loralab.data.chat_template import Chat
from loralab.data.encoded import Encoded
from loralab.data.lengths import check_positions, resolve_lengths
from loralab.data.prompts import Prompt
from loralab.data.splits import AnySplit, Split, StreamedSplit
from loralab.data.tokenization import encode
from loralab.metrics.labels import Labels
from loralab.metrics.metric import Floats
from loralab.metrics.scores import Scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOSS_TOKENS = 8192  # padded tokens of a batch whose loss is measured

Done = Callable[[int], None]
"""Hears how many rows are done."""


class TaskModel(Protocol):
    """The model's interface for a task; engine.Engine implements it."""

    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt | Chat
    causal: bool
    positions: int | None
    labels: Labels | None
    pad_id: int

    def losses(self, batch: Batch) -> NDArray[np.float64]:
        """[B]: each row's loss in nats, summed over its target tokens; nothing is dropped out."""

    def logits(self, batch: Batch) -> NDArray[np.float64]:
        """[B, C]: a classifier's, before softmax, or sigmoid where a row may have several labels; nothing is dropped out."""

    def generate(
        self,
        source_ids: Sequence[Sequence[int]],
        decoding: Decoding,
        on_done: Done | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> list[list[int]]:
        """Answers, as ids without start, end and padding; in the order of the sources. One that a stop text ends has that text
        in it (`stop_sequences.truncate_at_stop` takes it away).

        Args:
            on_done: hears how many are done.
            on_token: hears each token as it is written, for a single source and no beam search.
        """


class Task(ABC):
    """One way to learn from rows; see `loralab.tasks`."""

    classifies: ClassVar[bool] = False
    """The model chooses among labels, and writes nothing."""
    num_outputs: ClassVar[int | None] = None
    """Outputs of the head, where the task fixes their number."""
    has_source: ClassVar[bool] = True
    """A row asks for something; without a source it is a text alone."""

    def __init__(self, data: DataSettings) -> None:
        self.data = data

    # What rows are

    def check(self) -> None:  # noqa: B027, most tasks have nothing to check
        """Raises `RecipeError` where the settings cannot work, before anything is read."""

    @property
    def packed_length(self) -> int | None:
        """Tokens of a row in which texts are packed side by side; None where they are not."""
        return None

    def shown(self, source: str) -> str:
        """A source as people read it."""
        return source

    def sources(self, rows: Split) -> list[str]:
        """[rows]: the sources as people read them."""
        return [self.shown(example.source) for example in rows.examples]

    def settle_labels(self, training: AnySplit) -> Labels | None:
        """Returns the labels of the training rows; None where the task has none.

        Raises:
            DataError: they are no labels to learn (metrics/labels.settle).
        """
        return None

    def check_labels(  # noqa: B027, most tasks have no labels
        self, labels: Labels | None, rows: AnySplit, quietly: bool = False
    ) -> None:
        """Raises `DataError` where rows have labels that the model does not have; says how even they are, unless `quietly`."""

    # Rows to tokens

    @abstractmethod
    def prompt(self, tokenizer: PreTrainedTokenizerBase, causal: bool, labels: Labels | None = None) -> Prompt | Chat:
        """Returns how a row is presented to a model.

        Args:
            causal: the model is decoder-only: source and target are one sequence to it.
            labels: what a classifier chooses from.

        Raises:
            RecipeError: this kind of model cannot learn this task.
            ModelError: the tokenizer lacks what the task needs.
        """

    def resolve_lengths(self, model: TaskModel, training: AnySplit) -> tuple[int, int]:
        """Returns the longest source and target in tokens; a percentile is taken of the training rows."""
        prompt = self.prompt(model.tokenizer, model.causal, model.labels)
        given = self.data.max_source_length, self.data.max_target_length
        return self.within_positions(resolve_lengths(training, model.tokenizer, *given, prompt), model)

    def within_positions(self, lengths: tuple[int, int], model: TaskModel) -> tuple[int, int]:
        """Returns the lengths, shortened where the task can do without the rest."""
        return lengths

    def check_lengths(self, lengths: tuple[int, int], max_new_tokens: int, causal: bool, positions: int | None) -> None:
        """Raises `RecipeError` where a row or an answer may have more tokens than the model has positions (None: no bound)."""
        check_positions((lengths[0], max(lengths[1], max_new_tokens)), causal, positions)

    def encode(
        self, model: TaskModel, rows: AnySplit, lengths: tuple[int, int], seed: int, long_rows: str | None = None
    ) -> Encoded:
        """Returns the tokens of all rows.

        Args:
            lengths: of source and target at most.
            seed: of what is drawn anew in every epoch.
            long_rows: in the place of `data.long_rows`.
        """
        prompt = self.prompt(model.tokenizer, model.causal, model.labels)
        return encode(rows, model.tokenizer, prompt, *lengths, long_rows or self.data.long_rows)

    def encode_evaluated(
        self,
        model: TaskModel,
        rows: Split,
        lengths: tuple[int, int],
        seed: int,
        settings: EvaluationSettings | None = None,
        training: AnySplit | None = None,
    ) -> Encoded:
        """Returns the tokens of rows to evaluate. None is left out for its length, or two models would be compared on different
        rows.

        Args:
            settings: with shots, worked examples from the `training` rows stand before each row.
        """
        return self.encode(model, rows, lengths, seed, "cut" if self.data.long_rows == "skip" else None)

    # Tokens to scores

    @abstractmethod
    def loss_scores(self, rows: Split, encoded: Encoded, losses: Floats) -> Scores:
        """Returns the scores that losses alone give: [rows], or [windows] of documents."""

    @abstractmethod
    def evaluate(
        self, model: TaskModel, settings: EvaluationSettings, rows: Split, encoded: Encoded, file: Path | None
    ) -> Scores:
        """Scores the model on the rows, and writes what it answers into the file, one line a row."""

    def validate(
        self,
        model: TaskModel,
        metrics: Sequence[str],
        decoding: Decoding,
        rows: Split,
        encoded: Encoded,
        on_done: Done,
    ) -> dict[str, float]:
        """Returns the value of each column over all rows while a training goes on."""
        losses = row_losses(model, encoded, on_done)
        return {"loss": float(losses.sum() / encoded.target_tokens.sum())}

    def num_validated(self, rows: Split, encoded: Encoded, metrics: Sequence[str]) -> int:
        """Returns how much `on_done` hears of when `validate` has ended."""
        return len(encoded)

    def validation_columns(self, labels: Labels | None) -> list[str] | None:
        """Returns the columns that `validate` can measure; None where the recipe alone decides."""
        return None

    # What needs no model

    def floors(
        self, training: StreamedSplit, rows: Split, metrics: Sequence[str], labels: Labels | None
    ) -> Mapping[str, Scores]:
        """Returns the scores of answers that need no model, by name."""
        return {}

    def constant_answer(self, training: StreamedSplit) -> str:
        """Returns the one text that a floor gives to every row; "" where there is none."""
        return ""

    def compression_floors(self, training: AnySplit, rows: Split) -> Mapping[str, float]:
        """Returns bits per byte by compressors, by name; none where bits are not counted."""
        return {}


def row_losses(model: TaskModel, encoded: Encoded, on_done: Done) -> Floats:
    """Returns [rows]: each row's loss in nats, summed over its target tokens."""
    losses, done = np.zeros(len(encoded)), 0
    for rows in evaluation_batches(encoded.source_lengths, encoded.target_lengths, tokens_per_batch=LOSS_TOKENS):
        losses[rows] = model.losses(encoded.collate(rows, model.pad_id))
        on_done(done := done + len(rows))
    return losses
