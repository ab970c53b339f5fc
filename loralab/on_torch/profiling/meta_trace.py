"""Training steps of a model without numbers: the real class runs on PyTorch's device "meta", where tensors have a shape and no memory.

The meter (meter.py) counts what it computes and holds, as it does in a real step. The few operations that need numbers are
answered here: whether a mask hides anything, how many tokens are chosen by one, and PyTorch's attention kernels, which the
meta device does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loralab.engine import BatchShape, CannotTrace
from loralab.on_torch.ops.traced_device import device_kind, traced_for
from loralab.on_torch.profiling.meta_kernels import KERNELS, Kernel, like
from loralab.on_torch.profiling.meter import Meter, attention_backward_flops, attention_flops

GPU_BLOCK = 512  # PyTorch's allocator gives whole blocks of so many bytes there
aten = torch.ops.aten


class Trace(Meter):
    """Counts a step on the meta device, of a batch of this shape."""

    def __init__(self, there: Sequence[Tensor], kind: str) -> None:
        """
        Args:
            there: tensors that exist already and are to be counted.
            kind: the device that is traced for: cpu, cuda or mps.
        """
        super().__init__(there, 1 if kind == "cpu" else GPU_BLOCK)
        self.kind, self.shape = kind, BatchShape(0, 0, 0)
        answers: dict[Any, Kernel] = {
            **KERNELS,
            aten.all.default: self._all,
            aten._local_scalar_dense.default: self._scalar,
            aten.equal.default: lambda *_: True,
            aten.index.Tensor: self._chosen,
            aten.index_put.default: lambda x, *_: like(x),
            aten._index_put_impl_.default: lambda x, *_: x,
        }
        self._answers = {id(operation): answer for operation, answer in answers.items()}

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        answer = self._answers.get(id(func))
        result = NotImplemented if answer is None else answer(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result

    def _all(self, x: Tensor) -> Any:
        """Remembers what the question was: of a mask of the whole batch, whether nothing is padded."""
        found = torch.empty((), dtype=torch.bool, device=x.device)
        masks = {(self.shape.rows, self.shape.source), (self.shape.rows, self.shape.source + self.shape.target)}
        found.answer = not (self.shape.padded and tuple(x.shape) in masks)  # type: ignore[attr-defined]
        return found

    def _scalar(self, x: Tensor) -> Any:
        """True of a question without a remembered answer: texts stand in the usual order and nothing overflows."""
        if x.dtype == torch.bool:
            return getattr(x, "answer", True)
        raise CannotTrace("it computes with numbers of its inputs")

    def _chosen(self, x: Tensor, indices: Sequence[Tensor | None]) -> Any:
        """The rows that a mask of the batch's tokens chooses: its target tokens."""
        if len(indices) != 1 or indices[0] is None or indices[0].dtype != torch.bool:
            return NotImplemented
        return x.new_empty(self.shape.target_tokens, *x.shape[indices[0].dim() :])


class AttentionKernel(torch.autograd.Function):
    """Attention by one kernel: keeps what it was given and what it gave, and computes the weights again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, meter: Meter) -> Tensor:
        meter.flops += attention_flops(q, k)
        out = like(q) if q.shape[-1] == v.shape[-1] else q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.meter = meter
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = ctx.saved_tensors[:4]
        ctx.meter.flops += attention_backward_flops(q, k)
        given = (q, k, v, bias)
        return (*(like(x) if need else None for x, need in zip(given, ctx.needs_input_grad, strict=False)), None)


@contextmanager
def _kernels(meter: Trace) -> Iterator[None]:
    """Puts the traced device's kernels in the place of PyTorch's functions, which the meta device takes apart.

    The functions themselves are replaced: a mode of PyTorch's for functions is off while activations are computed again.
    """
    attention, log_softmax = F.scaled_dot_product_attention, torch.log_softmax
    F.scaled_dot_product_attention = partial(_attention, meter, attention)
    if meter.kind != "cpu":
        torch.log_softmax = partial(_log_softmax, log_softmax)
    try:
        yield
    finally:
        F.scaled_dot_product_attention, torch.log_softmax = attention, log_softmax


def _attention(
    meter: Trace,
    plain: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *more: Any,
    **named: Any,
) -> Tensor:
    """One kernel; on a CPU PyTorch falls back to single operations with dropout, and where a bias learns."""
    falls_back = dropout_p or (attn_mask is not None and attn_mask.requires_grad)
    if q.dim() != 4 or (device_kind(q) == "cpu" and falls_back):
        return plain(q, k, v, attn_mask, dropout_p, *more, **named)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty(attn_mask.shape, dtype=q.dtype, device=q.device)
    found: Tensor = AttentionKernel.apply(q, k, v, attn_mask, meter)
    return found


def _log_softmax(plain: Any, x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """A GPU casts within the kernel."""
    casts = x.is_floating_point() and x.element_size() < torch.float32.itemsize and dtype == torch.float32
    found: Tensor = torch._log_softmax(x, dim, True) if casts else plain(x, dim, dtype=dtype)
    return found


@contextmanager
def tracing(meter: Trace) -> Iterator[None]:
    """Counts what runs inside on the meta device as on the device that is traced for.

    Raises:
        CannotTrace: it needs numbers.
    """
    try:
        with traced_for(meter.kind), _kernels(meter), meter:
            yield
    except CannotTrace:
        raise
    except Exception as error:  # any class may fail in its own way
        text = str(error).strip()
        reason = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
        raise CannotTrace(reason) from error
