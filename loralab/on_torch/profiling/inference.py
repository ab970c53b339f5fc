"""What answering a batch of rows holds at its most: the last token of the longest answers, with all keys and values kept.

Run without numbers by traced_model.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from loralab.config.generation import TOKENS_PER_BATCH, Decoding
from loralab.engine import BatchShape
from loralab.on_torch.loading import classifier
from loralab.on_torch.models import gpt2_decoding, t5_decoding
from loralab.on_torch.models.gpt2 import GPT2
from loralab.on_torch.models.heads import is_classifier
from loralab.on_torch.models.kv_cache import KVCache
from loralab.on_torch.models.t5 import T5


def answered(shape: BatchShape, decoding: Decoding) -> BatchShape:
    """Returns a batch as generation makes it of rows of these lengths; whole texts are gone on from their first token."""
    source = max(shape.source, 1)
    rows = max(1, TOKENS_PER_BATCH // (source + decoding.beams * decoding.max_new_tokens))
    return replace(shape, rows=rows, source=source, target=decoding.max_new_tokens, padded=rows > 1, packed=False)


def answer(model: nn.Module, shape: BatchShape, beams: int) -> None:
    """Reads the rows and writes the last token of their answers."""
    ids, mask = (torch.empty(shape.rows, shape.source, dtype=torch.long, device="meta") for _ in range(2))
    if is_classifier(model):
        classifier.logits(model, ids, mask)
    elif isinstance(model, T5):
        _last_token(t5_decoding.start(model, ids, mask, shape.target, beams), shape.target - 1, beams)
    elif isinstance(model, GPT2):
        written = shape.target - 1 if beams > 1 else shape.source + shape.target - 2
        _last_token(gpt2_decoding.Cache(model, ids, mask, beams), written, beams)
    else:
        _read_all(model, ids, mask, shape.target, beams)


def _last_token(memory: t5_decoding.Cache | gpt2_decoding.Cache, written: int, beams: int) -> None:
    """Fills the decoder's own keys and values with so many positions, and goes one further."""
    for place, own in enumerate(memory.own):
        rows, heads, _, size = own.values.shape
        filled = own.values.new_empty(rows, heads, written, size)
        memory.own[place] = KVCache(filled, filled)
    hypotheses = torch.empty(len(memory.own[0].values), dtype=torch.long, device="meta")
    logits = memory.next_logits(hypotheses)
    if beams > 1:
        torch.log_softmax(logits, -1)
        memory.reorder(hypotheses)


def _read_all(model: nn.Module, ids: Tensor, mask: Tensor, new: int, beams: int) -> None:
    """Of a class of Transformers': source and answer in one pass that keeps keys and values, with logits of the last token."""
    rows = len(ids) * beams
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][:, -1:],))
    target = torch.empty(rows, new, dtype=torch.long, device="meta")
    source, seen = (each.expand(beams, *each.shape).flatten(0, 1) for each in (ids, mask))
    try:
        if model.config.is_encoder_decoder:  # type: ignore[union-attr]
            model(input_ids=source, attention_mask=seen, decoder_input_ids=target, use_cache=True)
        else:
            both = (torch.cat([source, target], 1), torch.cat([seen, target], 1))
            model(input_ids=both[0], attention_mask=both[1], use_cache=True)
    finally:
        hook.remove()
