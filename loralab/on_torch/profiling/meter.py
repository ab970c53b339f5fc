"""What PyTorch really computes and holds: every operation is seen as it runs.

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
    """Of one product of queries [B, H, Q, E] and keys [B, H, K, E]."""
    rows, heads, queries, size = q.shape
    return 2 * rows * heads * queries * k.shape[2] * size


def _attention(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _products(q, k)


def _attention_backward(_: Tensor, q: Tensor, k: Tensor, *__: Any, **___: Any) -> int:
    return 5 * _products(q, k)  # scores again, and two for each product of the forward pass


_NAMED: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
FORMULAS: dict[Any, Callable[..., int]] = {
    getattr(torch.ops.aten, name): formula for name, formula in _NAMED.items() if hasattr(torch.ops.aten, name)
}
"""Of operations that are private to PyTorch: those that this one has."""


class Meter(TorchDispatchMode):
    """Counts what runs inside `with`."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        """`there`: tensors that exist already and are to be counted."""
        super().__init__()
        self.flops, self.live = 0, 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in there:
            self._see(tensor)
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in FORMULAS:
            self.flops += FORMULAS[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self.peak = max(self.peak, self.live)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def freed(_: object) -> None:
            self.live -= size
            del self._known[key]

        self.live += size
        self._known[key] = weakref.ref(storage, freed)
