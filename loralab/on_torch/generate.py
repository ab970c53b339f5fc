"""Writing text: greedy decoding with a cache, in batches of like length.

The source is read once per row; its cross-attention keys and values are computed once. A row that has ended leaves the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loralab.errors import ModelError
from loralab.on_torch.models.t5 import T5

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Answer = Callable[[Any, Tensor, Tensor, int], list[list[int]]]

TOKENS_PER_BATCH = 16384  # padded source tokens that are generated from at once


@torch.inference_mode()
def greedy(model: T5, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> list[list[int]]:
    """The most likely next token, again and again, until the end token or `max_new_tokens` of them; ids without the end token.

    Args:
        input_ids, attention_mask: [B, S], padded on the right.
    """
    cache = model.start(input_ids, attention_mask, max_new_tokens)
    answers: list[list[int]] = [[] for _ in input_ids]
    rows = torch.arange(len(input_ids), device=input_ids.device)
    tokens = input_ids.new_full((len(input_ids),), model.config.decoder_start_token_id)
    for _ in range(max_new_tokens):
        tokens = model.next_logits(tokens, cache).argmax(-1)
        going = tokens != model.config.eos_token_id
        if not bool(going.all()):
            rows, tokens = rows[going], tokens[going]
            if not len(rows):
                break
            cache.keep(going)
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            answers[row].append(token)
    return answers


@torch.inference_mode()
def transformers_greedy(model: Any, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> list[list[int]]:
    """The same for an encoder-decoder of Transformers', by its own `generate`."""
    if not model.config.is_encoder_decoder:
        raise ModelError(f"Generation is there for encoder-decoder models so far; a {type(model).__name__} is none.")
    output = model.generate(
        input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
    )
    ends = {model.config.eos_token_id, model.config.pad_token_id}
    return [[token for token in row[1:].tolist() if token not in ends] for row in output]


def generate_ids(
    model: nn.Module,
    sources: Sequence[Sequence[int]],
    max_new_tokens: int,
    pad_id: int,
    on_done: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Greedy answers to encoded sources, in their order; the batches are of sources of like length. `on_done` hears how many are done."""
    answer: Answer = greedy if isinstance(model, T5) else transformers_greedy
    was_training = model.training
    model.eval()
    answers: list[list[int]] = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda row: len(sources[row]), reverse=True)
    while order:
        count = max(1, TOKENS_PER_BATCH // max(1, len(sources[order[0]])))
        rows, order = order[:count], order[count:]
        ids, mask = pad([sources[row] for row in rows], pad_id, next(model.parameters()).device)
        for row, tokens in zip(rows, answer(model, ids, mask, max_new_tokens), strict=True):
            answers[row] = tokens
        if on_done is not None:
            on_done(len(sources) - len(order))
    model.train(was_training)
    return answers


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, S], padded on the right to the longest row."""
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask


def generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, max_new_tokens: int
) -> list[str]:
    """The model's answers to these texts, in their order.

    Args:
        texts: what the model reads, prompt included.
        max_new_tokens: the longest answer, in tokens.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    sources = [tokenizer(text).input_ids for text in texts]
    assert isinstance(tokenizer.pad_token_id, int)
    answers = generate_ids(model, sources, max_new_tokens, tokenizer.pad_token_id)
    return [str(text) for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]
