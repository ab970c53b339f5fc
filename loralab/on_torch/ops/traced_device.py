"""The kind of device that a tensor is computed on: its own, or for a tensor without numbers the one that it stands for.

Some operations take another path on a CPU than on a GPU, and with it other memory. Where a model is traced on PyTorch's
device "meta" (profiling/meta_trace.py), they take the path of the device that the trace is about.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_stands_for = "cpu"


def device_kind(x: Tensor) -> str:
    """cpu, cuda or mps."""
    return _stands_for if x.is_meta else x.device.type


@contextmanager
def traced_for(kind: str) -> Iterator[None]:
    """Tensors without numbers stand for this kind of device inside."""
    global _stands_for
    before, _stands_for = _stands_for, kind
    try:
        yield
    finally:
        _stands_for = before
