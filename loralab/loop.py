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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from loralab import checkpoint
from loralab.checkpoint import Position
from loralab.config import Recipe
from loralab.data.batches import Batch, Rows, collate, plan_batches
from loralab.data.encode import EncodedSplit
from loralab.engine import Engine
from loralab.errors import RunError, Stopped
from loralab.progress import Progress, say
from loralab.run import METRICS, write_lines
from loralab.schedule import rate_at


@dataclass(frozen=True)
class Course:
    """What the loop measured of itself."""

    steps: int
    seconds: float
    tokens_per_second: float
    """Real source and target tokens; padding is not counted."""


def plan_steps(recipe: Recipe, encoded: EncodedSplit) -> list[list[Rows]]:
    """The batches of every step of every epoch; a step accumulates several where the recipe says so."""
    training, steps = recipe.training, []
    for epoch in range(training.epochs):
        batches = plan_batches(
            encoded.source_lengths,
            encoded.target_lengths,
            tokens_per_batch=training.token_budget,
            batch_size=training.batch_size,
            seed=training.seed,
            epoch=epoch,
        )
        steps += [batches[start : start + training.accumulate] for start in range(0, len(batches), training.accumulate)]
    return steps


def run_steps(engine: Engine, recipe: Recipe, encoded: EncodedSplit, run: Path) -> Course:
    """Takes every step that is still to be taken; a line of metrics.jsonl each.

    Raises:
        Stopped: Ctrl-C or a termination; the checkpoint of the last step has been written.
        RunError: the loss is not finite, or a checkpoint cannot be written.
    """
    steps = plan_steps(recipe, encoded)
    position = checkpoint.restore(run, engine)
    progress = Progress("train", len(steps), done=position.step)
    with _log(run / METRICS, position.step) as log, _stop_signals() as stopped:
        while position.step < len(steps):
            batches = [collate(encoded, rows, engine.pad_id) for rows in steps[position.step]]
            position = _take(engine, recipe, batches, position, len(steps), log, progress)
            if stopped.is_set():
                checkpoint.save(run, engine, position)
                raise Stopped(
                    f"Stopped after step {position.step} of {len(steps)}. Go on with: loralab train {run} --resume"
                )
            if position.step % recipe.training.save_every == 0:
                checkpoint.save(run, engine, position)
    return Course(len(steps), position.seconds, position.tokens / max(position.seconds, 1e-9))


def _take(
    engine: Engine,
    recipe: Recipe,
    batches: list[Batch],
    position: Position,
    total: int,
    log: TextIO,
    progress: Progress,
) -> Position:
    """One step."""
    rate, started = rate_at(position.step, total, recipe.optimizer), time.perf_counter()
    result = engine.train_step(batches, rate)
    if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
        raise RunError(_not_finite(engine, batches, position.step + 1))
    tokens = position.tokens + sum(batch.num_source_tokens + batch.num_target_tokens for batch in batches)
    position = Position(position.step + 1, tokens, position.seconds + time.perf_counter() - started)
    line = {"step": position.step, "loss": result.loss, "learning_rate": rate, "grad_norm": result.grad_norm}
    log.write(json.dumps(line | {"tokens": tokens, "seconds": round(position.seconds, 3)}) + "\n")
    log.flush()
    progress.update(position.step, f"loss {result.loss:.3f}  {tokens / position.seconds:,.0f} tokens/s")
    return position


def _not_finite(engine: Engine, batches: list[Batch], step: int) -> str:
    rows = np.concatenate([batch.rows for batch in batches]) + 1
    return (
        f"Step {step}: the loss or its gradient is not a finite number. {engine.diagnose(batches)} "
        f"The batch holds the training rows {', '.join(map(str, rows.tolist()))} (counted from 1, without the skipped). "
        "A lower optimizer.learning_rate, or model.dtype=float32, may help; the last checkpoint is good."
    )


@contextmanager
def _log(file: Path, step: int) -> Iterator[TextIO]:
    """metrics.jsonl, cut back to the steps that the checkpoint knows of."""
    if file.exists():
        write_lines(file, (line for line in _whole_lines(file) if line["step"] <= step))
    with file.open("a", encoding="utf-8") as log:
        yield log


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
