"""Classifies texts: for each a label, or several, and the probability of every label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.atomic_files import write_text
from loralab.config.recipe import Recipe
from loralab.console.progress import Progress, say
from loralab.data.inputs import InputTexts
from loralab.inference.saved_model import open_trained, trained_lengths
from loralab.metrics.labels import Labels
from loralab.tasks.label_answers import Answers, answer_texts

SHOWN = 5  # labels in a line
PROBABILITIES = "probabilities"


class TextClassifier:
    """A trained classifier with its prompt and lengths."""

    def __init__(self, recipe: Recipe, saved: Path | None, labels: Labels | None) -> None:
        """Loads it.

        Args:
            saved: what a run trained, or None for the base alone.
            labels: those that the run recorded, for what was saved without any.
        """
        self.engine = open_trained(recipe, saved, labels)
        self.max_length, _ = trained_lengths(self.engine, recipe)

    def choose(self, texts: Sequence[str]) -> Answers:
        """Returns what it says to each."""
        return answer_texts(self.engine, texts, self.max_length, Progress("classify", len(texts)).update)


def classify_texts(chooser: TextClassifier, texts: Sequence[str]) -> tuple[dict[str, Any], str]:
    """(as a record, a line for each text)."""
    answers = chooser.choose(texts)
    return {"answers": answers.as_json()}, "\n".join(label_lines(answers))


def label_lines(answers: Answers) -> list[str]:
    """ "pos  (pos 0.981, neg 0.019)", the likeliest first."""
    if answers.numbers:
        return answers.predictions
    return [
        f"{label}  ({probabilities_in_words(each)})"
        for label, each in zip(answers.predictions, answers.probabilities, strict=True)
    ]


def probabilities_in_words(probabilities: Mapping[str, float]) -> str:
    most = sorted(probabilities, key=lambda name: -probabilities[name])[:SHOWN]
    more = f", {len(probabilities) - SHOWN} more" if len(probabilities) > SHOWN else ""
    return ", ".join(f"{name} {probabilities[name]:.3f}" for name in most) + more


def classify_file(chooser: TextClassifier, texts: InputTexts, out: Path | None) -> tuple[dict[str, Any], str]:
    """The rows of a file; into `out` they go with the columns prediction and probabilities."""
    asked = [row for row, text in enumerate(texts.texts) if text]
    if blank := len(texts.texts) - len(asked):
        say(f"{blank} of {len(texts.texts)} rows have no text; their prediction is empty.")
    answers = chooser.choose([texts.texts[row] for row in asked])
    if out is None:
        known, words = iter(answers.as_json()), iter(label_lines(answers))
        every = [next(known) if text else None for text in texts.texts]
        return {"answers": every}, "\n".join(next(words) if text else "" for text in texts.texts)
    found = dict(zip(asked, zip(answers.predictions, answers.probabilities, strict=True), strict=True))
    rows = list(texts.rows)
    if not answers.numbers:
        rows = [{**row, PROBABILITIES: found[i][1] if i in found else None} for i, row in enumerate(rows)]
    predictions = [found[i][0] if i in found else "" for i in range(len(rows))]
    write_text(out, type(texts)(rows, texts.texts).table(predictions, out.suffix))
    return {"out": str(out), "rows": len(rows), "blank": blank}, f"{out} holds {len(rows)} rows."
