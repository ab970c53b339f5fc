"""Rows of files, of folders and of the hub: what is read is what is there, and a broken file is one clear error.

The judges are json, csv and pyarrow.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from folders import ROWS, index, read, real_rows, write_csv, write_jsonl

from loralab.data.rows import Example, Finding
from loralab.data.sources import splits_of
from loralab.errors import DataError

# Sources.


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_real_row_is_read_as_json_reads_it(data_folder: Path, split: str) -> None:
    rows = real_rows(data_folder / "dialogsum", split)
    got = read(data_folder / "dialogsum", split)
    assert got.examples == tuple(Example(n, row["dialogue"], (row["summary"],)) for n, row in enumerate(rows, 1))
    assert (got.split, set(got.findings) - {"repeated"}, len(got)) == (split, set(), len(rows))


def test_formats_agree_in_rows_and_hash(tmp_path: Path) -> None:
    folders = [
        tmp_path / name
        for name in ("jsonl", "gz", "csv", "bom", "csv-gz", "parquet", "tsv", "json", "json-lines", "json-gz")
    ]
    for folder in folders:
        folder.mkdir()
    plain = write_jsonl(folders[0] / "train.jsonl", ROWS).read_bytes()
    (folders[1] / "train.jsonl.gz").write_bytes(gzip.compress(plain))
    write_csv(folders[2] / "train.csv", ROWS)
    reordered = [{name: row[name] for name in ("dialogue", "id", "summary")} for row in ROWS]
    write_csv(folders[3] / "train.csv", reordered, encoding="utf-8-sig")
    (folders[4] / "train.csv.gz").write_bytes(gzip.compress((folders[2] / "train.csv").read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS), folders[5] / "train.parquet")
    with (folders[6] / "train.tsv").open("w", newline="", encoding="utf-8") as file:
        file.write("id\tsummary\tdialogue, of two\n")  # a comma that parts nothing
        csv.writer(file, delimiter="\t").writerows([row["id"], row["summary"], row["dialogue"]] for row in ROWS)
    (folders[7] / "train.json").write_text(json.dumps(ROWS, indent=1), "utf-8")
    (folders[8] / "train.json").write_bytes(plain)
    (folders[9] / "train.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    got = [read(folder, source="dialogue, of two") if folder.name == "tsv" else read(folder) for folder in folders]
    assert got[0].examples[0] == Example(1, 'A: one, "two"\nB: three', ("Numbers.",))
    assert got[0].examples[1].source == ROWS[1]["dialogue"]
    for other in got[1:]:
        assert (other.examples, other.content_hash) == (got[0].examples, got[0].content_hash)


def test_csv_takes_a_document_longer_than_the_default_limit(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [{"dialogue": "long " * 40_000, "summary": "s"}])
    assert read(tmp_path).examples[0].source == "long " * 40_000


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "validation.jsonl", ROWS)
    write_csv(tmp_path / "test.csv", ROWS)
    (tmp_path / "train.jsonl.gz").write_bytes(b"")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "notes.gz").write_bytes(b"")
    assert splits_of(str(tmp_path)) == ["test", "train", "validation"]


GOOD = json.dumps(ROWS[0])
BROKEN = {
    "a missing split": ("test.jsonl", GOOD, ["no split 'train'", "The splits are: test."]),
    "no file at all": ("notes.txt", GOOD, ["no split 'train'", "The splits are: none."]),
    "a missing column": (
        "train.jsonl",
        '{"id": 1, "dialog": "x"}\n{"text": "y"}',
        [
            "train.jsonl, line 1:",
            "no column 'dialogue' (Did you mean 'dialog'?)",
            "no column 'summary'",
            "id, dialog, text",
        ],
    ),
    "a missing column of a csv": ("train.csv", "id,dialogue,sumary\n1,a,b", ["line 2", "Did you mean 'sumary'?"]),
    "an empty file": ("train.jsonl", "", ["train.jsonl: has no rows"]),
    "an empty gz": ("train.jsonl.gz", b"", ["train.jsonl.gz: has no rows"]),
    "an empty csv": ("train.csv", "", ["train.csv: has no rows"]),
    "a csv that is a header": ("train.csv", "dialogue,summary\n", ["train.csv: has no rows"]),
    "empty rows only": (
        "train.jsonl",
        '{"dialogue": "", "summary": "x"}',
        ["each of the 1 rows has an empty 'dialogue'"],
    ),
    "a truncated gz": (
        "train.jsonl.gz",
        gzip.compress("\n".join([GOOD] * 5000).encode(), mtime=0)[:-40],
        ["train.jsonl.gz, after line", "truncated or damaged", "end-of-stream"],
    ),
    "a damaged gz": (
        "train.jsonl.gz",
        gzip.compress(GOOD.encode(), mtime=0)[:-8] + b"\0" * 8,
        ["train.jsonl.gz", "truncated or damaged", "CRC"],
    ),
    "a gz that is none": ("train.jsonl.gz", GOOD, ["after line 0", "Not a gzipped file"]),
    "not JSON": ("train.jsonl", f'{GOOD}\n{GOOD}\n{{"dialogue": "cut o', ["train.jsonl, line 3: not JSON", "cut o"]),
    "JSON too deep": ("train.jsonl", "[" * 200_000, ["line 1: not JSON"]),
    "a list cut off": ("train.json", f"[{GOOD},\n{GOOD}", ["line 2: not JSON: after row 2 stands the end of the file"]),
    "a list with an open object": (
        "train.json",
        f"[\n{GOOD},\n{GOOD[:30]}",
        ["train.json, line 3: not JSON", "is a list of"],
    ),
    "a list without a comma": ("train.json", f"[{GOOD}\n{GOOD}]", ["line 2: not JSON: after row 1 stands '{"]),
    "a list of texts": ("train.json", '["a", "b"]', ["train.json, line 1: a JSON str", "is a list of objects"]),
    "a list that goes on": ("train.json", f"[{GOOD},]", ["train.json, line 1: not JSON"]),
    "a list and more": ("train.json", f"[{GOOD}]\n{GOOD}", ["line 1: not JSON: after the list stands '{"]),
    "an empty list": ("train.json", "[ ]", ["train.json: has no rows"]),
    "one object over several lines": (
        "train.json",
        '{\n"rows": []}',
        ["train.json, line 1: not JSON", "or one object a line"],
    ),
    "two objects on a line": ("train.jsonl", f"{GOOD} {GOOD}", ["line 1: not JSON: after what is whole stands '{"]),
    "not an object": (
        "train.jsonl",
        f"{GOOD}\n[1, 2]",
        ["train.jsonl, line 2: a JSON list, '[1, 2]'", "one JSON object"],
    ),
    "not UTF-8": ("train.jsonl", GOOD.encode() + b'\n{"dialogue": "caf\xe9"}', ["train.jsonl, line 2: not UTF-8"]),
    "a csv not in UTF-8": ("train.csv", b"dialogue,summary\nx,caf\xe9\n", ["train.csv, line 2: not UTF-8"]),
    "half a surrogate pair": (
        "train.jsonl",
        '{"dialogue": "\\ud83d", "summary": "x"}',
        ["train.jsonl, line 1: column 'dialogue' is not Unicode text"],
    ),
    "a number for text": (
        "train.jsonl",
        '{"dialogue": "x", "summary": 7}',
        ["train.jsonl, line 1: column 'summary' holds 7 (int)"],
    ),
    "a list of turns": ("train.jsonl", '{"dialogue": ["x"], "summary": "y"}', ["column 'dialogue' holds ['x'] (list)"]),
    "a number among references": ("train.jsonl", '{"dialogue": "x", "summary": ["y", 7]}', ["'summary' holds 7 (int)"]),
    "a csv row too long": ("train.csv", "dialogue,summary\na,b\na,b,c\n", ["line 3: 3 cells", "2 columns"]),
    "a csv row too short": ("train.csv", "dialogue,summary\na\n", ["line 2: 1 cells"]),
    "an open quote": ("train.csv", 'dialogue,summary\n"a,b\nc,d\n', ["train.csv, line 3: not CSV"]),
    "a parquet file that is none": ("train.parquet", GOOD, ["train.parquet, after row 0: not Parquet"]),
    "no header": (
        "train.csv",
        f"{'word ' * 30},a\nb,c\n",
        ["line 1", "is no column's name but a cell", "line of names"],
    ),
    "a column twice": ("train.csv", "dialogue,summary,summary\na,b,c\n", ["line 1", "twice"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    name, content, fragments = BROKEN[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as raised:
        read(tmp_path)
    message = str(raised.value)
    assert str(tmp_path) in message
    assert [fragment for fragment in fragments if fragment not in message] == [], message


def test_a_real_file_cut_in_half_is_an_error(data_folder: Path, tmp_path: Path) -> None:
    whole = (data_folder / "dialogsum" / "validation.jsonl.gz").read_bytes()
    (tmp_path / "train.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train\.jsonl\.gz, after line \d+: the compressed file is truncated"):
        read(tmp_path)


def test_a_split_in_two_files_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_csv(tmp_path / "train.csv", ROWS)
    with pytest.raises(DataError, match=r"'train' twice: train\.csv and train\.jsonl"):
        splits_of(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["./nowhere", "/nowhere", "~/nowhere-at-all", "a/b/c", "nowhere/", "../nowhere", "my.csv", "x/my.jsonl.gz"]
)
def test_a_path_that_is_no_folder_never_asks_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.data.sources.from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=rf"there is no such {'file' if 'my.' in name else 'folder'}"):
        read(name)


def test_a_file_of_an_unknown_format_names_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "train.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"unknown format. The formats are: .*\.csv.*\.parquet"):
        splits_of(str(tmp_path / "train.xlsx"))


def test_a_parquet_file_is_read_whatever_its_row_groups(data_folder: Path, tmp_path: Path) -> None:
    rows = [row | {"summary": [row["summary"]]} for row in real_rows(data_folder / "dialogsum", "validation")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet", row_group_size=7)
    pq.write_table(pa.Table.from_pylist(rows * 5), tmp_path / "test.parquet")
    jsonl = read(data_folder / "dialogsum", "validation")
    assert read(tmp_path).examples == jsonl.examples
    assert [example.row for example in read(tmp_path, "test")] == list(range(1, 2501))
    assert [example.source for example in read(tmp_path, "test")] == 5 * [example.source for example in jsonl]


def test_the_lines_of_a_json_list_are_told(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(json.dumps([*ROWS, {"dialogue": 7, "summary": "s"}], indent=2), "utf-8")
    with pytest.raises(DataError, match=r"train\.json, line 17: column 'dialogue' holds 7"):
        read(tmp_path)


# What the library datasets has written.


def library_layouts(folder: Path) -> dict[str, Path]:
    """The same rows as the library saves them, and as repositories of the hub have them."""
    import datasets

    parts = {"train": ROWS[:2], "test": ROWS[2:]}
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    places = {name: folder / name for name in ("saved", "data", "root", "folders")}
    splits.save_to_disk(places["saved"])
    for name, rows in parts.items():
        for place, file in (
            ("data", f"data/{name}-00000-of-00001.parquet"),
            ("root", f"{name}-00000-of-00001.parquet"),
            ("folders", f"{name}/rows.parquet"),
        ):
            (places[place] / file).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), places[place] / file)
    return places


def test_folders_of_the_library_datasets_are_read_by_it(tmp_path: Path) -> None:
    expected = [(row["dialogue"].replace("\r\n", "\n"), (row["summary"],)) for row in ROWS]
    for name, place in library_layouts(tmp_path).items():
        assert splits_of(str(place)) == ["test", "train"], name
        assert [(e.source, e.targets) for e in (*read(place), *read(place, "test"))] == expected, name
        with pytest.raises(DataError, match=r"has no split 'validation'. The splits are: test, train"):
            read(place, "validation")


def test_rows_saved_without_splits_are_parted_as_a_file_is(data_folder: Path, tmp_path: Path) -> None:
    import datasets

    rows = real_rows(data_folder / "dialogsum", "validation")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    write_jsonl(tmp_path / "rows.jsonl", rows)
    for split in ("train", "validation", "test"):
        assert read(tmp_path / "saved", split).examples == read(tmp_path / "rows.jsonl", split).examples


def test_a_saved_folder_that_is_damaged_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match=r"cannot be read as the library datasets writes it \(KeyError"):
        read(tmp_path)


# The hub, without a network.


def test_hub_rows_pass_the_same_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = [{"dialogue": row["dialogue"], "summary": [row["summary"]]} for row in ROWS]
    table = datasets.Dataset.from_list([*rows, {"dialogue": None, "summary": ["s"]}])
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, *, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = read("owner/name", "test")
    assert asked == [("owner/name", "test")]
    assert [example.source for example in got.examples] == [row["dialogue"].replace("\r\n", "\n") for row in ROWS]
    assert [example.targets for example in got.examples] == [(row["summary"],) for row in ROWS]
    assert got.findings["missing"] == Finding(1, [4])
    indexed = index("owner/name", "test")
    assert (tuple(indexed), indexed.content_hash) == (got.examples, got.content_hash)
    with pytest.raises(
        DataError, match=r"owner/name, split 'test', row 1: no column 'dialog' \(Did you mean 'dialogue'"
    ):
        read("owner/name", "test", source="dialog")


def test_a_hub_that_cannot_be_reached_is_one_clear_error() -> None:
    for ask in (
        lambda: read("nobody/nothing"),
        lambda: splits_of("nobody/nothing"),
    ):
        with pytest.raises(
            DataError, match="nobody/nothing: there is no folder or file of this name, and the hub did not give"
        ):
            ask()
