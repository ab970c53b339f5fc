"""Trainings that a number of steps or of minutes ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workshop import loralab

from loralab.config.loading import load_recipe
from loralab.errors import RecipeError
from loralab.runs.record import read_lines, read_record
from loralab.training import loop
from loralab.training.train import train

EACH = ["validation.every=epoch", "validation.rows=2", "training.save_every=100"]


def test_steps_are_counted_in_the_place_of_epochs(workshop: Path, tmp_path: Path) -> None:
    """Rows are passed as often as that takes; the learning rate falls to its end; the last validation is of the last step."""
    whole, _ = train(load_recipe(workshop / "tiny.yaml", [*EACH, "training.epochs=3"]), tmp_path / "whole")
    total = len(read_lines(whole / "metrics.jsonl"))
    wanted = total - 1
    run, record = train(load_recipe(workshop / "tiny.yaml", [*EACH, f"training.max_steps={wanted}"]), tmp_path / "run")
    steps = read_lines(run / "metrics.jsonl")
    assert record["steps"] == len(steps) == wanted and "stopped" not in record
    assert [line["tokens"] for line in steps] == [line["tokens"] for line in read_lines(whole / "metrics.jsonl")][
        :wanted
    ]
    epochs = [line["epoch"] for line in read_lines(run / "validation.jsonl")]
    assert epochs[:2] == [1, 2] and 2 < epochs[2] < 3
    planned = json.loads(loralab(workshop, "plan", "tiny.yaml", f"training.max_steps={wanted}", "--json").stdout)
    assert {row["steps"] for row in planned["variants"] if row["method"] != "none"} == {wanted}
    with pytest.raises(RecipeError, match=r"training\.epochs has no effect with training\.max_steps"):
        load_recipe(workshop / "tiny.yaml", ["training.epochs=2", "training.max_steps=3"])


def test_time_is_over_and_given_again(workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as a training does: validated, saved, verified, evaluated; with more time it ends where it would have without a limit."""
    settings = [*EACH, "training.epochs=3", "model.dropout=0.1"]
    whole, expected = train(load_recipe(workshop / "tiny.yaml", settings), tmp_path / "whole")
    over = loop._out_of_time
    monkeypatch.setattr(loop, "_out_of_time", lambda recipe, position: over(recipe, position) or position.step >= 3)
    recipe = load_recipe(workshop / "tiny.yaml", [*settings, "training.max_minutes=100"])
    run, record = train(recipe, tmp_path / "run")
    assert record["steps"] == 3 and record["stopped"] == "max_minutes" and record["proof"]["reloaded_equal"]
    assert read_lines(run / "validation.jsonl")[-1]["step"] == 3 and record["metrics"]
    assert train(recipe, run, resume=True)[1] == read_record(run), "not without more time"
    monkeypatch.setattr(loop, "_out_of_time", over)
    more = load_recipe(workshop / "tiny.yaml", [*settings, "training.max_minutes=200.0"])
    _, record = train(more, run, resume=True)
    assert record["steps"] == expected["steps"] and "stopped" not in record
    weights = [folder / "adapter/adapter_model.safetensors" for folder in (run, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    losses = [[line["loss"] for line in read_lines(folder / "metrics.jsonl")] for folder in (run, whole)]
    assert losses[0] == losses[1] and not list(run.glob("checkpoint*"))


def test_the_clock_ends_a_training_by_command(workshop: Path) -> None:
    few = [*EACH, "training.epochs=500", "training.max_minutes=0.02", "--out", "timed"]
    done = loralab(workshop, "train", "tiny.yaml", *few, "--json")
    steps = json.loads(done.stdout)["steps"]
    assert (
        "training.max_minutes 0.02 are over. Go on with: loralab train timed --resume training.max_minutes=0.04"
        in done.stderr
    )
    assert read_record(workshop / "timed")["stopped"] == "max_minutes"
    again = loralab(workshop, "train", "timed", "--resume", "training.max_minutes=0.04", "--json")
    assert json.loads(again.stdout)["steps"] > steps
