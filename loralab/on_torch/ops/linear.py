"""Frozen linear maps: what LoRA needs to know of a module that holds a weight, and no more.

Two verbs: multiply (calling the module) and `dense_weight` (its matrix). Linear stores W [out, in]; Hugging Face's
Conv1D (GPT-2) and an Embedding store the transpose; a PackedLinear stores W in fewer bits and unpacks a part of it at a
time. A further one joins by registering itself with the functions below.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from loralab.on_torch.ops.traced_device import device_kind

PART = 2**20  # weights that are unpacked at a time: together with their product they stay in a CPU's cache


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with a frozen W in fewer bits. `part` unpacks; products are in the dtype of x, weights alone are rounded.

    Attributes:
        kind: what the packing is called.
        bias: of the base, or None.
        transposed: the base stores its matrix as [in, out].
        samples: values of the unpacked matrix where a fingerprint reads them, so that packing does not change it.
    """

    kind: str
    bias: nn.Parameter | None
    block = 1
    """So many neighbours in a row are packed together: parts begin at such columns."""

    def __init__(
        self, shape: tuple[int, int], bias: nn.Parameter | None, transposed: bool, samples: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.transposed, self.samples = transposed, samples
        self.register_parameter("bias", bias)

    def part(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """W[rows, columns]."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """W, or its transpose, as the base has it: for models that look at a weight."""
        dense = dense_weight(self)
        return dense.T if self.transposed else dense

    @property
    def base_shape(self) -> tuple[int, int]:
        """The shape of the matrix as the base stores it."""
        shape = self.out_features, self.in_features
        return shape[::-1] if self.transposed else shape

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = QuantizedProduct.apply(x, self)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Moves to another device; whatever else a model is made, the packed weights keep their dtypes."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.in_features} -> {self.out_features}, bias={self.bias is not None}"


class QuantizedProduct(torch.autograd.Function):
    """x Wᵀ, and its gradient g W, a part of W at a time. Nothing is kept for the backward pass but the packed weights themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: QuantizedLinear) -> Tensor:
        ctx.packed = packed
        x_NI = x.reshape(-1, packed.in_features)
        y_NO = x.new_empty(len(x_NI), packed.out_features)
        for rows in parts(packed.out_features, packed.in_features, 1, x):
            if x.is_meta:
                torch.mm(x_NI, _alike(packed.part(rows, slice(0, packed.in_features), x.dtype), packed).T, out=y_NO)
                break
            torch.mm(x_NI, packed.part(rows, slice(0, packed.in_features), x.dtype).T, out=y_NO[:, rows])
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (grad,), packed = grads, ctx.packed
        if not ctx.needs_input_grad[0]:
            return None, None
        grad_NO = grad.reshape(-1, packed.out_features)
        grad_NI = grad.new_empty(len(grad_NO), packed.in_features)
        for columns in parts(packed.in_features, packed.out_features, packed.block, grad):
            part = packed.part(slice(0, packed.out_features), columns, grad.dtype)
            if grad.is_meta:
                torch.mm(grad_NO, _alike(part, packed), out=grad_NI)
                break
            torch.mm(grad_NO, part, out=grad_NI[:, columns])
        return grad_NI.view(*grad.shape[:-1], -1), None


def _alike(part: Tensor, packed: QuantizedLinear) -> Tensor:
    """W [out, in] without numbers, as large in memory as one part of it: traced, one product stands for those of all parts."""
    return part[:1, :1].expand(packed.out_features, packed.in_features)


def parts(length: int, other: int, multiple: int, x: Tensor) -> Iterator[slice]:
    """Slices of `length`, of about PART weights each where the other side is `other` long; the whole where x is on a GPU."""
    step = length if device_kind(x) != "cpu" else max(PART // other // multiple, 1) * multiple
    yield from (slice(start, min(start + step, length)) for start in range(0, length, step))


@singledispatch
def dense_weight(module: nn.Module) -> Tensor:
    """The module's matrix W [out, in], such that it computes x Wᵀ (an Embedding: one-hot x)."""
    if is_conv1d(module):
        return module.weight.T  # type: ignore[return-value]
    raise TypeError(f"{type(module).__name__} is not a linear map")


dense_weight.register(nn.Linear, lambda module: module.weight)
dense_weight.register(nn.Embedding, lambda module: module.weight.T)


@dense_weight.register
def _(module: QuantizedLinear) -> Tensor:
    """In fp32: exactly what the packed weights stand for."""
    return module.part(slice(0, module.out_features), slice(0, module.in_features), torch.float32)


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """[out, in], without unpacking."""
    if isinstance(module, QuantizedLinear):
        return module.out_features, module.in_features
    outputs, inputs = dense_weight(module).shape
    return outputs, inputs


def is_transposed(module: nn.Module) -> bool:
    """Tells whether it is a linear map whose matrix is stored as [in, out]."""
    return is_conv1d(module) or (isinstance(module, QuantizedLinear) and module.transposed)


def is_conv1d(module: nn.Module) -> bool:
    """Tells whether it is a Conv1D of Transformers, without importing that library: where there is one, it has been imported."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Tells whether it is a linear map."""
    return isinstance(module, (nn.Linear, QuantizedLinear)) or is_conv1d(module)


def is_wrappable(module: nn.Module) -> bool:
    """Tells whether LoRA can go on it."""
    return is_linear(module) or isinstance(module, nn.Embedding)


@torch.no_grad()
def write_dense_weight(module: nn.Module, weight_OI: Tensor) -> None:
    """Overwrites the module's matrix with W [out, in], rounded to the module's dtype."""
    assert not isinstance(module, QuantizedLinear), (
        "an update is merged into the original weights, not into packed ones"
    )
    dense_weight(module).copy_(weight_OI)


def project(x: Tensor, linears: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The products of one input with several linear maps: q, k and v of one attention, or the two halves of a gated layer.

    Models use it wherever an input is shared, so that a wrapper can compute the products together.
    """
    together = getattr(linears[0], "project_together", None)
    if together is not None:
        return tuple(together(x, linears))
    return tuple(linear(x) for linear in linears)
