"""`loralab generate`: a trained model answers texts, a file of them, a row of its data, or somebody at a terminal."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.atomic_files import write_text
from loralab.config.extras import check_extras
from loralab.config.recipe import Recipe
from loralab.console.progress import Progress, say
from loralab.data.inputs import OUT_FORMATS, InputTexts, read_stdin, read_texts
from loralab.data.rows import Example
from loralab.data.splits import Split, read_split
from loralab.data.text_pairs import join_pair
from loralab.errors import DataError, UserError, nearest
from loralab.inference.classify import TextClassifier, classify_file, classify_texts, label_lines
from loralab.inference.text_generator import TextGenerator
from loralab.metrics.labels import Labels
from loralab.runs.find_saved_model import NO_DATA, NO_ROWS, find_saved_model
from loralab.runs.record import recorded_settings
from loralab.tasks import task_of

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class GenerateRequest:
    """A request of `loralab generate`: texts, an input file, or a sample; or none, for stdin or a terminal."""

    texts: Sequence[str] = ()
    input: str | None = None
    out: Path | None = None
    sample: str | None = None
    as_json: bool = False
    seed: int | None = None
    """Seed of the random row and of sampling; None takes another row each time."""
    text_pairs: Sequence[str] = ()
    """The second text of each, for a model that reads pairs."""

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
    request: GenerateRequest,
    overrides: list[str],
    base: str | None,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    top_p: float | None = None,
) -> tuple[dict[str, Any], str | None]:
    """Returns what the model says: as a record, and as text for people (None where they have seen it already)."""
    request.check()
    given = {"max_new_tokens": max_new_tokens, "top_p": top_p, "seed": request.seed}
    overrides = [
        *overrides,
        *(["evaluation.sample=true"] if top_p is not None else []),
        *(f"evaluation.{key}={value}" for key, value in given.items() if value is not None),
    ]
    if stop:
        ends = [text.replace("\\n", "\n") for text in stop]
        overrides = [*overrides, f"evaluation.stop={json.dumps(ends, ensure_ascii=False)}"]
    at_terminal = not (request.texts or request.input or request.sample) and sys.stdin.isatty()
    texts = [] if at_terminal or request.input or request.sample else _given_texts(request)
    recipe, saved = find_saved_model(trained, overrides, base, NO_DATA, lenient=True)  # --sample reads any split
    check_extras(recipe, trains=False)
    if request.seed is not None and request.sample is None and not recipe.evaluation.sample:
        raise UserError(
            "--seed changes nothing: nothing is drawn. Add --top-p, evaluation.sample=true or --sample SPLIT."
        )
    if task_of(recipe.data).classifies:
        stored = recorded_settings(trained).get("labels")
        labels = None if stored is None else Labels.from_json(stored)
        return _answer_with_labels(recipe, lambda: TextClassifier(recipe, saved, labels), request, texts)
    if at_terminal:
        return _converse(TextGenerator(recipe, saved)), None
    if request.input is not None:
        return _answer_file(recipe, saved, request.input, request.out)
    if request.sample is not None:
        return _answer_row(recipe, saved, request.sample, request.seed)
    generator = TextGenerator(recipe, saved)
    if len(texts) == 1 and generator.streams and sys.stdout.isatty() and not request.as_json:
        return {"answers": [generator.stream(texts[0], sys.stdout)]}, None
    answers = generator.write(texts)
    return {"answers": answers}, "\n".join(answers)


def _answer_with_labels(
    recipe: Recipe, load: Callable[[], TextClassifier], request: GenerateRequest, texts: Sequence[str]
) -> tuple[dict[str, Any], str | None]:
    """Answers with a classifier, which `load` gives once the texts are there."""
    if request.input is not None:
        given = read_texts(request.input, recipe.data.source or NO_DATA["source"], pair=recipe.data.text_pair)
        return classify_file(load(), given, request.out)
    if request.sample is not None:
        split, _, row = _sampled(recipe, request.sample, request.seed)
        result, words = classify_texts(load(), [row.source])
        result = {
            "split": split,
            "row": row.row,
            "source": task_of(recipe.data).shown(row.source),
            "references": list(row.targets),
            **result["answers"][0],
        }
        return result, _row_in_words(
            split,
            row.row,
            {"Source": task_of(recipe.data).shown(row.source), "Label": row.targets[0], "Prediction": words},
        )
    if texts:
        return classify_texts(load(), _paired(recipe, request, texts))
    if recipe.data.text_pair is not None:
        raise UserError(
            "This model reads two texts: give --text TEXT --text-pair TEXT, --input FILE or --sample SPLIT."
        )
    chooser, answers = load(), []
    say("Type a text and press Enter; \\n in it is a line break. An empty line or Ctrl-D ends.")
    while text := _ask():
        answer = chooser.choose([text])
        answers += answer.as_json()
        print(label_lines(answer)[0], flush=True)
    return {"answers": answers}, None


def _paired(recipe: Recipe, request: GenerateRequest, texts: Sequence[str]) -> Sequence[str]:
    """Returns the sources of rows: each text, with its second one where the model reads pairs.

    Raises:
        UserError: second texts are missing, or there are too many.
    """
    if recipe.data.text_pair is None and not request.text_pairs:
        return texts
    if recipe.data.text_pair is None:
        raise UserError("--text-pair is given, and this model reads one text: its recipe has no data.text_pair.")
    if len(texts) != len(request.text_pairs):
        raise UserError(
            f"This model reads two texts: expected a --text-pair for each --text; got {len(texts)} and {len(request.text_pairs)}."
        )
    return [join_pair(*both) for both in zip(texts, request.text_pairs, strict=True)]


def _given_texts(request: GenerateRequest) -> Sequence[str]:
    """Returns those of --text, or all of stdin as one."""
    texts = request.texts or [text for text in [read_stdin().strip()] if text]
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


def _answers_of_rows(generator: TextGenerator, texts: InputTexts) -> list[str]:
    asked = [text for text in texts.texts if text]
    answers = iter(generator.write(asked, Progress("generate", len(asked)).update))
    return [next(answers) if text else "" for text in texts.texts]


def _answer_row(recipe: Recipe, saved: Path | None, sample: str, seed: int | None) -> tuple[dict[str, Any], str]:
    split, given, row = _sampled(recipe, sample, seed)
    first = next(example.row for example in given if example.source == row.source)  # as in evaluation
    avoid = given.source_hashes if split != "train" else None
    generator = TextGenerator(recipe, saved)
    prediction = generator.write([row.source], None, first, avoid)[0]
    result: dict[str, Any] = {"split": split, "row": row.row, "source": row.source, "references": list(row.targets)}
    parts = {
        "Source": task_of(recipe.data).shown(row.source),
        "Reference": "\n".join(row.targets),
    }
    if recipe.evaluation.sample:
        result["greedy"] = generator.greedy().write([row.source], None, first, avoid)[0]
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


def _converse(generator: TextGenerator) -> dict[str, Any]:
    """Question and answer in turn, until an empty line or the end of the input."""
    say("Type a text and press Enter; \\n in it is a line break. An empty line or Ctrl-D ends.")
    answers: list[str] = []
    with generator.engine.generation_mode():
        while text := _ask():
            numbered = generator.with_seed(generator.decoding.seed + len(answers))  # the same text twice: two draws
            answers.append(numbered.stream(text, sys.stdout) if generator.streams else numbered.write([text])[0])
            if not generator.streams:
                print(answers[-1], flush=True)
    return {"answers": answers}


def _ask() -> str:
    """A line that was typed, or "" at the end."""
    try:
        return input("> " if sys.stdout.isatty() else "").replace("\\n", "\n").strip()
    except EOFError:
        print()
        return ""
