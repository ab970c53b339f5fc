"""What a program costs, against closed formulas: FLOPs counted in the program, memory as the compiler planned it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.experimental import pallas
from jax_programs import Reader, random

from loralab import LoRASpec
from loralab.errors import UserError
from loralab.models.t5 import SIZES
from loralab.on_jax import adapt
from loralab.on_jax.models.t5 import T5
from loralab.on_jax.names import from_hugging_face
from loralab.on_jax.profiling import flops, memory

WIDTH, ROWS, LAYERS = 64, 32, 10
ONE = 2 * ROWS * WIDTH * WIDTH  # a product of the rows with one matrix
MATRICES, X = jnp.ones((LAYERS, WIDTH, WIDTH)), jnp.ones((ROWS, WIDTH))


def layer(x: Array, w: Array) -> tuple[Array, None]:
    return jnp.tanh(x @ w), None


def deep(remat: bool) -> Callable[..., Array]:
    body = jax.checkpoint(layer) if remat else layer
    return lambda x, w: lax.scan(body, x, w)[0].sum()


def gradient(f: Callable[..., Array]) -> Callable[..., Any]:
    return jax.grad(f, argnums=(0, 1))


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x, w: x @ w[0], 1),
        (lambda x, w: jax.jit(lambda x: x @ w[0])(x), 1),
        (lambda x, w: jnp.einsum("nd,lde->lne", x, w), LAYERS),
        (deep(remat=False), LAYERS),
        (gradient(deep(remat=False)), 3 * LAYERS),
        (gradient(deep(remat=True)), 4 * LAYERS),
        (jax.vmap(deep(remat=False), in_axes=(None, 0)), None),
        (lambda x, w: lax.fori_loop(0, 7, lambda _, c: c @ w[0], x), 7),
        (lambda x, w: lax.cond(x.sum() > 0, lambda: x @ w[0], lambda: x @ w[0] @ w[1]), 2),
        (lambda x, w: lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x) @ w[0], 1),
        (gradient(lambda x, w: (x @ w[0]).sum()), 2),
        (lambda x, w: (x @ w[0], x @ w[1])[0], 1),
        (lambda x, w: jax.jit(lambda x: (x @ w[0], x @ w[1]))(x)[0], 1),
        (lambda x, w: lax.scan(lambda c, _: ((c[0] @ w[0], c[1] @ w[1]), None), (x, x), None, length=3)[0][0], 3),
        (gradient(lambda x, w: jax.jit(lambda x: jnp.tanh(x @ w[0]).sum())(x)), 3),
        (lambda x, w: jnp.linalg.solve(w[0], (x @ w[1]).T), 1),
        (lambda x, w: lax.ragged_dot(x, w, jnp.full(LAYERS, ROWS // LAYERS)), 1),
        (gradient(lambda x, w: jnp.sin(lax.ragged_dot(x, w, jnp.full(LAYERS, ROWS // LAYERS))).sum()), 3),
    ],
    ids=[
        "product", "jit", "batch", "scan", "scan, gradient", "scan, gradient, remat", "vmap", "fori", "the dearest branch",
        "a loop without products", "no value that only the gradient's function has", "no dead product",
        "none in a jit", "none in a scan", "gradient of a jit", "beside a solver", "ragged", "ragged, gradient",
    ],
)  # fmt: skip
def test_flops_equal_the_formula(f: Callable[..., Any], expected: int | None) -> None:
    if expected is None:
        assert flops.count(f, X, jnp.ones((2, LAYERS, WIDTH, WIDTH))) == 2 * LAYERS * ONE
    else:
        assert flops.count(f, X, MATRICES) == expected * ONE


@pytest.mark.parametrize(("by_hand", "times"), [(("data",), 1), (("data", "model"), 2)])
def test_of_a_mesh_those_axes_count_that_are_parted_by_hand(by_hand: tuple[str, ...], times: int) -> None:
    """Along the other axes it is the compiler that parts the one product."""
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = jax.P("data")
    f = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(rows, jax.P()), out_specs=rows, axis_names={*by_hand})
    assert flops.count(f, X, MATRICES[0]) == times * ONE


def test_a_product_in_eight_bits() -> None:
    small, scales = jnp.float8_e4m3fn, jnp.float8_e8m0fnu  # a scale for each 32 numbers of what is summed over
    x, w = jax.ShapeDtypeStruct((1, ROWS, WIDTH), small), jax.ShapeDtypeStruct((1, WIDTH, WIDTH), small)
    of_x, of_w = (jax.ShapeDtypeStruct((1, rows, WIDTH // 32), scales) for rows in (ROWS, WIDTH))
    assert flops.count(jax.nn.scaled_matmul, x, w, of_x, of_w) == ONE


def test_shapes_are_enough() -> None:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (X, MATRICES))
    assert flops.count(deep(remat=False), *shapes) == LAYERS * ONE


def test_a_while_loop_is_refused() -> None:
    with pytest.raises(UserError, match=r"a while loop with products in it, and nothing in it says how often"):
        flops.count(lambda x, w: lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ w[0], x), X, MATRICES)


def test_a_kernel_of_pallas_is_refused() -> None:
    def kernel(x: Any, y: Any) -> None:
        y[...] = x[...] @ x[...]

    square = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)
    with pytest.raises(UserError, match=r"a kernel of Pallas, whose products cannot be counted"):
        flops.count(pallas.pallas_call(kernel, out_shape=square), square)


CONVOLUTIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    # how, groups, pairs of output and kernel element that meet an input along one axis of 9, for a kernel of 3
    "same": ({"window_strides": (1, 1), "padding": "SAME"}, 1, 25),
    "valid": ({"window_strides": (1, 1), "padding": "VALID"}, 1, 21),
    "strides": ({"window_strides": (2, 2), "padding": "SAME"}, 1, 13),
    "dilated": ({"window_strides": (2, 2), "padding": "VALID", "rhs_dilation": (2, 2)}, 1, 9),
    "grouped": ({"window_strides": (1, 1), "padding": "SAME"}, 4, 25),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_and_their_gradients(name: str) -> None:
    """A gradient costs as much again for each of its two sides, whatever strides and dilation make of it."""
    how, groups, pairs = CONVOLUTIONS[name]

    def f(x: Array, kernel: Array) -> Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jnp.sin(
            lax.conv_general_dilated(x, kernel, **how, dimension_numbers=numbers, feature_group_count=groups)
        ).sum()

    x, kernel = jnp.ones((2, 9, 9, 8)), jnp.ones((3, 3, 8 // groups, 16))
    expected = 2 * 2 * 16 * (8 // groups) * pairs * pairs
    assert flops.count(f, x, kernel) == expected
    assert flops.count(gradient(f), x, kernel) == 3 * expected


# What LoRA costs

RANK, BATCH, SIZE = 4, 512, 256


def two(params: Any, x: Array) -> Array:
    return jnp.square(jnp.tanh(x @ params["a"]) @ params["b"]).sum()


@pytest.mark.parametrize(("rule", "big", "small"), [("a", 3, 5), ("b", 2, 5), ("*", 3, 11)])
def test_a_gradient_costs_what_the_formula_says(rule: str, big: int, small: int) -> None:
    """Full: two products forward and, but for the input's gradient, as many again for each side. LoRA: those forward, and those that
    lead back to an update; of an update's small products two forward, two for A and B, one on the way to A, one on to what is below."""
    params = {"a": random(0, SIZE, SIZE), "b": random(1, SIZE, SIZE)}
    adapted = adapt(LoRASpec(rank=RANK, rules=rule), two, params)
    trainable, x = adapted.start(params), jnp.ones((BATCH, SIZE))
    full = flops.count(jax.grad(two), params, x)
    cost = flops.count(jax.grad(lambda t, p, x: adapted(p, t, x)), trainable, params, x)
    assert full == 5 * 2 * BATCH * SIZE**2
    assert cost == big * 2 * BATCH * SIZE**2 + small * 2 * BATCH * SIZE * RANK <= 0.7 * full


def test_forward_products_of_a_linen_model() -> None:
    """Each update adds its two small products and nothing else."""
    model, ids = Reader(), jnp.ones((2, 7), int)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    adapted = adapt(LoRASpec(rank=RANK, rules=["up", "head"]), model.apply, params)
    base, cost = (
        flops.count(model.apply, params, ids),
        flops.count(adapted, params, jax.eval_shape(adapted.start, params), ids),
    )
    assert cost - base == 2 * ids.size * RANK * ((8 + 8) + (8 + 3))


def test_a_step_of_t5_small_at_the_published_setting() -> None:
    """From shapes alone. Nothing leads back to the embedded ids under LoRA, so that less is computed than all the products' ways back."""
    config = SIZES["t5-small"]
    model = T5(config)
    zeros = {name: np.broadcast_to(np.float32(0), shape) for name, shape in model.shapes(own_head=False).items()}
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), from_hugging_face(zeros))
    source, target = (jax.ShapeDtypeStruct((4, length), jnp.int32) for length in (512, 64))

    def loss(params: Any, ids: Array, labels: Array) -> Array:
        return model.token_losses(params, ids, ids, labels).sum()

    d, f, layers, S, T = 512, 2048, 6, 512, 64
    products = 2 * 4 * (S + T) * 2 * d * f * layers + 2 * 4 * T * d * config.vocab_size  # feed-forward and head
    products += 2 * 4 * (S * 4 + T * 6 + S * 2) * d * d * layers  # q, k, v, o of three attentions
    scores = 2 * 4 * 2 * (S * S + T * T + T * S) * d * layers
    assert flops.count(loss, params, source, target) == products + scores
    full = flops.count(jax.grad(loss), params, source, target)
    assert full == 3 * (products + scores)
    adapted = adapt(LoRASpec(rank=8, rules=["Attention.q", "Attention.k", "Attention.v", "Attention.o"]), loss, params)
    trainable = jax.eval_shape(adapted.start, params)
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == 589_824
    cost = flops.count(jax.grad(lambda t, p, *rows: adapted(p, t, *rows)), trainable, params, source, target)
    assert round(full / 1e9, 1) == 373.8 and round(cost / 1e9, 1) == 264.3


# Memory


def test_memory_of_a_compiled_program() -> None:
    plain, donated = (memory.measure(jax.jit(lambda x: x + 1, donate_argnums=d), X) for d in ((), 0))
    assert (plain.arguments, plain.outputs, plain.temporary, plain.shared) == (X.nbytes, X.nbytes, 0, 0)
    assert donated.shared == X.nbytes and donated.peak == plain.peak - X.nbytes == X.nbytes


def test_the_gradient_of_lora_takes_less_than_that_of_everything() -> None:
    """Gradients of the trained weights come out, and no activation is kept for a weight that has none."""
    params = {"a": random(0, SIZE, SIZE), "b": random(1, SIZE, SIZE)}
    adapted = adapt(LoRASpec(rank=RANK, rules="*"), two, params)
    trainable, x = adapted.start(params), jnp.ones((BATCH, SIZE))
    full = memory.measure(jax.grad(two), params, x)
    lora = memory.measure(jax.grad(lambda t, p, x: adapted(p, t, x)), trainable, params, x)
    assert full.outputs >= 2 * SIZE**2 * 4 > 2 * 2 * RANK * SIZE * 4 * 10
    assert lora.outputs < full.outputs / 20 and lora.peak < full.peak
