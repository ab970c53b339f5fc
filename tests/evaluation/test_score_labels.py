"""`loralab score --metrics classification`: how labels are read, which of them are measured, and who belongs together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import write_jsonl

from loralab.errors import DataError
from loralab.evaluation.prediction_files import Columns
from loralab.evaluation.score_files import report, score_files
from loralab.metrics.classification import columns_of
from loralab.metrics.significance import Bootstrap


def labels_file(path: Path, references: Sequence[Any], **systems: Sequence[Any]) -> Path:
    """One row a reference, with the systems' predictions beside it."""
    answers = [dict(zip(systems, row, strict=True)) for row in zip(*systems.values(), strict=True)]
    return write_jsonl(path, [{"reference": text, **row} for text, row in zip(references, answers, strict=True)])


@pytest.mark.parametrize(
    ("references", "a", "b", "count"),
    [
        (["pos", "neg", "pos"], ["pos", "neg", "neg"], ["maybe", "neg", "pos"], 3),
        (["pos", "neg", "pos"], ["pos", "neg", "neg"], ["pos", "", None], 2),
        (["pos", "pos", "pos"], ["pos", "pos", "pos"], ["pos", "neg", "neg"], 2),
    ],
    ids=["a label more", "no answer", "a label less"],
)
def test_systems_are_measured_with_the_labels_of_all(
    references: list[str], a: list[str], b: list[str | None], count: int, tmp_path: Path
) -> None:
    path = labels_file(tmp_path / "f.jsonl", references, prediction_a=a, prediction_b=b)
    results = score_files([path], Columns(), ["classification"])
    measured = [name for name in columns_of(count, multi=False) if name != "ece"]
    assert [list(row["metrics"]) for row in results["rows"]] == [measured, measured]
    found = [row["metrics"]["accuracy"]["value"] for row in results["rows"]]
    right = [sum(map(str.__eq__, references, map(str, each))) for each in (a, b)]
    assert found == pytest.approx([100 * number / len(references) for number in right])
    report(results)


@pytest.mark.parametrize(
    ("references", "predictions", "right"),
    [
        (["pos", " neg", "very  good"], ["pos ", "neg", "very good\n"], 3),
        ([1, 0, 1], [1, 0, 0], 2),
        ([1, 0, True], ["1", 0.0, "true"], 3),
        ([["pos"], ["neg"], ["neg"]], ["pos", "neg", ""], 2),
        ([["b", "a"], [], ["a"]], [["a", "b"], [], '["b"]'], 2),
        ([['["a", "b"]'], ["[]"], ['["a"]']], ['["a", "b"]', "[]", None], 2),
    ],
    ids=["white space", "numbers", "numbers and texts", "lists of references", "lists of labels", "as a run has them"],
)
def test_labels_are_read_as_those_of_training(
    references: list[Any], predictions: list[Any], right: int, tmp_path: Path
) -> None:
    path = labels_file(tmp_path / "f.jsonl", references, prediction=predictions)
    (row,) = score_files([path], Columns(), ["classification"])["rows"]
    assert row["metrics"]["accuracy"]["value"] == pytest.approx(100 * right / 3)


def test_labels_with_probabilities_are_in_their_order_for_all_systems(tmp_path: Path) -> None:
    certain = [{"spam": 0.9, "ham": 0.1}, {"spam": 0.2, "ham": 0.8}]
    rows = [{"references": ["ham"], "source": "s", "prediction": label} for label in ("spam", "ham")]
    sure = [{**row, "probabilities": each} for row, each in zip(rows, certain, strict=True)]
    unsure = [{**row, "prediction": "ham"} for row in rows]
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", each) for name, each in (("sure", sure), ("unsure", unsure))]
    found = [row["metrics"] for row in score_files(paths, Columns(), ["classification"])["rows"]]
    assert [metrics["recall"]["value"] for metrics in found] == [50, 100]  # of ham, the second
    assert all("ece" not in metrics for metrics in found)
    assert "ece" in score_files(paths[:1], Columns(), ["classification"])["rows"][0]["metrics"]


def test_rows_of_labels_are_groups_only_by_a_column(tmp_path: Path) -> None:
    """The interval is that of rows drawn one by one: labels that are the same are no common source."""
    references, given = ["pos", "neg"] * 20, ["pos", "neg", "neg", "pos"] * 10
    path = labels_file(tmp_path / "f.jsonl", references, prediction=given)
    results = score_files([path], Columns(), ["classification"])
    accuracy = results["rows"][0]["metrics"]["accuracy"]
    expected = Bootstrap(range(40)).interval(100.0 * np.array(list(map(str.__eq__, references, given))))
    assert (accuracy["value"], accuracy["low"], accuracy["high"]) == (expected.value, expected.low, expected.high)
    assert "40 rows in 40 groups: each row by itself, as labels and numbers repeat" in " ".join(report(results).split())

    def groups(columns: Columns, **cells: Sequence[Any]) -> int:
        file = labels_file(tmp_path / "g.jsonl", references, prediction=given, **cells)
        return int(score_files([file], columns, ["classification"])["groups"])

    sources = [f"text {row // 2}" for row in range(40)]
    assert groups(Columns(), source=sources) == groups(Columns(group="id"), id=sources) == 20
    assert groups(Columns(), source=["", *sources[:-2], None]) == 2 + 19


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"reference": "a", "prediction": 0.5}, r"line 1: column 'prediction' holds 0.5 \(float\). A label is"),
        ({"reference": None, "prediction": "a"}, "line 1: no reference in column reference"),
        ({"reference": "a", "prediction": " "}, "all 1 predictions in column 'prediction' are empty"),
        ({"reference": ["a", "b"], "prediction": "a"}, "Row 0 has 2 references"),
    ],
)
def test_each_mistake_in_labels_is_told(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        score_files([write_jsonl(tmp_path / "f.jsonl", [row])], Columns(), ["classification"])
