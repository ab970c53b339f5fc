"""Running the variants of a comparison, each as a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from loralab.atomic_files import write_text
from loralab.config.loading import to_yaml
from loralab.console.progress import clock, say
from loralab.errors import Stopped
from loralab.experiments.variants import PlannedRun, set_aside, states_of
from loralab.runs.folder import (
    RECIPE,
    RECIPES,
    resume_command,
)

STOPPED = 130  # the exit code of a run that was stopped after saving


def run_all(runs: Sequence[PlannedRun], folder: Path) -> dict[str, str]:
    """Runs what is not there yet; returns what failed, by the run's folder, and why."""
    failures: dict[str, str] = {}
    states = states_of(runs)
    taken: list[float] = []  # seconds of each training so far; what is not trained takes little
    for index, run in enumerate(runs):
        state = states[run.folder]
        if run.after is not None and str(run.after) in failures:
            failures[str(run.folder)] = f"it starts from {run.after.relative_to(folder)}, which failed"
            continue
        left = fmean(taken) * sum(_trains(other) for other in runs[index:]) if taken else 0
        say(f"\n[{index + 1}/{len(runs)}] {run.name}{f', about {clock(left)} left in all' if left else ''}")
        if state == "finished":
            say("It has finished already.")
            continue
        if state == "changed":
            say(f"Its recipe is another now; what was there lies in {set_aside(run.folder, folder)}.")
        started = time.monotonic()
        if failure := _run(run, folder):
            failures[str(run.folder)] = failure
            say(f"{run.name} failed: {failure}. The others go on.")
        elif _trains(run):
            taken.append(time.monotonic() - started)
    return failures


def _trains(run: PlannedRun) -> bool:
    return run.recipe.training.method != "none"


def _run(run: PlannedRun, folder: Path) -> str | None:
    """Runs `loralab train` in a process; why it failed, where it did."""
    recipe_file = folder / RECIPES / f"{run.name.replace('/', '-')}.yaml"
    write_text(recipe_file, to_yaml(run.recipe))
    again = ["--resume"] if (run.folder / RECIPE).exists() else []
    command = [*python_of_loralab(), "train", str(recipe_file), "--out", str(run.folder), "--json", *again]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # a terminal has told it too, other senders have not; it saves its checkpoint and ends
        process.wait()
        code = STOPPED
    if code == STOPPED:
        raise Stopped(f"Stopped in {run.name}. Go on with: {resume_command(folder)}")
    return None if code == 0 else "it was killed; too little memory?" if code == -9 else f"exit code {code}, see above"


def python_of_loralab() -> list[str]:
    """The beginning of a command that runs loralab in a process of its own, without importing from the working folder, in which a
    stranger's json.py may lie. Where loralab itself is imported from there, that folder stays on the path."""
    home = Path(__file__).resolve().parents[2]
    return [sys.executable, *([] if home == Path.cwd() else ["-P"]), "-m", "loralab"]
