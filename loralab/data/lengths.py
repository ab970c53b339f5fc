"""Lengths in tokens: percentiles of the training rows, and what a model's positions allow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from loralab.data.cache import ArrayFile, Facts, cached
from loralab.data.chat_template import Chat, messages_of, rendered
from loralab.data.prompts import Prompt
from loralab.data.splits import AnySplit
from loralab.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from loralab.data.tokenization import CHUNK_ROWS, NO_LENGTHS, chunks, token_ids, tokenizer_key

PERCENTILE_CAP = 512  # lengths above it count as it where a percentile is taken, as in the published setting


def resolve_lengths(
    train: AnySplit,
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int | str,
    max_target_length: int | str,
    prompt: Prompt | Chat | None = None,
) -> tuple[int, int]:
    """(source, target) lengths in tokens, each from a number or a percentile of the training rows.

    A percentile is that of the bare sources or first references, without the prompt but with the tokenizer's special
    tokens; the published 255 and 50 of SAMSum came about so. In a chat it is that of whole conversations. Nothing is
    tokenised for a number.
    """
    chat = isinstance(prompt, Chat)
    source = bare_lengths(train, tokenizer, "source", chat) if isinstance(max_source_length, str) else NO_LENGTHS
    target = bare_lengths(train, tokenizer, "target", chat) if isinstance(max_target_length, str) else NO_LENGTHS
    return resolve_length(max_source_length, source), resolve_length(max_target_length, target)


def bare_lengths(
    rows: AnySplit, tokenizer: PreTrainedTokenizerBase, side: str, chat: bool = False
) -> NDArray[np.int64]:
    """[rows]: tokens of each source or first reference by itself; the source of a chat is written down by its template."""

    def build(folder: Path) -> Facts:
        with ArrayFile(folder / "lengths.npy", "<i4") as file:
            for examples in chunks(rows, CHUNK_ROWS):
                texts = [example.source if side == "source" else example.targets[0] for example in examples]
                if chat and side == "source":
                    texts = [rendered(messages_of(text), tokenizer) for text in texts]
                file.append([len(ids) for ids in token_ids(texts, tokenizer, not chat)])
        return {}

    key = {"texts": rows.content_hash, "side": side, "chat": chat, **tokenizer_key(tokenizer)}
    return cached("lengths", key, build).array("lengths")


def check_packed_length(length: int, positions: int | None) -> None:
    """Raises `RecipeError` where a packed row has more tokens than the model has positions (None: no bound)."""
    if positions is not None and length > positions:
        raise RecipeError(
            f"A packed row has {length} tokens (data.max_target_length), and the model has {positions} positions. "
            f"Set data.max_target_length to {positions} or less."
        )


def check_positions(lengths: tuple[int, int], causal: bool, positions: int | None) -> None:
    """Raises `RecipeError` where a row, or an answer, may have more tokens than the model has positions (None: no bound).

    Args:
        lengths: the most tokens of a source, and of a target or an answer.
        causal: both are one sequence to the model.
    """
    source, target = lengths
    needed = source + target if causal else max(source, target)
    if positions is None or needed <= positions:
        return
    keys = "data.max_source_length, data.max_target_length and evaluation.max_new_tokens"
    sum_of = (
        f"{source} tokens of the source and {target} of the answer, {needed} in all" if causal else f"{needed} tokens"
    )
    raise RecipeError(
        f"A row may have {sum_of}, and the model has {positions} positions. Lower {keys}"
        + (f": the first and the larger of the others may be {positions} together." if causal else ".")
    )


def resolve_length(setting: int | str, lengths: NDArray[np.int64]) -> int:
    """`setting` itself where it is a number; for "p85" the 85th percentile of `lengths`, rounded up, at most 512."""
    if isinstance(setting, int) and setting > 0:
        return setting
    match = re.fullmatch(r"p([1-9][0-9]?|100)", str(setting))
    if match is None:
        raise RecipeError(
            f"The length {setting!r} is neither a number of tokens (1 or more) "
            "nor a percentile of the training lengths (p1 to p100, such as p85)."
        )
    return int(np.ceil(np.percentile(np.minimum(lengths, PERCENTILE_CAP), int(match[1]))))
