"""The weights in any tree of arrays, as LoRA's rules see them.

A weight's path is the components of its place joined by dots; `value`, with which Flax's boxes end each, is left out. The rules see
that path without a last `kernel`, `weight` or `embedding`: `encoder.block.0.layer.0.SelfAttention.q`. What a weight's axes
are is said by its name, unless the caller says it:

    two axes                          [in, out], as in x @ kernel         "io"
    two axes, named `weight`          [out, in], PyTorch's and Equinox's  "oi"
    two axes, an embedding            a row for each token                "io"
    one axis; a bias or a norm        a vector
    three and more                    must be said: layers "lio", several inputs or outputs "iio", a convolution "iiio"

What a Flax model keeps beside its parameters (running statistics, caches, counters) is not trained: Linen's collections of
STATE beside `params`, NNX's variables other than `Param`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from loralab.adapters.target_modules import Module, matches, select
from loralab.errors import TargetError

UNSEEN = ("kernel", "weight", "embedding")  # by the rules, at a path's end
EMBEDDINGS = ("shared", "wte", "wpe", "relative_attention_bias")
STATE = ("batch_stats", "cache", "intermediates")
VECTOR = re.compile(r"(.*_)?(bias|scale|offset|beta|gamma)")  # a path's last component
NORM = re.compile(r"(.*norm|ln)(_?(\d+|f|in|out|pre|post|final))?")  # the same, or the one before a last `weight`
LIKELY_AXES = {"query": "ioo", "key": "ioo", "value": "ioo", "out": "iio"}  # Flax's attention


@dataclass(frozen=True)
class Weight:
    """One array of the tree."""

    path: str
    module: str
    """The path as the rules see it."""
    shape: tuple[int, ...]
    dtype: Any
    axes: str | None
    """A letter for each axis of a matrix, see factored.py; None for what LoRA cannot adapt."""
    state: bool = False
    """True if it is no parameter of the model."""

    @property
    def leaf(self) -> str:
        """The path's last component."""
        return self.path.rpartition(".")[2]

    @property
    def trainable(self) -> bool:
        """Tells whether it can be trained."""
        return bool(jnp.issubdtype(self.dtype, jnp.floating)) and not self.state

    @property
    def embedding(self) -> bool:
        """A table of rows, by its name."""
        name = self.module.rpartition(".")[2].lower()
        return self.leaf == "embedding" or (self.leaf != "kernel" and (name in EMBEDDINGS or "embed" in name))

    @property
    def vector(self) -> bool:
        """A bias or a norm's scale; by its name, if nobody says its axes, also where there is one for each of several layers."""
        name = (self.path.removesuffix(".weight") if self.leaf == "weight" else self.path).rpartition(".")[2].lower()
        named = self.axes is None and bool(VECTOR.fullmatch(name) or NORM.fullmatch(name))
        return len(self.shape) <= 1 or named

    @property
    def kind(self) -> str:
        """Returns what it is, for messages."""
        what = "state" if self.state else "vector" if self.vector else "matrix" if self.axes else "tensor"
        likely = ", by its name (axes say otherwise)" if what == "vector" and len(self.shape) > 1 else ""
        return f"{what} of {self.dtype} {list(self.shape)}{likely}"

    def sizes(self) -> tuple[list[int], list[int], list[int]]:
        """Returns the sizes of the layers, the inputs and the outputs."""
        pairs = list(zip(self.shape, self.axes or "", strict=True))
        layers, inputs, outputs = ([size for size, axis in pairs if axis == kind] for kind in "lio")
        return layers, inputs, outputs


def weights_of_tree(params: Any, said: Mapping[str, str]) -> list[Weight | None]:
    """Returns what each leaf of the tree is, in the tree's order; None for a leaf that is no array.

    Args:
        said: rules -> the letters of the axes of the weights that they select.

    Raises:
        TargetError: axes are said of nothing, of other shapes, or in other letters.
    """
    if not isinstance(said, Mapping):
        raise TargetError(
            f"axes is {said!r}; it must be a dictionary of rules and letters, such as {{'layers.*': 'lio'}}."
        )
    places = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda node: bool(_boxes(node)))[0]
    leaves = [(_inside(path, node, inner), leaf) for path, node in places for inner, leaf in _flat(node)]
    beside = _beside_parameters(places, [path for path, _ in leaves])
    found = [_weight(path, leaf, beside) if hasattr(leaf, "dtype") else None for path, leaf in leaves]
    weights = [weight for weight in found if weight is not None]
    axes = dict(_said_axes(said, weights))
    return [w and replace(w, axes=axes.get(w.path, w.axes)) for w in found]


def _flat(node: Any) -> list[tuple[tuple[Any, ...], Any]]:
    leaves: list[tuple[tuple[Any, ...], Any]] = jax.tree_util.tree_flatten_with_path(node)[0]
    return leaves


def _inside(path: tuple[Any, ...], node: Any, inner: tuple[Any, ...]) -> str:
    """The path of a leaf of a box: without the attribute that holds the array."""
    held = _boxes(node) and path and inner and isinstance(inner[-1], GetAttrKey) and dotted(inner[-1:]) == "value"
    return dotted((*path, *inner[:-1]) if held else (*path, *inner))


def _beside_parameters(places: list[tuple[tuple[Any, ...], Any]], paths: list[str]) -> tuple[str, ...]:
    """Returns where there are no parameters, as beginnings of paths: NNX's other variables, Linen's other collections."""
    others = [
        f"{dotted(path)}." for path, node in places if "Variable" in (kinds := _boxes(node)) and "Param" not in kinds
    ]
    holders = {f".{path}".partition(".params.")[0] for path in paths if ".params." in f".{path}"}
    return *others, *(f"{holder}.{name}.".removeprefix(".") for holder in holders for name in STATE)


def _boxes(node: Any) -> list[str]:
    """The classes of one of Flax's boxes of an array, NNX's variables and Linen's metadata; none of any other node."""
    kinds = [kind.__name__ for kind in type(node).__mro__ if kind.__module__.startswith("flax.")]
    return kinds if {"Variable", "AxisMetadata"} & {*kinds} else []


def dotted(path: tuple[Any, ...]) -> str:
    """A place in a tree of JAX's in words."""
    return ".".join(
        str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name))) for key in path
    )


def _weight(path: str, leaf: Any, beside: tuple[str, ...]) -> Weight:
    module, _, last = path.rpartition(".")
    name = module if module and last in UNSEEN else path
    weight = Weight(path, name, tuple(leaf.shape), leaf.dtype, None, state=f"{path}.".startswith(beside))
    if len(weight.shape) != 2 or (weight.vector and not weight.embedding) or not weight.trainable:
        return weight
    return replace(weight, axes="oi" if last == "weight" and not weight.embedding else "io")


def _said_axes(said: Mapping[str, str], weights: list[Weight]) -> Iterator[tuple[str, str]]:
    for rule, axes in said.items():
        if set(axes) - set("lio") or not {"i", "o"} <= set(axes):
            raise TargetError(
                f"axes {axes!r} of {rule!r}: a letter for each axis, l (layers), i (input) or o (output), and both i and o among them."
            )
        chosen = select([rule], [weight.module for weight in weights], "axes of")
        fitting = [w for w in weights if w.module in chosen and len(w.shape) == len(axes)]
        if not fitting:
            shapes = sorted({str(list(w.shape)) for w in weights if w.module in chosen})
            raise TargetError(
                f"axes {axes!r} of {rule!r} has {len(axes)} letters; the weights have {', '.join(shapes)}."
            )
        if not any(w.trainable for w in fitting):
            raise TargetError(
                f"axes {axes!r} of {rule!r}: {fitting[0].module!r} is a {fitting[0].kind}, and is not trained."
            )
        yield from ((weight.path, axes) for weight in fitting if weight.trainable)


def modules(weights: list[Weight]) -> Iterator[Module]:
    """The weights as the rules see them, each after the groups that hold it."""
    seen = {weight.module for weight in weights}
    for weight in weights:
        parts = weight.module.split(".")
        for end in range(1, len(parts)):
            group = ".".join(parts[:end])
            if group not in seen:
                seen.add(group)
                yield Module(group, "group of weights")
        wrappable = weight.axes is not None and "i" in weight.axes and "o" in weight.axes
        yield Module(weight.module, weight.kind, wrappable, wrappable and not weight.embedding)


def refuse_unsaid(rules: tuple[str, ...], weights: list[Weight]) -> None:
    """Raises TargetError where a rule selects an array of three or more axes of which nobody said what they are.

    Tables of positions, [1, positions, width], are left alone.
    """
    unsaid = [w for w in weights if w.axes is None and len(w.shape) > 2 and w.trainable and not w.vector]
    for weight in unsaid:
        if len(weight.shape) == 3 and weight.shape[0] == 1 and weight.leaf not in ("kernel", "weight"):
            continue
        for rule in rules:
            if rule == "all-linear" or matches(rule, weight.module):
                raise TargetError(
                    f"The rule {rule!r} selects {weight.module!r}, an array {list(weight.shape)}: say what its axes are, such as "
                    f"axes={{{weight.module!r}: {_likely_axes(weight)!r}}}, "
                    "with l for a matrix per layer, i for input, o for output."
                )


def _likely_axes(weight: Weight) -> str:
    """Returns the likely meaning of each axis: of attention by its name; else of a matrix per layer, or of a convolution."""
    number, axes = len(weight.shape), LIKELY_AXES.get(weight.module.rpartition(".")[2])
    if axes is None or not 3 <= number <= 4:
        return "lio" if number == 3 else "i" * (number - 1) + "o"
    return axes if number == 3 else f"l{axes}"
