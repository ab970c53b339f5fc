"""Writing with our T5: greedy or by draws, a batch at a time, in one compiled loop. beam_search.py searches."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from loralab.config.generation import Decoding
from loralab.on_jax.generation.sampling import draw, penalised, sharpened
from loralab.on_jax.models.t5 import T5
from loralab.on_jax.models.t5_decoding import Cache, next_logits, start
from loralab.on_jax.models.t5_layers import Params


class Written(NamedTuple):
    """State of the generation loop."""

    step: Array
    tokens_BL: Array
    """The start token, then the answers so far, then ends."""
    ended_B: Array
    cache: Cache


@partial(jax.jit, static_argnames=("model", "decoding"))
def decode(
    model: T5, params: Params, input_ids: Array, attention_mask: Array, decoding: Decoding, uniforms_BL: Array | None
) -> Array:
    """Answers to a batch, [B, max_new_tokens], the end token after the last of their own.

    Args:
        input_ids, attention_mask: [B, S], padded on the right; a row that is nothing but padding is not answered.
        uniforms_BL: the number behind each row's draw at each step, where `decoding.sample` says so.
    """
    end, steps, penalty = model.config.eos_token_id, decoding.max_new_tokens, decoding.repetition_penalty
    source, cache = start(model, params, input_ids, attention_mask, steps)
    tokens_BL = jnp.full((len(input_ids), steps + 1), end, input_ids.dtype)
    tokens_BL = tokens_BL.at[:, 0].set(model.config.decoder_start_token_id)

    def going(state: Written) -> Array:
        return (state.step < steps) & ~state.ended_B.all()

    def write(state: Written) -> Written:
        logits_BV, cache = next_logits(model, params, state.tokens_BL[:, state.step], source, state.cache)
        logits_BV = penalised(logits_BV, state.tokens_BL, state.step + 1, penalty)
        if uniforms_BL is None:
            new_B = logits_BV.argmax(-1)
        else:
            new_B = draw(sharpened(logits_BV, decoding), uniforms_BL[:, state.step])
        new_B = jnp.where(state.ended_B, end, new_B).astype(state.tokens_BL.dtype)
        tokens_BL = state.tokens_BL.at[:, state.step + 1].set(new_B)
        return Written(state.step + 1, tokens_BL, state.ended_B | (new_B == end), cache)

    done = lax.while_loop(going, write, Written(jnp.int32(0), tokens_BL, ~attention_mask.any(1), cache))
    return done.tokens_BL[:, 1:]
