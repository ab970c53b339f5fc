"""PyTorch's own counters: what a function computes, and the most memory that its tensors take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode


def _forward(query: Any, key: Any, *_: Any, **__: Any) -> int:
    return int(4 * math.prod(query) * key[2])


def _backward(_: Any, query: Any, key: Any, *__: Any, **___: Any) -> int:
    return int(10 * math.prod(query) * key[2])


# Of attention on a CPU, which PyTorch counts as nothing: two products, and five backwards, one of them once more.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


class Tracker(MemTracker):
    """Without statistics by module, which do not bear frozen parameters and a module that is called twice."""

    def _nothing(self, *_: Any) -> None:
        pass

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _nothing


def flops_of(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        run()
    return int(counter.get_total_flops())


def peak_of(run: Callable[[], None], there: Iterable[Tensor]) -> int:
    """Bytes; `there`: tensors that exist already."""
    tracker = Tracker()
    tracker.track_external(*there)
    with tracker:
        run()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
