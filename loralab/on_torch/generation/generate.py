"""Writing text: sources are sorted into batches of like length; each is answered as the model's family writes.

Modules of loralab's own write by decode.py and beam_search.py, classes of Transformers' by their own `generate`
(transformers_generate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from loralab.config.generation import TOKENS_PER_BATCH, Decoding, decoding_of, refuse_one_text
from loralab.data.stop_sequences import Stops, truncate_at_stop
from loralab.errors import UserError
from loralab.on_torch.models.registry import family_of
from loralab.on_torch.ops.onednn_linear import prepacked_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate_ids(
    model: nn.Module,
    sources: Sequence[Sequence[int]],
    decoding: Decoding,
    pad_id: int,
    on_done: Callable[[int], None] | None = None,
    on_token: Callable[[int], None] | None = None,
    stops: Stops | None = None,
) -> list[list[int]]:
    """Answers to encoded sources, in their order.

    Args:
        on_done: hears how many sources are done.
        on_token: hears each token as it is written; for a single source, and no beam search.
        stops: texts with which an answer ends; it keeps the token that completes one.
    """
    assert on_token is None or (len(sources) == 1 and decoding.beams == 1)
    family = family_of(model)
    check_generation_length(family.generation_limit(model), sources, decoding)
    was_training = model.training
    model.eval()
    answers: list[list[int]] = [[] for _ in sources]

    def write(rows: Sequence[int]) -> list[list[int]]:
        batch, device = [sources[row] for row in rows], next(model.parameters()).device
        ids, mask = pad(batch, pad_id, device, "left" if family.causal else "right")
        return family.write(model, ids, mask, decoding, rows, on_token, stops)

    order = sorted(range(len(sources)), key=lambda row: len(sources[row]), reverse=True)
    with prepacked_weights(model):
        while order:
            room = len(sources[order[0]]) + decoding.beams * decoding.max_new_tokens
            count = max(1, TOKENS_PER_BATCH // room)
            rows, order = order[:count], order[count:]
            for row, tokens in zip(rows, write(rows), strict=True):
                answers[row] = tokens
            if on_done is not None:
                on_done(len(sources) - len(order))
    model.train(was_training)
    return answers


def check_generation_length(positions: int | None, sources: Sequence[Sequence[int]], decoding: Decoding) -> None:
    """Raises UserError where a source has no tokens, or a source and its answer may need more positions than there are.

    Args:
        positions: of the model; None where there is no bound.
    """
    for number, source in enumerate(sources, 1):
        if not source:
            raise UserError(f"Text number {number} has no tokens: there is nothing to go on from. Give a word or more.")
    if positions is None:
        return
    longest = max(range(len(sources)), key=lambda row: len(sources[row]), default=None)
    new = decoding.max_new_tokens
    if longest is not None and len(sources[longest]) + new > positions:
        length = len(sources[longest])
        raise UserError(
            f"Text number {longest + 1} has {length} tokens, and with max_new_tokens {new} that is {length + new}: more than the "
            f"{positions} positions of this model. Shorten the text, or lower max_new_tokens."
        )


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, S], padded to the longest row."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def generate(
    model: nn.Module,
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
    """The model's answers to these texts, in their order; of a model that is no encoder-decoder, what it adds to them.

    Args:
        texts: what the model reads, prompt included.
        max_new_tokens: the longest answer, in tokens.
        beams: hypotheses of a beam search; 1 is greedy, or draws with `sample`.
        length_penalty, early_stopping: of a beam search, as in Transformers.
        sample: draw each token, from logits divided by `temperature`, from the `top_k` likeliest tokens or the fewest
            whose probabilities reach `top_p`.
        repetition_penalty: above 1 makes tokens that were written already less likely.
        stop: texts with which an answer ends; it is cut before the first of them.
        seed: of the draws. The same seed gives the same answers; each text has draws of its own.

    Raises:
        UserError: a setting is out of its bounds, or means nothing with the others.
    """
    decoding = decoding_of(locals())
    refuse_one_text(texts)
    sources = [tokenizer(text).input_ids or _start(text, tokenizer) for text in texts]
    stops = Stops(tokenizer, decoding.stop) if decoding.stop else None
    answers = generate_ids(model, sources, decoding, tokenizer.pad_token_id or 0, stops=stops)
    written = tokenizer.batch_decode(answers, skip_special_tokens=True) if answers else []
    return [truncate_at_stop(str(text), decoding.stop) for text in written]


def _start(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns what stands for a text of no tokens: the token that begins a text, or else the one that ends it, as in GPT-2's training."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return [token]
    raise UserError(
        f"The text {text!r} has no tokens, and the tokenizer has none to begin a text with. Give a text of a word or more."
    )
