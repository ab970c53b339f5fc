"""`loralab generate`: a trained model answers texts, a file of them, a row of its data, or somebody at a terminal."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from loralab.atomic_files import write_text
from loralab.config.extras import check_extras
from loralab.config.recipe import Recipe
from loralab.console.progress import Progress, say
from loralab.data.chat_template import transcript
from loralab.data.few_shot import draw_shots
from loralab.data.inputs import OUT_FORMATS, InputTexts, read_stdin, read_texts
from loralab.data.rows import Example, source_hash
from loralab.data.splits import Split, read_split
from loralab.data.stop_sequences import final_part, truncate_at_stop
from loralab.data.tokenization import encode_sources
from loralab.errors import DataError, UserError, nearest
from loralab.evaluation.evaluate import after_shots
from loralab.inference.classify import TextClassifier, classify_file, classify_texts, label_lines
from loralab.inference.saved_model import lengths_of, open_trained
from loralab.metrics.labels import Labels
from loralab.runs.folder import NO_DATA, NO_ROWS, find_saved_model, recorded_settings
from loralab.training.datasets import read_training_rows

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class GenerateRequest:
    """What is asked: one of texts, an input file and a sample; or nothing, and then stdin or a terminal is."""

    texts: Sequence[str] = ()
    input: str | None = None
    out: Path | None = None
    sample: str | None = None
    as_json: bool = False
    seed: int | None = None
    """Of a row by chance, and of the draws; None takes another row each time."""

    def check(self) -> None:
        """Raises UserError where it is no question."""
        given = [name for name in ("text", "input", "sample") if getattr(self, "texts" if name == "text" else name)]
        if len(given) > 1:
            raise UserError(f"--{' and --'.join(given)} are both given; give one of them.")
        if blank := [place for place, text in enumerate(self.texts, start=1) if not text.strip()]:
            raise UserError(f"The text of --text number {blank[0]} is empty.")
        if self.out is not None:
            _check_out(self.out, self.input)
        if not given and self.as_json and sys.stdin.isatty():
            raise UserError("Nothing to answer: --json needs --text TEXT, --input FILE, --sample SPLIT, or a pipe.")


def _check_out(out: Path, input: str | None) -> None:
    if input is None:
        raise UserError("--out is given without --input FILE, whose rows it would take.")
    if out.suffix not in OUT_FORMATS:
        raise UserError(f"--out {out}: expected a name that ends in {' or '.join(OUT_FORMATS)}.")
    if out.exists():
        raise UserError(f"--out {out} is there already. Give another name, or remove it.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}.")


def run_request(
    trained: Path,
    question: GenerateRequest,
    overrides: list[str],
    base: str | None,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    top_p: float | None = None,
) -> tuple[dict[str, Any], str | None]:
    """What the model says: as a record, and as text for people (None where they have seen it already)."""
    question.check()
    given = {"max_new_tokens": max_new_tokens, "top_p": top_p, "seed": question.seed}
    overrides = [
        *overrides,
        *(["evaluation.sample=true"] if top_p is not None else []),
        *(f"evaluation.{key}={value}" for key, value in given.items() if value is not None),
    ]
    if stop:
        ends = [text.replace("\\n", "\n") for text in stop]
        overrides = [*overrides, f"evaluation.stop={json.dumps(ends, ensure_ascii=False)}"]
    at_terminal = not (question.texts or question.input or question.sample) and sys.stdin.isatty()
    texts = [] if at_terminal or question.input or question.sample else _given_texts(question)
    recipe, saved = find_saved_model(trained, overrides, base, NO_DATA, lenient=True)  # --sample reads any split
    check_extras(recipe, trains=False)
    if question.seed is not None and question.sample is None and not recipe.evaluation.sample:
        raise UserError(
            "--seed changes nothing: nothing is drawn. Add --top-p, evaluation.sample=true or --sample SPLIT."
        )
    if recipe.data.label is not None:
        stored = recorded_settings(trained).get("labels")
        labels = None if stored is None else Labels.from_json(stored)
        return _answer_with_labels(recipe, lambda: TextClassifier(recipe, saved, labels), question, texts)
    if at_terminal:
        return _converse(TextGenerator(recipe, saved)), None
    if question.input is not None:
        return _answer_file(recipe, saved, question.input, question.out)
    if question.sample is not None:
        return _answer_row(recipe, saved, question.sample, question.seed)
    writer = TextGenerator(recipe, saved)
    if len(texts) == 1 and writer.streams and sys.stdout.isatty() and not question.as_json:
        return {"answers": [writer.stream(texts[0], sys.stdout)]}, None
    answers = writer.write(texts)
    return {"answers": answers}, "\n".join(answers)


def _answer_with_labels(
    recipe: Recipe, load: Callable[[], TextClassifier], question: GenerateRequest, texts: Sequence[str]
) -> tuple[dict[str, Any], str | None]:
    """Answers with a classifier, which `load` gives once the texts are there."""
    if question.input is not None:
        given = read_texts(question.input, recipe.data.source or NO_DATA["source"])
        return classify_file(load(), given, question.out)
    if question.sample is not None:
        split, _, row = _sampled(recipe, question.sample, question.seed)
        result, words = classify_texts(load(), [row.source])
        result = {
            "split": split,
            "row": row.row,
            "source": row.source,
            "references": list(row.targets),
            **result["answers"][0],
        }
        return result, _row_in_words(
            split, row.row, {"Source": row.source, "Label": row.targets[0], "Prediction": words}
        )
    if texts:
        return classify_texts(load(), texts)
    chooser, answers = load(), []
    say("Type a text and press Enter; \\n in it is a line break. An empty line or Ctrl-D ends.")
    while text := _ask():
        answer = chooser.choose([text])
        answers += answer.as_json()
        print(label_lines(answer)[0], flush=True)
    return {"answers": answers}, None


def _given_texts(question: GenerateRequest) -> Sequence[str]:
    """Those of --text, or all of stdin as one."""
    texts = question.texts or [text for text in [read_stdin().strip()] if text]
    if not texts:
        raise UserError(
            "Nothing to answer: give --text TEXT, --input FILE or --sample SPLIT, pipe a text, or ask at a terminal."
        )
    return texts


def _answer_file(recipe: Recipe, saved: Path | None, place: str, out: Path | None) -> tuple[dict[str, Any], str]:
    data = recipe.data
    texts = read_texts(place, data.messages or data.source or NO_DATA["source"], chat=bool(data.messages))
    if blank := sum(not text for text in texts.texts):
        say(f"{blank} of {len(texts.texts)} rows have no text; their prediction is empty.")
    answers = _answers_of_rows(TextGenerator(recipe, saved), texts)
    if out is None:
        return {"answers": answers}, "\n".join(answers)
    write_text(out, texts.table(answers, out.suffix))
    return {"out": str(out), "rows": len(answers), "blank": blank}, f"{out} holds {len(answers)} rows."


def _answers_of_rows(writer: TextGenerator, texts: InputTexts) -> list[str]:
    asked = [text for text in texts.texts if text]
    answers = iter(writer.write(asked, Progress("generate", len(asked)).update))
    return [next(answers) if text else "" for text in texts.texts]


def _answer_row(recipe: Recipe, saved: Path | None, sample: str, seed: int | None) -> tuple[dict[str, Any], str]:
    split, given, row = _sampled(recipe, sample, seed)
    first = next(example.row for example in given if example.source == row.source)  # as in evaluation
    avoid = given.source_hashes if split != "train" else None
    writer = TextGenerator(recipe, saved)
    prediction = writer.write([row.source], None, first, avoid)[0]
    result: dict[str, Any] = {"split": split, "row": row.row, "source": row.source, "references": list(row.targets)}
    parts = {
        "Source": transcript(row.source) if recipe.data.messages else row.source,
        "Reference": "\n".join(row.targets),
    }
    if recipe.evaluation.sample:
        result["greedy"] = writer.greedy().write([row.source], None, first, avoid)[0]
        parts["Greedy"] = result["greedy"]
    return {**result, "prediction": prediction}, _row_in_words(split, row.row, parts | {"Prediction": prediction})


def _row_in_words(split: str, row: int, parts: Mapping[str, str]) -> str:
    text = "".join(f"\n\n{name}:\n{part}" for name, part in parts.items())
    return f"Row {row} of {split}; again: --sample {split}:{row}{text}"


def _sampled(recipe: Recipe, sample: str, seed: int | None) -> tuple[str, Split, Example]:
    """(the split, its rows, and of them) a row by chance, the same for the same seed, or the one whose number stands behind a colon."""
    split, _, number = sample.partition(":")
    data = recipe.data
    if data.name == NO_ROWS:
        raise DataError("--sample needs rows: give data.name, data.source and data.target, as in data.name=./my-data.")
    if split not in SPLITS:
        raise DataError(f"--sample {sample}: expected a split, or SPLIT:ROW. {nearest(split, SPLITS)}")
    given = read_split(data, split)
    rows = {example.row: example for example in given}
    if number and not (number.isdecimal() and int(number) in rows):
        raise DataError(f"--sample {sample}: there is no such row. Those of {split} are {min(rows)} to {max(rows)}.")
    chance = random.SystemRandom() if seed is None else random.Random(seed)
    return split, given, rows[int(number) if number else chance.choice(list(rows))]


def _converse(writer: TextGenerator) -> dict[str, Any]:
    """Question and answer in turn, until an empty line or the end of the input."""
    say("Type a text and press Enter; \\n in it is a line break. An empty line or Ctrl-D ends.")
    answers: list[str] = []
    with writer.engine.generation_mode():
        while text := _ask():
            numbered = writer.with_seed(writer.decoding.seed + len(answers))  # the same text twice: two draws
            answers.append(numbered.stream(text, sys.stdout) if writer.streams else numbered.write([text])[0])
            if not writer.streams:
                print(answers[-1], flush=True)
    return {"answers": answers}


def _ask() -> str:
    """A line that was typed, or "" at the end."""
    try:
        return input("> " if sys.stdout.isatty() else "").replace("\\n", "\n").strip()
    except EOFError:
        print()
        return ""


class TextGenerator:
    """A trained model with the prompt, the lengths and the settings that it writes with."""

    def __init__(self, recipe: Recipe, saved: Path | None) -> None:
        """`saved`: what a run trained, or None for the base alone."""
        if recipe.evaluation.shots and recipe.data.name == NO_ROWS:
            raise DataError("evaluation.shots needs training rows: give data.name, data.source and data.target.")
        self.training = read_training_rows(recipe) if recipe.evaluation.shots else None
        self.engine = open_trained(recipe, saved)
        self.decoding, self.prompt = recipe.evaluation, self.engine.prompt
        self.max_length, _ = lengths_of(self.engine, recipe)

    @property
    def streams(self) -> bool:
        """Whether a text can be shown while it is written; a beam search knows it only at the end."""
        return self.decoding.beams == 1

    def with_seed(self, seed: int) -> TextGenerator:
        """The same writer, with draws of another seed."""
        return self._but(seed=seed)

    def greedy(self) -> TextGenerator:
        """The same writer, which takes the likeliest token each time."""
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
