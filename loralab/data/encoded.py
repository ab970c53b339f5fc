"""The tokens of rows, as batches are made of them: for every task the same questions.

`Trained` is what the training loop draws from; `Encoded` is one data set's, which can be evaluated too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loralab.data.batches import Batch
from loralab.data.few_shot import Shots
from loralab.data.rows import Findings

Ints = NDArray[np.int64]


class Trained(Protocol):
    """Rows to train on; some have other tokens in every epoch."""

    @property
    def parts(self) -> Sequence[Encoded]:
        """The data sets: the main one first."""

    def rows_of(self, epoch: int) -> Ints:
        """Every row of an epoch."""

    def lengths_of(self, rows: Ints) -> tuple[Ints, Ints]:
        """(source, target) lengths of these rows, in tokens."""

    def numbers_of(self, rows: Ints) -> str:
        """Returns which rows of their file these are, in words."""

    def collate(self, rows: Ints, pad_id: int) -> Batch:
        """The given rows as one padded batch."""


class Encoded(Trained, Protocol):
    """The rows of one data set: of texts that are taken in parts, the parts."""

    @property
    def findings(self) -> Findings:
        """Rows that were too long."""

    @property
    def reused(self) -> bool:
        """Tells whether the tokens are those of an earlier run."""

    @property
    def shots(self) -> Shots | None:
        """The worked examples before each row."""

    @property
    def numbers(self) -> Ints:
        """[rows]: the number of each in its file."""

    @property
    def source_lengths(self) -> Ints:
        """[rows], in tokens."""

    @property
    def target_lengths(self) -> Ints:
        """[rows], in tokens."""

    @property
    def target_tokens(self) -> Ints:
        """[rows]: how many the loss counts of each."""

    @property
    def facts(self) -> dict[str, Any]:
        """Returns what a record says of the tokens."""

    def __len__(self) -> int: ...

    def __str__(self) -> str:
        """Counts how many there are, in words."""

    def source(self, i: int) -> NDArray[np.int32]:
        """Returns what the model reads of a row."""

    def target(self, i: int) -> NDArray[np.int32]:
        """Returns what it learns of a row."""

    def in_pass(self, rows: Ints, number: int) -> Ints:
        """Returns the same rows as they are when they are passed another time."""

    def after(self, row: int) -> Encoded:
        """The rows whose number in the file is above this one."""
