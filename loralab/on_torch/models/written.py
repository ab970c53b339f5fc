"""Keys and values of what one attention layer has seen so far, with room for some steps more.

The whole room is multiplied by, and its unwritten end hidden: of a part of a larger tensor PyTorch's products in bf16 make
a copy, at every step.

Shapes:  N rows   H heads   L positions so far   R positions there is room for   E size of a head
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.on_torch.attention import held

MORE = 64
"""Positions by which the room grows."""


class KeysValues:
    """Two tensors [N, H, R, E], zero beyond the first `length` positions."""

    def __init__(self, k_NHLE: Tensor, v_NHLE: Tensor) -> None:
        self.length = k_NHLE.shape[2]
        self.both = [held(_longer(k_NHLE)), held(_longer(v_NHLE))]

    def append(self, k_NH1E: Tensor, v_NH1E: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in one position; returns all keys and values, [N, H, R, E]."""
        if self.length == self.both[0].shape[2]:
            self.both = [_longer(tensor) for tensor in self.both]
        for tensor, new in zip(self.both, (k_NH1E, v_NH1E), strict=True):
            tensor[:, :, self.length] = new[:, :, 0]
        self.length += 1
        keys, values = self.both
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Drops every row but these."""
        self.both = [tensor[rows] for tensor in self.both]

    def reorder(self, rows: Tensor) -> None:
        """Puts at each place the row of this number, [N]."""
        for tensor in self.both:
            tensor[:, :, : self.length] = tensor[:, :, : self.length].index_select(0, rows)


def hypotheses_of(sources: Tensor, of: int, beams: int) -> Tensor:
    """The numbers of these sources' hypotheses, of which there are `of` in all and `beams` of each source."""
    return torch.arange(of, device=sources.device).view(-1, beams)[sources].flatten()


def room(length: int) -> int:
    """Positions that there is room for when so many are written, or one fewer."""
    return -(-length // MORE) * MORE


def hide_end(bias_L: Tensor) -> Tensor:
    """What is added to the scores of positions, [.., L], widened to their room, whose end is hidden: [.., R]."""
    length = bias_L.shape[-1]
    return F.pad(bias_L, (0, room(length) - length), value=torch.finfo(bias_L.dtype).min)


def _longer(tensor_NHLE: Tensor) -> Tensor:
    """The same with room for at least one position more."""
    return F.pad(tensor_NHLE, (0, 0, 0, room(tensor_NHLE.shape[2] + 1) - tensor_NHLE.shape[2]))
