"""Denoising: parts of a document are masked, and the model writes what stood there (data/span_corruption.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loralab.config.recipe import EvaluationSettings
from loralab.console.progress import Progress
from loralab.data.chat_template import Chat
from loralab.data.encoded import Encoded
from loralab.data.prompts import Prompt
from loralab.data.span_corruption import check_objective_lengths, encode_documents
from loralab.data.splits import AnySplit, Split
from loralab.metrics.labels import Labels
from loralab.metrics.metric import Floats
from loralab.metrics.scores import Scores
from loralab.tasks.predictions import write_document_losses
from loralab.tasks.task import Task, TaskModel, row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DenoisingTask(Task):
    """`data.objective`. Scores are of chunks, under the masks of the first epoch; chunks of one document belong together."""

    def check(self) -> None:
        check_objective_lengths(self.data)

    def prompt(self, tokenizer: PreTrainedTokenizerBase, causal: bool, labels: Labels | None = None) -> Prompt | Chat:
        return Prompt(self.data.prompt, self.data.source or "source", causal=causal)

    def encode(
        self, model: TaskModel, rows: AnySplit, lengths: tuple[int, int], seed: int, long_rows: str | None = None
    ) -> Encoded:
        assert self.data.objective is not None
        return encode_documents(rows, model.tokenizer, self.data.objective, *lengths, seed=seed)

    def loss_scores(self, rows: Split, encoded: Encoded, losses: Floats) -> Scores:
        tokens = encoded.target_tokens.astype(np.float64)
        return Scores(list(map(str, encoded.numbers)), {"loss": losses / tokens}, tokens)

    def evaluate(
        self, model: TaskModel, settings: EvaluationSettings, rows: Split, encoded: Encoded, file: Path | None
    ) -> Scores:
        scores = self.loss_scores(rows, encoded, row_losses(model, encoded, Progress("loss", len(encoded)).update))
        if file is not None:
            write_document_losses(file, encoded, scores)
        return scores
