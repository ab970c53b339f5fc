"""Measuring a model while it is trained, on rows of the validation split; which measurement is the best, and when to stop.

A validation is one line of validation.jsonl: the step after which it was made, the epochs done by then, the loss in nats
per target token, the scores of the generated answers, and the seconds that it took. Training goes on from it as if it
had not been made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loralab.config.generation import Decoding
from loralab.config.recipe import Recipe, ValidationSettings
from loralab.console.progress import Progress, say
from loralab.data.encoded import Encoded
from loralab.data.sequence_packing import PackedSplit
from loralab.data.sources import local_path, splits_of
from loralab.data.splits import Split, read_split
from loralab.engine import Engine
from loralab.errors import DataError, RecipeError
from loralab.runs.validation_lines import Line, best_of
from loralab.tasks import task_of
from loralab.tasks.task import Task, row_losses
from loralab.training.text_samples import TextSample, sample_texts

SPLIT = "validation"


@dataclass(frozen=True)
class Choosing:
    """The rows that are measured on."""

    rows: Split
    held_out: int
    """Number of first training rows that they are; 0 where they are the validation split's."""


@dataclass(frozen=True)
class Validator:
    """The rows, and what is measured on them."""

    settings: ValidationSettings
    choosing: Choosing
    encoded: Encoded
    decoding: Decoding
    task: Task

    def measure(self, engine: Engine, check: Callable[[], None]) -> Line:
        """Column -> value over all rows; None for a number that is not finite. `check` is called now and then, and may raise."""
        rows, metrics = self.choosing.rows, self.settings.metrics
        progress = Progress("validate", self.task.num_validated(rows, self.encoded, metrics), transient=True)

        def on_done(done: int) -> None:
            progress.update(done)
            check()

        with engine.preserve_rng():
            values = self.task.validate(engine, metrics, self.decoding, rows, self.encoded, on_done)
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def write_on(self, engine: Engine, check: Callable[[], None]) -> list[TextSample]:
        """The beginnings of some of the texts, and how the model goes on; none where the recipe asks for none."""
        if not self.settings.samples:
            return []
        assert isinstance(self.encoded, PackedSplit)
        with engine.preserve_rng():
            return sample_texts(engine, self.encoded, self.settings.samples, self.decoding, lambda done: check())

    def loss(self, engine: Engine) -> float | None:
        """Nats per target token over all rows; None where it is not finite."""
        loss = float(row_losses(engine, self.encoded, lambda done: None).sum() / self.encoded.target_tokens.sum())
        return loss if math.isfinite(loss) else None

    def due(self, step: int, epoch_ends: Sequence[int], validations: Sequence[Line], last: bool) -> bool:
        """Tells whether the model is to be measured after this step: it is time to, or it is the last one, and it has not been done."""
        if validations and validations[-1]["step"] == step:
            return False
        if self.settings.every is None:
            return False
        if isinstance(self.settings.every, int):
            return step > 0 and (step % self.settings.every == 0 or last)
        return step > 0 and (step in epoch_ends or last)

    def line(self, engine: Engine, step: int, epoch_ends: Sequence[int], check: Callable[[], None]) -> Line:
        """Measures; returns the line of validation.jsonl."""
        started = time.perf_counter()
        values = self.measure(engine, check)
        place = {"step": step, "epoch": round(epochs_done(step, epoch_ends), 4)}
        return place | values | {"seconds": round(time.perf_counter() - started, 3)}


def epochs_done(step: int, epoch_ends: Sequence[int]) -> float:
    """1.5 in the middle of the second epoch."""
    whole = sum(end <= step for end in epoch_ends)
    if whole == len(epoch_ends):
        return whole
    begin = epoch_ends[whole - 1] if whole else 0
    return whole + (step - begin) / (epoch_ends[whole] - begin)


def best_step(recipe: Recipe, validations: Sequence[Line]) -> int | None:
    """The step whose weights are to be kept beside the last ones; None where the recipe keeps no best."""
    best = best_of(validations, recipe.validation.metric) if recipe.validation.keep == "best" else None
    return None if best is None else int(best["step"])


def run_out(validations: Sequence[Line], settings: ValidationSettings) -> bool:
    """Tells whether the last `patience` validations have brought nothing better."""
    if settings.patience is None:
        return False
    best = best_of(validations, settings.metric)
    since = len(validations) - (validations.index(best) + 1 if best else 0)
    return since >= settings.patience


def news(validations: Sequence[Line], metric: str) -> str:
    """The last validation in words."""
    line, best = validations[-1], best_of(validations, metric)
    values = "  ".join(f"{name} {_text(line[name])}" for name in line if name not in ("step", "epoch", "seconds"))
    standing = ""
    if best is not None and len(validations) > 1:
        standing = ", the best yet" if best is line else f"; best: {_text(best[metric])} at step {best['step']}"
    return f"validation after step {line['step']}: {values}{standing}"


def _text(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


# Before training


def read_choosing_rows(recipe: Recipe, num_training: int) -> Choosing | None:
    """The rows to measure on; None where the recipe or the data has no use for them.

    Rows that choose a checkpoint are never those that are reported. Where the report is on the validation split, or the
    data has none, the first training rows choose, and are not trained on.

    Args:
        num_training: rows of the training split.
    """
    settings, data = recipe.validation, recipe.data
    if recipe.training.method == "none" or not (settings.every or recipe.chooses):
        return None
    has_split = _has_split(data.name)
    if not recipe.chooses:
        if not has_split:
            say(f"{data.name} has no split {SPLIT!r}: nothing is measured while training.")
            return None
    elif recipe.evaluation.split == SPLIT or not has_split:
        return _hold_out(recipe, num_training, "is reported" if has_split else "is not there")
    bounds = [bound for bound in (settings.rows, data.max_rows(SPLIT)) if bound is not None]
    return Choosing(read_split(data.model_copy(update={"max_validation_rows": min(bounds, default=None)}), SPLIT), 0)


def _hold_out(recipe: Recipe, num_training: int, why: str) -> Choosing:
    """The first rows of the training split, a tenth of it at most."""
    count = min(recipe.validation.rows or num_training, num_training // 10)
    if not count:
        raise RecipeError(
            f"{recipe.chooses} needs rows that choose, the validation split {why}, and {num_training} training rows are too "
            "few to hold out a tenth of them."
        )
    say(
        f"{recipe.chooses}: the split {SPLIT!r} {why}, so the first {count:,} training rows choose and are not trained on."
    )
    if recipe.data.pick_rows == "first":
        return Choosing(read_split(recipe.data.model_copy(update={"max_train_rows": count}), "train"), count)
    rows = read_split(recipe.data, "train")
    return Choosing(replace(rows, examples=rows.examples[:count]), count)


def _has_split(name: str) -> bool:
    try:
        return SPLIT in splits_of(name)
    except DataError:
        if local_path(name) is not None:
            raise
        return True  # a hub that does not list its splits may still give the rows; else reading them says why not


def make_validator(
    recipe: Recipe, choosing: Choosing | None, engine: Engine, lengths: tuple[int, int]
) -> Validator | None:
    """The rows as the engine's model reads them."""
    if choosing is None:
        return None
    task, metric = task_of(recipe.data), recipe.validation.metric
    measured = task.validation_columns(engine.labels)
    if measured is not None and metric not in ("loss", *measured):
        assert engine.labels is not None
        raise RecipeError(
            f"validation.metric {metric} is not measured with {len(engine.labels.names)} labels. "
            f"Choose among loss, {', '.join(measured)}."
        )
    encoded = task.encode_evaluated(engine, choosing.rows, lengths, recipe.training.one_seed)
    return Validator(recipe.validation, choosing, encoded, recipe.evaluation, task)
