"""Dropout on an adapter's input, with explicit keys (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html).

Sixteen random bits an element, so a rate is rounded to a multiple of 1/65,536, as in PyTorch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

LEVELS = 2**16


class Masks:
    """The masks of one trace: the body of a function, of a scan, of a rematerialised part. The key is never used itself."""

    def __init__(self, rate: float, shared: bool, key: Array) -> None:
        self.rate, self.shared, self.key = rate, shared, key
        self._keys = 0
        # Both by an array's identity. They hold the array too, so that none takes its place.
        self._kept: dict[int, tuple[Array, Array]] = {}
        self._sources: dict[int, tuple[Array, Array]] = {}

    def drop(self, x: Array) -> Array:
        """x with `rate` of its elements zero, the others as they are: 1/(1−rate) is the caller's. Shared: one mask for one input."""
        source = self._source(x)
        if not self.shared or id(source) not in self._kept:
            coins = jax.random.bits(self.next_key(), x.shape, jnp.uint16)
            self._kept[id(source)] = source, coins >= jnp.uint16(min(round(self.rate * LEVELS), LEVELS - 1))
        return jnp.where(self._kept[id(source)][1], x, 0)

    def take_for(self, x: Array, cast: Array) -> None:
        """Says that `cast` is x in another dtype: to its masks the two are one input."""
        self._sources[id(cast)] = cast, self._source(x)

    def _source(self, x: Array) -> Array:
        return self._sources.get(id(x), (x, x))[1]

    def next_key(self) -> Array:
        """A key that was not used yet."""
        self._keys += 1
        return jax.random.fold_in(self.key, self._keys)

    def inside(self, key: Array) -> Masks:
        """The masks of a trace within this one, which may not see this one's arrays again."""
        return Masks(self.rate, self.shared, key)
