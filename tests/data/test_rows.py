"""What is checked in a row, what the recipe makes of it, and how a single file becomes three splits.

The judges are plain loops over what json reads.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import ROWS, index, read, real_rows, settings, write_csv, write_jsonl

from loralab.data.auto_split import bounds, part_of
from loralab.data.rows import Example, Finding, Seen
from loralab.data.splits import announce
from loralab.errors import DataError
from loralab.evaluation.rows import leaked_rows


def words(text: str) -> str:
    return " ".join(text.split())


# Real rows.


def test_what_is_found_in_samsum(data_folder: Path) -> None:
    """Its empty dialogue, its carriage returns and its repeated rows."""
    rows = real_rows(data_folder / "samsum", "train")
    (empty,) = (number for number, row in enumerate(rows, 1) if row["id"] == "13828807")
    crlf = [n for n, row in enumerate(rows, 1) if "\r\n" in row["dialogue"] + row["summary"]]
    seen: set[tuple[str, ...]] = set()
    repeated = []
    for number, row in enumerate(rows, 1):
        texts = words(row["dialogue"]), words(row["summary"])
        if texts in seen:
            repeated.append(number)
        seen.add(texts)
    got = read(data_folder / "samsum")
    assert len(crlf) / len(rows) > 0.87 and repeated
    assert got.findings == {
        "empty": Finding(1, [empty]),
        "crlf": Finding(len(crlf), crlf[:100]),
        "repeated": Finding(len(repeated), repeated),
    }
    assert len(got) == len(rows) - 1 and empty not in {example.row for example in got}
    for example in got:
        row = rows[example.row - 1]
        assert example.source == row["dialogue"].replace("\r\n", "\n")
        assert example.targets == (row["summary"].replace("\r\n", "\n"),)
    text = announce(got, settings(data_folder / "samsum"))
    assert f"14,731 rows; {len(crlf):,} with CRLF line ends, made LF (rows 1, 2, 3, 4, 5, ...)" in text
    assert f"1 with an empty cell, skipped (row {empty})" in text
    assert f"{len(repeated)} equal to an earlier row, kept (row" in text


@pytest.mark.parametrize("policy", ["keep", "newline", "stop"])
def test_imdbs_html_breaks_are_kept_made_line_ends_or_stop_the_run(policy: str, data_folder: Path) -> None:
    rows = real_rows(data_folder / "imdb", "validation")
    broken = [number for number, row in enumerate(rows, 1) if re.search("<br */?>", row["text"], re.IGNORECASE)]
    columns = {"source": "text", "target": "label_name", "html_breaks": policy}
    assert len(broken) > 1000
    if policy == "stop":
        expected = (
            rf"validation.jsonl.gz: rows {len(broken):,} with HTML breaks \(rows {broken[0]}, .*html_breaks is stop"
        )
        with pytest.raises(DataError, match=expected):
            read(data_folder / "imdb", "validation", **columns)
        return
    got = read(data_folder / "imdb", "validation", **columns)
    assert got.findings["html_breaks"] == Finding(len(broken), broken[:100])
    expected_texts = [row["text"] for row in rows]
    if policy == "newline":
        expected_texts = [text.replace("<br />", "\n").replace("<br>", "\n") for text in expected_texts]
    assert [example.source for example in got] == expected_texts


def test_repeated_rows_are_kept_skipped_or_stop_the_run(data_folder: Path) -> None:
    """DialogSum repeats 595 dialogues, white space apart, seven of them with the summary."""
    rows = real_rows(data_folder / "dialogsum", "train")
    seen: set[tuple[str, str]] = set()
    repeated = []
    for number, row in enumerate(rows, 1):
        if (texts := (words(row["dialogue"]), words(row["summary"]))) in seen:
            repeated.append(number)
        seen.add(texts)
    kept, skipped = index(data_folder / "dialogsum"), index(data_folder / "dialogsum", duplicate_rows="skip")
    assert kept.findings == skipped.findings == {"repeated": Finding(7, repeated)}
    np.testing.assert_array_equal(kept.numbers, np.arange(1, len(rows) + 1))
    np.testing.assert_array_equal(skipped.numbers, np.setdiff1d(kept.numbers, repeated))
    assert len(np.unique(kept.source_hashes)) == len(rows) - 595
    with pytest.raises(
        DataError, match=rf"rows 7 equal to an earlier row .rows {repeated[0]}, .*duplicate_rows is stop"
    ):
        index(data_folder / "dialogsum", duplicate_rows="stop")


def test_rows_that_leak_are_counted(data_folder: Path) -> None:
    training, rows = index(data_folder / "dialogsum"), read(data_folder / "dialogsum", "validation")
    seen = {words(row["dialogue"]) for row in real_rows(data_folder / "dialogsum", "train")}
    assert leaked_rows(training, rows) == sum(words(row.source) in seen for row in rows) == 32


# Hostile rows.


def test_empty_cells_are_passed_over_and_several_references_kept(tmp_path: Path) -> None:
    targets: list[Any] = ["one", "  \n", None, [], ["", "two", None, "three\r\n"], [" "]]
    rows: list[dict[str, Any]] = [{"dialogue": "A: hi", "summary": target} for target in targets]
    rows += [{"dialogue": empty, "summary": "s"} for empty in ("", "\r\n\t", None)]
    rows += [{"summary": "no dialogue"}, {"dialogue": "no summary"}, {}]
    write_jsonl(tmp_path / "train.jsonl", rows)
    got = read(tmp_path)
    assert got.examples == (Example(1, "A: hi", ("one",)), Example(5, "A: hi", ("two", "three\n")))
    assert got.findings == {
        "empty": Finding(5, [2, 4, 6, 7, 8]),
        "missing": Finding(5, [3, 9, 10, 11, 12]),
        "crlf": Finding(1, [5]),
    }
    with pytest.raises(DataError) as raised:
        read(tmp_path, empty_rows="stop")
    message = str(raised.value)
    assert f"{tmp_path / 'train.jsonl'}: " in message
    assert "5 with a missing cell (rows 3, 9, 10, 11, 12), and data.empty_rows is stop" in message
    assert "5 with an empty cell (rows 2, 4, 6, 7, 8), and data.empty_rows is stop" in message


def test_the_first_row_may_lack_a_cell_too(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"dialogue": "no summary"}, {}, {"id": 1, "summary": "s"}, *ROWS])
    got = read(tmp_path)
    assert got.findings["missing"] == Finding(3, [1, 2, 3]) and [row.row for row in got.examples] == [4, 5, 6]
    write_jsonl(tmp_path / "my.jsonl", [{"dialogue": "no summary"}, *ROWS])
    assert sum(len(read(tmp_path / "my.jsonl", split)) for split in ("train", "validation", "test")) == 3


def test_row_numbers_are_line_numbers_and_max_rows_counts_used_rows(tmp_path: Path) -> None:
    lines = ["", json.dumps({"dialogue": "", "summary": "x"}), *(json.dumps(row) for row in ROWS), "  "]
    (tmp_path / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [example.row for example in read(tmp_path)] == [3, 4, 5]
    cut = read(tmp_path, max_train_rows=2)
    assert cut.examples == read(tmp_path).examples[:2] == tuple(index(tmp_path, max_train_rows=2))
    assert cut.findings["empty"] == Finding(1, [2])
    assert read(tmp_path, max_train_rows=99).content_hash == read(tmp_path).content_hash != cut.content_hash


def test_content_hash_tells_texts_apart_and_nothing_else(tmp_path: Path) -> None:
    def content_hash(*rows: tuple[str, Any]) -> str:
        cells = [{"dialogue": source, "summary": target, "id": len(rows)} for source, target in rows]
        write_jsonl(tmp_path / "train.jsonl", cells)
        assert read(tmp_path).content_hash == index(tmp_path).content_hash
        return read(tmp_path).content_hash

    variants = [
        [("a", "b"), ("c", "d")],
        [("c", "d"), ("a", "b")],
        [("a", "bc"), ("c", "d")],
        [("a", ["b", "c"]), ("c", "d")],
        [("ab", "c")],
        [("a", "bc")],
        [("a", "b\nc")],
    ]
    assert len({content_hash(*rows) for rows in variants}) == len(variants)
    assert content_hash(("a", "b"), ("", "x")) == content_hash(("a", ["b"]))


def test_hashes_are_remembered_beyond_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.data.rows.RECENT", 7)
    numbers = np.random.default_rng(0).integers(0, 200, 1000).astype(object) * (2**64 // 200)
    seen, expected = Seen(), set()
    for number in numbers.tolist():
        assert seen.before(number) == (number in expected)
        expected.add(number)
    assert len(seen.sorted) > 100


# One file.


def test_a_single_file_is_parted_by_source(data_folder: Path, tmp_path: Path) -> None:
    """Every row is in one split, equal sources share theirs, about 90/5/5; the same whatever the format."""
    rows = real_rows(data_folder / "samsum", "validation") + real_rows(data_folder / "dialogsum", "train")[:3000]
    rows += [
        {"id": "x", "dialogue": " " + row["dialogue"].replace("\n", " \n"), "summary": "Again."} for row in rows[:300]
    ]
    rows = [{name: row[name] for name in ("id", "dialogue", "summary")} for row in rows]
    file = write_jsonl(tmp_path / "my.jsonl", rows)
    parts = {split: read(file, split) for split in ("train", "validation", "test")}
    numbers = sorted(example.row for part in parts.values() for example in part)
    assert numbers == list(range(1, len(rows) + 1))
    home: dict[str, set[str]] = {}
    for split, part in parts.items():
        for example in part:
            home.setdefault(words(example.source), set()).add(split)
    assert max(map(len, home.values())) == 1
    shares = Counter(split for splits in home.values() for split in splits)
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert shares[split] / len(home) == pytest.approx(share, abs=0.015)  # four deviations of 3,700 sources
    assert leaked_rows(parts["train"], parts["test"]) == leaked_rows(index(file), parts["validation"]) == 0
    assert tuple(index(file)) == parts["train"].examples
    as_csv = write_csv(tmp_path / "my.csv", rows)
    assert {split: read(as_csv, split).content_hash for split in parts} == {
        split: part.content_hash for split, part in parts.items()
    }
    assert "one file, parted by a hash of the source" in announce(parts["test"], settings(file))


def test_a_row_keeps_its_split_when_others_are_added(data_folder: Path, tmp_path: Path) -> None:
    rows = real_rows(data_folder / "dialogsum", "validation")
    few = read(write_jsonl(tmp_path / "few.jsonl", rows[:250]), "test")
    many = read(write_jsonl(tmp_path / "many.jsonl", rows), "test")
    assert 0 < len(few) < len(many) and few.examples == tuple(example for example in many if example.row <= 250)


@pytest.mark.parametrize("count", [3, 4, 7, 20])
def test_a_small_file_has_a_row_in_each_split(count: int, data_folder: Path, tmp_path: Path) -> None:
    rows = real_rows(data_folder / "dialogsum", "validation")[:count]
    file = write_jsonl(tmp_path / "my.jsonl", [{"dialogue": "", "summary": "x"}, *rows, rows[0]])
    sizes = {split: len(read(file, split)) for split in ("train", "validation", "test")}
    assert min(sizes.values()) >= 1 and sum(sizes.values()) == count + 1


def test_two_sources_are_too_few_for_one_file(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "my.jsonl", [ROWS[0], ROWS[1], ROWS[1], {"dialogue": "a", "summary": ""}])
    with pytest.raises(DataError, match=r"my.jsonl: 2 different sources.*at least 3 rows with different ones"):
        read(file)
    write_jsonl(file, [*ROWS, {"summary": "s"}])
    assert sum(len(read(file, split)) for split in ("train", "validation", "test")) == 3
    with pytest.raises(DataError, match=r"my.jsonl, line 1: no column 'text'"):
        read(file, source="text")


def test_parts_begin_where_they_should() -> None:
    """Fixed places where each part gets a source; else ranks."""
    even = (np.arange(1000, dtype=np.uint64) * np.uint64(2**64 // 1000)).astype(np.uint64)
    assert bounds(even, "x") == (int(0.05 * 2**64), int(0.1 * 2**64))
    high = np.arange(2**63, 2**63 + 40, dtype=np.uint64)
    assert bounds(high, "x") == (2**63 + 2, 2**63 + 4)
    assert part_of("any", (0, 0)) == "train" and part_of("any", (2**64, 2**64)) == "test"
