"""What a model is to a plan: the modules that hold its weights; and what a batch is."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Module:
    """A module with weights of its own; the shape of its matrix is [out, in], or [rows, width] of a table."""

    name: str
    kind: str
    """Linear, Embedding, RMSNorm or LayerNorm."""
    shape: tuple[int, ...]
    bias: bool = False
    head: bool = False
    """Whether it stands for a task, or writes the vocabulary."""

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        found = {f"{self.name}.weight": self.shape}
        return found | {f"{self.name}.bias": self.shape[:1]} if self.bias else found

    @property
    def packable(self) -> bool:
        """Whether a quantised base has it in fewer bits."""
        return self.kind == "Linear" and not self.head

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.parameters.values())


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch."""

    rows: int
    source: int
    target: int
    """Of the longest row, in tokens."""
    padded: bool = False
    """Whether a source is shorter than the longest."""
    target_tokens: int = 0
    """Real ones, of all rows."""
    packed: bool = False
    """Whether texts stand side by side in a row."""
