"""LoRA for any JAX function: values and gradients against the NumPy oracle, and what it costs, counted in the program."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loralab import LoRASpec
from loralab.errors import MissingExtra
from loralab.on_jax import lora_init

INPUTS, HIDDEN, OUTPUTS, ROWS = 6, 8, 4, 5


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def two_layers(params: Any, x: jax.Array) -> jax.Array:
    """A kernel as Flax stores it, and a weight as PyTorch does."""
    hidden = jnp.tanh(x @ params["one"]["kernel"])
    return hidden @ params["two"]["weight"].T + params["two"]["bias"]


PARAMS = {
    "one": {"kernel": random(0, INPUTS, HIDDEN)},
    "two": {"weight": random(1, OUTPUTS, HIDDEN), "bias": random(2, OUTPUTS)},
}


def trained(trainable: Any, seed: int = 9) -> Any:
    """As if something had been learnt: every number moved."""
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, moved)


def test_without_jax_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "loralab.on_jax")
    with pytest.raises(MissingExtra, match=r"jax is not installed.*pip install 'loralab\[jax\]'"):
        importlib.import_module("loralab.on_jax")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_it_begins_as_the_base_and_merges_to_what_it_computes(settings: dict[str, Any]) -> None:
    x = random(3, ROWS, INPUTS)
    spec = LoRASpec(rank=2, alpha=3, rules=["one", "two"], **settings)
    trainable, apply_fn, merge_fn = lora_init(spec, two_layers, PARAMS)
    np.testing.assert_allclose(apply_fn(trainable, x), two_layers(PARAMS, x), rtol=1e-5, atol=1e-5)
    trainable = trained(trainable)
    np.testing.assert_allclose(apply_fn(trainable, x), two_layers(merge_fn(trainable), x), rtol=1e-5, atol=1e-5)
