"""LoRA for any JAX function f(params, …): plain ones, Flax's `module.apply`, NNX through `nnx.merge`.

    y = x W + s · drop(x) Aᵀ Bᵀ                       Hu et al. 2021, https://arxiv.org/abs/2106.09685
    y = m/‖W + sBA‖ · (x W + s · drop(x) Aᵀ Bᵀ)       DoRA; norms held constant in backward. Liu et al. 2024, https://arxiv.org/abs/2402.09353

    trainable, apply_fn, merge_fn = lora_init(LoRASpec(rank=8, rules=["Attention.q"]), f, params)
    apply_fn(trainable, batch)              what f(params, batch) is, with the update
    f(merge_fn(trainable), batch)           the same, by plain weights

f itself is never changed: see any_function.py. Trainable is a flat dictionary, {module: {"A": [r, in], "B": [out, r]}} and, of
what is trained whole, {path: array}: optimizers, checkpoints and adapters see nothing else. A and B are kept in fp32, or in
the weight's dtype if that is wider, and cast to the input's.
"""

from __future__ import annotations

import os
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from loralab.config.lora import LoRASpec
from loralab.errors import AdapterError, TargetError, nearest
from loralab.on_jax.adapters.any_function import Scope, call
from loralab.on_jax.adapters.factored import Factored, dense
from loralab.on_jax.adapters.selection import selected, trained_whole
from loralab.on_jax.adapters.weights import Weight, weights_of_tree
from loralab.on_jax.ops.dropout import Masks

Trainable = dict[str, Any]
# Folders, with the separator at their end: there are libraries whose names begin with jax.
LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parents[1], Path(jax.__file__).parent))
Unsaid = Literal["unsaid"]


def lora_init(
    spec: LoRASpec, f: Callable[..., Any], params: Any, *, axes: Mapping[str, str] | None = None
) -> tuple[Trainable, Callable[..., Any], Callable[[Trainable], Any]]:
    """LoRA on f's weights: what is trained, f with it, and the way back to plain weights.

    `apply_fn(trainable, *args, **kwargs)` closes over params: a compiled program holds them as constants. `adapt` gives a
    function that takes them as an argument. With `disabled`, trainable holds params' own arrays: a step to which it is
    donated frees them.

    Args:
        f: f(params, *args, **kwargs), any function that JAX can trace.
        params: any tree of arrays.
        axes: rules -> letters, where the shapes and names do not say what a weight's axes are; see weights.py.

    Returns:
        trainable; apply_fn(trainable, *args, lora_rng=None, **kwargs), with a key for dropout; merge_fn(trainable) -> params.

    Raises:
        TargetError: a rule or pattern selects nothing, or something that LoRA cannot adapt.
    """
    adapted = adapt(spec, f, params, axes=axes)
    base = adapted.frozen(params)

    def apply_fn(params: Trainable, *args: Any, lora_rng: Array | Unsaid | None = "unsaid", **kwargs: Any) -> Any:
        return adapted.apply(base, params, lora_rng, args, kwargs)

    def merge_fn(trainable: Trainable) -> Any:
        return adapted.merged(base, trainable)

    return adapted.start(params), apply_fn, merge_fn


def adapt(spec: LoRASpec, f: Callable[..., Any], params: Any, *, axes: Mapping[str, str] | None = None) -> Adapted:
    """f with LoRA, as a function of base and trainable; of params it reads names, shapes and dtypes alone. Raises as `lora_init`."""
    leaves = weights_of_tree(params, axes or {})
    weights = [weight for weight in leaves if weight is not None]
    targets = [] if spec.disabled else selected(spec, weights)
    whole = trained_whole(spec, weights, targets)
    return Adapted(
        f,
        spec,
        jax.tree.structure(params),
        updated={at: weight for at, weight in enumerate(leaves) if weight and weight.module in targets},
        whole={at: weight for at, weight in enumerate(leaves) if weight and weight.path in whole},
    )


@dataclass(frozen=True, eq=False)
class Adapted:
    """A function with LoRA on some of its weights. The base stays an argument, and so an argument of whatever compiles it."""

    f: Callable[..., Any]
    spec: LoRASpec
    tree: Any
    """The base's structure."""
    updated: Mapping[int, Weight]
    """The weights with an update, by the number of their leaf in the base."""
    whole: Mapping[int, Weight]
    """Weights that are trained whole."""
    reported: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def __call__(
        self, base: Any, trainable: Trainable, /, *args: Any, lora_rng: Array | Unsaid | None = "unsaid", **kwargs: Any
    ) -> Any:
        """f(base, *args, **kwargs) with the update.

        Args:
            lora_rng: a key: this is training, with the spec's dropout. None: there is no dropout. It must be said where
                the spec has dropout.
        """
        return self.apply(self._leaves(base), trainable, lora_rng, args, kwargs)

    def apply(
        self,
        leaves: list[Any],
        trainable: Trainable,
        lora_rng: Array | Unsaid | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Returns the same, from the base's leaves."""
        masks, filled = self._masks(lora_rng), self._filled(leaves, trainable)
        if not self.updated:
            return self.f(jax.tree.unflatten(self.tree, filled), *args, **kwargs)
        scope = Scope(self._report if masks is None else _refuse, masks)
        return call(self.f, scope, self.tree, filled, *args, **kwargs)

    def start(self, base: Any) -> Trainable:
        """Returns what is trained, as it is before the first step: no update yet. Two calls give the same.

        What is trained whole is copied, so that a step to which trainable is donated leaves the base alone; with `disabled`
        it is the base's own arrays.
        """
        leaves, key = self._leaves(base), _key(self.spec.seed or 0)
        trainable: Trainable = {}
        for at, weight in self.updated.items():
            own_key = jax.random.fold_in(key, zlib.crc32(weight.module.encode()))
            trainable[weight.module] = first_factors(self.spec, weight, leaves[at], own_key)
        for at, weight in self.whole.items():
            trainable[weight.path] = leaves[at] if self.spec.disabled else jnp.array(leaves[at], copy=True)
        return trainable

    def shapes(self) -> dict[str, Any]:
        """Returns the shapes of what is trained."""
        updates = {weight.module: factor_shapes(self.spec, weight) for weight in self.updated.values()}
        return {**updates, **{weight.path: weight.shape for weight in self.whole.values()}}

    def merge(self, base: Any, trainable: Trainable) -> Any:
        """Plain weights that do the same, in the base's tree and dtypes; what has no update is the base's own."""
        return self.merged(self._leaves(base), trainable)

    def merged(self, leaves: list[Any], trainable: Trainable) -> Any:
        """Returns the same, from the base's leaves."""
        return jax.tree.unflatten(self.tree, [dense(leaf) for leaf in self._filled(leaves, trainable)])

    def frozen(self, base: Any) -> list[Any]:
        """The base's leaves without those that are trained whole, so that their arrays can be freed."""
        return [None if at in self.whole else leaf for at, leaf in enumerate(self._leaves(base))]

    def _filled(self, leaves: list[Any], trainable: Trainable) -> list[Any]:
        """The base's leaves with the updates on them, and with what is trained whole in its place."""
        self.check(trainable)
        leaves = list(leaves)
        for at, weight in self.updated.items():
            leaves[at] = factored(self.spec, weight, leaves[at], trainable[weight.module])
        for at, weight in self.whole.items():
            leaves[at] = trainable[weight.path]
        return leaves

    def _leaves(self, base: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(base)
        if tree != self.tree:
            raise AdapterError(
                f"The base's {len(leaves)} leaves are not the tree of {self.tree.num_leaves} that LoRA was prepared for."
            )
        for at, weight in {**self.updated, **self.whole}.items():
            if (shape := tuple(leaves[at].shape)) != weight.shape:
                raise AdapterError(
                    f"The base's {weight.path!r} has the shape {shape}; LoRA was prepared for {weight.shape}."
                )
        return leaves

    def check(self, trainable: Trainable) -> None:
        """Raises AdapterError where trainable is not what this spec trains, by names and shapes."""
        expected = self.shapes()
        found = trainable if isinstance(trainable, Mapping) else {}
        for name, shapes in expected.items():
            if name not in found:
                raise AdapterError(f"What is trained lacks {name!r}, which this spec trains. {nearest(name, found)}")
            if (got := jax.tree.map(jnp.shape, found[name])) != shapes:
                raise AdapterError(
                    f"What is trained of {name!r} has the shapes {got}; with this spec they are {shapes}."
                )
        if further := [name for name in found if name not in expected]:
            raise AdapterError(f"What is trained has {further[0]!r}, which this spec does not train.")

    def _masks(self, lora_rng: Array | Unsaid | None) -> Masks | None:
        rate = self.spec.dropout
        if isinstance(lora_rng, str) and lora_rng == "unsaid":
            if rate and self.updated:
                raise TargetError(
                    f"The spec's dropout is {rate}: pass lora_rng=key in training and lora_rng=None elsewhere."
                )
            return None
        if lora_rng is None:
            return None
        if not _is_key(lora_rng):
            raise TargetError(f"lora_rng is {lora_rng!r}; it must be one key, such as jax.random.key(0), or None.")
        return Masks(rate, self.spec.shared_dropout, lora_rng) if rate else None

    def _report(self, name: str, operation: str) -> None:
        if (name, operation) not in self.reported:
            self.reported.add((name, operation))
            warnings.warn(
                f"LoRA on {name!r}: the function uses this weight in {operation!r}, which is no product with it, so W + BA "
                "is formed there. The result is right; its gradient costs as much as that of the whole weight.",
                stacklevel=_level_of_caller(),
            )


def _level_of_caller() -> int:
    """Returns how far above `warn` the first line is that is neither ours nor JAX's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    return level


def _key(seed: int) -> Array:
    """Returns the key of any seed: without 64-bit numbers JAX takes 32 bits of it."""
    key = jax.random.key(seed % 2**32)
    return jax.random.fold_in(key, seed >> 32) if seed >> 32 else key


def _is_key(value: Any) -> bool:
    """Tells whether this is one key, of `jax.random.key` or of the older `jax.random.PRNGKey`."""
    if not hasattr(value, "dtype"):
        return False
    new = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return value.shape == () if new else value.dtype == jnp.uint32 and value.ndim == 1


def _refuse(name: str, operation: str) -> None:
    raise TargetError(
        f"LoRA on {name!r}: the function uses this weight in {operation!r}, which is no product with it, so there is no input "
        "to drop elements of. Set dropout to 0, or leave this weight out of the rules."
    )


def factor_shapes(spec: LoRASpec, weight: Weight) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of A [l…, r, i…] and B [l…, o…, r], and with DoRA of the magnitude [l…, o…]."""
    layers, inputs, outputs, rank = *weight.sizes(), spec.rank_of(weight.module)
    shapes = {"A": (*layers, rank, *inputs), "B": (*layers, *outputs, rank)}
    return {**shapes, "magnitude": (*layers, *outputs)} if spec.use_dora else shapes


def first_factors(spec: LoRASpec, weight: Weight, W: Array, key: Array) -> dict[str, Array]:
    """An update that changes nothing yet: B is zero, or, as in PEFT, A is for an embedding."""
    shapes, dtype = factor_shapes(spec, weight), max(weight.dtype, jnp.dtype("float32"), key=lambda each: each.itemsize)
    factors = {name: jnp.zeros(shape, dtype) for name, shape in shapes.items()}
    fan_in = max(prod(weight.sizes()[1]), 1)  # nothing may come in
    if weight.embedding:
        factors["B"] = jax.random.normal(key, shapes["B"], dtype)
    elif spec.init == "kaiming":
        factors["A"] = jax.random.uniform(key, shapes["A"], dtype, -(fan_in**-0.5), fan_in**-0.5)
    else:
        deviation = {"gaussian": 1 / spec.rank_of(weight.module), "normal": 1.0, "kaiming_normal": (2 / fan_in) ** 0.5}
        factors["A"] = deviation[spec.init] * jax.random.normal(key, shapes["A"], dtype)
    if spec.use_dora:
        factors["magnitude"] = _plain(spec, weight, W, factors).lengths(W)
    return factors


def factored(spec: LoRASpec, weight: Weight, W: Array, factors: Trainable) -> Factored:
    """A weight with its update; with DoRA the lengths that the magnitudes are held against are constants.

    An output whose weights are all zero has no direction yet: its stretch is 1.
    """
    plain = _plain(spec, weight, W, factors)
    if "magnitude" not in factors:
        return plain
    constant = jax.lax.stop_gradient(plain)
    lengths = constant.lengths(constant.total())
    stretch = jnp.where(lengths > 0, factors["magnitude"] / jnp.where(lengths > 0, lengths, 1), 1)
    return Factored(W, plain.A, plain.B, stretch, plain.axes, plain.scale, plain.name)


def _plain(spec: LoRASpec, weight: Weight, W: Array, factors: Trainable) -> Factored:
    assert weight.axes is not None, "what LoRA adapts has axes"
    return Factored(W, factors["A"], factors["B"], None, weight.axes, spec.scale_of(weight.module), weight.module)
