"""A run that is stopped anywhere goes on as if nothing had happened: killed, interrupted, out of disk, or with a second process at work."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from processes import Process, wait_for_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from workshop import loralab

from loralab.runs.record import read_lines

KILLS = int(os.environ.get("LORALAB_KILLS", "5"))  # `make torture` asks for 200
LONG = ["training.epochs=12", "training.save_every=2", "lora.dropout=0.1", "training.accumulate=2"]
LONG += ["validation.every=5", "validation.rows=4", "validation.keep=best", "training.trackers=[tensorboard]"]


def changed(file: Path) -> int:
    """When the file was last written to."""
    return file.stat().st_mtime_ns if file.exists() else 0


@pytest.fixture(scope="module")
def uninterrupted(workshop: Path) -> Path:
    loralab(workshop, "train", "tiny.yaml", *LONG, "--out", "uninterrupted")
    return workshop / "uninterrupted"


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """What must be the same in every life of a run."""
    return {name: value for name, value in line.items() if name not in ("seconds", "tokens_per_second")}


def curves_of(steps: list[dict[str, Any]], validations: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """What a tracker has to hold of a run's own files: name -> (step, value in fp32)."""
    curves = {f"train/{name}": steps for name in ("loss", "learning_rate", "grad_norm")}
    curves["eval/loss"] = validations
    return {
        name: [(line["step"], float(np.float32(line[name.partition("/")[2]]))) for line in lines]
        for name, lines in curves.items()
    }


def curves_in_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads."""
    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    names = [name for name in reader.Tags()["scalars"] if name != "train/tokens_per_second"]
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in names}


def same(a: Path, b: Path) -> None:
    """The same adapter to the bit, the same metrics and validations without gap or repeat, the same answers and scores."""
    weights = [(run / "adapter/adapter_model.safetensors").read_bytes() for run in (a, b)]
    assert weights[0] == weights[1]
    steps, validations = (
        [[untimed(line) for line in read_lines(run / name)] for run in (a, b)]
        for name in ("metrics.jsonl", "validation.jsonl")
    )
    assert steps[0] == steps[1] and [line["step"] for line in steps[0]] == list(range(1, len(steps[0]) + 1))
    assert validations[0] == validations[1]
    assert [line["step"] for line in validations[0]] == [*range(5, len(steps[0]), 5), len(steps[0])]
    assert curves_in_tensorboard(a) == curves_in_tensorboard(b) == curves_of(steps[0], validations[0])
    assert read_lines(a / "predictions.jsonl") == read_lines(b / "predictions.jsonl")
    assert sorted(file.name for file in a.iterdir()) == sorted(file.name for file in b.iterdir())


def live_until_killed(workshop: Path, run: Path, coins: random.Random) -> bool:
    """Begins the run or goes on with it, until some moment after some of its steps; false if it came to its end first."""
    resume, log = ["--resume"] if (run / "recipe.yaml").exists() else [], run / "metrics.jsonl"
    before = changed(log)
    process = Process(workshop, ("train", "tiny.yaml", *LONG, "--out", run.name, *resume))
    while process.running() and changed(log) == before:
        time.sleep(0.005)  # until this life has begun to write
    wait_for_step(process, log, log.read_bytes().count(b"\n") + coins.randrange(-1, 6))
    time.sleep(coins.uniform(0, 0.1))
    if not process.running():
        assert process.wait() == 0, process.errors
        return False
    process.signal(signal.SIGKILL)
    process.wait()
    kept = list((run / "checkpoints").glob("step-????????"))
    assert len(kept) <= 4, "two, the best, and one whose writing has just ended"
    return True


def test_killed_at_random_moments(workshop: Path, uninterrupted: Path) -> None:
    coins, kills = random.Random(0), [0]
    while sum(kills) < KILLS:
        run = workshop / f"killed-{len(kills)}"
        kills.append(0)
        while sum(kills) < KILLS and live_until_killed(workshop, run, coins):
            kills[-1] += 1
        loralab(workshop, "train", run.name, "--resume")
        same(run, uninterrupted)
        assert kills[-1], "the run is long enough to be killed in"
    print(f"{sum(kills)} kills in {len(kills) - 1} runs")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_polite_stop_saves_and_says_how_to_go_on(number: signal.Signals, workshop: Path, uninterrupted: Path) -> None:
    run = workshop / f"stopped-{number.name}"
    process = Process(workshop, ("train", "tiny.yaml", *LONG, "training.save_every=1000", "--out", run.name))
    wait_for_step(process, run / "metrics.jsonl", 10)
    process.signal(number)
    assert process.wait() == 130 and "Traceback" not in process.errors
    assert f"Go on with: loralab train {run.name} --resume" in process.errors
    done = len(read_lines(run / "metrics.jsonl"))
    assert (run / f"checkpoints/step-{done:08}").is_dir(), "the very last step is kept"
    loralab(workshop, "train", run.name, "--resume")
    same(run, uninterrupted)


def test_a_full_disk_leaves_the_last_checkpoint(workshop: Path, uninterrupted: Path) -> None:
    """A limit on the size of files stands for the disk: no further checkpoint fits."""
    run = workshop / "full-disk"
    process = Process(workshop, ("train", "tiny.yaml", *LONG, "--out", run.name))
    wait_for_step(process, run / "metrics.jsonl", 6)
    process.signal(signal.SIGINT)
    process.wait()
    before = sorted(file.name for file in (run / "checkpoints").iterdir())
    process = Process(workshop, ("train", run.name, "--resume"), file_size=30_000)
    assert process.wait() == 2 and "Traceback" not in process.errors
    assert "A checkpoint could not be written" in process.errors
    assert "Make room and go on with --resume" in process.errors
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == before
    loralab(workshop, "train", run.name, "--resume")
    same(run, uninterrupted)


def test_a_second_process_and_other_rows_are_refused(workshop: Path) -> None:
    shutil.copytree(workshop / "data", workshop / "rows")
    process = Process(workshop, ("train", "tiny.yaml", *LONG, "data.name=rows", "--out", "busy"))
    wait_for_step(process, workshop / "busy/metrics.jsonl", 2)
    assert "Another process is at work in busy" in loralab(workshop, "train", "busy", "--resume", code=2).stderr
    process.signal(signal.SIGKILL)
    process.wait()
    with FileLock(workshop / "busy/.lock", timeout=0):
        pass  # the dead process holds nothing
    rows = workshop / "rows/train.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    done = loralab(workshop, "train", "busy", "--resume", code=2)
    assert "busy began with other rows: those that are trained on have changed on disk since" in done.stderr


def test_resume_wants_the_same_recipe(workshop: Path, uninterrupted: Path) -> None:
    done = loralab(workshop, "train", "uninterrupted", "lora.rank=8", "optimizer.learning_rate=1", "--resume", code=2)
    assert "started with another recipe: lora.rank, optimizer.learning_rate changed" in done.stderr
    assert "There is nothing to resume" in loralab(workshop, "train", "tiny.yaml", "--resume", code=2).stderr
    assert "has finished already" in loralab(workshop, "train", "uninterrupted", "--resume").stderr


def test_a_comparison_goes_on_where_it_was_stopped(workshop: Path) -> None:
    out = workshop / "compared"
    process = Process(
        workshop, ("compare", "tiny.yaml", "training.epochs=4", "training.save_every=2", "--out", out.name)
    )
    wait_for_step(process, out / "lora-4/metrics.jsonl", 5)
    process.signal(signal.SIGTERM)  # a background shell may have taught its children to ignore Ctrl-C
    assert process.wait() == 130 and "Go on with: loralab compare compared --resume" in process.errors
    before = (out / "zero-shot/record.json").stat().st_mtime_ns
    results: dict[str, Any] = json.loads(loralab(workshop, "compare", out.name, "--resume", "--json").stdout)
    assert [row["variant"] for row in results["rows"] if not row.get("failed")][:3] == ["zero-shot", "lora-4", "full"]
    assert (out / "zero-shot/record.json").stat().st_mtime_ns == before, "what had finished was kept"


def files_below(folder: Path) -> dict[Path, int]:
    return {file: changed(file) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def on_own_rows(workshop: Path) -> Path:
    """A comparison on rows that may change, whose last variant is still to be run."""
    shutil.copytree(workshop / "data", workshop / "own")
    settings = ["data.name=own", "training.epochs=1"]
    loralab(workshop, "compare", "tiny.yaml", *settings, "--out", "on-own-rows")
    shutil.rmtree(workshop / "on-own-rows/full")
    return workshop / "on-own-rows"


@pytest.mark.parametrize(("split", "what"), [("train", "trained on"), ("validation", "evaluated")])
def test_a_comparison_refuses_rows_that_changed(split: str, what: str, workshop: Path, on_own_rows: Path) -> None:
    """Else one table would hold scores of old and of new rows."""
    rows = workshop / f"own/{split}.jsonl"
    text, before = rows.read_text(), files_below(on_own_rows)
    rows.write_text(text.replace("#Person1#", "#Nobody#"))
    done = loralab(workshop, "compare", "on-own-rows", "--resume", code=2)
    rows.write_text(text)
    run = "lora-4" if split == "train" else "zero-shot"
    assert f"on-own-rows/{run} began with other rows: those that are {what} have changed" in done.stderr
    assert files_below(on_own_rows) == before, "nothing was trained or written"
