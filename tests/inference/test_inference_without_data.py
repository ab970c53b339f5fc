"""What was trained is enough by itself: it answers and merges on a machine that has none of the data, and others can read it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from classifiers import write_rows

from loralab.config.loading import load_recipe
from loralab.errors import RecipeError
from loralab.inference.generate import GenerateRequest, run_request
from loralab.inference.saved_model import evaluate_saved, merge_saved
from loralab.runs.record import read_record
from loralab.training.train import train

TEXT = "Ann: Shall we take lunch at 3? Tom: Yes, number 7 suits me, and the children come along too. " * 12
LENGTHS = ["data.max_source_length=p50", "data.max_target_length=p50"]


@pytest.fixture(scope="module")
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def runs(workshop: Path, umask: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs whose lengths are percentiles, with data of their own; their folder can be moved."""
    place = tmp_path_factory.mktemp("runs")
    shutil.copytree(workshop / "data", place / "data")
    for method in ("lora", "full"):
        settings = [f"training.method={method}", "training.epochs=1", f"data.name={place / 'data'}", *LENGTHS]
        train(load_recipe(workshop / "tiny.yaml", settings), place / method)
    return place


def answers(trained: Path, *overrides: str) -> list[Any]:
    found: list[Any] = run_request(trained, GenerateRequest(texts=(TEXT,)), list(overrides), None)[0]["answers"]
    return found


@pytest.mark.parametrize(("method", "saved"), [("lora", "adapter"), ("full", "model")])
def test_what_was_trained_answers_where_there_is_no_data(method: str, saved: str, runs: Path, tmp_path: Path) -> None:
    expected = answers(runs / method)
    assert expected != answers(runs / method, "data.max_source_length=30"), "the length matters"
    shutil.copytree(runs / method / saved, tmp_path / "copy")
    shutil.copytree(runs / method, tmp_path / "run")
    shutil.move(runs / "data", tmp_path / "hidden")
    try:
        assert answers(tmp_path / "copy") == expected, "what was saved, alone"
        assert answers(tmp_path / "run") == expected, "the run"
        if method == "lora":
            merge_saved(tmp_path / "copy", tmp_path / "merged", None)
    finally:
        shutil.move(tmp_path / "hidden", runs / "data")


def test_edited_data_changes_no_answer(runs: Path) -> None:
    expected = answers(runs / "lora")
    rows = (runs / "data/train.jsonl").read_text()
    short = [json.loads(line) | {"dialogue": "A: Hi.", "summary": "Hi."} for line in rows.splitlines()]
    (runs / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    try:
        assert answers(runs / "lora") == expected
        found, stored = evaluate_saved(runs / "lora", [], None), read_record(runs / "lora")
        assert found["metrics"]["loss"]["value"] == pytest.approx(stored["metrics"]["loss"]["value"], abs=1e-4)
    finally:
        (runs / "data/train.jsonl").write_text(rows)


def test_a_percentile_of_rows_that_are_not_read_is_refused(runs: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"p90 is a percentile of training rows, and no rows are read here. Give a number"
    ):
        answers(runs / "lora", "data.max_source_length=p90")


def test_an_earlier_run_of_all_weights_has_its_lengths_in_its_record(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "full", tmp_path / "run")
    (run / "model/loralab.json").unlink()
    assert answers(run) == answers(runs / "full")


def test_a_classifier_answers_where_there_is_no_data(bases: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "data")
    expected = {}
    for method in ("lora", "full", "none"):
        settings = [f"training.method={method}", f"data.name={tmp_path / 'data'}", "data.max_source_length=p50"]
        train(load_recipe(bases / "bert.yaml", settings), tmp_path / method)
        expected[method] = answers(tmp_path / method)
    shutil.rmtree(tmp_path / "data")
    for trained, method in {
        "lora": "lora",
        "full": "full",
        "none": "none",
        "full/model": "full",
        "lora/adapter": "lora",
    }.items():
        assert answers(tmp_path / trained) == expected[method], trained


def test_what_is_saved_can_be_read_by_others(runs: Path, tmp_path: Path) -> None:
    merge_saved(runs / "lora", tmp_path / "merged", None)
    files = [
        path
        for folder in (runs / "lora", runs / "full", tmp_path / "merged")
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {oct(0o644)}
