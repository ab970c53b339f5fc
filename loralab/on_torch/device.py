"""Where a model runs and in which dtype: what `auto` means."""

from __future__ import annotations

import statistics
import time

import torch

from loralab.errors import ModelError
from loralab.on_torch.product import linear

PROBE_SIZE, PROBE_RUNS = 1024, 7
WORTH_IT = 0.9  # bfloat16 must take less than this share of fp32's time: it also costs digits


def choose_device(setting: str) -> torch.device:
    """The device of this name; auto is a GPU where there is one."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if setting == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(setting, False):
        there = ", ".join(name for name, yes in available.items() if yes)
        raise ModelError(
            f"model.device is {setting!r}, which this PyTorch ({torch.__version__}) does not see here. There is: {there}."
        )
    return torch.device(setting)


def choose_dtype(setting: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of weights and products, and why, in words."""
    if setting in ("float32", "bfloat16"):
        return getattr(torch, setting), "as the recipe says"
    if setting != "auto":
        raise ModelError(
            f"dtype {setting!r} is not one of auto, float32, bfloat16. (float16 overflows in T5's feed-forward layers; "
            "a checkpoint stored in float16 loads all the same.)"
        )
    times = {dtype: _time_product(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    ratio = times[torch.bfloat16] / times[torch.float32]
    chosen = torch.bfloat16 if ratio < WORTH_IT else torch.float32
    return chosen, f"a product in bfloat16 takes {ratio:.2f} of its time in float32 here"


def _time_product(dtype: torch.dtype, device: torch.device) -> float:
    """Median seconds of a product of two square matrices."""
    a = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=device)
    times = []
    for _ in range(PROBE_RUNS):
        start = time.perf_counter()
        linear(a, a)[0, 0].item()  # .item() waits for a GPU
        times.append(time.perf_counter() - start)
    return statistics.median(times)
