"""LoRA in JAX: values and gradients against the NumPy oracle, what a spec means there, and the doors that people come
through: plain functions, Linen, NNX, TrainState and orbax."""

from __future__ import annotations

import importlib
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import orbax.checkpoint
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax import Array
from jax_programs import INPUTS, OUTPUTS, ROWS, TWO_LAYERS, Reader, moved, random, two_layers

from loralab import LoRASpec
from loralab.errors import AdapterError, MissingExtra, TargetError
from loralab.on_jax import adapt, lora_init
from loralab.on_jax.ops.dropout import Masks

X = random(50, ROWS, INPUTS)
W = random(51, INPUTS, OUTPUTS)


def product(params: Any, x: Array) -> Array:
    return x @ params["q"]["kernel"]


def close(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


# The maths


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("leaf", ["kernel", "weight"])
def test_values_and_gradients_equal_the_oracle(leaf: str, rate: float) -> None:
    """A kernel lies [in, out], a weight [out, in]; A and B lie as in PyTorch for both."""
    params = {"q": {leaf: W if leaf == "kernel" else W.T}}
    f = product if leaf == "kernel" else lambda p, x: x @ p["q"]["weight"].T
    adapted = adapt(LoRASpec(rank=2, alpha=3, rules="q", dropout=rate), f, params)
    key, trainable, dy = jax.random.key(4), moved(adapted.start(params)), random(5, ROWS, OUTPUTS)
    y, back = jax.vjp(lambda t, x: adapted(params, t, x, lora_rng=key), trainable, X)
    grads, dx = back(dy)
    mask = np.asarray(Masks(rate, True, key).drop(jnp.ones_like(X))) if rate else np.ones(X.shape)
    assert rate == 0 or 0 < mask.mean() < 1
    A, B = (np.asarray(trainable["q"][name], np.float64) for name in "AB")
    inputs = np.asarray(X, np.float64), np.asarray(W.T, np.float64), A, B, 1.5, mask
    close(y, oracle.forward(*inputs, rate))
    expected = oracle.backward(*inputs, np.asarray(dy, np.float64), rate)
    close((dx, grads["q"]["A"], grads["q"]["B"]), (expected.x, expected.A, expected.B))


def test_dora_equals_the_oracle() -> None:
    params = {"q": {"kernel": W}}
    adapted = adapt(LoRASpec(rank=2, alpha=3, rules="q", use_dora=True), product, params)
    start = adapted.start(params)
    close(start["q"]["magnitude"], oracle.row_norms(np.asarray(W.T)))
    trainable, dy = moved(start), random(5, ROWS, OUTPUTS)
    y, back = jax.vjp(lambda t: adapted(params, t, X), trainable)
    A, B, m = (np.asarray(trainable["q"][name], np.float64) for name in ("A", "B", "magnitude"))
    x, weight = np.asarray(X, np.float64), np.asarray(W.T, np.float64)
    close(y, x @ oracle.dora_merged(weight, A, B, 1.5, m).T)
    expected = oracle.dora_backward_magnitude(x, weight, A, B, 1.5, np.asarray(dy, np.float64))
    close(back(dy)[0]["q"]["magnitude"], expected)


def test_dora_learns_where_a_weight_begins_at_zero() -> None:
    params = {"q": {"kernel": W.at[:, 1].set(0.0)}}
    adapted = adapt(LoRASpec(rank=2, rules="q", use_dora=True), product, params)
    trained = adapted.start(params)
    for _ in range(40):
        gradient = jax.grad(lambda t: jnp.square(adapted(params, t, X) - 1).mean())(trained)
        trained = jax.tree.map(lambda x, g: x - 0.1 * g, trained, gradient)
    before, after = (jnp.square(adapted(params, t, X)[:, 1] - 1).mean() for t in (adapted.start(params), trained))
    assert float(before) == 1 and float(after) < 0.8


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 1.0), ({"alpha": 3}, 1.5), ({"alpha": 3, "use_rslora": True}, 3 / 2**0.5), ({"alpha_pattern": {"q": 8}}, 4.0),
     ({"alpha": 3, "rank_pattern": {"q": 6}}, 0.5)],
    ids=str,
)  # fmt: skip
def test_the_scale_is_the_specs(settings: dict[str, Any], scale: float) -> None:
    params = {"q": {"kernel": W}}
    trainable, _, merge_fn = lora_init(LoRASpec(rank=2, rules="q", **settings), product, params)
    trainable = moved(trainable)
    A, B = trainable["q"]["A"], trainable["q"]["B"]
    assert A.shape[0] == settings.get("rank_pattern", {"q": 2})["q"]
    close(merge_fn(trainable)["q"]["kernel"], W + scale * (B @ A).T)


# The start


@pytest.mark.parametrize(
    ("init", "deviation"),
    [("kaiming", 512**-0.5 / 3**0.5), ("gaussian", 1 / 64), ("normal", 1.0), ("kaiming_normal", 0.0625)],
)
def test_the_start_has_the_inits_spread(init: Any, deviation: float) -> None:
    params = {"q": {"kernel": jnp.zeros((512, 8))}}
    trainable, _, _ = lora_init(LoRASpec(rank=64, rules="q", init=init), product, params)
    A, B = trainable["q"]["A"], trainable["q"]["B"]
    assert not B.any()
    assert float(A.std()) == pytest.approx(deviation, rel=0.02)  # of 32,768 draws
    assert abs(float(A.mean())) < 0.03 * deviation
    assert init != "kaiming" or float(jnp.abs(A).max()) <= 512**-0.5


def test_a_seed_and_a_name_make_the_start() -> None:
    def start(seed: int | None, *names: str) -> Any:
        spec = LoRASpec(rank=2, rules=names, seed=seed)
        return lora_init(spec, product, {name: {"kernel": W} for name in names})[0]

    assert (start(1, "q", "v")["v"]["A"] == start(1, "v")["v"]["A"]).all(), "neither order nor neighbours matter"
    assert (start(None, "q")["q"]["A"] == start(0, "q")["q"]["A"]).all()
    assert (start(1, "q")["q"]["A"] != start(2, "q")["q"]["A"]).all()
    assert (start(1, "q")["q"]["A"] != start(1 + 2**40, "q")["q"]["A"]).all(), "no seed is cut to 32 bits"
    assert (start(1, "q", "v")["q"]["A"] != start(1, "q", "v")["v"]["A"]).all()


def test_an_embedding_starts_from_b_as_in_pytorch() -> None:
    params = {"embed": {"embedding": W}}
    trainable, apply_fn, _ = lora_init(
        LoRASpec(rank=2, rules="embed"), lambda p, ids: p["embed"]["embedding"][ids], params
    )
    assert not trainable["embed"]["A"].any() and trainable["embed"]["B"].all()
    close(apply_fn(trainable, jnp.array([1, 3])), W[jnp.array([1, 3])])


def test_a_bf16_base_has_fp32_factors_and_bf16_products() -> None:
    params = {"q": {"kernel": W.astype(jnp.bfloat16)}}
    trainable, apply_fn, merge_fn = lora_init(LoRASpec(rank=2, rules="q"), product, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    trainable, x = moved(trainable), X.astype(jnp.bfloat16)
    y, merged = apply_fn(trainable, x), product(merge_fn(trainable), x)
    assert y.dtype == merged.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(float), merged.astype(float), rtol=0.05, atol=0.05)  # bf16 has 8 bits
    wide = product({"q": {"kernel": W}}, X) + (X @ trainable["q"]["A"].T) @ trainable["q"]["B"].T
    np.testing.assert_allclose(y.astype(float), wide, rtol=0.05, atol=0.05)  # the same


def by_inputs(params: Any, x: Array) -> Array:
    return jax.lax.dot_general(x, params["q"]["kernel"], (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def by_outputs(params: Any, x: Array) -> Array:
    return jax.lax.dot_general(x, params["q"]["kernel"], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


@pytest.mark.parametrize("f", [by_inputs, by_outputs])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_, jnp.float8_e4m3fn])
def test_inputs_of_few_values_meet_the_update_in_its_own_dtype(dtype: Any, use_dora: bool, f: Any) -> None:
    """JAX leaves such an input as it is: cast to its dtype, the factors would be zero or coarse."""
    x, params = (random(7, ROWS, INPUTS) > 0).astype(dtype), {"q": {"kernel": random(8, INPUTS, INPUTS)}}
    trainable, apply_fn, merge_fn = lora_init(LoRASpec(rank=2, rules="q", use_dora=use_dora), f, params)
    trainable = moved(trainable)
    close(apply_fn(trainable, x), f(merge_fn(trainable), x))
    if not use_dora:  # whose lengths are constants to its gradient
        apart = jax.grad(lambda t: jnp.sin(apply_fn(t, x)).sum())(trainable)
        close(apart, jax.grad(lambda t: jnp.sin(f(merge_fn(t), x)).sum())(trainable))


# Dropout


def parallel(params: Any, x: Array) -> tuple[Array, Array]:
    return x @ params["q"], x @ params["v"]


@pytest.mark.parametrize("shared", [True, False])
def test_dropout_is_per_element_and_shared_by_those_who_read_the_same(shared: bool) -> None:
    """With a base of zeros, and A and B of ones: each sum tells what was left out of it."""
    params = {"q": jnp.zeros((400, 1)), "v": jnp.zeros((400, 1))}
    spec = LoRASpec(rank=1, rules=["q", "v"], dropout=0.25, shared_dropout=shared)
    _, apply_fn, _ = lora_init(spec, parallel, params)
    trainable = {name: {"A": jnp.ones((1, 400)), "B": jnp.ones((1, 1))} for name in params}
    x, key = random(1, 8, 400), jax.random.key(0)
    q, v = apply_fn(trainable, x, lora_rng=key)
    assert bool((q == v).all()) is shared
    again, other = (apply_fn(trainable, x, lora_rng=jax.random.key(seed))[0] for seed in (0, 1))
    assert (again == q).all() and not (other == q).any()
    same_rows = apply_fn(trainable, jnp.broadcast_to(x[0], x.shape), lora_rng=key)[0]
    assert len(np.unique(np.asarray(same_rows))) == 8, "each row has a mask of its own"
    kept = apply_fn(trainable, jnp.ones((8, 400)), lora_rng=key)[0]
    assert float(kept.mean()) == pytest.approx(400, rel=0.05)  # 3,200 coins, and 1/(1 − 0.25)
    close(apply_fn(trainable, x, lora_rng=None)[0], x.sum(1, keepdims=True))


@pytest.mark.parametrize("cast", [True, False], ids=["by the function", "by the update"])
def test_those_who_cast_an_input_share_its_mask(cast: bool) -> None:
    def f(params: Any, x: Array) -> tuple[Array, Array]:
        q, v = (x.astype(jnp.bfloat16) if cast else x for _ in range(2))
        return q @ params["q"], v @ params["v"]

    dtype = jnp.bfloat16 if cast else jnp.float32
    params = {"q": jnp.zeros((40, 1), dtype), "v": jnp.zeros((40, 1), dtype)}
    _, apply_fn, _ = lora_init(LoRASpec(rank=1, rules=["q", "v"], dropout=0.5), f, params)
    trainable = {name: {"A": jnp.ones((1, 40)), "B": jnp.ones((1, 1))} for name in params}
    q, v = apply_fn(trainable, jnp.ones((8, 40), jnp.float32 if cast else jnp.int32), lora_rng=jax.random.key(0))
    assert (q == v).all() and len(set(q[:, 0].tolist())) > 1


def test_each_turn_of_a_scan_draws_its_own_mask() -> None:
    """Under remat too: were the backward's masks others than the forward's, the gradient would not be the sum of dropped x."""
    params = {"q": jnp.zeros((3, 50, 1))}

    def f(params: Any, x: Array) -> Array:
        return jax.lax.scan(jax.checkpoint(lambda c, w: (c, x @ w)), 0.0, params["q"])[1]

    spec = LoRASpec(rank=50, rules="q", dropout=0.5)
    adapted = adapt(spec, f, params, axes={"q": "lio"})
    trainable = {"q": {"A": jnp.broadcast_to(jnp.eye(50), (3, 50, 50)), "B": jnp.ones((3, 1, 50))}}
    y, back = jax.vjp(lambda t: adapted(params, t, jnp.ones((1, 50)), lora_rng=jax.random.key(0)), trainable)
    seen = back(jnp.ones_like(y))[0]["q"]["B"]
    assert len(np.unique(np.asarray(seen[:, 0]), axis=0)) == 3
    close(seen.sum((1, 2)), y[:, 0, 0])


@pytest.mark.parametrize("loop", ["while", "cond"])
def test_dropout_reaches_into_loops_and_branches(loop: str) -> None:
    params = {"q": jnp.eye(50)}

    def f(params: Any, x: Array) -> Array:
        if loop == "cond":
            return jax.lax.cond(x[0] > 0, lambda: x @ params["q"], lambda: x)
        return jax.lax.while_loop(lambda c: c.min() < 3, lambda c: c @ params["q"] + 1, x)

    _, apply_fn, _ = lora_init(LoRASpec(rank=50, rules="q", dropout=0.5), f, params)
    trainable = {"q": {"A": jnp.eye(50), "B": jnp.eye(50)}}
    plain, dropped = (apply_fn(trainable, jnp.ones(50), lora_rng=key) for key in (None, jax.random.key(0)))
    assert len(set(plain.tolist())) == 1 and len(set(dropped.tolist())) > 1


def test_dropout_must_be_said_and_possible() -> None:
    spec = LoRASpec(rank=2, rules="q", dropout=0.1)
    trainable, apply_fn, _ = lora_init(spec, product, {"q": {"kernel": W}})
    with pytest.raises(TargetError, match=r"dropout is 0.1: pass lora_rng=key in training and lora_rng=None elsewhere"):
        apply_fn(trainable, X)
    with pytest.raises(TargetError, match=r"lora_rng is 0; it must be one key, such as jax.random.key\(0\), or None"):
        apply_fn(trainable, X, lora_rng=0)
    for no_key in (jnp.zeros(2), jnp.int32(3), jax.random.split(jax.random.key(0))):
        with pytest.raises(TargetError, match=r"it must be one key"):
            apply_fn(trainable, X, lora_rng=no_key)
    apply_fn(trainable, X, lora_rng=jax.random.PRNGKey(0))
    trainable, apply_fn, _ = lora_init(spec, lambda p: jnp.sum(p["q"]), {"q": W})
    with pytest.raises(TargetError, match=r"LoRA on 'q'.*'reduce_sum'.*no input to drop.*Set dropout to 0"):
        apply_fn(trainable, lora_rng=jax.random.key(0))


# Which weights

NAMED = {
    "encoder": {"SelfAttention": {"q": {"kernel": W, "bias": W[0]}}, "layer_norm": {"weight": W[0]}},
    "decoder": {"EncDecAttention": {"q": {"kernel": W}}, "conv": {"kernel": random(1, 3, 4, 5)}},
    "ids": jnp.arange(6).reshape(2, 3),
    "name": None,
}


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        ("q", ["decoder.EncDecAttention.q", "encoder.SelfAttention.q"]),
        ("Attention.q", ["decoder.EncDecAttention.q", "encoder.SelfAttention.q"]),
        ("SelfAttention.q", ["encoder.SelfAttention.q"]),
        ("decoder.*.q", ["decoder.EncDecAttention.q"]),
        (r"re:encoder\..*q", ["encoder.SelfAttention.q"]),
        ("encoder.*", ["encoder.SelfAttention.q"]),
    ],
)
def test_rules_see_the_path_without_the_leaf(rules: str, names: list[str]) -> None:
    assert list(lora_init(LoRASpec(rules=rules), product, NAMED)[0]) == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rules": "SelfAttenton.q"}, "'SelfAttenton.q' matches no module of this model. Did you mean 'SelfAttention.q'"),
        ({"rules": "layer_norm"}, "'layer_norm' matches 'encoder.layer_norm', a vector of float32 [8]; LoRA wraps matrices."),
        ({"rules": "q.bias"}, "'encoder.SelfAttention.q.bias', a vector of float32 [8]; LoRA wraps matrices."),
        ({"rules": "ids"}, "'ids', a tensor of int32 [2, 3]; LoRA wraps matrices."),
        ({"rules": "SelfAttention"}, "a group of weights; LoRA wraps matrices. Name the linear modules inside: SelfAttention.q, q."),
        ({"rules": "conv"}, "'decoder.conv', an array [3, 4, 5]: say what its axes are, such as axes={'decoder.conv': 'lio'}"),
        ({"rules": "all-linear"}, "The rule 'all-linear' selects 'decoder.conv'"),
        ({}, "A function has no default rules"),
        ({"rules": "q", "rank_pattern": {"k": 2}}, "rank_pattern 'k' matches none of the 2 adapted modules"),
        ({"rules": "q", "modules_to_save": ["heads"]}, "modules_to_save 'heads' matches no module"),
        ({"rules": "q", "modules_to_save": ["encoder"]}, "'encoder.SelfAttention.q' is selected both"),
        ({"rules": "decoder.*.q", "bias": "lora_only"}, "bias: lora_only trains nothing"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        lora_init(LoRASpec(**settings), product, NAMED)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"conv": "lix"}, "axes 'lix' of 'conv': a letter for each axis, l (layers), i (input) or o (output)"),
        (
            {"conv": "iii"},
            "axes 'iii' of 'conv': a letter for each axis, l (layers), i (input) or o (output), and both i and o",
        ),
        ({"ids": "io"}, "axes 'io' of 'ids': 'ids' is a tensor of int32 [2, 3], and is not trained"),
        ({"conv": "io"}, "axes 'io' of 'conv' has 2 letters; the weights have [3, 4, 5]"),
        ({"convolution": "iio"}, "axes of 'convolution' matches no module"),
        ("iio", "axes is 'iio'; it must be a dictionary of rules and letters"),
    ],
)
def test_axes_that_fit_nothing_are_refused(axes: Any, message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        lora_init(LoRASpec(rules="conv"), product, NAMED, axes=axes)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("query", (8, 2, 4), "such as axes={'query': 'ioo'}"),
        ("conv", (3, 3, 2, 4), "such as axes={'conv': 'iiio'}"),
        ("q", (3, 2, 4), "such as axes={'q': 'lio'}"),
        ("query", (3, 8, 2, 4), "such as axes={'query': 'lioo'}"),
        ("patch_embed", (8, 3, 4, 4), "such as axes={'patch_embed': 'iiio'}"),
        ("norms", (3, 4), None),
        ("norm_proj", (3, 4), None),
        ("ln_proj", (3, 4), None),
        ("layer_norm", (3, 4), "a vector of float32 [3, 4], by its name (axes say otherwise)"),
        ("ln_1", (3, 4), "a vector of float32 [3, 4], by its name (axes say otherwise)"),
        ("norm", (3, 4), "a vector of float32 [3, 4], by its name (axes say otherwise)"),
    ],
)
def test_a_name_says_what_an_array_is(name: str, shape: tuple[int, ...], message: str | None) -> None:
    params = {name: {"weight": jnp.ones(shape)}, "other": {"kernel": W}}
    if message is None:
        assert list(lora_init(LoRASpec(rules=name), product, params)[0]) == [name]
    else:
        with pytest.raises(TargetError, match=re.escape(message)):
            lora_init(LoRASpec(rules=name), product, params)


def test_positions_and_gammas_are_no_matrices_to_a_rule_that_takes_all() -> None:
    with pytest.raises(TargetError, match=r"'pos_embedding', a tensor of float32 \[1, 3, 4\]; LoRA wraps matrices"):
        lora_init(LoRASpec(rules="pos_embedding"), product, {"pos_embedding": jnp.ones((1, 3, 4))})
    params = {"pos_embedding": jnp.ones((1, 3, 4)), "first": {"ln_gamma": jnp.ones((3, 4)), "w": W}}
    for rules in ("all-linear", "re:.*"):
        assert list(lora_init(LoRASpec(rules=rules), product, params)[0]) == ["first.w"]
    assert list(lora_init(LoRASpec(rules="w", tune_vectors=True), product, params)[0]) == ["first.w", "first.ln_gamma"]
    matrix = lora_init(LoRASpec(rules="ln_gamma", tune_vectors=True), product, params, axes={"ln_gamma": "io"})[0]
    assert list(matrix) == ["first.ln_gamma"], "what is said comes before a name"


def test_axes_of_a_glob_are_those_of_what_is_trained() -> None:
    params = {
        "params": {"w": jnp.ones((3, 6, 6)), "codes": jnp.ones((3, 4, 6), int)},
        "cache": {"w": jnp.ones((3, 6, 6))},
    }
    assert list(lora_init(LoRASpec(rules="all-linear"), product, params, axes={"*": "lio"})[0]) == ["params.w"]


def test_an_embedding_takes_no_dora_and_names_must_differ() -> None:
    with pytest.raises(TargetError, match=r"use_dora adapts linear maps only; 'embed' is an embedding"):
        lora_init(LoRASpec(rules="embed", use_dora=True), product, {"embed": {"embedding": W}})
    with pytest.raises(TargetError, match=r"Two weights are called 'q'"):
        lora_init(LoRASpec(rules="q"), product, {"q": {"kernel": W, "weight": W}})
    lora_init(LoRASpec(rules="k"), product, {"q": {"kernel": W, "weight": W}, "k": {"kernel": W}})


class Heads(NamedTuple):
    query: Any
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclass
class Careful:
    """A node that looks at what it is given."""

    w: Any

    def __post_init__(self) -> None:
        assert self.w.ndim == 2


def test_a_field_may_be_called_value() -> None:
    trainable, apply_fn, _ = lora_init(
        LoRASpec(rank=1, rules="value"), lambda p, x: x @ p["attn"].value, {"attn": Heads(W, W, W)}
    )
    assert list(trainable) == ["attn.value"]
    close(apply_fn(trainable, X), X @ W)


@pytest.mark.parametrize("settings", [{"rules": "w"}, {"disabled": True}], ids=str)
def test_a_node_that_looks_at_its_leaves_sees_arrays(settings: dict[str, Any]) -> None:
    trainable, apply_fn, merge_fn = lora_init(LoRASpec(rank=1, **settings), lambda p, x: x @ p.w, Careful(W))
    trainable = moved(trainable)
    close(jax.jit(apply_fn)(trainable, X), X @ merge_fn(trainable).w)


def test_two_places_of_one_path_are_refused() -> None:
    params = {"a.b": W[0], "a": {"b": 2 * W[0]}, "w": W}
    for settings in ({"disabled": True}, {"rules": "w", "tune_vectors": True}):
        with pytest.raises(TargetError, match=r"Two places in the tree that are trained have the path 'a\.b'"):
            lora_init(LoRASpec(rank=1, **settings), product, params)


def test_a_module_may_be_called_as_a_collection_is() -> None:
    params = {"params": {"cache": {"kernel": W}, "batch_stats": {"bias": W[0]}}, "cache": {"index": W}}
    assert list(lora_init(LoRASpec(disabled=True), product, params)[0]) == [
        "params.batch_stats.bias",
        "params.cache.kernel",
    ]
    assert list(lora_init(LoRASpec(rank=1, rules="all-linear"), product, params)[0]) == ["params.cache"]
    assert list(lora_init(LoRASpec(rank=1, rules="cache"), product, {"cache": {"kernel": W}})[0]) == ["cache"]


def test_a_weight_without_inputs_and_a_number_of_rows_to_come() -> None:
    trainable, apply_fn, _ = lora_init(LoRASpec(rank=1, rules="w"), lambda p, x: x @ p["w"], {"w": W[:0]})
    assert float(abs(apply_fn(trainable, X[:, :0])).max()) == 0
    scanned = lambda p, x: jax.lax.scan(lambda carry, row: (carry, row @ p["w"]), 0.0, x)[1]  # noqa: E731
    trainable, apply_fn, merge_fn = lora_init(LoRASpec(rank=1, rules="w"), scanned, {"w": W})
    (rows,) = jax.export.symbolic_shape("rows")
    program = jax.export.export(jax.jit(partial(apply_fn, trainable)))(jax.ShapeDtypeStruct((rows, INPUTS), X.dtype))
    close(program.call(X), X @ merge_fn(trainable)["w"])


def test_a_dictionary_may_have_a_key_called_value() -> None:
    params = {"attn": {"query": W, "value": W}}
    assert list(lora_init(LoRASpec(rules="value"), product, params)[0]) == ["attn.value"]


@pytest.mark.parametrize(
    ("settings", "whole"),
    [
        ({"tune_vectors": True}, ["encoder.SelfAttention.q.bias", "encoder.layer_norm.weight"]),
        ({"bias": "all"}, ["encoder.SelfAttention.q.bias"]),
        ({"bias": "lora_only"}, ["encoder.SelfAttention.q.bias"]),
        ({"modules_to_save": ["conv"]}, ["decoder.conv.kernel"]),
    ],
    ids=str,
)
def test_some_weights_are_trained_whole(settings: dict[str, Any], whole: list[str]) -> None:
    trainable = lora_init(LoRASpec(rules="q", **settings), product, NAMED)[0]
    assert [name for name in trainable if not isinstance(trainable[name], dict)] == whole


def test_disabled_trains_every_weight() -> None:
    trainable, apply_fn, merge_fn = lora_init(LoRASpec(disabled=True), two_layers, TWO_LAYERS)
    assert {name: leaf.shape for name, leaf in trainable.items()} == {
        "one.kernel": (INPUTS, OUTPUTS), "two.bias": (4,), "two.weight": (4, OUTPUTS),
    }  # fmt: skip
    trainable = moved(trainable)
    assert merge_fn(trainable)["one"]["kernel"] is trainable["one.kernel"]
    close(apply_fn(trainable, X), two_layers(merge_fn(trainable), X))
    assert "ids" not in lora_init(LoRASpec(disabled=True), product, NAMED)[0], "whole numbers are not trained"


def test_a_step_may_use_up_what_it_trains_and_leaves_the_base() -> None:
    before = jax.tree.map(np.array, TWO_LAYERS)
    spec = LoRASpec(rank=2, rules=["one", "two"], tune_vectors=True)
    trainable, apply_fn, merge_fn = lora_init(spec, two_layers, TWO_LAYERS)

    def step(trainable: Any) -> Any:
        grads = jax.grad(lambda t: jnp.square(apply_fn(t, X)).sum())(trainable)
        return jax.tree.map(lambda p, g: p - 0.1 * g, trainable, grads)

    after = jax.jit(step, donate_argnums=0)(trainable)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trainable))
    jax.tree.map(np.testing.assert_array_equal, before, TWO_LAYERS)
    assert not (after["two.bias"] == TWO_LAYERS["two"]["bias"]).any()
    close(apply_fn(after, X), two_layers(merge_fn(after), X))


def test_vmap_runs_several_adapters_on_one_base() -> None:
    adapted = adapt(LoRASpec(rank=2, rules="one"), two_layers, TWO_LAYERS)
    several = [jax.tree.map(lambda leaf, k=k: leaf + k, adapted.start(TWO_LAYERS)) for k in (1.0, 2.0)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    together = jax.vmap(adapted, in_axes=(None, 0, None))(TWO_LAYERS, stacked, X)
    close(together, jnp.stack([adapted(TWO_LAYERS, each, X) for each in several]))


def test_what_is_trained_must_be_of_the_spec() -> None:
    trainable, apply_fn, _ = lora_init(LoRASpec(rank=2, rules="one"), two_layers, TWO_LAYERS)
    wider = lora_init(LoRASpec(rank=3, rules="one"), two_layers, TWO_LAYERS)[0]
    for wrong, message in [
        ({"params": trainable}, r"lacks 'one', which this spec trains. There are: params"),
        (wider, r"of 'one' has the shapes \{'A': \(3, 6\), 'B': \(8, 3\)\}; with this spec they are \{'A': \(2, 6\)"),
        ({**trainable, "two.bias": X}, r"has 'two.bias', which this spec does not train"),
    ]:
        with pytest.raises(AdapterError, match=message):
            apply_fn(wrong, X)
    adapted = adapt(LoRASpec(rank=2, rules="one"), two_layers, TWO_LAYERS)
    with pytest.raises(AdapterError, match=r"The base's 1 leaves are not the tree of 3 that LoRA was prepared for"):
        adapted({"one": {"kernel": W}}, trainable, X)


# Doors


def test_without_jax_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "loralab.on_jax")
    with pytest.raises(MissingExtra, match=r"jax is not installed.*pip install 'loralab\[jax\]'"):
        importlib.import_module("loralab.on_jax")


def test_the_base_is_an_argument_and_no_constant() -> None:
    """A program that holds its weights is as long as they are: 256 KiB of them, in hexadecimal."""
    params = {"q": {"kernel": random(0, 256, 256)}}
    adapted = adapt(LoRASpec(rank=2, rules="q"), product, params)
    trainable, x = adapted.start(params), jnp.ones((2, 256))
    _, apply_fn, _ = lora_init(LoRASpec(rank=2, rules="q"), product, params)
    assert len(jax.jit(adapted).lower(params, trainable, x).as_text()) < 5_000
    assert len(jax.jit(apply_fn).lower(trainable, x).as_text()) > 2 * params["q"]["kernel"].nbytes


def test_a_train_state_and_an_orbax_checkpoint(tmp_path: Path) -> None:
    """Linen's model, TrainState, a saved and restored adapter, merged weights: the published sequence."""
    model, ids, key = Reader(), jnp.array([[1, 2, 3], [4, 5, 6]]), jax.random.key(0)
    params, forward = jax.jit(model.init)(key, ids), jax.jit(partial(model.apply, activation="sin"))
    spec = LoRASpec(rank=2, rules=["embed", "query", "out", "up"], dropout=0.1, tune_vectors=True)
    axes = {"query": "ioo", "out": "iio"}
    trainable, apply_fn, merge_fn = lora_init(spec, model.apply, params, axes=axes)
    state = TrainState.create(apply_fn=apply_fn, params=trainable, tx=optax.adamw(1e-2))

    def loss(logits: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids % 3).mean()

    @jax.jit
    def step(state: TrainState, key: Array) -> TrainState:
        def objective(trained: Any) -> Array:
            rngs = {"dropout": key}
            return loss(state.apply_fn(params=trained, ids=ids, train=True, activation="sin", rngs=rngs, lora_rng=key))

        return state.apply_gradients(grads=jax.grad(objective)(state.params))

    for each in jax.random.split(key, 20):
        state = step(state, each)

    checkpointer = orbax.checkpoint.PyTreeCheckpointer()
    checkpointer.save(tmp_path.absolute() / "ckpt_20", jax.device_get(state.params))
    trainable, _, merge_fn = lora_init(spec, model.apply, params, axes=axes)
    restored = checkpointer.restore(tmp_path.absolute() / "ckpt_20")
    trainable = jax.tree.map(lambda x, y: x.at[:].set(y), trainable, restored)
    jax.tree.map(np.testing.assert_array_equal, trainable, state.params)
    tuned = merge_fn(trainable)
    again = jax.jit(partial(apply_fn, activation="sin", lora_rng=None))
    close(forward(tuned, ids), again(trainable, ids))
    assert float(loss(forward(tuned, ids))) < 0.8 * float(loss(forward(params, ids)))


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x: Array) -> Array:
        return linen.BatchNorm(use_running_average=True, name="norm")(linen.Dense(OUTPUTS, name="up")(x))


class NormedInNNX(nnx.Module):
    def __init__(self) -> None:
        self.up, self.norm = nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0)), nnx.BatchNorm(OUTPUTS, rngs=nnx.Rngs(0))

    def __call__(self, x: Array) -> Array:
        return self.norm(self.up(x), use_running_average=True)


def test_a_part_called_params_has_siblings() -> None:
    params = {"params": {"up": W}, "head": W}
    assert list(lora_init(LoRASpec(disabled=True), product, params)[0]) == ["head", "params.up"]
    with pytest.raises(
        TargetError, match=r"modules_to_save 'batch_stats' selects 'batch_stats', in which nothing can be trained"
    ):
        spec = LoRASpec(rules="up", modules_to_save=["batch_stats"])
        lora_init(spec, product, {**params, "batch_stats": {"mean": W[0]}})


@pytest.mark.parametrize("door", ["linen", "nnx"])
@pytest.mark.parametrize("settings", [{"rules": "up", "tune_vectors": True}, {"disabled": True}], ids=str)
def test_running_statistics_are_never_trained(door: str, settings: dict[str, Any]) -> None:
    if door == "linen":
        model = Normed()
        params, f = model.init(jax.random.key(0), X), model.apply
    else:
        graph, params = nnx.split(NormedInNNX())
        f = lambda params, x: nnx.merge(graph, params)(x)  # noqa: E731
    trainable, apply_fn, _ = lora_init(LoRASpec(**settings), f, params)
    trained = {"up", "up.bias", "norm.bias", "norm.scale"}
    assert {name.removeprefix("params.") for name in trainable} == (
        trained if "rules" in settings else trained - {"up"} | {"up.kernel"}
    )
    close(apply_fn(trainable, X), f(params, X))


def test_nnxs_remat_keeps_the_update_apart() -> None:
    """It gives the module back, from which the same block may be run again."""
    model = nnx.Linear(INPUTS, INPUTS, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    def f(params: Any, x: Array) -> Array:
        block, run = nnx.merge(graph, params), nnx.remat(lambda block, x: jnp.tanh(block(x)))
        return run(block, run(block, x))

    adapted = adapt(LoRASpec(rank=2, rules="kernel", dropout=0.1), f, params)
    trainable = moved(adapted.start(params))
    close(adapted(params, trainable, X, lora_rng=None), f(adapted.merge(params, trainable), X))
    jax.grad(lambda t: adapted(params, t, X, lora_rng=jax.random.key(0)).sum())(trainable)  # is not refused


def test_an_nnx_model() -> None:
    model = nnx.Sequential(
        nnx.Linear(INPUTS, OUTPUTS, rngs=nnx.Rngs(0)), jax.nn.relu, nnx.Linear(OUTPUTS, 3, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model)

    def f(params: Any, x: Array) -> Array:
        return nnx.merge(graph, params)(x)

    trainable, apply_fn, merge_fn = lora_init(LoRASpec(rank=2, rules="layers.*", tune_vectors=True), f, params)
    assert list(trainable) == ["layers.0", "layers.2", "layers.0.bias", "layers.2.bias"]
    trainable = moved(trainable)
    close(apply_fn(trainable, X), nnx.merge(graph, merge_fn(trainable))(X))
