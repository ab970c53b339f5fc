"""Lists the runs and comparisons below a folder, with their scores and how to resume what was stopped.

Nothing is asked but what stands in their files (folder.py): a `record.json` or `results.json` is written last, so that a
folder with it is finished; one whose lock is held is running; any other was stopped. Recipes are read as they are,
whatever version of loralab has written them.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from loralab.config.loading import stored_tree
from loralab.console.tables import Cell, layout, memory
from loralab.errors import RunError, nearest_file
from loralab.metrics import COLUMNS
from loralab.runs.checkpoint import FOLDER, at_work
from loralab.runs.folder import OWN_FOLDERS, RECIPE, RECORD, RESULTS, is_comparison, resume_command

NAME, BASE, TITLE = 20, 14, 10  # columns of a terminal, in each of which a longer text is folded


@dataclass(frozen=True)
class Listed:
    """One run or comparison, as far as its files tell."""

    name: str
    """Its folder, seen from the one that was listed."""
    path: str
    method: str | None
    """ "comparison", or a run's training.method."""
    base: str | None
    metric: str | None
    """The first score, or the loss where nothing else was measured."""
    value: float | None
    adapter_bytes: int
    when: str
    """The last change, ISO 8601, local time."""
    state: str
    """finished, running, stopped, "2 failed" (of a comparison's variants), or damaged."""
    go_on: str | None
    """The command that goes on with a stopped one."""


def list_runs(folder: Path) -> list[Listed]:
    """The runs and comparisons at and below a folder, the latest last, each comparison with its runs below it.

    Raises:
        RunError: there is no such folder.
    """
    if not folder.is_dir():
        raise RunError(
            f"There is no folder {folder}.{nearest_file(folder)} Runs are made by `loralab train`; name another folder: loralab runs FOLDER"
        )
    groups = [[_listed(place, folder), *(_listed(run, folder) for run in _inner(place))] for place in _places(folder)]
    return [
        each
        for group in sorted(groups, key=lambda group: (max(each.when for each in group), group[0].name))
        for each in group
    ]


def _places(folder: Path) -> Iterator[Path]:
    """The folders with a recipe, none of which is within another."""
    for place, below, files in os.walk(folder):
        if RECIPE in files:
            below.clear()
            yield Path(place)
        below[:] = sorted(name for name in below if not name.startswith("."))


def _inner(place: Path) -> list[Path]:
    """The runs of a comparison, the first first."""
    if not is_comparison(place):
        return []
    within = [each for each in place.iterdir() if each.is_dir() and each.name not in OWN_FOLDERS]
    return sorted((run for each in within for run in _places(each)), key=lambda run: (_last_change(run), run))


def _last_change(place: Path) -> float:
    """When it ended, or else when its folder was last written to; seconds since 1970."""
    ending = [file for name in (RECORD, RESULTS) if (file := place / name).exists()]
    return max(map(_written, ending or [*place.iterdir(), *(place / FOLDER).glob("*")]))


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # a run that goes on has moved it just now
        return 0.0


def _listed(place: Path, folder: Path) -> Listed:
    name = place.name if place == folder else place.relative_to(folder).as_posix()
    when = datetime.fromtimestamp(_last_change(place)).isoformat(timespec="seconds")
    try:
        return Listed(name, str(place), when=when, **_facts(place))
    except (ValueError, KeyError, TypeError, AttributeError):  # what stands there is not what a run leaves
        return Listed(name, str(place), None, None, None, None, 0, when, "damaged", None)


def _facts(place: Path) -> dict[str, Any]:
    tree = stored_tree(place / RECIPE)
    comparison = is_comparison(place)
    ending = place / (RESULTS if comparison else RECORD)
    record = json.loads(ending.read_text(encoding="utf-8")) if ending.exists() else None
    state = _state(place, comparison, record)
    metrics = {} if comparison or record is None else record["metrics"]
    metric = next((name for name in metrics if name != "loss"), next(iter(metrics), None))
    return {
        "method": "comparison" if comparison else tree.get("training", {}).get("method", "lora"),
        "base": tree["model"]["name"],
        "metric": metric,
        "value": metrics[metric]["value"] if metric else None,
        "adapter_bytes": 0 if record is None else record.get("adapter_bytes", 0),
        "state": state,
        "go_on": resume_command(place) if state not in ("finished", "running") else None,
    }


def _state(place: Path, comparison: bool, record: dict[str, Any] | None) -> str:
    if any(at_work(run) for run in (place, *_inner(place))):
        return "running"
    if record is None:
        return "stopped"
    failures = record["failures"] if comparison else ()
    return f"{len(failures)} failed" if failures else "finished"


# For people.


def report(listed: Sequence[Listed], folder: Path) -> str:
    """A table, and the commands that go on with what was stopped."""
    if not listed:
        return f"There are no runs below {folder.resolve() if folder == Path() else folder}."
    table = layout(["run", "method, base", "score", "saved", "when", "state"], [_cells(each) for each in listed])
    wholes = {each.path for each in listed if each.method == "comparison" and each.state != "finished"}
    commands = [each.go_on for each in listed if each.go_on and not _within(each.path, wholes)]
    return "\n".join(
        [table, *(["", "Go on with what was stopped:"] if commands else []), *(f"  {c}" for c in commands)]
    )


def _within(path: str, wholes: set[str]) -> bool:
    """Tells whether a run is one of these comparisons', which goes on with it."""
    return any(str(parent) in wholes for parent in Path(path).parents)


def _cells(each: Listed) -> list[Cell]:
    base = textwrap.wrap(Path(each.base or "-").name, BASE)
    score = ["-"]
    if each.metric is not None:
        column = COLUMNS.get(each.metric)
        title, digits = (column.title, column.digits) if column else (each.metric, 2)
        score = [*textwrap.wrap(title, TITLE), f"{each.value:.{digits}f}"]
    when = each.when.replace("T", " ")[:16].split()
    return [
        textwrap.wrap(each.name, NAME),
        [each.method or "-", *base],
        score,
        [memory(each.adapter_bytes)],
        when,
        [each.state],
    ]


def as_json(listed: Sequence[Listed], folder: Path) -> dict[str, Any]:
    """For `--json`."""
    return {"folder": str(folder), "runs": [asdict(each) for each in listed]}
