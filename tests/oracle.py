"""LoRA in NumPy, slow and obvious: the judge of both engines.

x [n, in], W [out, in], A [r, in], B [out, r], mask [n, in] of zeros and ones, m [out] (DoRA's magnitudes). Everything
in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Gradients(NamedTuple):
    """Of sum(y · dy) with respect to each input."""

    x: Array
    A: Array
    B: Array


def dropped(x: Array, mask: Array, rate: float) -> Array:
    return x * mask / (1 - rate)


def forward(x: Array, W: Array, A: Array, B: Array, scale: float, mask: Array, rate: float = 0.0) -> Array:
    """y = x Wᵀ + s · drop(x) Aᵀ Bᵀ."""
    return x @ W.T + scale * (dropped(x, mask, rate) @ A.T) @ B.T


def backward(
    x: Array, W: Array, A: Array, B: Array, scale: float, mask: Array, dy: Array, rate: float = 0.0
) -> Gradients:
    """Each gradient written out by the product rule."""
    d = dropped(x, mask, rate)
    through_A = scale * (dy @ B)
    return Gradients(
        x=dy @ W + (through_A @ A) * mask / (1 - rate),
        A=through_A.T @ d,
        B=scale * dy.T @ (d @ A.T),
    )


def merged(W: Array, A: Array, B: Array, scale: float) -> Array:
    """The one matrix that does the same."""
    return W + scale * B @ A


def row_norms(W: Array) -> Array:
    return np.sqrt((W * W).sum(axis=1))


def dora_merged(W: Array, A: Array, B: Array, scale: float, m: Array) -> Array:
    """Each row of W + sBA, brought to the length m."""
    total = merged(W, A, B, scale)
    return (m / row_norms(total))[:, None] * total


def dora_backward_magnitude(x: Array, W: Array, A: Array, B: Array, scale: float, dy: Array) -> Array:
    """dL/dm: the norms are constants."""
    total = merged(W, A, B, scale)
    return ((x @ total.T) * dy).sum(axis=0) / row_norms(total)
