"""Keys and values that one attention layer remembers while it writes, and what single queries take from them.

A query's scores are the rows of kᵀ summed with its own numbers as weights, and what it takes is the rows of v summed with
the softmax of the scores. A weighted sum of rows is an embedding bag, and as such PyTorch computes it, on x86, three times
as fast in bf16 as it does the same product, and nearly twice in fp32: at the speed of memory. So keys lie as [E, R].

Shapes:  N rows   H heads   M queries of each row   L positions so far   R positions there is room for   E size of a head
"""

from __future__ import annotations

import platform
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.on_torch.ops.probe import Probe, trial_numbers

MORE = 64
"""Positions by which the room grows."""
BAGS = platform.machine().lower() in ("x86_64", "amd64")
"""True if bags are fast here."""


class KVCache:
    """Keys [N, H, E, R] and values [N, H, R, E], zero beyond the first `length` positions."""

    def __init__(self, k_NHLE: Tensor, v_NHLE: Tensor, grows: bool = True) -> None:
        """`grows`: further positions will be written; without it no memory is kept for them."""
        self.length = k_NHLE.shape[2]
        positions = capacity(self.length + 1) if grows else self.length
        self.keys = _widened(k_NHLE.transpose(-1, -2), 3, positions)
        self.values = _widened(v_NHLE, 2, positions)
        self.spare: tuple[Tensor, Tensor] | None = None

    def append(self, k_NH1E: Tensor, v_NH1E: Tensor) -> None:
        """Takes in one position."""
        if self.length == self.values.shape[2]:
            positions = capacity(self.length + 1)
            self.keys, self.values = _widened(self.keys, 3, positions), _widened(self.values, 2, positions)
        self.keys[..., self.length] = k_NH1E[:, :, 0]
        self.values[:, :, self.length] = v_NH1E[:, :, 0]
        self.length += 1

    def attend(self, q_NHME: Tensor, bias_NHMR: Tensor | None) -> Tensor:
        """Returns what queries, already scaled, take from all positions, [N, H, M, E]."""
        scores_NHMR = self.scores(q_NHME)
        return self.take(torch.softmax(scores_NHMR if bias_NHMR is None else scores_NHMR + bias_NHMR, -1))

    def scores(self, q_NHME: Tensor) -> Tensor:
        """q kᵀ, [N, H, M, R]."""
        return summed(q_NHME, self.keys)

    def take(self, weights_NHMR: Tensor) -> Tensor:
        """The values' sum with these weights, [N, H, M, E]."""
        return summed(weights_NHMR, self.values)

    def keep(self, rows: Tensor) -> None:
        """Drops every row but these."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> None:
        """Puts at each place the row of this number, [N]."""
        if self.spare is None or self.spare[0].shape != self.keys.shape:
            self.spare = torch.empty_like(self.keys), torch.empty_like(self.values)
        reordered = self.spare  # new memory at every step would take longer than the copy
        for tensor, out in zip((self.keys, self.values), reordered, strict=True):
            torch.index_select(tensor, 0, rows, out=out)
        self.spare, (self.keys, self.values) = (self.keys, self.values), reordered


def grow(caches: list[KVCache], positions: int) -> tuple[KVCache, Tensor]:
    """Puts in the place of each cache one of so many positions more, of which no number is known.

    Returns:
        The last one as it was, and what it was made from.
    """
    assert caches
    for place, before in enumerate(caches):
        rows, heads, _, size = before.values.shape
        filled = before.values.new_empty(rows, heads, before.length + positions, size)
        caches[place] = KVCache(filled, filled)
    return before, filled


def _widened(tensor: Tensor, dim: int, size: int) -> Tensor:
    """A contiguous copy, widened by zeros."""
    shape = list(tensor.shape)
    shape[dim] = size
    wide, length = tensor.new_empty(shape), tensor.shape[dim]
    wide.narrow(dim, 0, length).copy_(tensor)
    wide.narrow(dim, length, size - length).zero_()
    return wide


def summed(weights_NHMK: Tensor, rows_NHKX: Tensor) -> Tensor:
    """weights @ rows, [N, H, M, X]; few rows of weights."""
    fitting = rows_NHKX.device.type == "cpu" and rows_NHKX.dtype in (torch.float32, torch.bfloat16)
    if not (BAGS and fitting and rows_NHKX.numel() and BAG.works(rows_NHKX.dtype)):
        return weights_NHMK @ rows_NHKX
    return _bagged(weights_NHMK, rows_NHKX)


def _bagged(weights_NHMK: Tensor, rows_NHKX: Tensor) -> Tensor:
    """The product as an embedding bag."""
    *sums, terms = weights_NHMK.shape
    bags = F.embedding_bag(
        _numbers(sums[0] * sums[1], sums[2], terms),
        rows_NHKX.flatten(0, 2),
        mode="sum",
        per_sample_weights=weights_NHMK.reshape(-1, terms),
    )
    return bags.view(*sums, -1)


@lru_cache(maxsize=8)
def _numbers(groups: int, queries: int, terms: int) -> Tensor:
    """Returns which rows each bag sums, [groups · queries, terms]: the queries of a group sum the same."""
    with torch.inference_mode(False):
        numbers = torch.arange(groups * terms, dtype=torch.int32).view(groups, 1, terms)
        return numbers.expand(-1, queries, -1).reshape(-1, terms)


def _try_bag(dtype: torch.dtype, _: torch.device) -> tuple[Tensor, Tensor]:
    weights_NHMK, rows_NHKX = trial_numbers(2, 3, 2, 5, dtype=dtype), trial_numbers(2, 3, 5, 16, dtype=dtype)
    return _bagged(weights_NHMK, rows_NHKX), weights_NHMK.float() @ rows_NHKX.float()


BAG = Probe(
    "A weighted sum of rows (embedding_bag)", "PyTorch's product takes its place: writing may be slower", _try_bag
)


def hypotheses_of(sources: Tensor, of: int, beams: int) -> Tensor:
    """The numbers of these sources' hypotheses, of which there are `of` in all and `beams` of each source."""
    return torch.arange(of, device=sources.device).view(-1, beams)[sources].flatten()


def capacity(length: int) -> int:
    """Positions that there is room for when so many are written, or one fewer."""
    return -(-length // MORE) * MORE


def hide_end(bias_L: Tensor) -> Tensor:
    """Returns what is added to the scores of positions, [.., L], widened to their room, whose end is hidden: [.., R]."""
    length = bias_L.shape[-1]
    return F.pad(bias_L, (0, capacity(length) - length), value=torch.finfo(bias_L.dtype).min)
