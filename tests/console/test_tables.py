"""Tables that are wider than their page, and what is said of columns in which more is not better."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest

from loralab.console.tables import COST, directions, empty_row, layout, markdown_table, terminal_tables
from loralab.metrics import COLUMNS
from loralab.reports.summary import remarks


def made_row(name: str, method: str, **values: float) -> dict[str, Any]:
    """A row whose intervals are ± 1."""
    metrics = {key: {"value": v, "low": v - 1, "high": v + 1, "p_vs_first": 0.5} for key, v in values.items()}
    return {**empty_row(name, method), "total": 10, "trainable": 1, "metrics": metrics}


def wide_rows() -> list[dict[str, Any]]:
    long = "a-variant-with-a-very-long-name-of-many-words-and-no-spaces"
    return [made_row(name, "lora", **dict.fromkeys(COLUMNS, 20.0)) for name in ("short", long)]


def test_layout_puts_what_does_not_fit_below() -> None:
    rows = [[["x"], ["111"], ["22", "2"], ["333"]]]
    expected = "n  aaa  bb\n----------\nx  111  22\n         2\n\nn    c\n------\nx  333"
    assert layout(["n", "aaa", "bb", "c"], rows, width=14) == expected
    assert layout(["n", "aaa", "bb", "c"], rows, width=15).count("\n") == 3
    assert layout(["n", "aaa"], [[["x"], ["111"]]], width=3) == "n  aaa\n------\nx  111"  # a column is never cut


def test_tables_of_all_metrics_fit_a_terminal() -> None:
    text = terminal_tables(wide_rows(), {"short": {"rouge1": 12.34}})
    assert max(map(len, text.splitlines())) <= 80
    lines = text.splitlines()
    headers = [re.split(r"  +", line) for line, below in pairwise(lines) if below.startswith("---")]
    found = [title for header in headers for title in header[1:]]
    assert sorted(found) == sorted([*COST, *(column.title for column in COLUMNS.values())])
    assert all(header[0] == "variant" for header in headers)
    assert "pub. 12.34" in text and text.count("a-variant-with-a-very-long-") == text.count("short")


def test_markdown_of_all_metrics_is_several_tables_of_ten_columns() -> None:
    text = markdown_table(wide_rows(), {})
    tables = [table.splitlines() for table in text.strip().split("\n\n")]
    assert {len(table) for table in tables} == {4}  # titles, a rule, two rows
    counts = [[line.count("|") - 1 for line in table] for table in tables]
    figures = len(COST) + len(COLUMNS)  # each table has the names again
    assert counts == [[1 + min(9, figures - start)] * 4 for start in range(0, figures, 9)] and len(counts) > 1
    assert tables[1][2].startswith("| short |")


def test_directions_are_said() -> None:
    said = directions(["loss", "rouge1", "chrf", "copied_3grams"])
    assert said == "Higher is better: ROUGE-1, chrF; lower is better: loss; neither is better: copied 3-grams."
    assert directions(["loss"]) == "Lower is better: loss."


@pytest.mark.parametrize(
    ("name", "beats"), [("rouge1", "high"), ("loss", "low"), ("new_names", "low"), ("length_ratio", None)]
)
def test_beats_is_said_in_the_columns_own_direction(name: str, beats: str | None) -> None:
    first, floor = made_row("first", "none", **{name: 50.0}), made_row("floor", "floor")
    rows = [first, made_row("high", "lora", **{name: 60.0}), made_row("low", "lora", **{name: 40.0}), floor]
    close = made_row("close", "lora", **{name: 51.0})
    said = " ".join(remarks(results_of([*rows, close])))
    assert [row["variant"] for row in [*rows, close] if f"{row['variant']} beats first" in said] == (
        [beats] if beats else []
    )


def test_a_floor_is_one_for_scores_alone() -> None:
    """The source's first turns make up no name and copy everything; no system is worse for it."""
    floor = made_row("lead", "floor", rouge1=30.0, new_names=0.0, copied_3grams=100.0)
    row = made_row("mine", "lora", rouge1=20.0, new_names=50.0, copied_3grams=10.0)
    said = remarks(results_of([row, floor]))
    assert said[-1] == 'mine is UNDER "lead" in ROUGE-1.'
    assert not any("UNDER" in line for line in remarks(results_of([made_row("up", "lora", rouge1=29.0), floor])))


def test_a_loss_is_said_to_be_per_row_of_labels_and_per_token_of_texts() -> None:
    for row, unit in (
        (made_row("x", "head", accuracy=90.0), "row"),
        (made_row("x", "lora", rouge1=9.0), "target token"),
    ):
        assert f"loss: nats per {unit}." in remarks(results_of([row]))[0]


def results_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    evaluated = {"rows": 2, "data": "d", "split": "test", "leaked": 0}
    nothing: dict[str, Any] = {"turns": {}, "failures": {}, "epochs": {}, "samples": [], "next_steps": ()}
    return {"rows": rows, "evaluated": evaluated, "constant": "c", "published": {}, "published_source": "", **nothing}
