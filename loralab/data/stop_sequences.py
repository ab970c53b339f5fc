"""Texts with which an answer ends: it is cut before the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN = 8  # tokens beyond a stop text's bytes, as the first ones of a window may be parts of a character


class Stops:
    """Tells from tokens whether a stop text stands at the end of what they say."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, tuple(texts)
        self.window = max(len(text.encode()) for text in texts) + MARGIN
        """How many of the last tokens need be looked at: each stands for a byte at least."""

    def met(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Tells whether the last tokens of each answer hold a stop text."""
        tails = self.tokenizer.batch_decode(
            [list(answer[-self.window :]) for answer in answers], skip_special_tokens=True
        )
        return [any(text in tail for text in self.texts) for tail in tails]


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]


def final_part(text: str, stops: Sequence[str]) -> str:
    """The text as far as it stays, whatever follows: without an end with which a stop text may begin."""
    begun = (
        length for stop in stops for length in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:length])
    )
    return text[: len(text) - max(begun, default=0)]
