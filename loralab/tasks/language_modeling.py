"""Language modelling: a decoder-only model learns whole texts, packed side by side (data/sequence_packing.py) or one a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loralab.config.data import NO_PROMPT
from loralab.config.generation import Decoding
from loralab.config.recipe import EvaluationSettings
from loralab.console.progress import Progress, say
from loralab.data.cache import Facts, cached
from loralab.data.chat_template import Chat
from loralab.data.encoded import Encoded
from loralab.data.lengths import check_packed_length, check_positions
from loralab.data.prompts import Prompt
from loralab.data.sequence_packing import PackedSplit, encode_packed
from loralab.data.splits import AnySplit, Split
from loralab.errors import RecipeError
from loralab.metrics import BITS
from loralab.metrics.compression import xz_bits_per_byte
from loralab.metrics.labels import Labels
from loralab.metrics.metric import Floats
from loralab.metrics.scores import Scores
from loralab.tasks.predictions import write_document_losses, write_predictions
from loralab.tasks.task import Done, Task, TaskModel, row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LanguageModelingTask(Task):
    """`data.source` is null: the texts of `data.target`. Of packed texts every byte counts, in bits per byte."""

    has_source = False

    @property
    def packed_length(self) -> int | None:
        return self.data.row_length if self.data.packing else None

    def prompt(self, tokenizer: PreTrainedTokenizerBase, causal: bool, labels: Labels | None = None) -> Prompt | Chat:
        check_causal(causal, "data.packing" if self.data.packing else "data.source is null, which")
        return Prompt(self.data.prompt, "source", causal=True, begins=self.data.prompt == NO_PROMPT)

    def check_lengths(self, lengths: tuple[int, int], max_new_tokens: int, causal: bool, positions: int | None) -> None:
        if self.data.packing:
            check_packed_length(lengths[1], positions)
        else:
            check_positions((1, max(lengths[1], max_new_tokens)), causal, positions)

    def encode(
        self, model: TaskModel, rows: AnySplit, lengths: tuple[int, int], seed: int, long_rows: str | None = None
    ) -> Encoded:
        if not self.data.packing:
            return super().encode(model, rows, lengths, seed, long_rows)
        self.prompt(model.tokenizer, model.causal)
        return encode_packed(rows, model.tokenizer, lengths[1], seed)

    def loss_scores(self, rows: Split, encoded: Encoded, losses: Floats) -> Scores:
        tokens = encoded.target_tokens.astype(np.float64)
        values = {"loss": losses / tokens}
        if not isinstance(encoded, PackedSplit):
            return Scores([example.subject for example in rows.examples], values, tokens, plain=True)
        num_bytes = encoded.target_bytes
        values[BITS.name] = losses / num_bytes / np.log(2)
        return Scores(list(map(str, encoded.numbers)), values, tokens, None, True, num_bytes)

    def evaluate(
        self, model: TaskModel, settings: EvaluationSettings, rows: Split, encoded: Encoded, file: Path | None
    ) -> Scores:
        scores = self.loss_scores(rows, encoded, row_losses(model, encoded, Progress("loss", len(encoded)).update))
        if file is not None and self.data.packing:
            write_document_losses(file, encoded, scores)
        elif file is not None:
            write_predictions(file, rows, self.sources(rows), None, scores)
        return scores

    def validate(
        self,
        model: TaskModel,
        metrics: Sequence[str],
        decoding: Decoding,
        rows: Split,
        encoded: Encoded,
        on_done: Done,
    ) -> dict[str, float]:
        losses = row_losses(model, encoded, on_done)
        values = {"loss": float(losses.sum() / encoded.target_tokens.sum())}
        if isinstance(encoded, PackedSplit):
            values[BITS.name] = float(losses.sum() / encoded.target_bytes.sum() / np.log(2))
        return values

    def compression_floors(self, training: AnySplit, rows: Split) -> Mapping[str, float]:
        """Bits per byte of the rows by xz, with and without the training texts before them."""
        if not self.data.packing:
            return {}

        class Texts:
            def __iter__(self) -> Iterator[str]:
                return (example.targets[0] for example in training)

        def build(folder: Path) -> Facts:
            say(f"Compressing the texts of {rows.name} with xz, to compare ...")
            return dict(xz_bits_per_byte(Texts(), [example.targets[0] for example in rows.examples]))

        key = {"training": training.content_hash, "rows": rows.content_hash}
        return dict(cached("xz", key, build).facts)


def check_causal(causal: bool, setting: str) -> None:
    """Raises `RecipeError` where an encoder-decoder is to learn what only a decoder-only model can."""
    if not causal:
        raise RecipeError(
            f"{setting} is for decoder-only models, and this one is an encoder-decoder: "
            "give the column that it reads as data.source and the one that it writes as data.target."
        )
