"""Chooses the device and dtype of a model: the meaning of `auto`."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from loralab.errors import ModelError
from loralab.on_torch.ops.onednn_linear import linear
from loralab.on_torch.ops.probe import Probe, trial_numbers

PROBE_SIZE, PROBE_RUNS = 1024, 7
WORTH_IT = 0.9  # bfloat16 must take less than this share of fp32's time: it also costs digits


def _try_bfloat16(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    x, weight = trial_numbers(3, 40, dtype=dtype), trial_numbers(24, 40, dtype=dtype)
    return (x.to(device) @ weight.to(device).T).cpu(), x.float() @ weight.float().T


BFLOAT16 = Probe("A product", "float32 takes its place where the dtype is auto", _try_bfloat16)
"""An Apple GPU before macOS 14 has none in bfloat16."""


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
    if setting == "bfloat16" and not BFLOAT16.works(torch.bfloat16, device):
        raise ModelError(
            f"This {device.type} does not compute in bfloat16 (the line above says why). Take dtype float32."
        )
    if setting in ("float32", "bfloat16"):
        return getattr(torch, setting), "as the recipe says"
    if setting != "auto":
        raise ModelError(
            f"dtype {setting!r} is not one of auto, float32, bfloat16. (float16 overflows in T5's feed-forward layers; "
            "a checkpoint stored in float16 loads all the same.)"
        )
    if not BFLOAT16.works(torch.bfloat16, device):
        return torch.float32, "there is no bfloat16 here"
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
