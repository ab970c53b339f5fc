"""`loralab score`: files to aligned rows, groups found by themselves, every pair compared, and each mistake told."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from workshop import loralab

from loralab.errors import DataError
from loralab.evaluation.prediction_files import Columns, read_predictions
from loralab.evaluation.score_files import report, score_files
from loralab.metrics.significance import Bootstrap, holm

SYSTEMS = ["base_summaries", "full_summaries", "lora_summaries"]


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def published(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the layout of the published DialogSum results: 40 dialogues, three rows each, one reference a row, no source."""
    with gzip.open(data_folder / "dialogsum/validation.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, 40)]
    cells = []
    for row in rows:
        words = row["summary"].split()
        answers = [row["dialogue"][:100], " ".join(words[: len(words) * 3 // 4]), " ".join(words[: len(words) // 2])]
        references = [row["summary"], " ".join(words[1:]), " ".join(words[2:])]
        cells += [[str(len(cells) + k), reference, *answers] for k, reference in enumerate(references)]
    return write_csv(tmp_path_factory.mktemp("published") / "results.csv", ["", "human_baseline", *SYSTEMS], cells)


@pytest.fixture(scope="module")
def scored(published: Path) -> dict[str, Any]:
    return score_files([published], Columns(SYSTEMS, ["human_baseline"]), ["rouge", "length"])


def test_scores_are_the_librarys_and_intervals_are_by_dialogue(published: Path, scored: dict[str, Any]) -> None:
    with published.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    bootstrap = Bootstrap([row["base_summaries"] for row in rows])
    values = {}
    for system, row in zip(SYSTEMS, scored["rows"], strict=True):
        f = [100 * scorer.score(each["human_baseline"], each[system])["rouge1"].fmeasure for each in rows]
        values[system], expected = np.array(f), bootstrap.interval(f)
        assert row["system"] == system and row["empty"] == 0
        found = row["metrics"]["rouge1"]
        assert (found["value"], found["low"], found["high"]) == (expected.value, expected.low, expected.high)
    pairs = [pair for pair in scored["pairs"] if pair["metric"] == "rouge1"]
    assert [(pair["a"], pair["b"]) for pair in pairs] == [tuple(SYSTEMS[:2]), tuple(SYSTEMS[::2]), tuple(SYSTEMS[1:])]
    for pair in pairs:
        known = bootstrap.difference(values[pair["a"]], values[pair["b"]])
        assert (pair["difference"], pair["low"], pair["high"], pair["p"]) == (
            known.value, known.low, known.high, known.p,
        )  # fmt: skip
    assert [pair["p_corrected"] for pair in pairs] == holm([pair["p"] for pair in pairs])
    assert len(scored["pairs"]) == 3 * 5 and (scored["examples"], scored["groups"]) == (120, 40)


def test_the_report_fits_a_terminal_and_says_what_was_done(scored: dict[str, Any]) -> None:
    text = report(scored)
    assert max(map(len, text.splitlines())) <= 80
    said = " ".join(text.split())
    for expected in (
        "120 rows in 40 groups: rows whose predictions repeat, in every system, are taken for one source",
        "Higher is better: ROUGE-1, ROUGE-2, ROUGE-L, ROUGE-Lsum; neither is better: length ratio.",
        "Holm: the same corrected over the 3 pairs, for each column by itself.",
        "− lora_summaries",
        "Holm p<.001",
    ):
        assert expected in said


def test_one_system_has_no_pairs_and_its_empty_predictions_are_told(tmp_path: Path) -> None:
    rows = [{"prediction": text, "reference": "a b c"} for text in ("a b", " ", "c", None)]
    results = score_files([write_jsonl(tmp_path / "mine.jsonl", rows)], Columns(), ["rouge", "chrf"])
    assert [(row["system"], row["empty"]) for row in results["rows"]] == [("mine", 2)] and results["pairs"] == []
    assert "mine: 2 of the predictions are empty and score 0." in report(results)
    alone = score_files([write_jsonl(tmp_path / "two.jsonl", rows[::2])], Columns(), ["rouge"])
    ours, theirs = (each["rows"][0]["metrics"]["rouge1"]["value"] for each in (results, alone))
    assert ours == pytest.approx(theirs / 2) and results["groups"] == 4  # nobody is grouped with others by silence


# Columns and files


def test_columns_are_found_by_name_or_named(tmp_path: Path) -> None:
    row = {"prediction_a": "x", "prediction_b": "y", "summary": "r", "more": "s", "note": "n"}
    path = write_jsonl(tmp_path / "f.jsonl", [row])
    found = read_predictions([path], Columns())
    assert found.systems == {"prediction_a": ["x"], "prediction_b": ["y"]} and found.references == [("r",)]
    named = read_predictions([path], Columns(["note,prediction_a"], ["more", "summary"]))
    assert named.systems == {"note": ["n"], "prediction_a": ["x"]} and named.references == [("s", "r")]
    comma = write_jsonl(tmp_path / "g.jsonl", [{"a,b": "x", "target": ["r", "", "s"]}])
    assert read_predictions([comma], Columns(["a,b"])).references == [("r", "s")]


def test_systems_of_several_files_are_named_after_them(tmp_path: Path) -> None:
    row = {"prediction": "x", "references": ["r"], "source": "s"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "predictions.jsonl", [row])
    table = write_csv(tmp_path / "table.csv", ["reference", "prediction_1", "prediction_2"], [["r", "y", "z"]])
    found = read_predictions([tmp_path / "one", tmp_path / "two/predictions.jsonl", table], Columns())
    assert list(found.systems) == ["one", "two", "table: prediction_1", "table: prediction_2"]
    assert found.sources == ["s"]


def test_groups_are_the_given_column_else_the_source_else_repeated_predictions(tmp_path: Path) -> None:
    texts = [("p", "q"), ("p", "q"), ("p", "r"), ("", ""), ("", ""), ("p", "q")]
    rows = [
        {
            "prediction_1": a,
            "prediction_2": b,
            "target": "t",
            "id": i // 2,
            "text": "ab"[i % 2],
            "source": "abc"[i // 2],
        }
        for i, (a, b) in enumerate(texts)
    ]

    def partition(columns: Columns, keys: str) -> list[int]:
        kept = [{key: value for key, value in row.items() if key in keys.split() or key[0] in "pt"} for row in rows]
        groups = read_predictions([write_jsonl(tmp_path / "f.jsonl", kept)], columns).groups
        return [groups.index(group) for group in groups]

    assert partition(Columns(group="id"), "id source") == [0, 0, 2, 2, 4, 4]
    assert partition(Columns(), "source") == [0, 0, 2, 2, 4, 4]
    assert partition(Columns(source="text"), "source") == [0, 1, 0, 1, 0, 1]
    assert partition(Columns(["prediction_1", "prediction_2"]), "") == [0, 0, 2, 3, 4, 0]


def test_a_system_that_always_says_the_same_is_no_single_source(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [{"prediction": "x y", "target": text} for text in ("x", "y", "z")])
    results = score_files([path], Columns(), ["rouge"])
    assert results["groups"] == 3 and results["rows"][0]["metrics"]["rouge1"]["low"] == 0


def test_metrics_that_need_the_source_take_the_column_named(tmp_path: Path) -> None:
    rows = [{"prediction": "Hello from Ann", "target": "x", "dialogue": text} for text in ("Ann: Hi", "Bob: Hi")]
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    results = score_files([path], Columns(source="dialogue"), ["names", "copied"])
    assert results["rows"][0]["metrics"]["new_names"]["value"] == 50
    assert results["rows"][0]["metrics"]["copied_3grams"]["value"] == 0
    with pytest.raises(DataError, match=r"names and copied look at .* no column 'source'.* --source COLUMN"):
        score_files([path], Columns(), ["rouge", "names", "copied"])
    with pytest.raises(DataError, match=r"Unknown metric 'rogue'. Did you mean 'rouge'\?"):
        score_files([path], Columns(), ["rogue"])


def test_metrics_may_have_blanks_around_them_and_stand_there_twice(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", [{"prediction": "x y", "target": "x"}])
    assert list(score_files([path], Columns(), ["length", " chrf", "length "])["metrics"]) == ["length", "chrf"]


# Mistakes

GOOD = [{"prediction": f"p{i}", "reference": f"r{i}", "source": f"s{i}", "other": f"o{i}"} for i in range(4)]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (GOOD[:3], r"a.jsonl has 4 rows and .*b.jsonl has 3: row 4 \(.*a.jsonl, line 4\) has no counterpart"),
        ([*GOOD, GOOD[0]], r"has 4 rows and .* has 5: row 5 \(.*b.jsonl, line 5\) has no counterpart"),
        (
            [GOOD[0], GOOD[2], GOOD[1]],
            r"Row 2: the reference differs: \('r1',\) at .*a.jsonl, line 2, \('r2',\) at .*b.jsonl, line 2",
        ),
        (
            [*GOOD[:2], {**GOOD[2], "source": "?"}, GOOD[3]],
            r"Row 3: the source differs: 's2' at .*a.jsonl, line 3, '\?'",
        ),
    ],
)
def test_files_whose_rows_differ_are_refused(second: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / name, rows) for name, rows in (("a.jsonl", GOOD), ("b.jsonl", second))]
    with pytest.raises(DataError, match=message):
        read_predictions(paths, Columns())


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], Columns(), "has no rows"),
        (GOOD, Columns(["predicton"]), r"f.jsonl, line 1: no column 'predicton' \(Did you mean 'prediction'"),
        ([*GOOD, {"prediction": "p"}], Columns(), "f.jsonl, line 5: no column 'reference'"),
        (GOOD, Columns(references=["refs"]), "no column 'refs'"),
        (GOOD, Columns(source="text"), "no column 'text'"),
        (GOOD, Columns(group="id"), "no column 'id'"),
        ([{"answer": "a", "target": "t"}], Columns(), "no column whose name starts with 'prediction'.*answer, target"),
        ([{"prediction": "a", "text": "t"}], Columns(), "no reference column.* --reference COLUMN"),
        (
            [{"prediction": "a", "target": "t", "summary": "t"}],
            Columns(),
            r"2 columns that could be the references \(target, summary\)",
        ),
        (
            [{**row, "prediction": "  "} for row in GOOD],
            Columns(),
            "all 4 predictions in column 'prediction' are empty",
        ),
        ([{**row, "other": None} for row in GOOD], Columns(["prediction", "other"]), "column 'other' are empty"),
        ([*GOOD, {**GOOD[0], "reference": ""}], Columns(), "line 5: no reference in column reference"),
        ([{**GOOD[0], "prediction": 3}], Columns(), r"column 'prediction' holds 3 \(int\), where text is needed"),
        ([{**GOOD[0], "other": ""}], Columns(group="other"), "the group in column 'other' is empty"),
        (GOOD, Columns(["reference"]), "column 'reference' is both prediction and reference"),
    ],
)
def test_each_mistake_in_a_file_is_told(
    rows: list[dict[str, Any]], columns: Columns, message: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", rows)
    with pytest.raises(DataError, match=message):
        read_predictions([path], columns)


def test_files_that_are_not_there_or_not_known_or_twice(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "results.jsonl", GOOD)
    with pytest.raises(DataError, match=r"There is no file .*result.jsonl. Did you mean 'results.jsonl'"):
        read_predictions([tmp_path / "result.jsonl"], Columns())
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(DataError, match=r"unknown kind of file '.txt'. Expected .jsonl"):
        read_predictions([tmp_path / "x.txt"], Columns())
    with pytest.raises(DataError, match="A file is given twice"):
        read_predictions([path, tmp_path / "../" / tmp_path.name / "results.jsonl"], Columns())


def test_the_command_prints_one_object_or_one_message(tmp_path: Path) -> None:
    rows = [{"reference": "a b", "p": f"a {i}", "q": f"b {i}", "id": i // 2} for i in range(6)]
    write_jsonl(tmp_path / "f.jsonl", rows)
    asked = ["f.jsonl", "--predictions", "p", "--prediction", "q", "--group", "id", "--metrics", "bleu,length"]
    results = json.loads(loralab(tmp_path, "score", *asked, "--json").stdout)
    assert [row["system"] for row in results["rows"]] == ["p", "q"] and results["groups"] == 3
    assert set(results["pairs"][0]) == {"a", "b", "metric", "difference", "low", "high", "p", "p_corrected"}
    assert list(results["metrics"]) == ["bleu", "length"]
    failed = loralab(tmp_path, "score", *asked, "--reference", "c", code=2)
    assert failed.stdout == "" and failed.stderr.startswith("loralab: f.jsonl, line 1: no column 'c'")
