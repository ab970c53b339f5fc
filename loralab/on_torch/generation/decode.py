"""Writing with modules of loralab's own: greedy or by draws, a batch at a time. beam_search.py searches.

The source is read once. A row that has ended leaves the batch, together with others: each leaving copies the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from loralab.config.generation import Decoding, until
from loralab.data.stop_sequences import Stops
from loralab.on_torch.generation.sampling import Draws, penalised

LEAVING = 8  # one in so many rows of a batch must have ended before they leave


class DecoderState(Protocol):
    """Decoding state of a batch of B sources between tokens, each with M hypotheses: N = B · M of them.

    `context`: [B, C], what counts as written before the first token: a start token, or the prompt. The first step is
    given the last of it.
    """

    context: Tensor

    def next_logits(self, tokens_N: Tensor) -> Tensor:
        """Logits [N, V] in fp32 of the token after these, which are remembered."""

    def keep(self, sources: Tensor) -> None:
        """Drops every source but these, with all its hypotheses."""

    def reorder(self, hypotheses: Tensor) -> None:
        """Puts at each place the hypothesis of this number, [N]; they are of the same source."""

    def grow(self, tokens: int) -> object:
        """Becomes as large as if so many tokens had been written, without their numbers: a plan's way to the last token.

        Returns:
            What a layer holds besides while it makes room, for the caller to keep until that token is written; None where it needs none.
        """


@torch.inference_mode()
def decode(
    memory: DecoderState,
    ends: Sequence[int],
    decoding: Decoding,
    rows: Sequence[int],
    on_token: Callable[[int], None] | None = None,
    stops: Stops | None = None,
) -> list[list[int]]:
    """Answers to a batch, as ids without the end token.

    Args:
        memory: of the sources, which have been read.
        ends: tokens that end a text.
        rows: the places of these sources in the whole call, of which their draws are made.
        on_token: hears each token as it is written; for a batch of one.
        stops: texts with which an answer ends too; it keeps the token that completes one.
    """
    count, begun, device = *memory.context.shape, memory.context.device
    end, all_ends = ends[0], torch.tensor(ends, device=device)
    draws = Draws(decoding, rows) if decoding.sample else None
    room = memory.context.new_full((count, decoding.max_new_tokens), end)
    written = torch.cat([memory.context, room], 1)
    open_rows = torch.arange(count, device=device)
    ended = torch.zeros_like(open_rows, dtype=torch.bool)
    for step in range(decoding.max_new_tokens):
        place = begun + step
        logits = memory.next_logits(written[open_rows, place - 1])
        logits = penalised(logits, written[open_rows, :place], decoding.repetition_penalty)
        tokens = likeliest(logits) if draws is None else draws(logits, open_rows, step)
        written[open_rows, place] = tokens.masked_fill(ended, end)
        ended |= torch.isin(tokens, all_ends)
        if on_token is not None and not ended[0]:
            on_token(int(tokens[0]))
        if stops is not None:
            tails = written[open_rows, max(begun, place + 1 - stops.window) : place + 1]
            ended |= torch.tensor(stops.met(tails.tolist()), device=ended.device)
        if (count := int(ended.sum())) == len(ended):
            break
        if count * LEAVING >= len(ended):
            memory.keep(~ended)
            open_rows, ended = open_rows[~ended], ended[~ended]
    return [until(row, ends) for row in written[:, begun:].tolist()]


def likeliest(logits_NV: Tensor) -> Tensor:
    """The first of the likeliest tokens, [N]. On a CPU by NumPy, which takes a tenth of PyTorch's time."""
    return torch.from_numpy(logits_NV.numpy().argmax(-1)) if logits_NV.device.type == "cpu" else logits_NV.argmax(-1)
