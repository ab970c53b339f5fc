"""Writing text with our T5: sources are sorted by length and padded to a few sizes, so that few programs are compiled.

A batch's source length is a power of two, its rows are as many as fit, a power of two again; what is left over at the end
goes into the next smaller powers. So no more shapes occur than there are lengths, and then one for each halving of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from loralab.config.generation import TOKENS_PER_BATCH, Decoding, decoding_of, refuse_one_text, uniforms, until
from loralab.data.stop_sequences import truncate_at_stop
from loralab.errors import UserError
from loralab.on_jax.generation.beam_search import beam_search
from loralab.on_jax.generation.decode import decode
from loralab.on_jax.models.t5 import T5
from loralab.on_jax.models.t5_layers import Params
from loralab.on_jax.names import check_params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORTEST = 32  # the smallest length that sources are padded to


def generate_ids(
    model: T5,
    params: Params,
    sources: Sequence[Sequence[int]],
    decoding: Decoding,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Answers to encoded sources, in their order, without the end token.

    Args:
        params: plain weights; of an adapted model those that `merge_fn` gives.
        on_done: hears how many sources are done.
    """
    answers: list[list[int]] = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda row: len(sources[row]), reverse=True)
    while order:
        size, length = batch_shape(len(order), len(sources[order[0]]), decoding)
        rows, order = order[:size], order[size:]
        tokens_BL = _answer(model, params, *pad([sources[row] for row in rows], size, length), decoding, rows)
        for row, tokens in zip(rows, tokens_BL.tolist(), strict=False):  # the rest is padding
            answers[row] = until(tokens, (model.config.eos_token_id,))
        if on_done is not None:
            on_done(len(sources) - len(order))
    return answers


def batch_shape(rows: int, longest: int, decoding: Decoding) -> tuple[int, int]:
    """Counts how many rows the next batch has room for, and how long its sources are, when so many are left and the first is so long."""
    length = max(SHORTEST, power_of_two(longest))
    most = max(1, TOKENS_PER_BATCH // (length + decoding.beams * decoding.max_new_tokens))
    return min(power_of_two(most + 1) // 2, power_of_two(rows)), length


def power_of_two(number: int) -> int:
    """The smallest that is no less."""
    return 1 << (number - 1).bit_length()


def pad(rows: Sequence[Sequence[int]], size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [size, length], zeros where there is nothing."""
    ids, mask = np.zeros((2, size, length), np.int32)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    return ids, mask


def _answer(
    model: T5, params: Params, ids: np.ndarray, mask: np.ndarray, decoding: Decoding, rows: Sequence[int]
) -> np.ndarray:
    """Answers to one batch, [B, L]."""
    program = decoding.model_copy(update={"seed": 0})  # the draws' numbers are an argument: a new seed compiles nothing
    if decoding.beams > 1:
        return np.asarray(beam_search(model, params, ids, mask, program))
    numbers = None
    if decoding.sample:
        numbers = np.ones((len(ids), decoding.max_new_tokens), np.float32)
        numbers[: len(rows)] = uniforms(decoding.seed, rows, decoding.max_new_tokens)
    return np.asarray(decode(model, params, ids, mask, program, numbers))


def generate(
    model: T5,
    params: Params,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: Literal[False, True, "never"] = False,
    sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 42,
) -> list[str]:
    """The model's answers to these texts, in their order. The settings are those of `loralab.generate`.

    Raises:
        UserError: a setting is out of its bounds, or means nothing with the others; there are stop texts and beams; params are no
            weights of a T5.
    """
    decoding = decoding_of(locals())
    refuse_one_text(texts)
    check_params(params)
    if decoding.stop and decoding.beams > 1:
        raise UserError(
            f"stop is {list(decoding.stop)} and beams is {beams}: in JAX no hypothesis ends with a text. Set beams to 1."
        )
    answers = generate_ids(model, params, [tokenizer(text).input_ids for text in texts], decoding)
    written = tokenizer.batch_decode(answers, skip_special_tokens=True) if answers else []
    return [truncate_at_stop(str(text), decoding.stop) for text in written]
