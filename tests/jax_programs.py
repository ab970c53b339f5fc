"""Small functions of weights for the tests of LoRA in JAX, and what a program of JAX's holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import NamedSharding, PartitionSpec

ROWS, INPUTS, OUTPUTS, LAYERS, RANK = 5, 6, 8, 3, 2


def random(seed: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(seed), shape)


def moved(trainable: Any) -> Any:
    """As if something had been learnt: no number is where it started."""
    leaves, tree = jax.tree.flatten(trainable)
    return jax.tree.unflatten(tree, [leaf + 0.3 * random(at, *leaf.shape) for at, leaf in enumerate(leaves)])


def products(program: Any) -> Iterator[tuple[int, ...]]:
    """The shape of what each product in a jaxpr gives, however deep it stands."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.outvars[0].aval.shape
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from products(value)


@jax.custom_vjp
def own_product(x: Array, w: Array) -> Array:
    return x @ w


own_product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


class Program(NamedTuple):
    """f(weight, x), whose weight LoRA is put on."""

    f: Callable[[Array, Array], Any]
    shape: tuple[int, ...] = (INPUTS, OUTPUTS)
    axes: str | None = None


def heads(x: Array) -> Array:
    return x.reshape(ROWS, 2, INPUTS // 2)


def convolved(x: Array, w: Array, **how: Any) -> Array:
    """Over [1, ROWS, INPUTS], with a kernel [width, in, out]."""
    how = {"window_strides": (1,), "padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC"), **how}
    return lax.conv_general_dilated(x[None], w, **how)


MESH = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
SQUARE, STACKED = (INPUTS, INPUTS), (LAYERS, INPUTS, INPUTS)
layer: Callable[[Array, Array], tuple[Array, None]] = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731

handing_on: Callable[[Array, Array], tuple[Array, Array]] = lambda x, w: (jnp.tanh(x @ w), w)  # noqa: E731

FACTORED = {
    "a product": Program(lambda w, x: x @ w),
    "from the left": Program(lambda w, x: w.T @ x.T),
    "by the outputs": Program(lambda w, x: jnp.tanh(x @ w) @ w.T),
    "split into heads": Program(lambda w, x: jnp.einsum("nd,dhe->nhe", x, w.reshape(INPUTS, 2, 4))),
    "several outputs": Program(lambda w, x: jnp.einsum("nd,dhe->nhe", x, w), (INPUTS, 2, 4), "ioo"),
    "several inputs": Program(lambda w, x: jnp.einsum("nhe,hed->nd", heads(x), w), (2, 3, OUTPUTS), "iio"),
    "some of the inputs": Program(lambda w, x: jnp.einsum("nhe,hed->nhd", heads(x), w), (2, 3, OUTPUTS), "iio"),
    "a matrix a head": Program(lambda w, x: jnp.einsum("nhe,hed->nhd", heads(x), w), (2, 3, OUTPUTS), "lio"),
    "heads of outputs": Program(lambda w, x: jnp.einsum("nhe,hed->nhd", heads(x), w), (2, 3, OUTPUTS), "oio"),
    "pieces": Program(lambda w, x: [jnp.sin(x @ piece) for piece in jnp.split(w, 4, axis=1)]),
    "pieces of inputs": Program(lambda w, x: x[:, 2:4] @ w[2:4, ::2]),
    "side by side": Program(lambda w, x: x @ jnp.concatenate([w, x.T, 2 * w[:, 1:], -w], 1)),
    "under one another": Program(lambda w, x: jnp.hstack([x, x, x[:, :2]]) @ jnp.concatenate([w, x[:1].T * jnp.ones(OUTPUTS), -w[4:]], 0)),
    "times a number": Program(lambda w, x: x @ (2 * w / 3) - x @ -w),
    "an axis more": Program(lambda w, x: x[None] @ w[None]),
    "cast": Program(lambda w, x: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)),
    "vmap over rows": Program(lambda w, x: jax.vmap(lambda row: row @ w)(x)),
    "vmap over layers": Program(lambda w, x: jax.vmap(lambda own: x @ own)(w), STACKED, "lio"),
    "one layer": Program(lambda w, x: jnp.tanh(x @ w[0]) @ w[2], STACKED, "lio"),
    "scan over layers": Program(lambda w, x: lax.scan(layer, x, w)[0], STACKED, "lio"),
    "scan, rematerialised": Program(lambda w, x: lax.scan(jax.checkpoint(layer), x, w)[0], STACKED, "lio"),
    "scan with one weight": Program(lambda w, x: lax.scan(lambda c, _: layer(c, w), x, None, length=3)[0], SQUARE),
    "loop over layers": Program(lambda w, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i]), x), STACKED, "lio"),
    "cond": Program(lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (2 * x) @ w)),
    "jit": Program(lambda w, x: jax.jit(lambda x, w: x @ w)(x, w)),
    "jit on devices": Program(lambda w, x: jax.jit(lambda x, w: x @ w, out_shardings=on_mesh())(x, w)),
    "gradient of the input": Program(lambda w, x: jax.grad(lambda x: jnp.tanh(x @ w).sum())(x)),
    "beside a custom derivative": Program(lambda w, x: own_product(jax.nn.relu(x @ w), jnp.ones((OUTPUTS, 3)))),
    "nine axes": Program(lambda w, x: jnp.einsum("nd,abcdefhij->nabcefhij", x, w),
                         (1, 2, 1, INPUTS, 1, 2, 1, 2, 1), "oooiooooo"),
    "ten axes of the input": Program(lambda w, x: x.reshape(1, 1, 1, 1, ROWS, 1, 1, 1, 1, INPUTS) @ w),
    "a layer by a small number": Program(lambda w, x: x @ lax.dynamic_index_in_dim(w, jnp.uint8(2), keepdims=False), STACKED, "lio"),
    "nobody looks": Program(lambda w, x: (jnp.sum(w), x @ w)[1]),
    "nobody looks at what an inner program gives": Program(lambda w, x: jax.jit(lambda w, x: (jnp.tanh(x @ w), jnp.sum(w)))(w, x)[0]),
    "handed on": Program(lambda w, x: jnp.matmul(*jax.checkpoint(handing_on)(*jax.checkpoint(handing_on)(x, w))), SQUARE),
    "a sum over layers": Program(lambda w, x: jnp.einsum("nhe,hed->nd", heads(x), w), (2, 3, OUTPUTS), "lio"),
    "a sum over layers, by the outputs": Program(lambda w, x: jnp.einsum("nhe,hde->nd", heads(x), w), (2, OUTPUTS, 3), "lio"),
    "convolution": Program(lambda w, x: convolved(x, w), (3, INPUTS, OUTPUTS), "iio"),
    "convolution with strides": Program(lambda w, x: convolved(x, w, window_strides=(2,)), (3, INPUTS, OUTPUTS), "iio"),
    "rows": Program(lambda w, x: w[jnp.array([[1, 2], [0, 5]])]),
    "rows that are not there": Program(lambda w, x: w.at[jnp.array([1, 9])].get(mode="fill", fill_value=2.0)),
    "rows that are hidden": Program(lambda w, x: jnp.where(jnp.array([[True], [False]]), jnp.take(w, jnp.array([1, 9]), axis=0), 0)),
    "rows, then the head": Program(lambda w, x: jnp.take(w, jnp.array([1, 5]), axis=0) @ w.T),
    "placed": Program(lambda w, x: x @ lax.with_sharding_constraint(w, on_mesh())),
    "barrier": Program(lambda w, x: jnp.matmul(*lax.optimization_barrier((x, w)))),
    "constant": Program(lambda w, x: x @ lax.stop_gradient(w) + x @ w),
}  # fmt: skip

# Those in which DoRA's stretch takes a way of its own.
STRETCHED = (
    "a product", "from the left", "by the outputs", "several outputs", "a matrix a head", "heads of outputs", "pieces", "side by side",
    "one layer",
    "scan over layers", "convolution",
)  # fmt: skip

# What needs the sum -> the operation that is to blame.
FALLBACKS = {
    "convert_element_type": Program(lambda w, x: x @ w.astype(jnp.float8_e4m3fn).astype(jnp.float32)),
    "reduce_sum": Program(lambda w, x: x.sum() * jnp.sum(w)),
    "return": Program(lambda w, x: w),
    "reshape": Program(lambda w, x: x[:, :4] @ w.reshape(4, 12)),
    "dot_general": Program(lambda w, x: x @ (w @ w.T)),
    "concatenate": Program(lambda w, x: lax.scan(layer, x, jnp.concatenate([w, w]))[0], STACKED, "lio"),
    "custom_jvp_call": Program(lambda w, x: x @ jax.nn.relu(w)),
    "custom_vjp_call": Program(lambda w, x: own_product(x, w)),
    "conv_general_dilated": Program(lambda w, x: convolved(x, w, feature_group_count=2), (3, INPUTS // 2, OUTPUTS), "iio"),
    "scan": Program(lambda w, x: lax.scan(lambda c, row: (c + row.sum(), None), 0.0, w)[0]),
    "scan's carry": Program(lambda w, x: lax.scan(lambda c, _: (jnp.tanh(c), None), w, None, length=2)[0]),
    "while's carry": Program(lambda w, x: lax.while_loop(lambda c: c.sum() > 1e9, jnp.tanh, w)),
}  # fmt: skip


def on_mesh() -> NamedSharding:
    return NamedSharding(MESH, PartitionSpec("x"))


def two_layers(params: Mapping[str, Any], x: Array) -> Array:
    """A kernel as Flax stores it, and a weight as PyTorch does."""
    return jnp.tanh(x @ params["one"]["kernel"]) @ params["two"]["weight"].T + params["two"]["bias"]


TWO_LAYERS = {
    "one": {"kernel": random(0, INPUTS, OUTPUTS)},
    "two": {"weight": random(1, 4, OUTPUTS), "bias": random(2, 4)},
}


class Reader(linen.Module):
    """Embedding, heads, a norm, dropout: a model of Linen's."""

    @linen.compact
    def __call__(self, ids: Array, train: bool = False, activation: str = "tanh") -> Array:
        x = linen.Embed(20, OUTPUTS, name="embed")(ids)
        x = linen.DenseGeneral(OUTPUTS, axis=(-2, -1), name="out")(linen.DenseGeneral((2, 4), name="query")(x))
        x = getattr(jnp, activation)(linen.Dense(OUTPUTS, name="up")(linen.LayerNorm(name="norm")(x)))
        return linen.Dense(3, name="head")(linen.Dropout(0.5, deterministic=not train)(x))
