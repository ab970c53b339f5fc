"""Models and sources for the tests of generation in both engines."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import end_with, make_t5, ours

from loralab.config.generation import Decoding
from loralab.on_torch.generation.generate import generate_ids


def make_ending_t5(folder: Path, layout: str = "untied") -> Path:
    """A random T5 whose answers have different lengths."""
    make_t5(folder, layout)
    return end_with(folder, generate_ids(ours(folder), random_sources(20), Decoding(max_new_tokens=12), 0))


def random_sources(count: int, vocabulary: int = 120) -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(2, vocabulary, (5 + 3 * row,)).tolist() for row in range(count)]
