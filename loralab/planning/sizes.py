"""Bytes of a base, of an adapter's file and of a saved model, counted from shapes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from loralab.adapters.files import PREFIX
from loralab.engine import ModelFacts

ITEMSIZES = {"float32": 4, "bfloat16": 2}
"""Bytes of an element in each dtype of weights and products."""
FLOAT = ITEMSIZES["float32"]
KEPT = {"int8": 2, "nf4": 2}  # bytes of an element that is not quantised


@dataclass(frozen=True)
class Sizes:
    """Counts that depend on no batch."""

    trainable: int
    total: int
    saved_bytes: int
    """Bytes of the adapter's file; of the model's where all of it is trained."""
    values_bytes: int
    """Bytes of the numbers in it alone."""
    base_bytes: dict[str, int]
    """Bytes of the base in each dtype, and quantised."""


def sizes_of(facts: ModelFacts, method: str, dtype: str) -> Sizes:
    """Returns parameters and bytes.

    Args:
        method: the recipe's training.method.
        dtype: of weights and products.
    """
    if method == "full":
        saved = values = facts.base_parameters * ITEMSIZES[dtype]
    else:
        values = FLOAT * sum(map(math.prod, facts.saved.values()))
        saved = values + (_header(facts.saved) if facts.saved else 0)
    return Sizes(facts.trainable, facts.total, saved, values, _base_bytes(facts))


def _header(tensors: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes before the numbers in a safetensors file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in sorted(tensors):
        end = place + math.prod(tensors[name]) * FLOAT
        entries[PREFIX + name] = {"dtype": "F32", "shape": list(tensors[name]), "data_offsets": [place, end]}
        place = end
    text = len(json.dumps(entries, separators=(",", ":")))
    return 8 + -(-text // 8) * 8


def _base_bytes(facts: ModelFacts) -> dict[str, int]:
    found = {dtype: facts.base_parameters * size for dtype, size in ITEMSIZES.items()}
    packed = sum(math.prod(shape) for shape in facts.matrices)
    for quantize, kept in KEPT.items():
        found[quantize] = kept * (facts.base_parameters - packed) + sum(
            packed_bytes(shape, quantize) for shape in facts.matrices
        )
    return found


def packed_bytes(shape: tuple[int, int], quantize: str) -> int:
    """Returns the bytes of a quantised matrix: int8 with a scale a row; nf4 with a scale for 64 numbers."""
    numel = math.prod(shape)
    return numel + shape[0] * FLOAT if quantize == "int8" else (numel + 1) // 2 + -(-numel // 64) * FLOAT
