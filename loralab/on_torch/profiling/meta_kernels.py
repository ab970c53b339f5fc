"""Results without numbers of the operations that models use most.

PyTorch describes these on the device "meta" in Python, which takes half a millisecond a call, and imports its compiler at the
first one. Here each is the shape, dtype and order in memory of its result. What is not a plain case is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Kernel = Callable[..., Any]


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Returns a tensor of x's shape, without gaps, whose axes lie in memory in the order of x's; of x's dtype, or this one."""
    dtype = dtype or x.dtype
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    strides, step = [0] * x.dim(), 1
    for axis in sorted(range(x.dim() - 1, -1, -1), key=x.stride):
        strides[axis], step = step, step * max(x.shape[axis], 1)
    return torch.empty_strided(x.shape, strides, dtype=dtype, device=x.device)


def _like(x: Tensor, *_: Any, **__: Any) -> Any:
    """Returns a tensor of x's shape and dtype."""
    return like(x) if x.is_floating_point() else NotImplemented


def _like_second(_: Tensor, x: Tensor, *__: Any, **___: Any) -> Any:
    return _like(x)


def _binary(x: Tensor, y: Any, **_: Any) -> Tensor:
    """Returns a tensor of the operands' common shape and dtype; in memory like the one that has this shape already."""
    dtype = torch.result_type(x, y)
    if not isinstance(y, Tensor) or x.shape == y.shape:
        return like(x, dtype=dtype)
    shape = _common(x.shape, y.shape)
    whole = next((each for each in (x, y) if tuple(each.shape) == shape), None)
    return _empty(x, shape, dtype) if whole is None else like(whole, dtype=dtype)


def _common(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """The shape that both are broadcast to."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    ends = [*([1] * (len(longer) - len(shorter))), *shorter]
    return tuple(b if a == 1 else a for a, b in zip(longer, ends, strict=True))


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Returns a tensor of x's shape and dtype, whatever its dtype."""
    return like(x)


def _question(x: Tensor, y: Any, **_: Any) -> Tensor:
    """Truth values of the operands' common shape."""
    return like(_binary(x, y), dtype=torch.bool)


def _where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return like(_binary(condition, _binary(x, y)), dtype=torch.result_type(x, y))


def _quotient(x: Tensor, y: Any, **named: Any) -> Any:
    return _binary(x, y, **named) if x.is_floating_point() else NotImplemented


def _softmax_backward(grad: Tensor, _: Tensor, __: int, dtype: torch.dtype) -> Tensor:
    return like(grad, dtype=dtype)


def _mean(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if not dims or not keepdim or dtype is not None:
        return NotImplemented
    gone = {dim % x.dim() for dim in dims}
    return _empty(x, [1 if place in gone else size for place, size in enumerate(x.shape)])


def _normalized(x: Tensor, _: int, half_to_float: bool) -> Tensor:
    return like(x, torch.float32 if half_to_float else None)


def _product_and_bias(_: Tensor, x: Tensor, y: Tensor, **__: Any) -> Tensor:
    return _empty(x, (x.shape[0], y.shape[1]))


def _sum(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    if not dims or dtype is not None or not x.is_floating_point():
        return NotImplemented
    gone = {dim % x.dim() for dim in dims}
    sizes = [1 if place in gone else size for place, size in enumerate(x.shape)]
    return _empty(x, sizes if keepdim else [size for place, size in enumerate(sizes) if place not in gone])


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Any:
    first = parts[0]
    if any(part.dtype != first.dtype or part.dim() != first.dim() or part.dim() > 3 for part in parts):
        return NotImplemented
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return _empty(first, shape)


def _empty(x: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def _empty_like(x: Tensor, *, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return like(x, dtype)


def _clone(x: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor:
    return like(x) if memory_format in (None, torch.preserve_format) else _empty(x, x.shape)


def _stack(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(parts[0].shape)
    shape.insert(dim % (len(shape) + 1), len(parts))
    return _empty(parts[0], shape)


def _each_loss(x: Tensor, labels: Tensor, weight: Any, reduction: int, _: int) -> Any:
    """A loss for each row, where they are not summed."""
    return NotImplemented if reduction else (_empty(x, labels.shape), _empty(x, ()))


def _out(*_: Any, out: Tensor) -> Tensor:
    return out


def _arange(*bounds: int, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any) -> Any:
    """Returns a tensor as long as a range of whole numbers."""
    if not all(isinstance(bound, int) for bound in bounds):
        return NotImplemented
    return torch.empty(len(range(*bounds)), dtype=dtype or torch.int64, device=device)


def _layer_norm(x: Tensor, shape: Sequence[int], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The result, means and reciprocal deviations."""
    sizes = [*x.shape[: x.dim() - len(shape)], *([1] * len(shape))]
    return like(x), _empty(x, sizes, torch.float32), _empty(x, sizes, torch.float32)


def _layer_norm_backward(
    grad: Tensor, x: Tensor, _: Any, __: Any, ___: Any, weight: Tensor | None, bias: Tensor | None, mask: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    wanted = zip((x, weight, bias), mask, strict=True)
    return tuple(like(each) if each is not None and need else None for each, need in wanted)


KERNELS: dict[Any, Kernel] = {
    aten.mul.Tensor: _binary,
    aten.mul.Scalar: _binary,
    aten.add.Tensor: _binary,
    aten.sub.Tensor: _binary,
    aten.div.Scalar: _quotient,
    aten.div.Tensor: _quotient,
    aten.pow.Tensor_Scalar: _like,
    aten.gelu.default: _like,
    aten.rsqrt.default: _like,
    aten.relu.default: _like,
    aten.tanh.default: _like,
    aten.log.default: _like,
    aten.abs.default: _same,
    aten.neg.default: _same,
    aten.clamp.default: _same,
    aten.exp_.default: lambda x: x,
    aten.bitwise_not.default: _same,
    aten.bitwise_and.Tensor: _binary,
    aten.masked_fill.Scalar: lambda x, mask, _: like(_binary(x, mask), dtype=x.dtype),
    aten.where.self: _where,
    **dict.fromkeys((aten.eq.Scalar, aten.ne.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar), _question),
    **dict.fromkeys((aten.eq.Tensor, aten.ne.Tensor, aten.gt.Tensor), _question),
    aten.tanh_backward.default: _like,
    aten.threshold_backward.default: _like,
    aten._softmax.default: _normalized,
    aten._safe_softmax.default: _like,
    aten._log_softmax.default: _normalized,
    aten._log_softmax_backward_data.default: _softmax_backward,
    aten.addmm.default: _product_and_bias,
    aten.mm.default: lambda x, y: _empty(x, (x.shape[0], y.shape[1])),
    aten.bmm.default: lambda x, y: _empty(x, (*x.shape[:2], y.shape[2])),
    aten.mul_.Tensor: lambda x, _: x,
    aten.embedding.default: lambda table, ids, *_: _empty(table, (*ids.shape, table.shape[1])),
    aten.gelu_backward.default: _like_second,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.mean.dim: _mean,
    aten.sum.dim_IntList: _sum,
    aten.div_.Scalar: lambda x, _: x,
    aten.scatter_add_.default: lambda x, *_: x,
    aten.gather.default: lambda x, _, index, **__: _empty(x, index.shape),
    **dict.fromkeys((aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default), _empty_like),
    aten.new_empty.default: _empty,
    aten.clone.default: _clone,
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.tril.default: _same,
    **dict.fromkeys((aten.arange.default, aten.arange.start, aten.arange.start_step), _arange),
    aten.any.default: lambda x: _empty(x, (), torch.bool),
    aten.nll_loss_forward.default: _each_loss,
    aten.nll_loss_backward.default: _like_second,
    aten.ge.Scalar_out: _out,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
}
