"""Pairs of texts that a classifier reads side by side: a premise and its hypothesis, a question and a passage.

A row's source is both texts as a JSON list. The tokenizer joins them its own way, BERT's as `[CLS] a [SEP] b [SEP]`; where it
tells them apart by token types, 0 and 1, the place of the first 1 is kept. Of a pair that is too long the longer text loses
its end, token by token, as with `truncation="longest_first"` of Transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from loralab.data.prompts import Prompt
from loralab.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000  # pairs a call of the tokenizer


@dataclass(frozen=True, slots=True)
class PairPrompt(Prompt):
    """The prompt of pairs: the two texts alone."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """The tokens of a pair."""

    ids: list[int]
    second: int
    """Place of the first token of type 1; the number of tokens where the tokenizer has no types."""

    def __len__(self) -> int:
        return len(self.ids)


def join_pair(first: str, second: str) -> str:
    """Returns the source of a row."""
    return json.dumps([first, second], ensure_ascii=False)


def split_pair(source: str) -> tuple[str, str]:
    """Returns the two texts of a row's source."""
    first, second = json.loads(source)
    return first, second


def has_token_types(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether models of this tokenizer are told which text a token is of."""
    return "token_type_ids" in tokenizer.model_input_names


def encode_pairs(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[EncodedPair]:
    """Tokenizes pairs.

    Args:
        sources: of rows, as `join_pair` makes them.
        max_length: tokens of a pair with those that the tokenizer adds; None does not truncate.

    Raises:
        ModelError: the tokenizer's types are not 0 and then 1.
    """
    settings: dict[str, Any] = {"return_token_type_ids": has_token_types(tokenizer), "verbose": False}
    if max_length is not None:
        settings |= {"truncation": "longest_first", "max_length": max_length}
    found: list[EncodedPair] = []
    for start in range(0, len(sources), CHUNK):
        pairs = [split_pair(source) for source in sources[start : start + CHUNK]]
        batch = tokenizer([first for first, _ in pairs], [second for _, second in pairs], **settings)
        types = batch.get("token_type_ids") or [[0] * len(ids) for ids in batch["input_ids"]]
        found += [EncodedPair(list(ids), _second(kinds)) for ids, kinds in zip(batch["input_ids"], types, strict=True)]
    return found


def _second(types: Sequence[int]) -> int:
    runs = [(kind, len(list(group))) for kind, group in groupby(types)]
    if [kind for kind, _ in runs] not in ([0], [0, 1]):
        raise ModelError(
            f"The tokenizer marks the tokens of a pair with the types {', '.join(str(kind) for kind, _ in runs)}; expected 0 for "
            "the first text and then 1 for the second, as BERT's does. Take a base of BERT's or RoBERTa's kin."
        )
    return runs[0][1]


def check_pair_length(max_length: int) -> None:
    """Raises `DataError` where not even a token of each text fits beside the special tokens."""
    if max_length < 6:
        raise DataError(f"data.max_source_length {max_length} is too short for pairs of texts; expected 6 or more.")
