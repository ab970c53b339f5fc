"""The training loop, once for every engine: which rows when, at which learning rate, and what is written down.

The steps of a run are a pure function of its recipe and data, so that a run that was stopped anywhere goes on exactly
as it would have.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, count
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from loralab.atomic_files import write_json, write_lines
from loralab.config.recipe import Recipe
from loralab.console.progress import Progress, say
from loralab.console.tables import memory
from loralab.data.batches import IGNORED_LABEL, Batch, Rows, plan_batches
from loralab.data.encoded import Trained
from loralab.engine import Engine
from loralab.errors import RunError, Stopped
from loralab.runs import checkpoint
from loralab.runs.checkpoint import Position
from loralab.runs.folder import FIRST_STEP, METRICS, SAMPLES, VALIDATION, resume_command
from loralab.runs.record import read_lines
from loralab.runs.validation_lines import Line, best_of
from loralab.training.lr_schedule import rate_at
from loralab.training.text_samples import TextSample, samples_in_words
from loralab.training.trackers import Trackers, eval_values, open_trackers, train_values
from loralab.training.validation import Validator, best_step, news, run_out


@dataclass(frozen=True)
class TrainingResult:
    """Steps, time and validations of a training."""

    steps: int
    planned: int
    """Steps that the recipe's epochs have; early stopping leaves some."""
    kept: int
    """The step whose weights the model has now."""
    stopped: str | None
    """Why it took less steps than planned: "patience" or "max_minutes"; None where it took all."""
    seconds: float
    """Time of the steps; validations are not counted."""
    tokens_per_second: float
    """Real source and target tokens; padding is not counted."""
    validations: tuple[Line, ...]


def plan_epochs(recipe: Recipe, encoded: Trained) -> list[list[list[Rows]]]:
    """For each epoch the batches of each of its steps; a step accumulates several where the recipe says so.

    With `training.max_steps` there are as many epochs as that takes, the last of which may not be taken to its end.
    """
    training, epochs = recipe.training, list[list[list[Rows]]]()
    for epoch in range(training.epochs) if training.max_steps is None else count():
        if training.max_steps is not None and sum(map(len, epochs)) >= training.max_steps:
            break
        rows = encoded.rows_of(epoch)
        places = plan_batches(
            *encoded.lengths_of(rows),
            tokens_per_batch=training.token_budget,
            batch_size=training.batch_size,
            seed=training.one_seed,
            epoch=epoch,
        )
        batches = [rows[each] for each in places]
        epochs.append(
            [batches[start : start + training.accumulate] for start in range(0, len(batches), training.accumulate)]
        )
    return epochs


def plan_steps(recipe: Recipe, encoded: Trained) -> list[list[Rows]]:
    """The batches of every step that the recipe wants."""
    return [step for epoch in plan_epochs(recipe, encoded) for step in epoch][: recipe.training.max_steps]


def run_steps(
    engine: Engine, recipe: Recipe, encoded: Trained, run: Path, validator: Validator | None
) -> TrainingResult:
    """Takes every step that is still to be taken; a line of metrics.jsonl each, a line of validation.jsonl each validation.

    Raises:
        Stopped: Ctrl-C or a termination; the checkpoint of the last step has been written.
        RunError: the loss is not finite, or a checkpoint cannot be written.
    """
    epochs = plan_epochs(recipe, encoded)
    steps = [step for epoch in epochs for step in epoch][: recipe.training.max_steps]
    ends = list(accumulate(map(len, epochs)))
    position = saved = checkpoint.restore(run, engine)
    progress = Progress("train", len(steps), done=position.step)

    def stop_if_asked() -> None:
        if stopped.is_set():
            done = f"Stopped after step {position.step} of {len(steps)}."
            raise Stopped(f"{done} Go on with: {resume_command(run)}")

    with _journal(recipe, run, position) as journal, _stop_signals() as stopped:
        try:
            while True:
                last = position.step == len(steps) or _out_of_time(recipe, position)
                if validator is not None and validator.due(position.step, ends, position.validations, last):
                    line = validator.line(engine, position.step, ends, stop_if_asked)
                    written = validator.write_on(engine, stop_if_asked)
                    position = replace(position, validations=(*position.validations, line))
                    journal.validation(position.validations)
                    journal.samples(position.step, written)
                    progress.say(
                        "\n".join([news(position.validations, recipe.validation.metric), *samples_in_words(written)])
                    )
                if position != saved and _worth_saving(recipe, position):
                    checkpoint.save(run, engine, position, best_step(recipe, position.validations))
                    saved = position
                if last or run_out(position.validations, recipe.validation):
                    break
                rows = steps[position.step]
                position, line = _take(engine, recipe, encoded, rows, position, len(steps), run)
                journal.step(line)
                progress.update(position.step, *_notes(engine, recipe, position, line))
                stop_if_asked()
        except Stopped:
            if position != saved:
                checkpoint.save(run, engine, position, best_step(recipe, position.validations))
            raise
        if position != saved and _out_of_time(recipe, position):
            checkpoint.save(run, engine, position, best_step(recipe, position.validations))
    return _end(engine, recipe, run, position, len(steps))


def _out_of_time(recipe: Recipe, position: Position) -> bool:
    """Tells whether steps and validations have taken the minutes that the recipe gives them."""
    minutes = recipe.training.max_minutes
    spent = position.seconds + sum(line["seconds"] for line in position.validations)
    return minutes is not None and spent >= 60 * minutes


def _take(
    engine: Engine,
    recipe: Recipe,
    encoded: Trained,
    rows: list[Rows],
    before: Position,
    total: int,
    run: Path,
) -> tuple[Position, Line]:
    """One step: where the loop stands after it, and its line of metrics.jsonl."""
    batches = [encoded.collate(each, engine.pad_id) for each in rows]
    rate, started = rate_at(before.step, total, recipe.optimizer), time.perf_counter()
    if before.step:
        result = engine.train_step(batches, rate)
    else:
        with engine.profile() as watched:
            result = engine.train_step(batches, rate)
        write_json(run / FIRST_STEP, {**asdict(watched), "batches": [_shape(batch) for batch in batches]})
    if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
        raise RunError(_not_finite(engine, encoded, batches, before.step + 1, run))
    seconds = time.perf_counter() - started
    tokens = sum(batch.num_source_tokens + batch.num_target_tokens for batch in batches)
    after = replace(before, step=before.step + 1, tokens=before.tokens + tokens, seconds=before.seconds + seconds)
    line = {"step": after.step, "loss": result.loss, "learning_rate": rate, "grad_norm": result.grad_norm}
    speed = round(tokens / seconds, 1)
    return after, line | {"tokens": after.tokens, "seconds": round(after.seconds, 3), "tokens_per_second": speed}


def _shape(batch: Batch) -> dict[str, Any]:
    """Returns how large it is; `longest` is that of source and target of one row together."""
    source, target = batch.source_mask.sum(axis=1), (batch.labels != IGNORED_LABEL).sum(axis=1)
    return {
        "rows": len(batch.rows), "source": batch.source_ids.shape[1], "target": batch.labels.shape[1],
        "longest": int((source + target).max()), "padded": not bool(batch.source_mask.all()),
        "target_tokens": batch.num_target_tokens,
    }  # fmt: skip


def _worth_saving(recipe: Recipe, position: Position) -> bool:
    """Every so many steps; and where a new best is to be kept, before the next step changes it."""
    new_best = position.validations and position.step == best_step(recipe, position.validations)
    return bool(new_best) or position.step % recipe.training.save_every == 0


def _notes(engine: Engine, recipe: Recipe, position: Position, line: Line) -> Iterator[str]:
    """Returns what the progress line says of a step, the dispensable last."""
    yield f"loss {line['loss']:.3f}"
    yield f"lr {line['learning_rate']:.1e}".replace("e-0", "e-")
    speed = position.tokens / max(position.seconds, 1e-9)
    yield f"{speed / 1000:.0f}k tok/s" if speed >= 10_000 else f"{speed:,.0f} tok/s"
    if (best := best_of(position.validations, recipe.validation.metric)) is not None:
        yield f"best {best[recipe.validation.metric]:.3f}"
    yield memory(engine.peak_memory())


def _end(engine: Engine, recipe: Recipe, run: Path, position: Position, planned: int) -> TrainingResult:
    """Says why no step is taken any more, and goes back to the best weights where the recipe asks for them."""
    stopped = None
    if position.step < planned:
        stopped = "patience" if run_out(position.validations, recipe.validation) else "max_minutes"
        patience, minutes = recipe.validation.patience, recipe.training.max_minutes
        reasons = {
            "patience": f"{patience} validations without a better one.",
            "max_minutes": f"training.max_minutes {minutes} are over. Go on with: "
            f"{resume_command(run)} training.max_minutes={2 * (minutes or 1):g}",
        }
        say(f"Stopped early after step {position.step} of {planned}: {reasons[stopped]}")
    kept = best_step(recipe, position.validations) or position.step
    if kept != position.step:
        checkpoint.restore_weights(run, engine, kept)
        say(f"The weights are those of step {kept}, the best validation.")
    speed = position.tokens / max(position.seconds, 1e-9)
    return TrainingResult(position.step, planned, kept, stopped, position.seconds, speed, position.validations)


def _not_finite(engine: Engine, encoded: Trained, batches: list[Batch], step: int, run: Path) -> str:
    numbers = encoded.numbers_of(np.concatenate([batch.rows for batch in batches]))
    return (
        f"Step {step}: the loss or its gradient is not a finite number. {engine.diagnose(batches)} "
        f"The batch holds the training rows {numbers}. "
        f"A lower optimizer.learning_rate, or model.dtype=float32, may help. {checkpoint.describe_last(run)}"
    )


class Journal:
    """Writes a run's steps and validations to its two files and its trackers."""

    def __init__(self, run: Path, log: TextIO, trackers: Trackers) -> None:
        self.run, self.log, self.trackers = run, log, trackers

    def step(self, line: Line) -> None:
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()
        self.trackers.log(line["step"], train_values(line))

    def samples(self, step: int, written: Sequence[TextSample]) -> None:
        """Returns what the model wrote at a validation, after what it wrote before."""
        if written:
            lines = read_lines(self.run / SAMPLES) if (self.run / SAMPLES).exists() else []
            write_lines(self.run / SAMPLES, [*lines, *({"step": step, **asdict(each)} for each in written)])

    def validation(self, lines: Sequence[Line]) -> None:
        """All of them so far; the last is new."""
        write_lines(self.run / VALIDATION, lines)
        self.trackers.log(lines[-1]["step"], eval_values(lines[-1]))


@contextmanager
def _journal(recipe: Recipe, run: Path, position: Position) -> Iterator[Journal]:
    """Both files cut back to what the checkpoint knows of, and the trackers told so."""
    file = run / METRICS
    lines = [line for line in _whole_lines(file) if line["step"] <= position.step] if file.exists() else []
    write_lines(file, lines)
    if position.validations or (run / VALIDATION).exists():
        write_lines(run / VALIDATION, position.validations)
    if (run / SAMPLES).exists():
        measured = {line["step"] for line in position.validations}
        write_lines(run / SAMPLES, [line for line in read_lines(run / SAMPLES) if line["step"] in measured])
    with (
        open_trackers(recipe, run, lines, position.validations) as trackers,
        file.open("a", encoding="utf-8") as log,
    ):
        yield Journal(run, log, trackers)


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """Every line but a last one that was cut off when the process died."""
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and a termination set; a second Ctrl-C stops at once."""
    stopped = threading.Event()

    def stop(number: int, _: object) -> None:
        if stopped.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        say("\nStopping after this step; press Ctrl-C again to stop at once.")
        stopped.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
