"""T5 a token at a time: what the decoder remembers between tokens, and one step of it.

A source may have several hypotheses (beams). Its keys and values stay single: in cross-attention the hypotheses are
further queries of one source, [B, H, M, E] against [B, H, S, E]. Only the decoder's own keys and values are per
hypothesis. They have room for the longest answer from the start, so that every step has the same shapes.

Shapes:  B sources   M hypotheses of each   N = B·M, all of them   L positions, of the longest answer   the rest as in models/t5.py
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from loralab.on_jax.models.t5 import T5, head, layers
from loralab.on_jax.models.t5_layers import (
    Dropout,
    Params,
    attend,
    cross_attention_layer,
    feed_forward_layer,
    keys_values,
    queries,
    rms_norm,
)

KEEP_ALL = Dropout(0.0, None)
Pairs = list[tuple[Array, Array]]


class Source(NamedTuple):
    """Arrays that every step reads and none changes."""

    cross: Pairs
    """For each block the source's keys and values, [B, H, S, E]."""
    cross_bias_B11S: Array | None
    bias_1HLL: Array
    """The decoder's position biases, with the future hidden: in the cache, that is the room not yet used."""
    head_DV: Array


class Cache(NamedTuple):
    """KV cache of the decoder."""

    own: Pairs
    """For each block its own keys and values, [N, H, L, E]."""
    length: Array

    def reorder(self, hypotheses_N: Array) -> Cache:
        """Puts at each place the hypothesis of this number."""
        return Cache([(k[hypotheses_N], v[hypotheses_N]) for k, v in self.own], self.length)


def start(
    model: T5, params: Params, input_ids: Array, attention_mask: Array, max_length: int, beams: int = 1
) -> tuple[Source, Cache]:
    """Reads the source once; from there up to `max_length` tokens can be generated."""
    encoded_BSD, bias_B11S = model.encode(params, input_ids, attention_mask)
    heads = model.config.num_heads
    cross = [keys_values(cross["EncDecAttention"], encoded_BSD, heads) for _, cross, _ in layers(params["decoder"])]
    bias_1HLL = model.causal_bias(params["decoder"], max_length)
    room = jnp.zeros((len(input_ids) * beams, heads, max_length, model.config.d_kv), encoded_BSD.dtype)
    source = Source(cross, bias_B11S, bias_1HLL, lax.optimization_barrier(head(params)))
    return source, Cache([(room, room) for _ in cross], jnp.int32(0))


def next_logits(model: T5, params: Params, tokens_N: Array, source: Source, cache: Cache) -> tuple[Array, Cache]:
    """Logits [N, V] in fp32 of the token after these, and the cache with them."""
    config, stack = model.config, params["decoder"]
    bias_1H1L = lax.dynamic_slice_in_dim(source.bias_1HLL, cache.length, 1, axis=2)
    x_N1D, own = params["shared"]["embedding"][tokens_N][:, None], []
    blocks = zip(layers(stack), source.cross, cache.own, strict=True)
    for (self_attention, cross_attention, feed_forward), k_v_BHSE, k_v_NHLE in blocks:
        normed_N1D = rms_norm(self_attention["layer_norm"], x_N1D, config.layer_norm_epsilon)
        attention = self_attention["SelfAttention"]
        new = keys_values(attention, normed_N1D, config.num_heads)
        k_NHLE, v_NHLE = (
            lax.dynamic_update_slice_in_dim(old, one, cache.length, axis=2)
            for old, one in zip(k_v_NHLE, new, strict=True)
        )
        own.append((k_NHLE, v_NHLE))
        q_NH1E = queries(attention, normed_N1D, config.num_heads)
        x_N1D = x_N1D + attend(attention, q_NH1E, k_NHLE, v_NHLE, bias_1H1L, KEEP_ALL)
        x_BMD = x_N1D.reshape(len(k_v_BHSE[0]), -1, x_N1D.shape[-1])
        x_BMD = x_BMD + cross_attention_layer(
            cross_attention, x_BMD, k_v_BHSE, source.cross_bias_B11S, config, KEEP_ALL
        )
        x_N1D = x_BMD.reshape(x_N1D.shape)
        x_N1D = x_N1D + feed_forward_layer(feed_forward, x_N1D, config, KEEP_ALL)
    states_ND = rms_norm(stack["final_layer_norm"], x_N1D, config.layer_norm_epsilon)[:, 0]
    return model.logits_of(states_ND, source.head_DV).astype(jnp.float32), Cache(own, cache.length + 1)
