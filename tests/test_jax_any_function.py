"""LoRA inside any JAX function: the same as with plain weights W + BA, which are never formed where it multiplies."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax_programs import FACTORED, FALLBACKS, INPUTS, RANK, ROWS, STRETCHED, Program, moved, products, random

from loralab import LoRASpec
from loralab.on_jax import adapt
from loralab.on_jax.lora import Adapted

X = random(50, ROWS, INPUTS)


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


@pytest.mark.parametrize("name", STRETCHED)
def test_dora_stays_apart(name: str) -> None:
    assert_same(*both_ways(*prepared(FACTORED[name], use_dora=True)))


@pytest.mark.parametrize("operation", FALLBACKS)
def test_elsewhere_the_sum_is_formed_and_reported_once(operation: str) -> None:
    adapted, base, trainable = prepared(FALLBACKS[operation])
    with pytest.warns(UserWarning, match=f"LoRA on 'w': .* in \"?'?{operation}") as told:
        assert_same(jax.jit(adapted)(base, trainable, X), adapted.f(adapted.merge(base, trainable), X))
    assert len(told) == 1
    assert formed(adapted, base, trainable), "and nothing more is reported"
