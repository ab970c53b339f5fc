"""From logits to tokens: the repetition penalty, temperature, top-k and top-p, and the draw itself.

The penalty is of Keskar et al. 2019, https://arxiv.org/abs/1909.05858; top-p of Holtzman et al. 2020,
https://arxiv.org/abs/1904.09751. Order and meanings are those of Transformers; the numbers behind the draws are those of the
PyTorch engine (`loralab.config.generation.uniforms`).

Shapes:  N rows   V vocabulary   L positions of the longest answer and the start token
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from loralab.config.generation import Decoding


def penalised(scores_NV: Array, written_NL: Array, length: Array, penalty: float) -> Array:
    """The scores, with those of the first `length` tokens written made smaller (for a penalty above 1), once each."""
    if penalty == 1.0:
        return scores_NV
    rows_N1, there_L = jnp.arange(len(scores_NV))[:, None], jnp.arange(written_NL.shape[1]) < length
    seen_NV = jnp.zeros(scores_NV.shape, bool).at[rows_N1, written_NL].max(there_L[None, :])
    return jnp.where(seen_NV, jnp.where(scores_NV < 0, scores_NV * penalty, scores_NV / penalty), scores_NV)


def sharpened(logits_NV: Array, decoding: Decoding) -> Array:
    """The logits after temperature, top-k and top-p; those of tokens that may not be drawn are -inf."""
    logits_NV = logits_NV / decoding.temperature
    if decoding.top_k is not None:
        smallest_N1 = lax.top_k(logits_NV, min(decoding.top_k, logits_NV.shape[-1]))[0][:, -1:]
        logits_NV = jnp.where(logits_NV < smallest_N1, -jnp.inf, logits_NV)
    if decoding.top_p is not None and decoding.top_p < 1:
        order_NV = jnp.argsort(logits_NV, axis=-1, descending=True)
        probabilities_NV = jax.nn.softmax(jnp.take_along_axis(logits_NV, order_NV, axis=-1), axis=-1)
        beyond_NV = jnp.cumsum(probabilities_NV, axis=-1) - probabilities_NV >= decoding.top_p
        beyond_NV = jnp.put_along_axis(jnp.zeros_like(beyond_NV), order_NV, beyond_NV, axis=-1, inplace=False)
        logits_NV = jnp.where(beyond_NV, -jnp.inf, logits_NV)
    return logits_NV


def draw(logits_NV: Array, uniform_N: Array) -> Array:
    """One token [N] of each row's softmax, by inverting its cumulated sum at numbers from (0, 1]."""
    cumulated_NV = jnp.cumsum(jax.nn.softmax(logits_NV, axis=-1), axis=-1)
    # The first whose sum reaches a number above zero: never one with a probability of zero, whatever is rounded.
    return (cumulated_NV < uniform_N[:, None] * cumulated_NV[:, -1:]).sum(-1)
