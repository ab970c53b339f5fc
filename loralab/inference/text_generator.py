"""A trained model that answers texts, with the prompt, the lengths and the settings that it generates with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from loralab.config.recipe import Recipe
from loralab.data.few_shot import draw_shots
from loralab.data.rows import source_hash
from loralab.data.stop_sequences import final_part, truncate_at_stop
from loralab.data.tokenization import encode_sources
from loralab.data.training_rows import read_training_rows
from loralab.errors import DataError
from loralab.inference.saved_model import open_trained, trained_lengths
from loralab.runs.find_saved_model import NO_ROWS
from loralab.tasks.text_answers import after_shots


class TextGenerator:
    """A trained model with the prompt, the lengths and the settings that it writes with."""

    def __init__(self, recipe: Recipe, saved: Path | None) -> None:
        """`saved`: what a run trained, or None for the base alone."""
        if recipe.evaluation.shots and recipe.data.name == NO_ROWS:
            raise DataError("evaluation.shots needs training rows: give data.name, data.source and data.target.")
        self.training = read_training_rows(recipe) if recipe.evaluation.shots else None
        self.engine = open_trained(recipe, saved)
        self.decoding, self.prompt = recipe.evaluation, self.engine.prompt
        self.max_length, _ = trained_lengths(self.engine, recipe)

    @property
    def streams(self) -> bool:
        """Tells whether a text can be shown while it is written; a beam search knows it only at the end."""
        return self.decoding.beams == 1

    def with_seed(self, seed: int) -> TextGenerator:
        """Returns the same writer, with draws of another seed."""
        return self._but(seed=seed)

    def greedy(self) -> TextGenerator:
        """Returns the same writer, which takes the likeliest token each time."""
        return self._but(sample=False, temperature=1.0, top_k=None, top_p=None)

    def _but(self, **settings: Any) -> TextGenerator:
        other = copy.copy(self)
        other.decoding = self.decoding.model_copy(update=settings)
        return other

    def write(
        self,
        texts: Sequence[str],
        on_done: Callable[[int], None] | None = None,
        first: int = 1,
        avoid: NDArray[np.uint64] | None = None,
    ) -> list[str]:
        """The answers, each stripped of white space around it.

        Args:
            first: the number of the first text's row, by which its worked examples are drawn.
            avoid: hashes of sources that are no examples; None those of the texts.
        """
        ids = self.engine.generate(self._encode(texts, first, avoid), self.decoding, on_done)
        return [self._text(answer) for answer in ids]

    def stream(self, text: str, out: TextIO) -> str:
        """The answer to one text, shown as it grows; a line ends it."""
        tokens: list[int] = []
        shown = ""

        def show(token: int) -> None:
            nonlocal shown
            tokens.append(token)
            whole = final_part(self._text(tokens), self.decoding.stop)
            # A character of several tokens is whole only with its last; and what was shown cannot be taken back.
            if whole.startswith(shown) and not whole.endswith("\ufffd"):
                out.write(whole[len(shown) :])
                out.flush()
                shown = whole

        (ids,) = self.engine.generate(self._encode([text]), self.decoding, None, show)
        answer = self._text(ids)
        out.write((answer[len(shown) :] if answer.startswith(shown) else "\n" + answer) + "\n")
        out.flush()
        return answer

    def _encode(self, texts: Sequence[str], first: int = 1, avoid: NDArray[np.uint64] | None = None) -> list[list[int]]:
        ids = encode_sources(texts, self.engine.tokenizer, self.prompt, self.max_length)[0]
        if self.training is None:
            return ids
        avoid = np.array([source_hash(text) for text in texts], dtype=np.uint64) if avoid is None else avoid
        rows, settings = list(enumerate(texts, first)), self.decoding
        drawn = draw_shots(rows, avoid, self.training, settings.shots, settings.seed)
        return after_shots(self.engine, ids, list(texts), drawn, self.max_length)[0]

    def _text(self, ids: Sequence[int]) -> str:
        return truncate_at_stop(
            str(self.engine.tokenizer.decode(list(ids), skip_special_tokens=True)), self.decoding.stop
        ).strip()
