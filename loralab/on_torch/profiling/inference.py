"""Peak memory of inference on a batch of rows: the last token of the longest answers, with all keys and values kept.

Run without numbers by traced_model.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from loralab.config.generation import TOKENS_PER_BATCH, Decoding
from loralab.engine import BatchShape
from loralab.on_torch.models.registry import family_of


def answered(shape: BatchShape, decoding: Decoding) -> BatchShape:
    """Returns a batch as generation makes it of rows of these lengths; whole texts are gone on from their first token."""
    source = max(shape.source, 1)
    rows = max(1, TOKENS_PER_BATCH // (source + decoding.beams * decoding.max_new_tokens))
    return replace(shape, rows=rows, source=source, target=decoding.max_new_tokens, padded=rows > 1, packed=False)


def answer(model: nn.Module, shape: BatchShape, beams: int) -> None:
    """Reads the rows and writes the last token of their answers."""
    ids, mask = (torch.empty(shape.rows, shape.source, dtype=torch.long, device="meta") for _ in range(2))
    family_of(model).trace_answer(model, ids, mask, shape.target, beams)
