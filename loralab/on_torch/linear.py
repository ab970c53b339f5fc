"""Frozen linear maps: what LoRA needs to know of a module that holds a weight, and no more.

Two verbs: multiply (calling the module) and `dense_weight` (its matrix). Linear stores W [out, in]; Hugging Face's
Conv1D (GPT-2) and an Embedding store the transpose. A quantised layer joins by registering itself with the functions
below.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@singledispatch
def dense_weight(module: nn.Module) -> Tensor:
    """The module's matrix W [out, in], such that it computes x Wᵀ (an Embedding: one-hot x)."""
    raise TypeError(f"{type(module).__name__} is not a linear map")


dense_weight.register(nn.Linear, lambda module: module.weight)
dense_weight.register(Conv1D, lambda module: module.weight.T)
dense_weight.register(nn.Embedding, lambda module: module.weight.T)

LINEAR = (nn.Linear, Conv1D)
WRAPPABLE = (*LINEAR, nn.Embedding)


@torch.no_grad()
def write_dense_weight(module: nn.Module, weight_OI: Tensor) -> None:
    """Overwrites the module's matrix with W [out, in], rounded to the module's dtype."""
    dense_weight(module).copy_(weight_OI)


def project(x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The products of one input with several linear maps: q, k and v of one attention, or the two halves of a gated layer.

    Models use it wherever an input is shared, so that a wrapper can compute the products together.
    """
    together = getattr(linears[0], "project_together", None)
    if together is not None:
        return tuple(together(x, linears))
    return tuple(linear(x) for linear in linears)
