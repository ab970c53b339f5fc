"""Reading a loss curve: a smooth version of it, and where it began to rise again.

A rate that is too high shows first in the loss of training: it falls while the rate is warming up, then turns. The turn
says which rate was still good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

SURE = 5.0  # standard errors by which the smooth curve must rise; 3 happen by chance once in a few curves
WINDOWS = 20  # the smoothing window is this part of the curve, and at least LEAST steps
LEAST = 5


@dataclass(frozen=True)
class Turn:
    """The loss fell until `step` and rose from there."""

    step: int
    learning_rate: float
    loss: float
    """Value of the smooth curve at the turn."""
    peak_step: int
    peak_loss: float
    """Highest value afterwards."""

    def __str__(self) -> str:
        return (
            f"the training loss began to rise again at step {self.step}, at a learning rate of {self.learning_rate:.2g}: "
            f"from {self.loss:.3f} to {self.peak_loss:.3f} at step {self.peak_step}"
        )


def window_of(steps: int) -> int:
    """Counts how many steps are averaged; odd, so that a window has a middle."""
    return max(LEAST, steps // WINDOWS) | 1


def smooth(losses: ArrayLike, window: int | None = None) -> Floats:
    """[steps]: the mean over a window around each step; at the ends over the part of it that is there."""
    raw = np.asarray(losses, dtype=np.float64)
    half = (window or window_of(len(raw))) // 2
    sums = np.concatenate([[0.0], np.cumsum(raw)])
    first = np.maximum(np.arange(len(raw)) - half, 0)
    last = np.minimum(np.arange(len(raw)) + half + 1, len(raw))
    return np.asarray((sums[last] - sums[first]) / (last - first))


def first_turn(losses: Sequence[float], learning_rates: Sequence[float]) -> Turn | None:
    """The first point from which the smooth loss rises by more than its noise explains; None where there is none.

    The noise is that of a window's mean: the spread of the steps around the curve, over the root of the window.
    """
    window = window_of(len(losses))
    if len(losses) < 4 * window:  # too short to tell a turn from noise
        return None
    inner = slice(window // 2, len(losses) - window // 2)  # whole windows only
    curve = smooth(losses, window)[inner]
    spread = np.std(np.diff(np.asarray(losses, dtype=np.float64))) / np.sqrt(2)  # differences leave the trend out
    risen = curve - np.minimum.accumulate(curve) > SURE * spread * np.sqrt(2 / window)
    if not risen.any():
        return None
    lowest = int(np.argmin(curve[: int(np.argmax(risen)) + 1]))
    peak = lowest + int(np.argmax(curve[lowest:]))
    at, top = lowest + window // 2, peak + window // 2
    return Turn(at + 1, learning_rates[at], float(curve[lowest]), top + 1, float(curve[peak]))
