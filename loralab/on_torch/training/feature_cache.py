"""The states at the end of a classifier's frozen part, computed once for every row instead of once an epoch.

They lie in the cache, one row's tokens after the other's, under a hash of the frozen weights and of the rows' token ids.
Where the frozen part ends, and what runs on from there, is in frozen_prefix.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loralab.data.batches import Batch, evaluation_batches
from loralab.data.cache import Facts, cached
from loralab.data.encoded import Encoded
from loralab.on_torch.models.heads import head_parameters
from loralab.on_torch.training.forward import tensors_of
from loralab.on_torch.training.frozen_prefix import FrozenPrefix

TOKENS_PER_BATCH = 8192
MOST_BYTES = 8 << 30  # of stored states; a data set that would take more is computed anew in every epoch
STORED = {torch.float32: "<f4", torch.bfloat16: "<u2", torch.float16: "<f2"}  # NumPy knows no bf16: its bits

Array = NDArray[Any]


class FeatureCache:
    """Stored states, found by the token ids of a row."""

    def __init__(self, prefix: FrozenPrefix, pad_id: int) -> None:
        self.prefix, self.pad_id = prefix, pad_id
        one = next(prefix.model.parameters())
        self.dtype, self.device = one.dtype, one.device
        self._weights = _digest(prefix)
        self._rows: dict[bytes, Array] = {}
        """Of a row's ids, by their hash: [S, D], or [1, D], mapped from the disk."""

    def prepare(self, encoded: Encoded, on_done: Callable[[int], None]) -> None:
        """Computes the states of all rows, or finds them in the cache."""
        ends = np.cumsum(np.minimum(encoded.source_lengths, self.prefix.most_tokens))
        if int(ends[-1]) * self.prefix.width * self.dtype.itemsize > MOST_BYTES:
            return
        keys = [_key(encoded.source(row)) for row in range(len(encoded))]
        ids = hashlib.blake2b(b"".join(keys), digest_size=16).hexdigest()
        about = {"weights": self._weights, "dtype": str(self.dtype), "cut": self.prefix.name, "ids": ids}
        states = cached("features", about, lambda folder: self._write(folder, encoded, ends, on_done)).array("states")
        self._rows |= dict(zip(keys, np.split(states, ends[:-1]), strict=True))

    def logits(self, batch: Batch) -> Tensor | None:
        """[B, C] in fp32, from stored states; None where a row has not been prepared."""
        rows = [self._rows.get(_key(ids[mask])) for ids, mask in zip(batch.source_ids, batch.source_mask, strict=True)]
        found = [row for row in rows if row is not None]
        if len(found) < len(rows):
            return None
        states = np.zeros((len(found), max(map(len, found)), self.prefix.width), STORED[self.dtype])
        for place, row in zip(states, found, strict=True):
            place[: len(row)] = row
        on_device = torch.from_numpy(states).view(self.dtype).to(self.device)
        return self.prefix.logits(on_device, *tensors_of(batch, self.device)[:2])

    def _write(self, folder: Path, encoded: Encoded, ends: NDArray[np.int64], on_done: Callable[[int], None]) -> Facts:
        lengths = encoded.source_lengths, encoded.target_lengths
        shape, done = (int(ends[-1]), self.prefix.width), 0
        states = np.lib.format.open_memmap(folder / "states.npy", "w+", np.dtype(STORED[self.dtype]), shape)
        self.prefix.model.eval()
        for rows in evaluation_batches(*lengths, tokens_per_batch=TOKENS_PER_BATCH):
            given = self.prefix.states(*tensors_of(encoded.collate(rows, self.pad_id), self.device)[:2]).cpu()
            bits = given.view(torch.uint16).numpy() if self.dtype == torch.bfloat16 else given.numpy()
            for row, found in zip(rows, bits, strict=True):
                start = ends[row - 1] if row else 0
                states[start : ends[row]] = found[: ends[row] - start]
            on_done(done := done + len(rows))
        states.flush()
        return {}


def _digest(prefix: FrozenPrefix) -> str:
    """Returns a digest of all weights that are not trained, except the head's."""
    head, digest = set(head_parameters(prefix.model)), hashlib.blake2b(digest_size=16)
    digest.update(type(prefix.model).__name__.encode())
    trained = {name for name, parameter in prefix.model.named_parameters() if parameter.requires_grad}
    for name, tensor in prefix.model.state_dict().items():  # packed weights are no parameters
        if name not in head | trained:
            digest.update(name.encode())
            flat = tensor.cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _key(ids: Array) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).data, digest_size=16).digest()
