"""Checkpoints of a run in progress: all that is needed to go on as if nothing had happened.

    RUN/checkpoints/step-00000120/   state.safetensors (the engine's tensors), position.json (where the loop stands)
    RUN/checkpoints/rows.json        hashes of the rows that the run began with

A checkpoint is written beside its place and moved there when it is whole, so that one with its name is always good,
whenever the process is killed. The last two are kept, and that of the best validation where the recipe keeps the best.
A run folder is locked while a process works in it; the system frees the lock of a process that has died.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loralab.atomic_files import write_json
from loralab.engine import Engine
from loralab.errors import RunError
from loralab.runs.record import read_json

FORMAT, KEPT = 2, 2
FOLDER, STATE, POSITION, ROWS, LOCK = "checkpoints", "state.safetensors", "position.json", "rows.json", ".lock"


@dataclass(frozen=True)
class Position:
    """Position of the training loop."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Real tokens seen."""
    seconds: float = 0.0
    """Spent training, over all lives of the run."""
    validations: tuple[dict[str, Any], ...] = ()
    """Validations so far: the lines of validation.jsonl."""


def save(run: Path, engine: Engine, position: Position, best: int | None = None) -> Path:
    """Writes a checkpoint and removes all but the last two, and but that of the step `best`.

    Raises:
        RunError: it could not be written (a full disk); the checkpoints from before are still there.
    """
    place = _place(run, position.step)
    part = place.with_suffix(".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        engine.save_state(part / STATE)
        (part / POSITION).write_text(json.dumps({"format": FORMAT, **asdict(position)}), encoding="utf-8")
        _to_disk(part)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(part, place)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise RunError(
            f"A checkpoint could not be written to {place} ({error}). {describe_last(run)} Make room and go on with --resume."
        ) from error
    for old in _finished(run)[:-KEPT]:
        if best is None or old != _place(run, best):
            shutil.rmtree(old)
    return place


def describe_last(run: Path) -> str:
    """Returns what there is to go on from, in words."""
    finished = _finished(run)
    return (
        f"The checkpoint of step {int(finished[-1].name[5:])} is whole." if finished else "There is no checkpoint yet."
    )


def restore(run: Path, engine: Engine) -> Position:
    """Puts the engine back to the last checkpoint; the start where there is none.

    Raises:
        RunError: the checkpoint is of another version of loralab.
    """
    finished = _finished(run)
    if not finished:
        return Position()
    stored = read_json(finished[-1] / POSITION)
    if stored.pop("format") != FORMAT:
        raise RunError(
            f"{finished[-1]} is a checkpoint of another version of loralab; this one reads format {FORMAT}. Start the run anew."
        )
    engine.load_state(finished[-1] / STATE)
    return Position(**stored | {"validations": tuple(stored["validations"])})


def restore_weights(run: Path, engine: Engine, step: int) -> None:
    """Puts the engine back to the checkpoint of one step."""
    engine.load_state(_place(run, step) / STATE)


def check_same_rows(run: Path, hashes: dict[str, str]) -> None:
    """Keeps the hashes of a new run's rows, and holds those of a run that goes on against them.

    Raises:
        RunError: they are others than those that the run began with.
    """
    file = run / FOLDER / ROWS
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_json(file, hashes)
        return
    compare_rows(run, began_with(run), hashes)


def began_with(run: Path) -> dict[str, str]:
    """The hashes of the rows of a run that was stopped; none where it had not come so far."""
    file = run / FOLDER / ROWS
    hashes: dict[str, str] = read_json(file) if file.exists() else {}
    return hashes


def compare_rows(run: Path, began: dict[str, str], now: dict[str, str]) -> None:
    """Raises RunError where rows that a run began with are others now."""
    if changed := [name for name in began if began[name] != now.get(name)]:
        raise RunError(
            f"{run} began with other rows: those that are {' and '.join(changed)} have changed on disk since. "
            "Going on would mix the two. Put the old rows back, or begin anew with another --out."
        )


def remove(run: Path) -> None:
    """Removes all checkpoints: the run has finished."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


def _place(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08}"


def _finished(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(place for place in (run / FOLDER).glob("step-*") if not place.suffix)


def _to_disk(folder: Path) -> None:
    """Waits until the files are on the disk: a name must not be there before its content is, should the machine lose its power."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keeps every other process out of the run's folder.

    Raises:
        RunError: another process is at work there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(run / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunError(f"Another process is at work in {run}. Wait for it, or give another --out.") from error
    try:
        yield
    finally:
        lock.release()
        (run / LOCK).unlink(missing_ok=True)


def at_work(run: Path) -> bool:
    """Tells whether a process works in the run's folder now; the file of a lock may outlive its process, the lock does not."""
    from filelock import FileLock, Timeout

    if not (run / LOCK).exists():
        return False
    try:
        with FileLock(run / LOCK, timeout=0):
            return False
    except Timeout:
        return True
