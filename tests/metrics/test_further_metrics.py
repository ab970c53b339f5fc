"""The metrics beside ROUGE: chrF and BLEU against their library, lengths, copies and names by hand, and the contract."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from loralab.errors import DataError
from loralab.metrics import COLUMNS, LABELS, METRICS, NUMBERS, bleu, chrf, copied, length, names


@pytest.fixture(scope="module")
def rows(data_folder: Path) -> list[dict[str, str]]:
    with gzip.open(data_folder / "dialogsum/validation.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, 60)]


def test_every_metric_keeps_the_contract() -> None:
    for name, metric in {name: metric for name, metric in METRICS.items() if name != NUMBERS}.items():
        second = ["three"] if name == LABELS else ["three", "four"]  # a row has one label
        scores = metric.score(["one", "two"], [["one"], second], ["a one", "b"])
        columns = [column.name for column in metric.COLUMNS]
        assert list(scores) == [column for column in columns if column in scores]
        assert name == LABELS or len(scores) == len(columns), (
            "of labels some columns are of two classes, others of more"
        )
        assert all(values.shape[0] == 2 and values.dtype == np.float64 for values in scores.values())
        assert name == LABELS or all(values.ndim == 1 for values in scores.values())
        assert metric.ID and metric.version()
    every = [column.name for metric in METRICS.values() for column in metric.COLUMNS]
    assert sorted(COLUMNS) == sorted(["loss", "perplexity", "bits_per_byte", *every]) and len(set(every)) == len(every)


def test_an_empty_prediction_scores_zero_everywhere() -> None:
    for metric in (metric for name, metric in METRICS.items() if name not in (LABELS, NUMBERS)):
        scores = metric.score([""], [["one two three"]], ["Ann: one two three"])
        assert all(values.tolist() == [0.0] for values in scores.values())


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_refuses_lists_that_do_not_fit(name: str) -> None:
    score = METRICS[name].score
    for predictions, references, sources, message in (
        (["a"], [["a"], ["b"]], ["s"], "1 predictions and references for 2 rows"),
        ([], [], [], "no rows"),
        (["a"], [[]], ["s"], "Row 0 has no reference"),
    ):
        with pytest.raises(DataError, match=message):
            score(predictions, references, sources)
    if METRICS[name].NEEDS_SOURCES:
        with pytest.raises(DataError, match="looks at the sources and got none"):
            score(["a"], [["a"]])
        with pytest.raises(DataError, match="got 2 sources for 1 predictions"):
            score(["a"], [["a"]], ["s", "t"])


def test_chrf_and_bleu_are_their_librarys_corpus_scores_of_one_row(rows: list[dict[str, str]]) -> None:
    """A corpus of one row is a sentence; the library reaches its score another way than for a sentence."""
    predictions = [" ".join(row["dialogue"].split()[:20]) for row in rows] + ["a cat", "cat", "!", "x y"]
    references = [[row["summary"], rows[0]["summary"]] for row in rows] + [["a cat sat", "the cat"]] * 4
    library = {"bleu": BLEU(effective_order=True), "chrf": CHRF()}
    for metric, name in ((bleu, "bleu"), (chrf, "chrf")):
        expected = [
            library[name].corpus_score([text], [[each] for each in texts]).score
            for text, texts in zip(predictions, references, strict=True)
        ]
        found = metric.score(predictions, references)[name]
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert len(set(found.round(6))) > 30


def test_chrf_takes_the_better_reference_and_bleu_uses_both() -> None:
    one, other = ["the cat sat on the mat"], ["a dog ran in the park"]
    both = [[one[0], other[0]]]
    alone = [chrf.score(one, [texts])["chrf"][0] for texts in (one, other)]
    assert chrf.score(one, both)["chrf"][0] == max(alone) == pytest.approx(100)
    mixed = ["the cat sat in the park"]
    alone = [bleu.score(mixed, [texts])["bleu"][0] for texts in (one, other)]
    assert bleu.score(mixed, both)["bleu"][0] > max(alone)


@pytest.mark.parametrize(("metric", "made"), [(bleu, BLEU(effective_order=True)), (chrf, CHRF())])
def test_the_stated_rule_is_the_librarys_signature(metric: object, made: BLEU | CHRF) -> None:
    made.sentence_score("a", ["a"])
    stated = metric.ID.rsplit(", ", 1)[1]  # type: ignore[attr-defined]
    assert f"nrefs:1|{stated}|version:{bleu.version()}" == str(made.get_signature())


def test_length_ratio_by_hand() -> None:
    ratios = length.score(["one two three", "  a\nb ", ""], [["a b"], ["a", "a b c"], ["a"]])["length_ratio"]
    np.testing.assert_array_equal(ratios, [1.5, 1.0, 0.0])


def test_copied_trigrams_by_hand() -> None:
    predictions = ["The cat sat down.", "the CAT, sat!", "no such words", "cat sat", "a b c a b c", "it's Tom’s cat"]
    sources = ["Look: the cat sat there", "Look: the cat sat there", "such words", "cat sat", "a b c", "It’s Tom's cat"]
    shares = copied.score(predictions, [["x"]] * 6, sources)["copied_3grams"]
    np.testing.assert_allclose(shares, [50, 100, 0, 0, 50, 100])  # "a b c" twice, of four 3-grams


def test_a_copy_of_the_source_is_copied_whole_and_makes_up_no_name(rows: list[dict[str, str]]) -> None:
    sources = [row["dialogue"] for row in rows]
    leads, others = [source[:150] for source in sources], [sources[-1], *sources[:-1]]
    whole = [lead.rsplit(" ", 1)[0] for lead in leads]
    references = [[row["summary"]] for row in rows]
    np.testing.assert_array_equal(copied.score(whole, references, sources)["copied_3grams"], 100)
    np.testing.assert_array_equal(names.score(whole, references, sources)["new_names"], 0)
    assert copied.score(whole, references, others)["copied_3grams"].mean() < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tom asks Ann. Lunch is at one.", {"ann"}),  # what begins a sentence may be any word
        ("#Person1# tells #Person2#'s boss.", {"#person1#", "#person2#"}),
        ("He meets Mr. Smith and Dr. Mary-Jane O'Brien.", {"smith", "mary-jane", "o'brien"}),
        ("Then I'm off, and I’ve Ann’s keys", {"ann"}),
        ('He says: "Come here!" to Bob\nMonday is fine. (Really.) Sure', {"bob"}),
        ("nothing here", set()),
        ("", set()),
    ],
)
def test_names_of_a_text(text: str, expected: set[str]) -> None:
    assert names.names_of(text) == expected


def test_new_names_by_hand() -> None:
    source = "#Person1#: Hi, tom's here. Anna-Lena too!"
    predictions = ["So Tom and Anna met Bob and Eve.", "#Person2# is here.", "Hello.", "Then Anna-Lena left TOM."]
    shares = names.score(predictions, [["x"]] * 4, [source] * 4)["new_names"]
    np.testing.assert_allclose(shares, [50, 100, 0, 0])
