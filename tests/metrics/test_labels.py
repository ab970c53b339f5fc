"""Labels: what a cell stands for, their order, and what is wrong with those of a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from folders import write_csv, write_jsonl

from loralab.config.data import DataSettings
from loralab.data.columns import row_columns
from loralab.data.readers import Record
from loralab.data.rows import clean_row
from loralab.data.splits import index_split, read_split
from loralab.errors import DataError
from loralab.metrics.labels import Labels, aligned, balance, label_text, settle


def settings(place: Path | str = "x", **others: Any) -> DataSettings:
    return DataSettings(**{"name": str(place), "source": "text", "label": "label", **others})


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("pos", "pos"), (" very  good ", "very good"), (0, "0"), (1.0, "1"), (True, "true"), (None, None),
        (float("nan"), None), ("", ""), (["b", "a", "b"], '["a", "b"]'), ('["b", 1]', '["1", "b"]'), ([], "[]"),
        ("[sic]", "[sic]"),
    ],
)  # fmt: skip
def test_a_cell_as_text(cell: object, text: str | None) -> None:
    assert label_text(cell, "row 1", "label") == text


@pytest.mark.parametrize(
    ("cell", "message"), [(0.5, "holds 0.5 (float)"), ({"a": 1}, "(dict)"), (["a", ""], "empty label")]
)
def test_a_cell_that_is_no_label(cell: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        clean_row(Record(1, "f.jsonl, line 1", {"text": "t", "label": cell}), row_columns(settings()))
    assert "f.jsonl, line 1: column 'label'" in str(caught.value) and message in str(caught.value)


def test_the_order_of_labels() -> None:
    assert settle({"10": 1, "9": 1}, {}, "x").names == ("9", "10")
    assert settle({"pos": 1, "neg": 3}, {}, "x").names == ("neg", "pos")
    assert settle({'["b", "c"]': 1, '["a"]': 1, "[]": 1}, {}, "x") == Labels(("a", "b", "c"), (), multi=True)
    given = {"0": "bad", "1": "good", "neg": "bad"}
    labels = settle({"0": 1, "1": 1}, given, "x")
    assert labels.names == ("bad", "good") and [labels.places(text) for text in ("neg", "1", "good")] == [[0], [1], [1]]


def test_targets() -> None:
    assert Labels(("a", "b"), (("1", "b"),)).targets("1") == [1]
    several = Labels(("a", "b", "c"), multi=True)
    assert several.targets('["a", "c"]') == [1, 0, 1] and several.targets("[]") == [0, 0, 0]
    assert several.named('["c", "a"]') == '["a", "c"]'
    assert Labels.from_json(several.as_json()) == several


@pytest.mark.parametrize(
    ("counts", "given", "message"),
    [
        ({"pos": 7}, {}, "x: of 7 training rows all 7 have the label 'pos', and there is nothing to choose between"),
        ({"[]": 3}, {}, "none has any"),
        ({"pos": 2, '["neg"]': 1}, {}, "1 of 3 rows have a list of labels, the others a single one"),
        (
            {f"id {n}": 1 for n in range(40)},
            {},
            "40 rows have 40 different labels.*Does data.label name the right column",
        ),
        ({"pos": 2, "neg": 3, "meh": 4}, {"pos": "+", "neg": "-"}, r"4 rows have labels .*'meh' \(4 rows\)"),
    ],
)
def test_training_rows_that_teach_no_choice(counts: dict[str, int], given: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        settle(counts, given, "x")


def test_labels_that_were_not_trained_on_are_counted() -> None:
    labels = Labels(("neg", "pos"))
    labels.check({"neg": 3}, "x")
    with pytest.raises(DataError) as caught:
        labels.check({"0": 5, "1": 4, "pos": 1}, "data, validation")
    message = str(caught.value)
    assert "data, validation: 9 rows have labels" in message and "'0' (5 rows), '1' (4 rows)" in message
    assert "Its labels are: neg, pos. Numbers stand in one place and names in the other" in message
    assert "data.labels='{0: neg, …}'" in message


def test_what_is_said_of_uneven_labels() -> None:
    even = balance({"neg": 6, "pos": 4}, Labels(("neg", "pos")), "x")
    assert even == ["x, labels: neg 6 (60 %), pos 4 (40 %)"]
    _, absent = balance({"neg": 9}, Labels(("neg", "pos")), "x")
    assert absent == "x: no row has the label 'pos'."
    _, uneven = balance({"neg": 9, "pos": 1}, Labels(("neg", "pos")), "x")
    assert "x is imbalanced: always 'neg' would be right in 90.0 % of the rows" in uneven


@pytest.mark.parametrize(
    ("names", "base", "order"),
    [
        (("neg", "pos"), ("NEGATIVE", "POSITIVE"), [0, 1]),
        (("neg", "pos"), ("Positive", "Negative"), [1, 0]),
        (("0", "1"), ("NEGATIVE", "POSITIVE"), [0, 1]),
        (("0", "1"), ("LABEL_0", "LABEL_1"), [0, 1]),
        (("b", "a"), ("a", "b"), [1, 0]),
        (("neg", "pos"), ("LABEL_0", "LABEL_1"), None),
        (("neg", "pos"), ("NEGATIVE", "POSITIVE", "NEUTRAL"), None),
        (("1", "2"), ("one", "two"), None),
        (("in", "into"), ("in", "intoxicated"), None),
        (("spam", "ham"), ("s", "sp"), None),
    ],
)
def test_labels_that_are_those_of_a_bases_head(
    names: tuple[str, ...], base: tuple[str, ...], order: list[int] | None
) -> None:
    found = aligned(Labels(names), base)
    assert (found is None) == (order is None)
    if found is not None:
        assert found.names == base and [found.places(name)[0] for name in names] == order


# Rows


def test_rows_have_labels_and_an_index_counts_them(tmp_path: Path, cache: Path) -> None:
    rows = [{"text": f"t{n}", "label": ["neg", "pos"][n % 3 == 0]} for n in range(9)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_csv(tmp_path / "validation.csv", rows[:4])
    assert index_split(settings(tmp_path), "train").label_counts == {"pos": 3, "neg": 6}
    assert read_split(settings(tmp_path), "validation").label_counts == {"pos": 2, "neg": 2}


def test_rows_without_a_label_stop_the_run_or_are_left_out(tmp_path: Path, cache: Path) -> None:
    write_jsonl(
        tmp_path / "train.jsonl",
        [{"text": "a", "label": "x"}, {"text": "b", "label": None}, {"text": "c", "label": "y"}],
    )
    with pytest.raises(DataError, match=r"1 with a missing cell \(row 2\), and data.empty_rows is stop"):
        index_split(settings(tmp_path), "train")
    assert index_split(settings(tmp_path, empty_rows="skip"), "train").label_counts == {"x": 1, "y": 1}


def test_any_rows_of_a_file_that_is_sorted(tmp_path: Path, cache: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t{n}", "label": int(n >= 100)} for n in range(200)])
    first = settings(tmp_path, max_train_rows=60)
    assert read_split(first, "train").label_counts == {"0": 60}
    drawn = first.model_copy(update={"pick_rows": "random"})
    counts = read_split(drawn, "train").label_counts
    assert sum(counts.values()) == 60 and 15 <= counts["0"] <= 45
    numbers = read_split(drawn, "train").numbers
    assert (numbers == index_split(drawn, "train").numbers).all() and (numbers[1:] > numbers[:-1]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "summary"}, "label and target are both given"),
        ({"source": None}, "label needs a source"),
        ({"max_target_length": 20}, "max_target_length means nothing with label"),
        ({"labels": {"0": "a", "1": "a"}}, "labels need at least two names"),
        ({"label": None, "target": "t", "labels": {"0": "a", "1": "b"}}, "data.label, which is not given"),
    ],
)
def test_settings_that_do_not_go_with_labels(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)
