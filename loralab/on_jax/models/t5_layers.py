"""The layers of T5 as functions of their weights: norm, attention, feed-forward; and the buckets of its relative positions.

Each takes its own part of the dictionary of weights. Every product with a matrix is a plain `x @ kernel`, so that LoRA finds
it. The three functions at the end return what is added to the stream. Shapes as in models/t5.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from loralab.models.t5 import T5Config
from loralab.on_jax.ops.dropout import Masks

Params = Mapping[str, Any]
HIDDEN = float(np.finfo(np.float32).min)  # the bias of what must not be looked at


class Dropout:
    """Drops elements while there is a key; each call draws anew."""

    def __init__(self, rate: float, key: Array | None) -> None:
        self.rate = rate
        self.masks = None if key is None or not rate else Masks(rate, shared=False, key=key)

    def __call__(self, x: Array) -> Array:
        return x if self.masks is None else self.masks.drop(x) / (1 - self.rate)


def rms_norm(params: Params, x_D: Array, epsilon: float) -> Array:
    """x / rms(x) · weight, statistics in fp32 or better."""
    wide_D = x_D.astype(jnp.promote_types(x_D.dtype, jnp.float32))
    normed_D = wide_D * jax.lax.rsqrt(jnp.square(wide_D).mean(-1, keepdims=True) + epsilon)
    return params["weight"].astype(x_D.dtype) * normed_D.astype(x_D.dtype)


# Attention, without the 1/√E scale: T5's initialisation absorbs it.


def queries(params: Params, x_BQD: Array, heads: int) -> Array:
    """[B, H, Q, E]"""
    return split_heads(x_BQD @ params["q"]["kernel"], heads)


def keys_values(params: Params, x_BKD: Array, heads: int) -> tuple[Array, Array]:
    """[B, H, K, E] each"""
    return split_heads(x_BKD @ params["k"]["kernel"], heads), split_heads(x_BKD @ params["v"]["kernel"], heads)


def split_heads(x_BQI: Array, heads: int) -> Array:
    return x_BQI.reshape(*x_BQI.shape[:2], heads, -1).swapaxes(1, 2)


def attend(
    params: Params, q_BHQE: Array, k_BHKE: Array, v_BHKE: Array, bias_BHQK: Array | None, dropout: Dropout
) -> Array:
    """softmax(q kᵀ + bias) v, then the output's product; [B, Q, D]. Scores and softmax in fp32 or better."""
    dtype = jnp.promote_types(q_BHQE.dtype, jnp.float32)
    scores_BHQK = jnp.einsum("bhqe,bhke->bhqk", q_BHQE, k_BHKE, preferred_element_type=dtype)
    if bias_BHQK is not None:
        scores_BHQK = scores_BHQK + bias_BHQK
    weights_BHQK = dropout(jax.nn.softmax(scores_BHQK, axis=-1).astype(v_BHKE.dtype))
    mixed_BHQE = jnp.einsum("bhqk,bhke->bhqe", weights_BHQK, v_BHKE)
    mixed_BQHE = mixed_BHQE.swapaxes(1, 2)
    return mixed_BQHE.reshape(*mixed_BQHE.shape[:2], -1) @ params["o"]["kernel"]


def feed_forward(params: Params, x_BQD: Array, config: T5Config, dropout: Dropout) -> Array:
    """v1.0: relu(x wi) wo. v1.1 and FLAN: (gelu(x wi_0) · x wi_1) wo."""
    if config.gated:
        gate_BQF = jax.nn.gelu(x_BQD @ params["wi_0"]["kernel"], approximate=True)
        hidden_BQF = gate_BQF * (x_BQD @ params["wi_1"]["kernel"])
    else:
        hidden_BQF = jax.nn.relu(x_BQD @ params["wi"]["kernel"])
    return dropout(hidden_BQF) @ params["wo"]["kernel"]


# The layers of a block, each behind its norm.


def self_attention_layer(params: Params, x_BQD: Array, bias_BHQQ: Array, config: T5Config, dropout: Dropout) -> Array:
    attention, normed_BQD = params["SelfAttention"], rms_norm(params["layer_norm"], x_BQD, config.layer_norm_epsilon)
    q_BHQE = queries(attention, normed_BQD, config.num_heads)
    k_BHQE, v_BHQE = keys_values(attention, normed_BQD, config.num_heads)
    return attend(attention, q_BHQE, k_BHQE, v_BHQE, bias_BHQQ, dropout)


def cross_attention_layer(
    params: Params,
    x_BTD: Array,
    k_v_BHSE: tuple[Array, Array],
    bias_B11S: Array | None,
    config: T5Config,
    dropout: Dropout,
) -> Array:
    """From the target to the encoded source, whose keys and values the caller computes once."""
    normed_BTD = rms_norm(params["layer_norm"], x_BTD, config.layer_norm_epsilon)
    q_BHTE = queries(params["EncDecAttention"], normed_BTD, config.num_heads)
    return attend(params["EncDecAttention"], q_BHTE, *k_v_BHSE, bias_B11S, dropout)


def feed_forward_layer(params: Params, x_BQD: Array, config: T5Config, dropout: Dropout) -> Array:
    normed_BQD = rms_norm(params["layer_norm"], x_BQD, config.layer_norm_epsilon)
    return feed_forward(params["DenseReluDense"], normed_BQD, config, dropout)


def relative_buckets(distance: np.ndarray, bidirectional: bool, config: T5Config) -> np.ndarray:
    """The bucket of each signed distance (key − query): exact when near, logarithmic when far, one for all beyond the maximum.

    In NumPy, as positions are known when a program is compiled: no device rounds a logarithm its own way into another bucket.
    """
    buckets = config.relative_attention_num_buckets
    offset = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(-distance, 0)
    exact = buckets // 2
    spread = math.log(config.relative_attention_max_distance / exact)
    steps = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(spread) * (buckets - exact)
    far = exact + steps.astype(distance.dtype)
    return offset + np.where(distance < exact, distance, np.minimum(far, buckets - 1))
