"""A short record of a base model's weights, so that an adapter knows which base it was trained on.

A few values of many weight matrices are kept under their Hugging Face names. Two records agree if the shapes do and the
values are equal within the rounding of bf16: dtype and sharding do not change them, other weights do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

TENSORS, VALUES = 64, 8  # sampled: enough to tell any two trainings apart, and a few kilobytes on disk
ROUNDING = 2.0**-7  # bf16 keeps 8 bits: two roundings of one value differ by at most this share of it


class WeightSample(TypedDict):
    """One matrix: its shape and some of its values, at positions spread evenly over it."""

    shape: list[int]
    values: list[float]


Fingerprint = dict[str, WeightSample]


def take(shapes: Mapping[str, Sequence[int]], read: Callable[[str, np.ndarray], Sequence[float]]) -> Fingerprint:
    """The fingerprint of a model with weights of these names and shapes.

    Args:
        shapes: by name; vectors are left out, as trained norms and biases are no part of the frozen base.
        read: (name, flat positions [n]) -> the n values there, in the order of C.
    """
    matrices = sorted(name for name, shape in shapes.items() if len(shape) >= 2)
    return {name: _sample(name, shapes[name], read) for name in spread(matrices, TENSORS)}


def _sample(name: str, shape: Sequence[int], read: Callable[[str, np.ndarray], Sequence[float]]) -> WeightSample:
    values = read(name, sampled_positions(shape))
    return {"shape": list(shape), "values": [float(f"{value:.6g}") for value in values]}


def sampled_positions(shape: Sequence[int]) -> NDArray[np.int64]:
    """The flat positions of the values that are kept of a matrix of this shape."""
    return np.unique(np.linspace(0, int(np.prod(shape)) - 1, VALUES).astype(np.int64))


def spread(names: Sequence[str], count: int) -> list[str]:
    """At most `count` of the names, spread evenly."""
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).astype(int))]


def difference(stored: Fingerprint, current: Fingerprint) -> str | None:
    """Returns what tells two fingerprints apart, in words, or None where they agree."""
    if unknown := sorted(set(stored) - set(current)):
        return f"the base has no weight {unknown[0]!r}"
    for name, sample in stored.items():
        if sample["shape"] != current[name]["shape"]:
            return f"{name} has the shape {current[name]['shape']}, not {sample['shape']}"
    changed = [name for name in stored if not _equal(stored[name]["values"], current[name]["values"])]
    if changed:
        return f"{len(changed)} of {len(stored)} sampled weights have other values, {changed[0]} among them"
    return None


def _equal(a: Sequence[float], b: Sequence[float]) -> bool:
    return bool(np.allclose(a, b, rtol=ROUNDING, atol=1e-30))
