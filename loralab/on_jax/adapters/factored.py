"""A weight with its LoRA update, kept apart: W, A and B stand for W + s·BA.

The interpreter in any_function.py hands such a weight through a program. Products with it are in products.py; here stand
the operations that give a weight with its update again: transposes, reshapes, slices, weights side by side, casts, products
with a scalar.

A weight may have any number of axes. A letter for each says what it is: `l` a matrix per layer, `i` input, `o` output.

    W        in any order, such as [in, out] "io", [out, in] "oi", [layers, in, out] "lio", [height, width, in, out] "iiio"
    A        [l…, r, i…]
    B        [l…, o…, r]
    stretch  [l…, o…], DoRA's m/‖W + sBA‖
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.tree_util import register_dataclass

LETTERS, RANK = string.ascii_lowercase[:-1], "z"  # einsum's, of W's axes and of r


@functools.partial(register_dataclass, data_fields=["W", "A", "B", "stretch"], meta_fields=["axes", "scale", "name"])
@dataclass(frozen=True)
class Factored:
    """W + s·BA, or with DoRA stretch · (W + s·BA)."""

    W: Array
    A: Array
    B: Array
    stretch: Array | None
    axes: str
    """A letter for each axis of W: l, i or o."""
    scale: float
    name: str

    def dense(self) -> Array:
        """The one array, like W. Computed in the factors' dtype."""
        return self.stretched(self.total(), self.letters()).astype(self.W.dtype)

    def total(self) -> Array:
        """W + s·BA in the factors' dtype, like W."""
        delta = jnp.einsum(f"{self.letters('lzi')},{self.letters('loz')}->{self.letters()}", self.A, self.B)
        return self.W.astype(self.A.dtype) + self.scale * delta

    def lengths(self, array: Array) -> Array:
        """Returns the norm of the row of each output, [l…, o…], in an array like W."""
        squares = jnp.square(array.astype(self.A.dtype))
        return jnp.sqrt(jnp.einsum(f"{self.letters()}->{self.letters('lo')}", squares))

    def stretched(self, array: Array, letters: str) -> Array:
        """An array that has all of W's layers and outputs among its axes, each output times its stretch. In the array's dtype."""
        if self.stretch is None:
            return array
        own = self.letters("lo")
        factor = self.stretch.transpose(sorted(range(len(own)), key=lambda at: letters.index(own[at])))
        return array * jnp.expand_dims(factor, [at for at, each in enumerate(letters) if each not in own]).astype(
            array.dtype
        )

    def one_layer(self) -> Factored:
        """Handles what a scan over the layers has taken apart: the arrays have lost their first axis, now the letters do."""
        return Factored(self.W, self.A, self.B, self.stretch, self.axes[1:], self.scale, self.name)

    def letters(self, kinds: str | None = None) -> str:
        """einsum's letters of W's axes, in their order; or of those of some kinds, kind by kind, z being r."""
        if kinds is None:
            return LETTERS[: len(self.axes)]
        return "".join(RANK if kind == "z" else "".join(LETTERS[at] for at in self.places(kind)) for kind in kinds)

    def places(self, kind: str) -> list[int]:
        """W's axes of this kind."""
        return [at for at, axis in enumerate(self.axes) if axis == kind]


def is_factored(value: Any) -> bool:
    """Tells whether this is a weight with its update."""
    return isinstance(value, Factored)


def dense(value: Any) -> Any:
    """The plain array of a value that may be factored."""
    return value.dense() if isinstance(value, Factored) else value


# Operations after which the update is still apart. Each takes the operation's parameters and operands, and returns the
# weight or the weights that come out, or None where the sum has to be formed.

Place = int | None  # which of W's axes an axis of a part is; None for r
Change = Callable[[Array, list[Place]], Array]


def _changed(weight: Factored, W: Array, axes: str, change: Change) -> Factored:
    """The weight with a new W, and each other part changed."""
    layers, inputs, outputs = (weight.places(kind) for kind in "lio")
    A, B = change(weight.A, [*layers, None, *inputs]), change(weight.B, [*layers, *outputs, None])
    stretch = None if weight.stretch is None else change(weight.stretch, [*layers, *outputs])
    return Factored(W, A, B, stretch, axes, weight.scale, weight.name)


def _transpose(params: dict[str, Any], weight: Factored) -> Factored:
    order: tuple[int, ...] = params["permutation"]

    def change(part: Array, places: list[Place]) -> Array:
        kinds = ["" if at is None else weight.axes[at] for at in places]  # a part's kinds of axes stay in their order
        rank = [0 if at is None else order.index(at) for at in places]
        return part.transpose(sorted(range(len(places)), key=lambda k: (kinds.index(kinds[k]), rank[k])))

    return _changed(weight, weight.W.transpose(order), "".join(weight.axes[at] for at in order), change)


def _slice(params: dict[str, Any], weight: Factored) -> Factored:
    start, limit = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or [1] * len(start)

    def change(part: Array, places: list[Place]) -> Array:
        cut = [slice(None) if at is None else slice(start[at], limit[at], strides[at]) for at in places]
        return part[tuple(cut)]

    return _changed(weight, change(weight.W, [*range(len(start))]), weight.axes, change)


def _dynamic_slice(params: dict[str, Any], weight: Factored, *starts: Any) -> Factored:
    zero = jnp.zeros_like(starts[0])  # all starts are of one dtype

    def change(part: Array, places: list[Place]) -> Array:
        sizes = [size if at is None else params["slice_sizes"][at] for at, size in zip(places, part.shape, strict=True)]
        return lax.dynamic_slice(part, [zero if at is None else starts[at] for at in places], sizes)

    return _changed(weight, change(weight.W, [*range(len(starts))]), weight.axes, change)


def _split(params: dict[str, Any], weight: Factored) -> list[Factored]:
    ends, shape = np.cumsum(params["sizes"]), weight.W.shape
    pieces = []
    for size, end in zip(params["sizes"], ends, strict=True):
        start, limit = [0] * len(shape), list(shape)
        start[params["axis"]], limit[params["axis"]] = int(end - size), int(end)
        pieces.append(_slice({"start_indices": start, "limit_indices": limit, "strides": None}, weight))
    return pieces


def _concatenate(params: dict[str, Any], *parts: Any) -> Factored | None:
    """Weights side by side, plain ones too: the rank is the sum of theirs, and each update reaches its own outputs, or inputs."""
    weights, at = [part for part in parts if is_factored(part)], params["dimension"]
    first, kind = weights[0], weights[0].axes[at]
    stretched = any(weight.stretch is not None for weight in weights)
    if kind == "l" or (kind == "i" and stretched) or any(weight.axes != first.axes for weight in weights):
        return None
    W = lax.concatenate([part.W if is_factored(part) else part for part in parts], at)
    layers, place = len(first.places("l")), first.places(kind).index(at)
    factors, stretches, begin = [], [], 0
    for part in parts:
        size = np.shape(part.W if is_factored(part) else part)[at]
        room, begin = (begin, W.shape[at] - begin - size), begin + size
        if is_factored(part):
            A, B = part.A, part.B * part.scale
            factors.append(
                (_widened(A, layers + 1 + place, room), B) if kind == "i" else (A, _widened(B, layers + place, room))
            )
        shape = [size if axis == at else W.shape[axis] for axis in first.places("l") + first.places("o")]
        own = part.stretch if is_factored(part) else None
        stretches.append(jnp.ones(shape, first.A.dtype) if own is None else own)
    A, B = (jnp.concatenate(each, axis) for each, axis in zip(zip(*factors, strict=True), (layers, -1), strict=True))
    stretch = jnp.concatenate(stretches, layers + place) if stretched else None
    return Factored(W, A, B, stretch, first.axes, 1.0, ", ".join(dict.fromkeys(weight.name for weight in weights)))


def _widened(part: Array, axis: int, room: tuple[int, int]) -> Array:
    """With so many zeros before and behind, along one axis."""
    return jnp.pad(part, [room if each == axis else (0, 0) for each in range(part.ndim)])


def _squeeze(params: dict[str, Any], weight: Factored) -> Factored | None:
    return _into(weight, tuple(np.delete(weight.W.shape, params["dimensions"]).tolist()))


def _reshape(params: dict[str, Any], weight: Factored) -> Factored | None:
    return _into(weight, tuple(params["new_sizes"]))


def _broadcast(params: dict[str, Any], weight: Factored) -> Factored | None:
    return _into(weight, tuple(params["shape"]))


def _into(weight: Factored, shape: tuple[int, ...]) -> Factored | None:
    """The weight in another shape, if that keeps axes of different kinds apart, and no number is repeated."""
    axes = _axes_after(weight.axes, weight.W.shape, shape)
    if axes is None:
        return None
    rank = weight.A.shape[len(weight.places("l"))]
    layers, inputs, outputs = ([s for s, axis in zip(shape, axes, strict=True) if axis == kind] for kind in "lio")
    A, B = weight.A.reshape(*layers, rank, *inputs), weight.B.reshape(*layers, *outputs, rank)
    stretch = None if weight.stretch is None else weight.stretch.reshape(*layers, *outputs)
    return Factored(weight.W.reshape(shape), A, B, stretch, axes, weight.scale, weight.name)


def _axes_after(axes: str, old: Sequence[int], new: Sequence[int]) -> str | None:
    """The kinds of a new shape's axes, those of length one being outputs; None where one would hold axes of two kinds."""
    if prod(old) != prod(new) or not prod(old):
        return None
    unread = [(size, kind) for size, kind in zip(old, axes, strict=True) if size > 1]
    kinds: list[str] = []
    group, inside, outside = "", 1, 1  # the kind of the old axes that are being split or joined, and both their sizes
    for size in new:
        if size == 1:
            kinds.append("o")
            continue
        if inside == outside:
            group = ""
        outside *= size
        while inside < outside:
            length, kind = unread.pop(0)
            inside *= length
            if group not in ("", kind):
                return None
            group = kind
        kinds.append(group)
    return "".join(kinds)


def _cast(params: dict[str, Any], weight: Factored) -> Factored | None:
    """The factors stay in theirs: a product casts them to its input's dtype. A cast to eight bits rounds the sum and no part alone."""
    dtype = jnp.dtype(params["new_dtype"])
    apart = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
    return _with(weight, weight.W.astype(dtype), weight.B) if apart else None


def _multiply(params: dict[str, Any], left: Any, right: Any) -> Factored | None:
    weight, factor = (left, right) if is_factored(left) else (right, left)
    if is_factored(factor) or np.ndim(factor):
        return None
    return _with(weight, weight.W * factor, weight.B * jnp.asarray(factor, weight.B.dtype))


def _divide(params: dict[str, Any], weight: Any, divisor: Any) -> Factored | None:
    if not is_factored(weight) or is_factored(divisor) or np.ndim(divisor):
        return None
    return _with(weight, weight.W / divisor, weight.B / jnp.asarray(divisor, weight.B.dtype))


def _negate(params: dict[str, Any], weight: Factored) -> Factored:
    return _with(weight, -weight.W, -weight.B)


def _with(weight: Factored, W: Array, B: Array) -> Factored:
    return Factored(W, weight.A, B, weight.stretch, weight.axes, weight.scale, weight.name)


def _constant(params: dict[str, Any], weight: Factored) -> Factored:
    constant: Factored = lax.stop_gradient(weight)
    return constant


def _on_devices(params: dict[str, Any], weight: Factored) -> Factored:
    """W on the devices that the function asks for; the factors are small."""
    return _with(weight, lax.with_sharding_constraint(weight.W, params["sharding"]), weight.B)


def _varying(params: dict[str, Any], weight: Factored) -> Factored:
    """Within `shard_map`: W may differ from device to device from here on. What the factors meet makes them do so too."""
    axes = params["axes"]
    if hasattr(lax, "pcast"):
        return _with(weight, lax.pcast(weight.W, axes, to="varying"), weight.B)
    return _with(weight, lax.pvary(weight.W, axes), weight.B)  # type: ignore[attr-defined]  # JAX's older name for it


def _barrier(params: dict[str, Any], *operands: Any) -> list[Any]:
    return list(lax.optimization_barrier(operands))


def _same(params: dict[str, Any], weight: Factored) -> Factored:
    return weight


STRUCTURE: dict[str, Callable[..., Factored | list[Factored] | None]] = {
    "transpose": _transpose,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "concatenate": _concatenate,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _cast,
    "mul": _multiply,
    "div": _divide,
    "neg": _negate,
    "stop_gradient": _constant,
    "sharding_constraint": _on_devices,
    "pvary": _varying,
    "optimization_barrier": _barrier,
    "copy": _same,
    "copy_p": _same,
    "name": _same,
}
