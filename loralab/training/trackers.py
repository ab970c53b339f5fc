"""Curves for TensorBoard and Weights & Biases, with the field's usual names: train/loss, train/learning_rate, eval/loss, eval/rouge2.

Both libraries are extras. What a tracker holds is a copy: the truth is in metrics.jsonl and validation.jsonl. So a run
that is gone on with tells its tracker everything up to its checkpoint again, and what lies after it is forgotten.

    RUN/tensorboard/   event files: `tensorboard --logdir RUN`, or the folder of many runs
    RUN/wandb/         W&B's own files, and run_id: every life of the run is one run there
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from loralab.atomic_files import write_text
from loralab.config.recipe import Recipe
from loralab.console.progress import say
from loralab.errors import RunError
from loralab.runs.folder import recipe_tree

Line = dict[str, Any]
TRAIN = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
NOT_MEASURED = ("step", "epoch", "seconds")


def train_values(line: Line) -> dict[str, float]:
    """A line of metrics.jsonl under the field's names."""
    return {f"train/{name}": line[name] for name in TRAIN}


def eval_values(line: Line) -> dict[str, float]:
    """A line of validation.jsonl under the field's names, without what was not finite."""
    return {f"eval/{name}": value for name, value in line.items() if name not in NOT_MEASURED and value is not None}


class Tracker(Protocol):
    """One place that curves go to."""

    knows_earlier_lives: bool
    """It keeps what it was told before the run was stopped."""

    def log(self, step: int, values: dict[str, float], when: float) -> None:
        """Values after this step; `when` in seconds since 1970."""

    def close(self) -> None: ...


class Trackers:
    """All of a run's trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    def log(self, step: int, values: dict[str, float]) -> None:
        """Tells each of them."""
        for tracker in self.trackers:
            tracker.log(step, values, time.time())


@contextmanager
def open_trackers(recipe: Recipe, run: Path, lines: Sequence[Line], validations: Sequence[Line]) -> Iterator[Trackers]:
    """The recipe's trackers, told what the run has done so far: its lines of metrics.jsonl and validation.jsonl."""
    opened: list[Tracker] = []
    with ExitStack() as stack:
        for name in recipe.training.trackers:
            tracker: Tracker = TensorBoard(run) if name == "tensorboard" else WandB(recipe, run)
            opened.append(stack.enter_context(closing(tracker)))
            if not tracker.knows_earlier_lives:
                _tell_again(tracker, lines, validations)
        yield Trackers(opened)


def _tell_again(tracker: Tracker, lines: Sequence[Line], validations: Sequence[Line]) -> None:
    """As if the run had been trained without a break until now."""
    now, measured = time.time(), {line["step"]: line for line in validations}
    for line in lines:
        when = now - (lines[-1]["seconds"] - line["seconds"])
        tracker.log(line["step"], train_values(line), when)
        if line["step"] in measured:
            tracker.log(line["step"], eval_values(measured[line["step"]]), when)


class TensorBoard:
    """An event file for each life of the run, by TensorBoard's own writer (https://github.com/tensorflow/tensorboard)."""

    knows_earlier_lives = False

    def __init__(self, run: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(run / "tensorboard"), flush_secs=10)
        start = SessionLog(status=SessionLog.START)  # readers forget what the files of earlier lives told them
        self.writer.add_event(Event(wall_time=time.time(), step=0, session_log=start))

    def log(self, step: int, values: dict[str, float], when: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.add_event(Event(wall_time=when, step=step, summary=Summary(value=scalars)))

    def close(self) -> None:
        self.writer.close()


class WandB:
    """One run of Weights & Biases; where it goes is said by its own variables: WANDB_MODE, WANDB_PROJECT, WANDB_NAME, …

    Steps that are done again after a kill come a second time with the same values: W&B takes no line back.
    """

    def __init__(self, recipe: Recipe, run: Path) -> None:
        import wandb

        place = run / "wandb"
        place.mkdir(exist_ok=True)
        if not (place / "run_id").exists():
            write_text(place / "run_id", secrets.token_hex(4))
        name = (place / "run_id").read_text(encoding="utf-8")
        earlier = list(place.glob(f"offline-run-*-{name}"))
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "loralab"),
                name=os.environ.get("WANDB_NAME", run.resolve().name),
                id=name,
                resume="allow",
                dir=run,
                config=recipe_tree(recipe),
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise RunError(
                f"Weights & Biases did not start ({error}). Log in with `wandb login`, set WANDB_MODE=offline, "
                "or take wandb out of training.trackers; then go on with --resume."
            ) from error
        self.knows_earlier_lives = bool(self.run.resumed)
        for folder in earlier if not self.knows_earlier_lives else ():
            shutil.rmtree(folder)  # all of it is told again, and sending both would leave the last alone
        self.run.define_metric("train/global_step")
        self.run.define_metric("*", step_metric="train/global_step")
        offline = f"offline; send it with: wandb sync {Path(self.run.dir).parent}"
        say(f"Weights & Biases: {offline if self.run.offline else self.run.url}")

    def log(self, step: int, values: dict[str, float], when: float) -> None:
        self.run.log({"train/global_step": step, **values})

    def close(self) -> None:
        self.run.finish()
