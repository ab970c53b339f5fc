"""Reading what a run has written: JSON, lines of JSON, its record; damage is one clear error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loralab.errors import RunError
from loralab.runs.folder import RECORD, SAVED


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line."""
    with _damage_told(path), path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_json(path: Path) -> Any:
    """Reads one JSON object."""
    with _damage_told(path):
        return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # no JSON, or no UTF-8
        raise RunError(f"{path} is damaged: {error}. Put a whole copy back, or make it anew.") from error


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished run."""
    if not (folder / RECORD).exists():
        raise RunError(f"{folder} holds no {RECORD}: the run there has not finished.")
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or "metrics" not in record:
        raise RunError(f"{folder / RECORD} is damaged: it holds no metrics. Put a whole copy back, or make it anew.")
    return record


def recorded_settings(run: Path) -> dict[str, Any]:
    """Returns what a run's record says of its model: "lengths", and "labels" of a classifier; what is not recorded is left out.

    Where the run has no record, what was trained has a card that says the same.
    """
    from loralab.adapters import files

    file = run / RECORD
    about = read_record(run) if file.exists() else {}
    for name in SAVED:
        about = files.read_card(run / name) | about
    return {key: about[key] for key in ("lengths", "labels") if about.get(key) is not None}
