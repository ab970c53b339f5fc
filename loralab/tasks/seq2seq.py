"""Sequence to sequence: the model reads a source within its prompt and writes the target.

An encoder-decoder reads the one and writes the other; a decoder-only model reads both as one sequence, of which the target
is learnt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from loralab.data.chat_template import Chat
from loralab.data.prompts import Prompt
from loralab.metrics.labels import Labels
from loralab.tasks.text_answers import TextAnswerTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Seq2SeqTask(TextAnswerTask):
    """`data.source` to `data.target`."""

    def prompt(self, tokenizer: PreTrainedTokenizerBase, causal: bool, labels: Labels | None = None) -> Prompt | Chat:
        return Prompt(self.data.prompt, self.data.source or "source", causal=causal)
