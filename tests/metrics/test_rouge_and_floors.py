"""ROUGE against its library, and the two floors."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from loralab.errors import DataError
from loralab.metrics import floors, rouge


def dialogsum(folder: Path, split: str) -> list[dict[str, str]]:
    with gzip.open(folder / "dialogsum" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def validation(data_folder: Path) -> list[dict[str, str]]:
    return dialogsum(data_folder, "validation")


@pytest.fixture(scope="module")
def summaries(data_folder: Path) -> list[str]:
    return [row["summary"] for row in dialogsum(data_folder, "train")]


# --- ROUGE


def test_rouge_equals_its_library_row_for_row(validation: list[dict[str, str]]) -> None:
    predictions = [row["dialogue"] for row in validation[:60]]  # several lines, so that rougeLsum differs from rougeL
    references = [[row["summary"]] for row in validation[:60]]
    scores = rouge.score(predictions, references)
    scorer = RougeScorer(list(rouge.NAMES), use_stemmer=True)
    rows = [scorer.score(texts[0], prediction) for prediction, texts in zip(predictions, references, strict=True)]
    assert list(scores) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    for name in scores:
        np.testing.assert_array_equal(scores[name], [100 * row[name].fmeasure for row in rows])
    assert (scores["rougeLsum"] != scores["rougeL"]).any()


def test_each_metric_takes_its_own_best_reference(validation: list[dict[str, str]]) -> None:
    texts = [row["summary"] for row in validation]
    predictions, references = texts[:50], [texts[50 + 3 * row : 53 + 3 * row] for row in range(50)]
    scores = rouge.score(predictions, references)
    single = [rouge.score(predictions, [[row[k]] for row in references]) for k in range(3)]
    for name in rouge.NAMES:
        np.testing.assert_array_equal(scores[name], np.max([one[name] for one in single], axis=0))
    best = [np.argmax([one[name] for one in single], axis=0) for name in ("rouge1", "rouge2")]
    assert (best[0] != best[1]).any()  # else the test could not tell the metrics' choices apart


def test_rouge_by_hand() -> None:
    predictions = ["The cats sat.", "", "a b\nc d", "c d\na b"]
    references = [["a cat sat down"], ["something"], ["a b c d"], ["a b\nc d"]]
    scores = rouge.score(predictions, references)
    f = 100 * 2 * 2 / (3 + 4)  # "cat" (stemmed) and "sat" are shared, of 3 and 4 tokens
    np.testing.assert_allclose(scores["rouge1"], [f, 0, 100, 100])
    np.testing.assert_allclose(scores["rouge2"], [100 * 2 * 1 / (2 + 3), 0, 100, 100 * 2 / 3])
    np.testing.assert_allclose(scores["rougeL"], [f, 0, 100, 50])
    np.testing.assert_allclose(scores["rougeLsum"], [f, 0, 100, 100])  # sentences by newline, in any order


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a"], [["a"], ["b"]], "1 predictions and references for 2 rows"),
        ([], [], "no rows"),
        (["a", "b"], [["a"], []], "Row 1 has no reference"),
        (["a", "b"], ["a", "b"], "row 0 are one text"),
    ],
)
def test_rouge_refuses(predictions: list[str], references: list[list[str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rouge.score(predictions, references)


def test_importing_the_metrics_loads_no_heavy_library() -> None:
    code = "import sys, loralab.metrics.floors, loralab.metrics.significance; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "loralab.metrics.rouge" in loaded
    assert not {"rouge_score", "sacrebleu", "nltk", "scipy", "torch", "transformers", "jax"} & set(loaded)


# --- the floors


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("#Person1#: Hi.\n#Person2#: Hello. You?\n#Person1#: Well.", "#Person1#: Hi. #Person2#: Hello. You?"),
        ("A: Hi\r\n\r\n  B: Hello  \r\nA: Bye", "A: Hi B: Hello"),
        ("A: Hi\rB: Hello\rA: Bye", "A: Hi B: Hello"),
        ("One, 2.5 of it. Two!  Three? Four.", "One, 2.5 of it. Two!"),
        ("Only one", "Only one"),
        ("\n \n", ""),
        ("", ""),
    ],
)
def test_lead(source: str, expected: str) -> None:
    assert floors.lead(source) == expected


def test_lead_of_more_turns() -> None:
    assert floors.lead("A: 1\nB: 2\nA: 3\nB: 4", turns=3) == "A: 1 B: 2 A: 3"


def medoid(texts: list[str]) -> str:
    """The rule of `constant`, word for word and slowly."""
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    total = np.zeros(len(texts))
    for i, j in itertools.permutations(range(len(texts)), 2):
        total[i] += scorer.score(texts[i], texts[j])["rouge1"].fmeasure
    return texts[int(np.argmax(total >= total.max() - 1e-9))]


def test_constant_is_the_medoid_of_real_summaries(summaries: list[str]) -> None:
    for sample in (summaries[:60], summaries[600:620] + summaries[610:630]):  # the second with repeated rows
        assert floors.constant(sample) == medoid(sample)


def test_constant_is_the_medoid_of_hard_little_cases() -> None:
    """Few words, so that tokens repeat within a text, texts repeat, ties abound, and some texts have no token."""
    generator = random.Random(0)
    for _ in range(300):
        words = ["run", "running", "Cat", "dog", "...", "b"]
        texts = [" ".join(generator.choices(words, k=generator.randrange(6))) for _ in range(generator.randrange(1, 7))]
        assert floors.constant(texts) == medoid(texts)


def test_constant_takes_the_first_of_equals() -> None:
    assert floors.constant(["b c", "a b", "A B!", "b a"]) == "a b"
    assert floors.constant(["...", "", "?"]) == "..."


def test_constant_refuses_no_targets() -> None:
    with pytest.raises(DataError, match="no training targets"):
        floors.constant([])


def test_floors_of_dialogsum(validation: list[dict[str, str]], summaries: list[str]) -> None:
    """Known figures. First two turns, speakers' tags in: 28.2 and 7.5; the closest training summary: 27.7 and 2.7."""
    references = [[row["summary"]] for row in validation]
    lead = rouge.score([floors.lead(row["dialogue"]) for row in validation], references)
    constant = rouge.score([floors.constant(summaries)] * len(validation), references)
    figures = [[scores[name].mean() for name in ("rouge1", "rouge2")] for scores in (lead, constant)]
    np.testing.assert_allclose(figures, [[28.15, 7.52], [27.75, 2.70]], atol=0.006)
