"""Writing with our T5: greedy or by draws, a batch at a time. beam.py searches.

The source is read once. A row that has ended leaves the batch, together with others: each leaving copies the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loralab.decoding import Decoding
from loralab.on_torch.models.t5 import T5
from loralab.on_torch.models.t5_decoding import next_logits, start
from loralab.on_torch.sampling import Draws, penalised

LEAVING = 8  # one in so many rows of a batch must have ended before they leave


@torch.inference_mode()
def decode(
    model: T5,
    input_ids: Tensor,
    attention_mask: Tensor,
    decoding: Decoding,
    rows: Sequence[int],
    on_token: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Answers to a batch, as ids without the end token.

    Args:
        input_ids, attention_mask: [B, S], padded on the right.
        rows: the places of these sources in the whole call, of which their draws are made.
        on_token: hears each token as it is written; for a batch of one.
    """
    end = model.config.eos_token_id
    cache = start(model, input_ids, attention_mask, decoding.max_new_tokens)
    draws = Draws(decoding, rows) if decoding.sample else None
    written = input_ids.new_full((len(input_ids), decoding.max_new_tokens + 1), end)
    written[:, 0] = model.config.decoder_start_token_id
    open_rows = torch.arange(len(input_ids), device=input_ids.device)
    ended = torch.zeros_like(open_rows, dtype=torch.bool)
    for step in range(decoding.max_new_tokens):
        logits = next_logits(model, written[open_rows, step], cache)
        logits = penalised(logits, written[open_rows, : step + 1], decoding.repetition_penalty)
        tokens = logits.argmax(-1) if draws is None else draws(logits, open_rows, step)
        written[open_rows, step + 1] = tokens.masked_fill(ended, end)
        ended |= tokens == end
        if (count := int(ended.sum())) == len(ended):
            break
        if on_token is not None:
            on_token(int(tokens[0]))
        if count * LEAVING >= len(ended):
            cache.keep(~ended)
            open_rows, ended = open_rows[~ended], ended[~ended]
    return [until(row, (end,)) for row in written[:, 1:].tolist()]


def until(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends a text."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])
