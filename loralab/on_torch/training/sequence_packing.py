"""Rows of several texts (data/sequence_packing.py): attention within each text alone, positions that begin anew with it.

Our GPT-2 is told which text each token is of. Transformers' classes tell it from positions that do not go on by one; those
that do not are found out before the training, and refused.

    B rows   S tokens of a row   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loralab.errors import ModelError

TIGHT = 1e-3  # of the largest logit: the same sums
LOOSE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # sums in another order, rounded to 8 bits in bf16
SHORT = 4  # tokens of the second text that is tried


def positions_of(documents_BS: Tensor) -> Tensor:
    """[B, S]: the place of each token in its text."""
    places_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return places_S - (places_S * begins_BS).cummax(1).values


@torch.no_grad()
def check_texts_apart(
    model: nn.Module, inputs_of: Callable[[Tensor, Tensor | None], dict[str, Any]], length: int
) -> None:
    """Raises ModelError where a text's logits depend on what stands before it in its row, or on where it stands.

    Two texts that fill a row of `length` tokens are tried, the first long enough to tell a sliding window.

    Args:
        inputs_of: (ids, numbers of their texts or None for one) -> what the model's forward takes.
    """
    if length <= SHORT:
        return
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    ids_2S = torch.randint(vocabulary, (2, length), generator=generator).to(next(model.parameters()).device)
    ids_2S[1, -SHORT:] = ids_2S[0, -SHORT:]  # two rows that end in the same text
    documents_2S = torch.zeros_like(ids_2S)
    documents_2S[:, -SHORT:] = 1
    try:
        logits_2SV = model(**inputs_of(ids_2S, documents_2S)).logits.float()
        long, short = (
            model(**inputs_of(part, None)).logits[0].float() for part in (ids_2S[:1, :-SHORT], ids_2S[:1, -SHORT:])
        )
    except TypeError:  # it takes no positions
        raise ModelError(_refusal(model)) from None
    largest = float(logits_2SV.abs().max())
    apart = torch.allclose(logits_2SV[0, -SHORT:], logits_2SV[1, -SHORT:], rtol=0, atol=TIGHT * largest)
    alone_SV, loose = torch.cat([long, short]), LOOSE.get(next(model.parameters()).dtype, TIGHT)
    if not (apart and torch.allclose(logits_2SV[0], alone_SV, rtol=0, atol=loose * largest)):
        raise ModelError(_refusal(model))


def _refusal(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} cannot keep packed texts apart: a text's logits change with what stands before it in its row. "
        "Set data.packing to false; rows are then texts of their own, of like lengths in a batch."
    )
