"""The tokens of a split's rows: flat arrays with offsets, which tokenization.py makes and a cache on disk holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.data.batches import Batch, collate, with_token_types
from loralab.data.few_shot import Shots
from loralab.data.rows import Findings


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSplit:
    """Token ids of n rows, in the order of the split: row i is `ids[offsets[i]:offsets[i + 1]]`."""

    source_ids: NDArray[np.int32]
    source_offsets: NDArray[np.int64]  # n + 1
    target_ids: NDArray[np.int32]
    target_offsets: NDArray[np.int64]  # n + 1
    numbers: NDArray[np.int64]  # n: the number of each row in its file
    max_source_length: int  # tokens, with the prompt and the end-of-sequence token
    max_target_length: int  # tokens, with the end-of-sequence token
    findings: Findings  # the rows that were too long
    reused: bool  # the tokens are those of an earlier run
    shots: Shots | None = None  # the worked examples before each row
    second: NDArray[np.int32] | None = None  # n: of pairs of texts, the place of the first token of type 1

    def __len__(self) -> int:
        return len(self.source_offsets) - 1

    def __str__(self) -> str:
        return f"{len(self):,} rows"

    @property
    def parts(self) -> tuple[EncodedSplit]:
        """Itself."""
        return (self,)

    @property
    def facts(self) -> dict[str, Any]:
        """Returns what a record says of the tokens."""
        return {"rows": len(self), **({"shots": self.shots.as_json()} if self.shots else {})}

    def collate(self, rows: NDArray[np.int64], pad_id: int) -> Batch:
        """The given rows as one padded batch."""
        batch = collate(rows, [self.source(i) for i in rows], [self.target(i) for i in rows], pad_id)
        return batch if self.second is None else with_token_types(batch, self.second[rows])

    @property
    def source_lengths(self) -> NDArray[np.int64]:
        return np.diff(self.source_offsets)

    @property
    def target_lengths(self) -> NDArray[np.int64]:
        return np.diff(self.target_offsets)

    @property
    def target_tokens(self) -> NDArray[np.int64]:
        """[n]: how many the loss counts of each row."""
        return self.target_lengths

    def after(self, row: int) -> EncodedSplit:
        """The rows whose number in the file is above this one."""
        first = int(np.searchsorted(self.numbers, row, side="right"))
        kept = slice(first, None)
        return replace(
            self,
            source_offsets=self.source_offsets[kept],
            target_offsets=self.target_offsets[kept],
            numbers=self.numbers[kept],
            second=None if self.second is None else self.second[kept],
        )

    def rows_of(self, epoch: int) -> NDArray[np.int64]:
        """[n]: every row, in every epoch the same."""
        return np.arange(len(self))

    def in_pass(self, rows: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        """Returns the same rows as they are when they are passed another time."""
        return rows

    def lengths_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, target) lengths of these rows."""
        return self.source_lengths[rows], self.target_lengths[rows]

    def numbers_of(self, rows: NDArray[np.int64]) -> str:
        """Returns which rows these are in their file, in words."""
        return ", ".join(map(str, self.numbers[rows].tolist()))

    def source(self, i: int) -> NDArray[np.int32]:
        return self.source_ids[self.source_offsets[i] : self.source_offsets[i + 1]]

    def target(self, i: int) -> NDArray[np.int32]:
        return self.target_ids[self.target_offsets[i] : self.target_offsets[i + 1]]
