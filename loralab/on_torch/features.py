"""The states that a frozen encoder gives a classifier's head, computed once for every row instead of once an epoch.

    ids [S] ── encoder, frozen, nothing dropped out ──> state [D] of the first token ── head ──> logits [C]

Heads that read the first token alone (BERT's, RoBERTa's and their relatives') can be run on stored states: the encoder is
stood in for by one that gives a text of that one state back. Whether that holds for a model is tried, not assumed. States
lie in the cache under a hash of the encoder's weights and of the token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loralab.data.batches import Batch, collate, evaluation_batches
from loralab.data.cache import ArrayFile, Facts, cached
from loralab.data.encoded import EncodedSplit
from loralab.on_torch.heads import POOLER, head_parameters

TOKENS_PER_BATCH = 8192
STORED = {torch.float32: "<f4", torch.bfloat16: "<u2"}  # NumPy knows no bf16: its bits


def encoder_of(model: nn.Module) -> nn.Module:
    """A classifier without what stands beside its encoder."""
    encoder: nn.Module = getattr(model, str(model.base_model_prefix))
    return encoder


@contextmanager
def _standing_in(encoder: nn.Module, states_BD: Tensor) -> Iterator[None]:
    """Makes the encoder give these states, as of texts of one token."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    pooler = getattr(encoder, POOLER, None)

    def forward(*_: Any, **__: Any) -> Any:
        states = states_BD[:, None]
        return BaseModelOutputWithPooling(states, None if pooler is None else pooler(states))

    encoder.forward = forward
    try:
        yield
    finally:
        del encoder.forward


def head_logits(model: nn.Module, states_BD: Tensor) -> Tensor:
    """[B, C] in fp32."""
    ids = torch.zeros(len(states_BD), 1, dtype=torch.long, device=states_BD.device)
    with _standing_in(encoder_of(model), states_BD):
        found: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found.float()


@torch.no_grad()
def states_of(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """[B, D]: the first token's."""
    found: Tensor = encoder_of(model)(input_ids=ids, attention_mask=mask)[0][:, 0]
    return found


@torch.no_grad()
def reads_first_token(model: nn.Module, ids: Tensor, mask: Tensor) -> bool:
    """Whether the head gives the model's logits of these rows from their first tokens' states alone."""
    was_training = model.training
    model.eval()
    try:
        whole = model(input_ids=ids, attention_mask=mask).logits.float()
        return torch.allclose(head_logits(model, states_of(model, ids, mask)), whole, rtol=1e-4, atol=1e-5)
    except Exception:  # a head that reads otherwise fails in its own way
        return False
    finally:
        model.train(was_training)


class Features:
    """Stored states, found by the token ids of a row."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self._weights = _digest(model)
        self._states: list[np.ndarray[Any, Any]] = []
        self._place: dict[bytes, tuple[int, int]] = {}

    def prepare(self, encoded: EncodedSplit, on_done: Callable[[int], None]) -> None:
        """Computes the states of all rows, or finds them in the cache."""
        dtype = next(encoder_of(self.model).parameters()).dtype
        key = {"weights": self._weights, "dtype": str(dtype), "ids": _digest_of_ids(encoded)}

        def build(folder: Path) -> Facts:
            return self._write(folder, encoded, dtype, on_done)

        entry = cached("features", key, build)
        self._states.append(entry.array("states").reshape(len(encoded), -1))
        for row in range(len(encoded)):
            self._place[_key(encoded.source(row))] = len(self._states) - 1, row

    def of(self, batch: Batch) -> Tensor | None:
        """[B, D]; None where a row has not been prepared."""
        places = [
            self._place.get(_key(ids[mask])) for ids, mask in zip(batch.source_ids, batch.source_mask, strict=True)
        ]
        if None in places:
            return None
        rows = np.stack([self._states[part][row] for part, row in (place for place in places if place)])
        states = torch.from_numpy(rows)
        encoder = next(encoder_of(self.model).parameters())
        return (states if states.dtype == torch.float32 else states.view(torch.bfloat16)).to(encoder.device)

    def _write(self, folder: Path, encoded: EncodedSplit, dtype: torch.dtype, on_done: Callable[[int], None]) -> Facts:
        device = next(self.model.parameters()).device
        self.model.eval()
        table: np.ndarray[Any, Any] | None = None
        done = 0
        for rows in evaluation_batches(
            encoded.source_lengths, encoded.target_lengths, tokens_per_batch=TOKENS_PER_BATCH
        ):
            batch = collate(encoded, rows, self.pad_id)
            ids, mask = (torch.from_numpy(array).to(device) for array in (batch.source_ids, batch.source_mask))
            states = states_of(self.model, ids, mask).cpu()
            bits = (states if dtype == torch.float32 else states.view(torch.uint16)).numpy()
            if table is None:
                table = np.zeros((len(encoded), bits.shape[1]), dtype=bits.dtype)
            table[rows] = bits
            on_done(done := done + len(rows))
        assert table is not None
        with ArrayFile(folder / "states.npy", STORED[dtype]) as file:
            file.append(table.ravel())
        return {}


def _digest(model: nn.Module) -> str:
    """Of all weights but the head's."""
    head, digest = set(head_parameters(model)), hashlib.blake2b(digest_size=16)
    digest.update(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        if name not in head:
            digest.update(name.encode())
            flat = parameter.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest_of_ids(encoded: EncodedSplit) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for row in range(len(encoded)):
        digest.update(_key(encoded.source(row)))
    return digest.hexdigest()


def _key(ids: np.ndarray[Any, Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int32).data, digest_size=16).digest()
