"""LoRA inside any JAX function: the same as with plain weights W + BA, which are never formed where it multiplies."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax_programs import (
    FACTORED,
    FALLBACKS,
    INPUTS,
    MESH,
    OUTPUTS,
    RANK,
    ROWS,
    SQUARE,
    STRETCHED,
    Program,
    moved,
    products,
    random,
)

from loralab import LoRASpec
from loralab.errors import AdapterError
from loralab.on_jax import adapt, lora_init, save_adapter
from loralab.on_jax.adapters.lora import Adapted

X = random(50, ROWS, INPUTS)
W = random(52, INPUTS, OUTPUTS)


def prepared(program: Program, **settings: Any) -> tuple[Adapted, Any, Any]:
    """The program with LoRA, its base, and weights that have learnt something."""
    base = {"w": random(51, *program.shape)}
    axes = {"w": program.axes} if program.axes else {}
    adapted = adapt(
        LoRASpec(rank=RANK, rules="w", alpha=3, **settings), lambda p, x: program.f(p["w"], x), base, axes=axes
    )
    return adapted, base, moved(adapted.start(base))


def both_ways(adapted: Adapted, base: Any, trainable: Any) -> tuple[Any, Any]:
    """Values and gradients as they are computed with the update apart, and through plain merged weights."""

    def loss(out: Any) -> Array:
        return sum(jnp.sin(leaf).sum() for leaf in jax.tree.leaves(out))

    def run(base: Any, trainable: Any, x: Array) -> tuple[Any, Any]:
        apart = jax.value_and_grad(lambda t: loss(adapted(base, t, x)))(trainable)
        merged = jax.value_and_grad(lambda t: loss(adapted.f(adapted.merge(base, t), x)))(trainable)
        return apart, merged

    return jax.jit(run)(base, trainable, X)


def assert_same(apart: Any, merged: Any, rtol: float = 1e-4) -> None:
    """Sums in another order: fp32 agrees to some 1e-6 of the largest number."""
    for ours, plain in zip(jax.tree.leaves(apart), jax.tree.leaves(merged), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=rtol, atol=rtol * float(jnp.abs(plain).max()))


def formed(adapted: Adapted, base: Any, trainable: Any) -> list[tuple[int, ...]]:
    """Products that give an array like the weight, or like one layer of it, in the order of its axes or another."""
    shape = base["w"].shape
    alike = {tuple(sorted(shape)), tuple(sorted(shape[-2:]))}
    shapes = products(jax.make_jaxpr(adapted)(base, trainable, X))
    return [each for each in shapes if tuple(sorted(each)) in alike]


@pytest.mark.parametrize("name", FACTORED)
def test_the_update_stays_apart(name: str) -> None:
    """A fallback would be reported, which is an error here."""
    case = prepared(FACTORED[name])
    assert_same(*both_ways(*case), 0.1 if name == "cast" else 1e-4)  # bf16 rounds W and BA apart, or their sum
    assert formed(*case) == []


def test_nothing_of_a_trace_is_kept() -> None:
    adapted, base, trainable = prepared(FACTORED["scan, rematerialised"])
    with jax.checking_leaks():
        jax.jit(adapted)(base, trainable, X)


def test_rows_under_vmap_leave_a_loop_one_by_one() -> None:
    """Its truth value is one for each row there, and `lax.while_loop` takes no such."""
    halved = lambda w, x: jax.vmap(lambda row: lax.while_loop(lambda c: jnp.abs(c).sum() > 1, lambda c: 0.3 * jnp.tanh(c @ w), row))(x)  # noqa: E731  # fmt: skip
    adapted, base, trainable = prepared(Program(halved, SQUARE))
    x = X * jnp.arange(ROWS)[:, None]  # the first is done at once
    assert_same(jax.jit(adapted)(base, trainable, x), adapted.f(adapted.merge(base, trainable), x))


def test_a_layer_may_be_chosen_in_64_bits() -> None:
    case = prepared(FACTORED["loop over layers"])
    with jax.enable_x64(True):
        assert_same(*both_ways(*case))


@pytest.mark.parametrize("name", ["by the outputs", "convolution"])
def test_on_every_device_the_update_stays_apart(name: str) -> None:
    """`shard_map` marks what differs from device to device; dropout is refused where that would need the sum."""
    program = FACTORED[name]
    adapted, base, trainable = prepared(program, dropout=0.1)
    rows = jax.P("x")

    def run(trainable: Any, key: Array | None) -> Array:
        return jax.shard_map(
            lambda x: adapted(base, trainable, x, lora_rng=key), mesh=MESH, in_specs=rows, out_specs=rows
        )(X)

    assert_same(jax.jit(run)(trainable, None), program.f(adapted.merge(base, trainable)["w"], X))
    key = jax.random.key(0)
    dropped = [
        jax.jit(jax.value_and_grad(lambda t, f=f: jnp.sin(f(t)).sum()))(trainable)
        for f in (partial(run, key=key), lambda t: adapted(base, t, X, lora_rng=key))
    ]
    assert_same(*dropped)


def test_arguments_may_have_any_name() -> None:
    adapted = adapt(LoRASpec(rank=RANK, rules="w"), lambda p, f, *, scope, base: f(scope @ p["w"] + base), {"w": W})
    trainable = adapted.start({"w": W})
    np.testing.assert_allclose(adapted({"w": W}, trainable, jnp.tanh, scope=X, base=1), jnp.tanh(X @ W + 1), rtol=1e-6)


def test_the_base_must_be_the_one_that_was_prepared() -> None:
    adapted, _, trainable = prepared(FACTORED["a product"])
    with pytest.raises(AdapterError, match=r"The base's 'w' has the shape \(6, 1\); LoRA was prepared for \(6, 8\)"):
        adapted.merge({"w": W[:, :1]}, trainable)


def test_an_adapters_folder_is_for_our_t5(tmp_path: Path) -> None:
    spec, f = LoRASpec(rank=RANK, rules="w"), FACTORED["a product"].f
    with pytest.raises(AdapterError, match=r"for the T5 that load_model gives.*got function\. Of any other.*orbax"):
        save_adapter(tmp_path / "a", f, {"w": W}, spec, {})  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


def test_a_base_of_eight_bits_has_fp32_factors() -> None:
    trainable, apply_fn, merge_fn = lora_init(
        LoRASpec(rank=RANK, rules="w"), lambda p, x: x @ p["w"].astype(x.dtype), {"w": W.astype(jnp.float8_e4m3fn)}
    )
    assert {part.dtype for part in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    merged = merge_fn(trainable)["w"].astype(jnp.float32)  # nothing is learnt yet, so nothing was rounded
    np.testing.assert_allclose(apply_fn(trainable, X), X @ merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STRETCHED)
def test_dora_stays_apart(name: str) -> None:
    assert_same(*both_ways(*prepared(FACTORED[name], use_dora=True)))


@pytest.mark.parametrize("operation", FALLBACKS)
def test_elsewhere_the_sum_is_formed_and_reported_once(operation: str) -> None:
    adapted, base, trainable = prepared(FALLBACKS[operation])
    with pytest.warns(UserWarning, match=f"LoRA on 'w': .* in \"?'?{operation}") as told:
        assert_same(jax.jit(adapted)(base, trainable, X), adapted.f(adapted.merge(base, trainable), X))
    assert [warning.filename for warning in told] == [__file__], "once, at the line that calls the function"
    assert formed(adapted, base, trainable), "and nothing more is reported"
