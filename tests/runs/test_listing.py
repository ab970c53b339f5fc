"""`loralab runs`: what lies below a folder, told from its files alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from loralab.atomic_files import write_json
from loralab.config.loading import load_recipe
from loralab.errors import RunError
from loralab.runs.folder import write_recipe
from loralab.runs.listing import Listed, as_json, list_runs, report

BASE = ["model.name=some/where/flan-t5-base"]
LORA = {"metrics": {"loss": {"value": 2.5}, "rouge1": {"value": 40.812}}, "adapter_bytes": 7_100_000}


def make(place: Path, record: dict[str, Any] | None = None, day: int = 1, *overrides: str) -> Path:
    """A run's folder as a run leaves it, on that day of 2020."""
    place.mkdir(parents=True)
    write_recipe(place, load_recipe("flan-t5-base-dialogsum", [*BASE, *overrides]))
    if record is not None:
        write_json(place / "record.json", record)
    return touched(place, day)


def touched(place: Path, day: int) -> Path:
    for path in (*place.iterdir(), place):
        os.utime(path, (1577880000 + day * 86400,) * 2)  # 2020, the first of January, at noon in UTC
    return place


def make_comparison(place: Path, failures: dict[str, str] | None, day: int) -> Path:
    """One with a finished and a stopped run, and one that was replaced."""
    make(place, None, day)
    make(place / "zero-shot", LORA | {"adapter_bytes": 0}, day, "training.method=none")
    make(place / "lora-16/seed-2", None, day)
    make(place / "replaced/lora-16-1", LORA, day)
    (place / "recipes").mkdir()
    if failures is not None:
        write_json(place / "results.json", {"failures": failures})
    return touched(place, day)


def one(folder: Path) -> Listed:
    (listed,) = list_runs(folder)
    return listed


def test_a_finished_run(tmp_path: Path) -> None:
    make(tmp_path / "rank-16", LORA)
    expected = Listed(
        "rank-16", f"{tmp_path}/rank-16", "lora", BASE[0][11:], "rouge1", 40.812, 7_100_000, "", "finished", None
    )
    listed = one(tmp_path)
    assert listed.when.startswith("2020-01-0") and len(listed.when) == 19
    assert as_json([listed], tmp_path)["runs"] == [{**vars(expected), "when": listed.when}]
    assert one(tmp_path / "rank-16") == listed, "also where the folder is the run itself"


def test_the_loss_is_the_score_where_nothing_else_is(tmp_path: Path) -> None:
    make(tmp_path / "pretrained", {"metrics": {"loss": {"value": 2.5}}})
    assert (one(tmp_path).metric, one(tmp_path).value) == ("loss", 2.5)


def test_a_stopped_and_a_running_one(tmp_path: Path) -> None:
    place = make(tmp_path / "it's mine")
    assert (one(tmp_path).state, one(tmp_path).go_on) == (
        "stopped",
        f"loralab train '{tmp_path}/it'\"'\"'s mine' --resume",
    )
    with FileLock(place / ".lock"):
        assert (one(tmp_path).state, one(tmp_path).go_on) == ("running", None)
    (place / ".lock").touch()  # of a process that was killed
    assert one(tmp_path).state == "stopped"


@pytest.mark.parametrize(
    ("failures", "state"),
    [(None, "stopped"), ({}, "finished"), ({"lora-16": "exit code 1", "full": "exit code 1"}, "2 failed")],
)
def test_a_comparison_stands_above_its_runs(failures: dict[str, str] | None, state: str, tmp_path: Path) -> None:
    make(tmp_path / "later", LORA, 9)
    make_comparison(tmp_path / "deep/down", failures, 5)
    listed = list_runs(tmp_path)
    assert [(each.name, each.method, each.state) for each in listed] == [
        ("deep/down", "comparison", state),
        ("deep/down/lora-16/seed-2", "lora", "stopped"),
        ("deep/down/zero-shot", "none", "finished"),
        ("later", "lora", "finished"),
    ]
    go_on = [line for line in report(listed, tmp_path).splitlines() if "--resume" in line]
    within = "train {}/deep/down/lora-16/seed-2" if state == "finished" else "compare {}/deep/down"
    assert go_on == [f"  loralab {within.format(tmp_path)} --resume"], "the whole goes on with its parts"


def test_the_latest_is_the_last_and_folders_without_runs_are_passed_over(tmp_path: Path) -> None:
    for name, day in (("b", 3), ("a", 2), ("c/d", 1)):
        make(tmp_path / name, LORA, day)
    make(tmp_path / ".hidden", LORA)
    (tmp_path / "notes").mkdir()
    assert [each.name for each in list_runs(tmp_path)] == ["c/d", "a", "b"]


DAMAGES = {
    "a recipe that is no YAML": ("recipe.yaml", "model: ["),
    "a recipe that is a list": ("recipe.yaml", "[]"),
    "a recipe without a model": ("recipe.yaml", "name: x"),
    "a recipe of other kinds": ("recipe.yaml", "model: 3"),
    "a record that is cut off": ("record.json", '{"metrics": '),
    "a record of something else": ("record.json", "[1]"),
}


@pytest.mark.parametrize(("file", "text"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_damaged_is_told_and_the_others_are_listed(file: str, text: str, tmp_path: Path) -> None:
    make(tmp_path / "whole", LORA, 1)
    (make(tmp_path / "x", LORA, 2) / file).write_text(text)
    assert [(each.name, each.state) for each in list_runs(tmp_path)] == [("whole", "finished"), ("x", "damaged")]


def test_a_recipe_of_another_version_is_read_as_it_is(tmp_path: Path) -> None:
    place = make(tmp_path / "old", LORA)
    (place / "recipe.yaml").write_text("model: {name: t5, colour: red}\ntraining: {method: head}\n")
    assert (one(tmp_path).method, one(tmp_path).base, one(tmp_path).state) == ("head", "t5", "finished")


TABLE = """\
run                  method, base    score   saved        when     state
------------------------------------------------------------------------
first                        none     loss       -  2020-01-02  finished
                     flan-t5-base    2.500               12:00
a-name-longer-than-          lora  ROUGE-1  7.1 MB  2020-01-03  finished
twenty-letters       flan-t5-base    40.81               12:00
last                         lora        -       -  2020-01-04   stopped
                     flan-t5-base                        12:00

Go on with what was stopped:
  loralab train {}/last --resume"""


def test_the_table_for_people(tmp_path: Path) -> None:
    make(tmp_path / "first", {"metrics": {"loss": {"value": 2.5}}}, 1, "training.method=none")
    make(tmp_path / "a-name-longer-than-twenty-letters", LORA, 2)
    make(tmp_path / "last", None, 3)
    listed = [Listed(**{**vars(each), "when": f"{each.when[:10]}T12:00:00"}) for each in list_runs(tmp_path)]
    assert report(listed, tmp_path) == TABLE.format(tmp_path)


def test_the_widest_table_has_80_columns() -> None:
    scores = ("rougeLsum", 99.99, 999_900_000)
    wide = Listed("n" * 99, "p", "comparison", "b" * 99, *scores, "2020-01-01T12:00:00", "9 failed", None)
    assert max(map(len, report([wide], Path()).splitlines())) <= 80


def test_nothing_there(tmp_path: Path) -> None:
    assert report(list_runs(tmp_path), tmp_path) == f"There are no runs below {tmp_path}."
    with pytest.raises(RunError, match=r"There is no folder nowhere.*loralab runs FOLDER"):
        list_runs(Path("nowhere"))


PROGRAM = """
import sys
from loralab.cli import app
sys.argv[1:] = ["runs", "--json"]
try:
    app()
finally:
    assert "torch" not in sys.modules
"""


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    make(tmp_path / "runs/rank-16", LORA)
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [each["name"] for each in json.loads(done.stdout)["runs"]] == ["rank-16"]
