"""A device that is not there, pretended on the CPU: which operations it would be asked for, and in which dtypes.

Inside `with PretendedDevice() as device`, tensors that are made on the device or moved to it say that they are there, and
are computed on the CPU. So code takes its paths for accelerators, and every operation that meets such a tensor would run
on the accelerator; operations on other tensors, as those after `.cpu()`, are the host's, and are not recorded. The
device calls itself "meta", which PyTorch knows in every build and which no code of ours or of Transformers' models asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
CPU = torch.device("cpu")


class OnDevice(Tensor):
    """A tensor that says it is on the device; its numbers are in `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside the pretended device")

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("only a tensor on the host becomes an array")


class _ListsOnHost(TorchFunctionMode):
    """Makes tensors of lists on the host and moves them, as PyTorch does it for every device but this one, which has no numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE:
            return func(*args, **kwargs | {"device": CPU}).to(DEVICE)
        return func(*args, **kwargs)


class PretendedDevice(TorchDispatchMode):
    """Records what the device is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[Any] = set()
        self.dtypes: dict[torch.dtype, str] = {}
        """Of tensors on the device, each with an operation that made one."""

        self._lists = _ListsOnHost()

    def __enter__(self) -> torch.device:  # type: ignore[override]
        self._lists.__enter__()
        super().__enter__()
        return DEVICE

    def __exit__(self, *about: Any) -> None:
        super().__exit__(*about)
        self._lists.__exit__(*about)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        there = {id(leaf.inner): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnDevice)}
        if func is torch.ops.aten.item.default:
            func = torch.ops.aten._local_scalar_dense.default
        if there:
            with self, torch._C.DisableTorchFunction():
                parts = func.decompose(*args, **kwargs)  # a composite operation in the others that it is made of
            if parts is not NotImplemented:
                return parts
        stays = bool(there)
        if (asked := kwargs.get("device")) is not None:
            stays = torch.device(asked) == DEVICE
            kwargs["device"] = CPU
        if there or stays:
            self.operations.add(func)
        with torch.inference_mode(False):  # a wrapper shares nothing with what it wraps that this mode spares
            result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
            if not stays:
                return result
            wrapped = tree_map(lambda leaf: _wrapped(leaf, there), result)
        for leaf in tree_leaves(wrapped):
            if isinstance(leaf, OnDevice):
                self.dtypes.setdefault(leaf.dtype, str(func))
        return wrapped


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnDevice) else leaf


def _wrapped(leaf: Any, there: dict[int, OnDevice]) -> Any:
    """The tensor itself where it was changed in place."""
    if not isinstance(leaf, Tensor):
        return leaf
    return there[id(leaf)] if id(leaf) in there else OnDevice(leaf)
