"""Four bits a weight (NF4: Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): codes and scales back to weights.

By bitsandbytes' operation, of which each device has its own; where that does not work (ops/probe.py), by plain operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loralab.on_torch.ops.probe import Probe

NF4, BLOCK = "nf4", 64  # the name of the packing; neighbours that share a scale
# Quantiles of N(0, 1), scaled to [-1, 1]; the paper's appendix E.
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def unpack(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """W of this shape.

    Args:
        codes: two a byte, the first in the upper half; `scales`: fp32, one for each BLOCK weights.
    """
    if codes.is_meta:  # traced: there is nothing to unpack
        return torch.empty(shape, dtype=dtype, device=codes.device)
    way = unpack_fast if FAST.works(dtype, codes.device) else unpack_plainly
    return way(codes, scales, shape, dtype)


def unpack_fast(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`unpack` by bitsandbytes."""
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(codes, scales, BLOCK, NF4, shape, dtype)
    return weight


def unpack_plainly(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`unpack` from the formula."""
    halves = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], -1)
    weights = torch.tensor(CODE, device=codes.device)[halves.int()]
    return (weights.view(-1, BLOCK) * scales[:, None]).to(dtype).view(shape)


def _try(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    codes = (torch.arange(2 * BLOCK) * 37 % 256).to(device, torch.uint8).view(2, -1)
    scales = torch.tensor([0.25, 0.5, 1.0, 2.0], device=device)
    given = codes, scales, (2, 2 * BLOCK), dtype
    return unpack_fast(*given), unpack_plainly(*given)


FAST = Probe(
    "bitsandbytes' unpacking of nf4 (dequantize_4bit)", "plain operations of PyTorch take its place, more slowly", _try
)
