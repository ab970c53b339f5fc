"""Outputs of our models, as Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

IGNORED = -100  # a label that stands for padding


@dataclass
class Output:
    """Mean loss per target token (None without labels), and logits [B, T, V]."""

    loss: Tensor | None
    logits: Tensor
