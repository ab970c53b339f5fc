"""Beam search with our T5: Transformers' scores and stopping rules (its version 5), in one compiled loop.

A hypothesis is scored by the sum of its tokens' log-probabilities; once it has ended, by that sum / length^penalty.
At each step the 2M best continuations of a source's M open hypotheses are looked at. Those among the first M that end
become finished ones, of which the M best are kept; the best M that go on stay open. Of equal scores the first comes first.

Shapes:  B sources   M beams   N = B·M   V vocabulary   L the longest answer and the start token
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from loralab.config.generation import Decoding
from loralab.on_jax.generation.sampling import penalised
from loralab.on_jax.models.t5 import T5
from loralab.on_jax.models.t5_decoding import Cache, next_logits, start
from loralab.on_jax.models.t5_layers import Params

NEVER = -1e9  # the score of what must not be chosen; Transformers' number, as sums with it may be compared


class Beams(NamedTuple):
    """The open and the finished hypotheses of each source of a batch, each best first."""

    length: Array
    written_BML: Array
    scores_BM: Array
    finished_BML: Array
    finished_scores_BM: Array
    is_finished_BM: Array
    ended_B: Array
    """Whose best finished hypothesis stands: what is finished does not change any more."""
    cache: Cache


@partial(jax.jit, static_argnames=("model", "decoding"))
def beam_search(model: T5, params: Params, input_ids: Array, attention_mask: Array, decoding: Decoding) -> Array:
    """The best finished hypothesis of each source, [B, max_new_tokens], the end token after the last of its own.

    Args:
        input_ids, attention_mask: [B, S], padded on the right; a row that is nothing but padding is not answered.
    """
    source, cache = start(model, params, input_ids, attention_mask, decoding.max_new_tokens, decoding.beams)
    end, first = model.config.eos_token_id, model.config.decoder_start_token_id

    def going(state: Beams) -> Array:
        return ~state.ended_B.all()

    def extend(state: Beams) -> Beams:
        last_N = state.written_BML[:, :, state.length].reshape(-1)
        logits_NV, cache = next_logits(model, params, last_N, source, state.cache)
        return extended(state._replace(cache=cache), logits_NV, end, decoding)

    begun = beginning(input_ids, ~attention_mask.any(1), cache, first, end, decoding)
    return lax.while_loop(going, extend, begun).finished_BML[:, 0, 1:]


def beginning(input_ids: Array, ended_B: Array, cache: Cache, first: int, end: int, decoding: Decoding) -> Beams:
    shape = (len(input_ids), decoding.beams)
    written_BML = jnp.full((*shape, decoding.max_new_tokens + 1), end, input_ids.dtype).at[:, :, 0].set(first)
    never_BM, nothing_BM = jnp.full(shape, NEVER), jnp.zeros(shape, bool)
    scores_BM = never_BM.at[:, 0].set(0.0)  # all begin alike: only the first has continuations of worth
    return Beams(jnp.int32(0), written_BML, scores_BM, written_BML, never_BM, nothing_BM, ended_B, cache)


def extended(state: Beams, logits_NV: Array, end: int, decoding: Decoding) -> Beams:
    """All hypotheses gone on by one token."""
    sources, beams = state.scores_BM.shape
    vocabulary, length = logits_NV.shape[-1], state.length + 1
    so_far_NL = state.written_BML.reshape(sources * beams, -1)
    log_p_NV = penalised(jax.nn.log_softmax(logits_NV), so_far_NL, length, decoding.repetition_penalty)
    totals_BC = (log_p_NV.reshape(sources, beams, -1) + state.scores_BM[:, :, None]).reshape(sources, -1)
    scores_BC, places_BC = lax.top_k(totals_BC, 2 * beams)  # C = 2M candidates
    parents_BC, tokens_BC = places_BC // vocabulary, places_BC % vocabulary
    written_BCL = pick(state.written_BML, parents_BC)
    written_BCL = written_BCL.at[:, :, length].set(tokens_BC.astype(written_BCL.dtype))
    ends_BC = (tokens_BC == end) | (length == decoding.max_new_tokens)
    state = finish(state._replace(length=length), written_BCL, scores_BC, ends_BC, decoding)
    scores_BM, chosen_BM = lax.top_k(scores_BC + NEVER * ends_BC, beams)
    continued_BM = jnp.arange(sources)[:, None] * beams + pick(parents_BC, chosen_BM)
    state = state._replace(
        written_BML=pick(written_BCL, chosen_BM),
        scores_BM=scores_BM,
        cache=state.cache.reorder(continued_BM.reshape(-1)),
    )
    return state._replace(ended_B=state.ended_B | has_ended(state, decoding))


def finish(state: Beams, written_BCL: Array, scores_BC: Array, ends_BC: Array, decoding: Decoding) -> Beams:
    """Takes up the candidates that end where they are better than the finished ones, for each source that has not ended."""
    just_BC = ends_BC & (jnp.arange(scores_BC.shape[1]) < decoding.beams)
    scores_BC = scores_BC / power(state.length, decoding) + NEVER * ~just_BC
    best_BM, chosen_BM = lax.top_k(jnp.concatenate([state.finished_scores_BM, scores_BC], 1), decoding.beams)
    better_BML = pick(jnp.concatenate([state.finished_BML, written_BCL], 1), chosen_BM)
    are_BM = pick(jnp.concatenate([state.is_finished_BM, just_BC], 1), chosen_BM)
    stands_B1 = state.ended_B[:, None]
    return state._replace(
        finished_BML=jnp.where(stands_B1[:, :, None], state.finished_BML, better_BML),
        finished_scores_BM=jnp.where(stands_B1, state.finished_scores_BM, best_BM),
        is_finished_BM=jnp.where(stands_B1, state.is_finished_BM, are_BM),
    )


def has_ended(state: Beams, decoding: Decoding) -> Array:
    """[B]: whose best finished hypothesis stands."""
    at_limit = state.length == decoding.max_new_tokens
    if decoding.early_stopping is True:
        return at_limit | state.is_finished_BM.all(1) | ~may_improve(state, state.length, decoding)
    longer_is_better = decoding.early_stopping == "never" and decoding.length_penalty > 0
    length = jnp.int32(decoding.max_new_tokens) if longer_is_better else state.length
    return at_limit | ~may_improve(state, length, decoding)


def may_improve(state: Beams, length: Array, decoding: Decoding) -> Array:
    """[B]: whether the best open hypothesis, ended at this length without further loss, would beat the worst finished one."""
    worst_B = jnp.where(state.is_finished_BM.all(1), state.finished_scores_BM.min(1), NEVER)
    return state.scores_BM[:, 0] / power(length, decoding) > worst_B


def power(length: Array, decoding: Decoding) -> Array:
    return length.astype(jnp.float32) ** decoding.length_penalty


def pick(values: Array, places: Array) -> Array:
    """Returns the entries of [B, X, ...] at the places [B, Y]: [B, Y, ...]."""
    return values[jnp.arange(len(values))[:, None], places]
