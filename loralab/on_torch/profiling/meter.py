"""Measures FLOPs and memory: every operation of PyTorch is seen as it runs.

FLOPs are those of matrix products, by PyTorch's own formulas (torch.utils.flop_counter), to which the CPU's attention kernel
is added. Memory is that of tensors: a storage counts from its making until PyTorch frees it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


def _products(q: Tensor, k: Tensor) -> int:
    """Returns the FLOPs of one product of queries [B, H, Q, E] and keys [B, H, K, E]."""
    rows, heads, queries, size = q.shape
    return 2 * rows * heads * queries * k.shape[2] * size


def attention_flops(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of an attention kernel: scores, and the weighted sum of values."""
    return 2 * _products(q, k)


def attention_backward_flops(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of its backward pass: scores again, and two products for each of the forward pass."""
    return 5 * _products(q, k)


def _product_flops(x: Tensor, y: Tensor, *_: Any, **__: Any) -> int:
    """Returns the FLOPs of the product of [.., rows, inner] and [.., inner, columns]."""
    return 2 * x.numel() * y.shape[-1]


_NAMED: dict[str, Callable[..., int]] = {
    "mm": _product_flops,
    "bmm": _product_flops,
    "addmm": lambda _, *given, **named: _product_flops(*given, **named),
    "_scaled_dot_product_flash_attention_for_cpu": attention_flops,
    "_scaled_dot_product_flash_attention_for_cpu_backward": lambda _, *given, **named: attention_backward_flops(
        *given, **named
    ),
}
FORMULAS: dict[Any, Callable[..., int]] = {
    getattr(torch.ops.aten, name): formula for name, formula in _NAMED.items() if hasattr(torch.ops.aten, name)
}
"""Private operations of PyTorch that this version has; and products, whose formulas there take long."""


_known_formulas: dict[int, Callable[..., int] | None] = {}  # by the operation's identity: to hash one takes longer


def _formula(func: Any) -> Callable[..., int] | None:
    """The FLOPs of an operation, from its arguments and result; None where they count for nothing."""
    if id(func) not in _known_formulas:
        packet = func._overloadpacket
        _known_formulas[id(func)] = FORMULAS.get(packet, flop_registry.get(packet))
    return _known_formulas[id(func)]


class Meter(TorchDispatchMode):
    """Counts what runs inside `with`."""

    def __init__(self, there: Iterable[Tensor] = (), block: int = 1) -> None:
        """
        Args:
            there: tensors that exist already and are to be counted.
            block: a storage counts in whole blocks of so many bytes, as GPU allocators give them.
        """
        super().__init__()
        self.flops, self.live, self.peak, self.block = 0, 0, 0, block
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.see(*there)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled: PyTorch need not import its compiler to leave this mode out of it, which takes two seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._run(func, args, kwargs)
        formula = _formula(func)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        if isinstance(result, Tensor):
            self._see(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._see(leaf)
        self.peak = max(self.peak, self.live)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def see(self, *there: Tensor) -> None:
        """Counts tensors that exist already."""
        for tensor in there:
            self._see(tensor)
        self.peak = max(self.peak, self.live)

    def bytes_of(self, tensor: Tensor) -> int:
        """Returns the bytes of a tensor's storage, in whole blocks."""
        return -(-tensor.untyped_storage().nbytes() // self.block) * self.block

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = self.bytes_of(tensor)

        def freed(_: object) -> None:
            self.live -= size
            del self._known[key]

        self.live += size
        self._known[key] = weakref.ref(storage, freed)
