"""From text to token ids: a `Split` becomes an `EncodedSplit`, two flat arrays with offsets.

Flat arrays cost four bytes a token and can be memory-mapped from a file, which a list of lists cannot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from loralab.data.prompts import Prompt
from loralab.data.sources import Split
from loralab.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 1000  # rows a call of the tokenizer: enough for its threads, little memory
PERCENTILE_CAP = 512  # lengths above it count as it where a percentile is taken, as in the published setting


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSplit:
    """Token ids of n rows, in the order of `Split.examples`: row i is `ids[offsets[i]:offsets[i + 1]]`."""

    source_ids: NDArray[np.int32]
    source_offsets: NDArray[np.int64]  # n + 1
    target_ids: NDArray[np.int32]
    target_offsets: NDArray[np.int64]  # n + 1
    max_source_length: int  # tokens, with the prompt and the end-of-sequence token
    max_target_length: int  # tokens, with the end-of-sequence token
    cut_sources: int  # rows
    cut_targets: int  # rows

    def __len__(self) -> int:
        return len(self.source_offsets) - 1

    @property
    def source_lengths(self) -> NDArray[np.int64]:
        return np.diff(self.source_offsets)

    @property
    def target_lengths(self) -> NDArray[np.int64]:
        return np.diff(self.target_offsets)

    def source(self, i: int) -> NDArray[np.int32]:
        return self.source_ids[self.source_offsets[i] : self.source_offsets[i + 1]]

    def target(self, i: int) -> NDArray[np.int32]:
        return self.target_ids[self.target_offsets[i] : self.target_offsets[i + 1]]


def encode(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_source_length: int,
    max_target_length: int,
) -> EncodedSplit:
    """Token ids of every row: the prompt around its source, and its first reference.

    Lengths are tokens; `resolve_lengths` makes them of a recipe's "p85". Where a row is too long, the source within
    the prompt is cut, and the target before its end-of-sequence token; both are counted.
    """
    sources, cut_sources = encode_sources([row.source for row in split.examples], tokenizer, prompt, max_source_length)
    targets, cut_targets = encode_targets([row.targets[0] for row in split.examples], tokenizer, max_target_length)
    return EncodedSplit(*flat(sources), *flat(targets), max_source_length, max_target_length, cut_sources, cut_targets)


def encode_sources(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_length: int
) -> tuple[list[list[int]], int]:
    """The token ids of each prompt, at most `max_length` of them, and how many sources were cut."""
    rows: list[list[int]] = []
    num_cut = 0
    for source, ids in zip(sources, token_ids([prompt.fill(source) for source in sources], tokenizer), strict=True):
        too_long = len(ids) > max_length
        num_cut += too_long
        rows.append(prompt.cut(source, tokenizer, max_length) if too_long else ids)
    return rows, num_cut


def encode_targets(
    targets: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[list[int]], int]:
    """The token ids of each target, at most `max_length` with the end of sequence, and how many were cut."""
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError("The tokenizer has no end-of-sequence token, so a model cannot learn where a target ends.")
    rows: list[list[int]] = []
    num_cut = 0
    for ids in token_ids(targets, tokenizer):
        closed = ids if ids[-1:] == [eos] else [*ids, eos]
        num_cut += len(closed) > max_length
        rows.append(closed if len(closed) <= max_length else [*closed[: max_length - 1], eos])
    return rows, num_cut


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} gives no character offsets. "
            "A fast tokenizer is needed, one with a tokenizer.json."
        )
    for start in range(0, len(texts), CHUNK_ROWS):
        yield from tokenizer(list(texts[start : start + CHUNK_ROWS]), verbose=False)["input_ids"]


def flat(rows: Sequence[Sequence[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """(all rows one after the other, n + 1 offsets)."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    ids = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(offsets[-1]))
    return ids, offsets


# Lengths given as a percentile.


def resolve_lengths(
    train: Split, tokenizer: PreTrainedTokenizerBase, max_source_length: int | str, max_target_length: int | str
) -> tuple[int, int]:
    """(source, target) lengths in tokens, each from a number or a percentile of the training rows.

    A percentile is that of the bare sources or first references, without the prompt but with the tokenizer's special
    tokens; the published 255 and 50 of SAMSum came about so. Nothing is tokenised for a number.
    """
    sources = [row.source for row in train.examples]
    targets = [row.targets[0] for row in train.examples]
    return length_of(max_source_length, sources, tokenizer), length_of(max_target_length, targets, tokenizer)


def length_of(setting: int | str, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> int:
    lengths = [len(ids) for ids in token_ids(texts, tokenizer)] if isinstance(setting, str) else []
    return resolve_length(setting, np.array(lengths, dtype=np.int64))


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
