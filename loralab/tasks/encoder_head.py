"""Tasks of an encoder with a head: the model reads a text, or two side by side, and gives numbers instead of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from loralab.console.progress import say
from loralab.data.chat_template import Chat
from loralab.data.encoded import Encoded
from loralab.data.prompts import Prompt
from loralab.data.splits import Split
from loralab.data.text_pairs import PairPrompt, check_pair_length, split_pair
from loralab.metrics.labels import Labels
from loralab.metrics.metric import Floats
from loralab.metrics.scores import Scores
from loralab.tasks.task import Task, TaskModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncoderHeadTask(Task):
    """`data.source`, with `data.text_pair` two texts, to `data.label`."""

    classifies = True

    def check(self) -> None:
        if self.reads_pairs and isinstance(self.data.max_source_length, int):
            check_pair_length(self.data.max_source_length)

    @property
    def reads_pairs(self) -> bool:
        """Tells whether a row has two texts."""
        return self.data.text_pair is not None

    def shown(self, source: str) -> str:
        return "\n".join(split_pair(source)) if self.reads_pairs else source

    def prompt(self, tokenizer: PreTrainedTokenizerBase, causal: bool, labels: Labels | None = None) -> Prompt | Chat:
        kind = PairPrompt if self.reads_pairs else Prompt
        return kind(self.data.prompt, self.data.source or "source", labels=labels)

    def within_positions(self, lengths: tuple[int, int], model: TaskModel) -> tuple[int, int]:
        """Texts beyond the model's positions are cut, and that is said."""
        (source, target), positions = lengths, model.positions
        if positions is None or source <= positions:
            return lengths
        say(
            f"data.max_source_length is {source}, and the model has {positions} positions: texts are cut to {positions} tokens."
        )
        return positions, target

    def check_lengths(self, lengths: tuple[int, int], max_new_tokens: int, causal: bool, positions: int | None) -> None:
        """`within_positions` has shortened what is too long."""

    def loss_scores(self, rows: Split, encoded: Encoded, losses: Floats) -> Scores:
        tokens = encoded.target_tokens.astype(np.float64)
        return Scores([example.subject for example in rows.examples], {"loss": losses / tokens}, tokens)
