"""Several data sets as one to train on: which rows of each an epoch has, as a pure function of seed and epoch.

An epoch is one pass over the main set. Of each other set comes a fixed number of rows with it, by its weight: rows for one
row of the main set. They are taken from an endless sequence of shuffled passes over that set, each epoch where the last one
ended, so that no row comes again before all others of its set have come.

    main set, 4 rows               a b c d | a b c d | …
    other set, 3 rows, weight 0.5  z x     | y y     | …     of its passes z x y, y z x, …
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loralab.data.batches import Batch, collate
from loralab.data.encoded import Encoded

Rows = NDArray[np.int64]

STREAM = 1  # parts these coins from others that are made of the same seed


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """P sets, the main one first. Row `j * P + p` is row j of set p, where rows of a later pass have higher numbers."""

    names: tuple[str, ...]
    parts: tuple[Encoded, ...]
    counts: tuple[int, ...]
    """Rows of each that an epoch has; of the main one all."""
    seed: int

    def rows_of(self, epoch: int) -> Rows:
        """[sum of counts]: the rows of this epoch, set after set."""
        parts = [self.parts[0].rows_of(epoch), *(self._drawn(p, epoch) for p in range(1, len(self.parts)))]
        return np.concatenate([rows * len(self.parts) + p for p, rows in enumerate(parts)])

    def _drawn(self, p: int, epoch: int) -> Rows:
        """The next rows of set p: those of its passes that this epoch reaches into."""
        part, count = self.parts[p], self.counts[p]
        start, size = epoch * count, len(part)
        passes = range(start // size, (start + count - 1) // size + 1)
        orders = [np.random.default_rng([self.seed, p, each, STREAM]).permutation(size) for each in passes]
        rows = np.concatenate([part.in_pass(order, each) for order, each in zip(orders, passes, strict=True)])
        return rows[start % size : start % size + count]

    def lengths_of(self, rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(source, target) lengths of these rows."""
        lengths = np.zeros((2, len(rows)), dtype=np.int64)
        for p, mine in self._by_part(rows):
            lengths[:, mine] = self.parts[p].lengths_of(rows[mine] // len(self.parts))
        return lengths[0], lengths[1]

    def _by_part(self, rows: Rows) -> Sequence[tuple[int, NDArray[np.bool_]]]:
        return [(p, rows % len(self.parts) == p) for p in range(len(self.parts))]

    def source(self, i: int) -> NDArray[np.int32]:
        row, p = divmod(int(i), len(self.parts))
        return self.parts[p].source(row)

    def target(self, i: int) -> NDArray[np.int32]:
        row, p = divmod(int(i), len(self.parts))
        return self.parts[p].target(row)

    def collate(self, rows: Rows, pad_id: int) -> Batch:
        """The given rows, of any of the sets, as one padded batch."""
        return collate(rows, [self.source(i) for i in rows], [self.target(i) for i in rows], pad_id)

    def numbers_of(self, rows: Rows) -> str:
        """Returns which rows these are in their files, in words."""
        found = {
            self.names[p]: self.parts[p].numbers_of(rows[mine] // len(self.parts))
            for p, mine in self._by_part(rows)
            if mine.any()
        }
        return "; ".join(f"{numbers} of {name}" for name, numbers in found.items())
