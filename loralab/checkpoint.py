"""Checkpoints of a run in progress: all that is needed to go on as if nothing had happened.

    RUN/checkpoints/step-00000120/   state.safetensors (the engine's tensors), position.json (where the loop stands)

A checkpoint is written beside its place and moved there when it is whole, so that one with its name is always good,
whenever the process is killed. The last two are kept. A run folder is locked while a process works in it; the system
frees the lock of a process that has died.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from loralab.engine import Engine
from loralab.errors import RunError

FORMAT, KEPT = 1, 2
FOLDER, STATE, POSITION, LOCK = "checkpoints", "state.safetensors", "position.json", ".lock"


@dataclass(frozen=True)
class Position:
    """Where the loop stands."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Real tokens seen."""
    seconds: float = 0.0
    """Spent training, over all lives of the run."""


def save(run: Path, engine: Engine, position: Position) -> Path:
    """Writes a checkpoint and removes all but the last two.

    Raises:
        RunError: it could not be written (a full disk); the checkpoints from before are still there.
    """
    place = run / FOLDER / f"step-{position.step:08}"
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
        kept = (
            f"The checkpoint of step {finished[-1].name[5:].lstrip('0')} is whole"
            if (finished := _finished(run))
            else "There is none yet"
        )
        raise RunError(
            f"A checkpoint could not be written to {place} ({error}). {kept}; make room and go on with --resume."
        ) from error
    for old in _finished(run)[:-KEPT]:
        shutil.rmtree(old)
    return place


def restore(run: Path, engine: Engine) -> Position:
    """Puts the engine back to the last checkpoint; the start where there is none.

    Raises:
        RunError: the checkpoint is of another version of loralab.
    """
    finished = _finished(run)
    if not finished:
        return Position()
    stored = json.loads((finished[-1] / POSITION).read_text(encoding="utf-8"))
    if stored.pop("format") != FORMAT:
        raise RunError(
            f"{finished[-1]} is a checkpoint of another version of loralab; this one reads format {FORMAT}. Start the run anew."
        )
    engine.load_state(finished[-1] / STATE)
    return Position(**stored)


def remove(run: Path) -> None:
    """Removes all checkpoints: the run has finished."""
    shutil.rmtree(run / FOLDER, ignore_errors=True)


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
