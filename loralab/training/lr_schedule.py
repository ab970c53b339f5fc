"""The learning rate's course: up in a straight line, then down, or level."""

from __future__ import annotations

import math

from loralab.config.training import OptimizerSettings


def rate_at(step: int, total: int, settings: OptimizerSettings) -> float:
    """The learning rate of step 0, 1, …, total − 1; with linear, the same as Transformers' `get_linear_schedule_with_warmup`."""
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total)
    if step < warmup:
        return settings.peak * step / warmup
    gone = (step - warmup) / max(1, total - warmup)
    fall = {"linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2, "constant": 1.0}
    return settings.peak * fall[settings.schedule]
