"""TensorBoard and Weights & Biases, read back from what they have written."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loralab.config.extras import check_extras
from loralab.config.loading import load_recipe
from loralab.config.recipe import Recipe
from loralab.errors import MissingExtra, RunError
from loralab.experiments import compare as comparison
from loralab.experiments.variants import PlannedRun
from loralab.runs.folder import recipe_tree
from loralab.training.trackers import eval_values, open_trackers, train_values

STEPS = [
    {"step": step, "loss": 4 / step, "learning_rate": 1e-3 / step, "grad_norm": 1.5, "tokens": 100 * step,
     "seconds": 2.0 * step, "tokens_per_second": 50.0 + step} for step in range(1, 9)
]  # fmt: skip
VALIDATIONS = [
    {"step": 4, "epoch": 0.5, "loss": 3.0, "rouge2": 5.0, "seconds": 0.5},
    {"step": 8, "epoch": 1.0, "loss": 3.5, "rouge2": None, "seconds": 0.5},
]


def expected(last: int) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value in fp32) of all lines up to a step."""
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
    curves = {f"train/{name}": [(line["step"], line[name]) for line in STEPS[:last]] for name in names}
    for name in ("loss", "rouge2"):
        curves[f"eval/{name}"] = [
            (v["step"], v[name]) for v in VALIDATIONS if v["step"] <= last and v[name] is not None
        ]
    return {name: [(step, float(np.float32(value))) for step, value in points] for name, points in curves.items()}


def recipe(workshop: Path, *trackers: str) -> Recipe:
    return load_recipe(workshop / "tiny.yaml", [f"training.trackers=[{', '.join(trackers)}]"])


def live(settings: Recipe, run: Path, known: int, until: int) -> None:
    """A life of a run: it goes on from the step `known` and ends after the step `until`."""
    before = [line for line in VALIDATIONS if line["step"] <= known]
    with open_trackers(settings, run, STEPS[:known], before) as trackers:
        for line in STEPS[known:until]:
            trackers.log(line["step"], train_values(line))
            for validation in VALIDATIONS:
                if validation["step"] == line["step"]:
                    trackers.log(line["step"], eval_values(validation))


# TensorBoard


def test_tensorboard_shows_one_run_whatever_befell_it(workshop: Path, tmp_path: Path) -> None:
    settings = recipe(workshop, "tensorboard")
    live(settings, tmp_path, 0, 7)
    watching = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    watching.Reload()
    live(settings, tmp_path, 3, 8)  # it was killed after step 7; the last checkpoint was of step 3
    fresh = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    for reader in (fresh, watching):
        reader.Reload()
        assert {
            name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]
        } == expected(8)
    times = [event.wall_time for event in fresh.Scalars("train/loss")]
    assert np.diff(times[:3]) == pytest.approx([2.0, 2.0]), "steps of an earlier life keep their distance in time"


# Weights & Biases


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("ERROR_REPORTING", "false"), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield
    wandb.teardown()  # it reads the variables once


def wandb_records(run: Path) -> Iterator[Any]:
    """The records of the only offline run below, from W&B's file: a header of 7 bytes, then LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content, at, held = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        held, at = held + content[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(held)
            held = b""


def test_weights_and_biases_gets_one_run_whatever_befell_it(offline: None, workshop: Path, tmp_path: Path) -> None:
    settings = recipe(workshop, "wandb")
    for known, until in ((0, 7), (3, 8)):
        live(settings, tmp_path, known, until)
        sys.modules["wandb"].teardown()  # as the end of a process does: it waits until the file is written
    curves: dict[str, list[tuple[int, float]]] = {}
    config, names = {}, set()
    for record in wandb_records(tmp_path):
        if record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            names.add((record.run.run_id, record.run.project, record.run.display_name))
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            for name in values.keys() & expected(8).keys():
                curves.setdefault(name, []).append((values["train/global_step"], float(np.float32(values[name]))))
    assert curves == expected(8)
    assert names == {((tmp_path / "wandb/run_id").read_text(), "loralab", tmp_path.name)}
    assert {key: config[key] for key in recipe_tree(settings)} == recipe_tree(settings)


def test_without_an_account_it_says_what_to_do(
    offline: None, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(RunError, match=r"did not start .* `wandb login`, set WANDB_MODE=offline"):
        live(recipe(workshop, "wandb"), tmp_path, 0, 1)


# Extras


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_an_extra_that_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda library: None if library == name else object())
    recipe = load_recipe("quickstart", ["training.trackers=[tensorboard, wandb]"])
    with pytest.raises(MissingExtra, match=rf"{name} is not installed.*pip install 'loralab\[{name}\]'"):
        check_extras(recipe, trains=True)
    check_extras(recipe, trains=False)  # a finished run is scored and asked without


def test_a_finished_comparison_is_written_anew_without_its_trackers(
    workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(recipe: Recipe) -> None:
        raise InterruptedError("what comes after the libraries")

    monkeypatch.setattr(importlib.util, "find_spec", lambda library: None if library == "wandb" else object())
    monkeypatch.setattr(comparison, "read_evaluation_rows", read)
    (workshop / "done" / "recipes").mkdir(parents=True)
    (workshop / "done" / "recipe.yaml").touch()
    for state, end in (("stopped", MissingExtra), ("finished", InterruptedError)):
        monkeypatch.setattr(PlannedRun, "state", state)
        with pytest.raises(end):
            comparison.compare(recipe(workshop, "wandb"), workshop / "done", resume=True)
