"""`train`, `compare`, `evaluate`, `plan`, `score` and `generate`, called from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from loralab.api.results import (
    Comparison,
    ComparisonRow,
    Evaluation,
    FileScores,
    GeneratedAnswers,
    Plan,
    TrainingRun,
    metrics_of,
)
from loralab.config.generation import Decoding
from loralab.config.loading import recipe_of, spelt
from loralab.config.recipe import Recipe
from loralab.engine import generate_texts

RecipeLike = str | Path | Mapping[str, Any] | Recipe
"""A shipped name, a file, the settings themselves, or what `load_recipe` gave."""
Overrides = Mapping[str, Any] | Sequence[str]
"""{"lora.rank": 32}, {"lora": {"rank": 32}} or ["lora.rank=32"]."""


def train(
    recipe: RecipeLike, overrides: Overrides = (), *, out: str | Path | None = None, resume: bool = False
) -> TrainingRun:
    """Trains a recipe, saves, verifies and evaluates; the command `loralab train`.

    Args:
        recipe: a shipped name, a file, the settings, or what `load_recipe` gave.
        overrides: settings in the place of the recipe's.
        out: the new run's folder; None takes the next free runs/NAME.
        resume: go on with the run in `out`.

    Raises:
        UserError: something is wrong with the recipe, the data, the model or the folder; the message says what to do.
    """
    from loralab.evaluation.scores_in_words import run_summary
    from loralab.training.train import train as run

    folder, record = run(recipe_of(recipe, overrides), None if out is None else Path(out), resume)
    saved = record.get("saved")
    return TrainingRun(
        text=run_summary(record),
        folder=folder,
        saved=None if saved is None else Path(saved),
        metrics=metrics_of(record["metrics"]),
        steps=record.get("steps", 0),
        seconds=record.get("seconds", 0.0),
        tokens_per_second=record.get("tokens_per_second", 0.0),
        record=record,
    )


def compare(
    recipe: RecipeLike, overrides: Overrides = (), *, out: str | Path | None = None, resume: bool = False
) -> Comparison:
    """Runs every variant of a recipe, each in a process of its own, and compares them; the command `loralab compare`.

    Args:
        recipe: as for `train`, with variants.
        overrides: settings in the place of the recipe's.
        out: the new folder; None takes the next free runs/NAME.
        resume: go on with the comparison in `out`.

    Returns:
        The rows of the table; a variant that failed has no metrics, and its reason stands in `failures`.

    Raises:
        UserError: as `train`.
    """
    from loralab.experiments.compare import compare as run
    from loralab.reports.summary import report

    results = run(recipe_of(recipe, overrides), None if out is None else Path(out), resume)
    rows = [
        ComparisonRow(
            variant=row["variant"],
            method=row["method"],
            metrics=metrics_of(row["metrics"]),
            trainable=row["trainable"],
            total=row["total"],
            seconds=row["seconds"],
            peak_memory_bytes=row["peak_memory_bytes"],
            failed=bool(row.get("failed")),
        )
        for row in results["rows"]
    ]
    return Comparison(report(results), Path(results["out"]), rows, results["failures"], results)


def evaluate(trained: str | Path, overrides: Overrides = (), *, base: str | None = None) -> Evaluation:
    """Scores a run, an adapter or a base, on its own data or other; the command `loralab evaluate`.

    Args:
        trained: a run's folder, an adapter's, a model's, or a hub id.
        overrides: settings in the place of those that it was trained with.
        base: the base model, where it has moved.

    Raises:
        UserError: as `train`.
    """
    from loralab.evaluation.scores_in_words import scores_in_words
    from loralab.inference.saved_model import evaluate_saved

    row = evaluate_saved(Path(trained), spelt(overrides), base)
    return Evaluation(scores_in_words(row), metrics_of(row["metrics"]), row)


def plan(
    recipe: RecipeLike, overrides: Overrides = (), *, measure: bool = False, tokens_per_second: float | None = None
) -> Plan:
    """Says what a recipe will cost and whether it fits this machine, without weights; the command `loralab plan`.

    Args:
        recipe: as for `train`.
        overrides: settings in the place of the recipe's.
        measure: take real steps on random weights, and compare.
        tokens_per_second: of an earlier run, for the hours of this one.

    Raises:
        UserError: as `train`.
    """
    from loralab.planning.plan import PlanOptions
    from loralab.planning.plan import plan as foresee
    from loralab.planning.report import report

    found = foresee(recipe_of(recipe, overrides), PlanOptions(measure, None, tokens_per_second))
    return Plan(report(found), found["variants"], found)


def score(
    files: str | Path | Sequence[str | Path],
    metrics: Sequence[str] = ("rouge",),
    *,
    predictions: Sequence[str] = (),
    references: Sequence[str] = (),
    source: str | None = None,
    group: str | None = None,
) -> FileScores:
    """Scores predictions that are there already, whoever made them; the command `loralab score`.

    Args:
        files: tables with predictions, or runs' folders.
        metrics: rouge, chrf, bleu, classification, regression, …
        predictions: their columns, one for each system; without it those whose name begins with "prediction".
        references: the columns of the references; without it reference, references, target or summary.
        source: the column of what was read.
        group: the column by which rows are resampled together.

    Raises:
        DataError: a file cannot be read, or a column is missing.
    """
    from loralab.evaluation.prediction_files import Columns
    from loralab.evaluation.score_files import report, score_files

    paths = [files] if isinstance(files, str | Path) else files
    results = score_files([Path(file) for file in paths], Columns(predictions, references, source, group), metrics)
    systems = {row["system"]: metrics_of(row["metrics"]) for row in results["rows"]}
    return FileScores(report(results), systems, results["pairs"], results)


def generate(
    model: Any,
    tokenizer: Any = None,
    texts: Sequence[str] | None = None,
    *,
    max_new_tokens: int | None = None,
    beams: int | None = None,
    length_penalty: float | None = None,
    early_stopping: Literal[False, True, "never"] | None = None,
    sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] | None = None,
    seed: int | None = None,
    overrides: Overrides = (),
    base: str | None = None,
    text_pairs: Sequence[str] = (),
) -> Any:
    """GeneratedAnswers texts, with what was trained or with a loaded model.

        loralab.generate("runs/rank-32", ["Tom: Lunch? Ann: At one."])                          with the prompt of its training
        loralab.generate(model, tokenizer, ["Summarize: …"], max_new_tokens=32, beams=4)        texts as they are

    Args:
        model: the folder of a run, an adapter or a model, or a hub id, and then the texts; or what `load_model` gave, with its
            tokenizer and the texts.
        max_new_tokens: the longest answer, in tokens; needed with a loaded model.
        beams: hypotheses of a beam search; 1 is greedy, or samples with `sample`.
        length_penalty, early_stopping: of a beam search, as in Transformers.
        sample: draw each token, from logits divided by `temperature`, from the `top_k` likeliest tokens or the fewest whose
            probabilities reach `top_p`.
        repetition_penalty: above 1 makes tokens that were generated already less likely.
        stop: texts with which an answer ends; it is cut before the first of them.
        seed: of the draws. The same seed gives the same answers; each text has draws of its own.
        overrides: of a folder, settings in the place of those that it was trained with.
        base: of a folder, the base model, where it has moved.
        text_pairs: of a classifier of pairs, the second text of each.

    Returns:
        `GeneratedAnswers` of a folder; a list of texts of a loaded model, which from a decoder-only one are what it adds.

    Raises:
        UserError: a setting is out of its bounds or means nothing with the others, the folder is none of these, or a text is empty.
    """
    given = {key: value for key, value in locals().items() if key in Decoding.model_fields and value is not None}
    if not isinstance(model, str | Path):
        texts_given = {} if texts is None else {"texts": texts}
        return generate_texts(model, tokenizer=tokenizer, **texts_given, **given)
    return _answer(
        Path(model),
        tokenizer if texts is None else texts,
        [*spelt(overrides), *spelt(_evaluation(given))],
        base,
        text_pairs,
    )


def _evaluation(given: Mapping[str, Any]) -> dict[str, Any]:
    return {f"evaluation.{key}": value for key, value in given.items()}


def _answer(
    trained: Path, texts: Sequence[str], overrides: list[str], base: str | None, text_pairs: Sequence[str]
) -> GeneratedAnswers:
    from loralab.inference.generate import GenerateRequest, run_request

    request = GenerateRequest(
        [texts] if isinstance(texts, str) else list(texts), text_pairs=list(text_pairs), as_json=True
    )
    result, text = run_request(trained, request, overrides, base)
    return GeneratedAnswers(text or "", result["answers"])
