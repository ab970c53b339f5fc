"""The metrics: ROUGE against its library, the bootstrap against SciPy and against what it promises, the two floors."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from rouge_score.rouge_scorer import RougeScorer

from loralab.errors import DataError
from loralab.metrics import METRICS, floors, rouge
from loralab.metrics.significance import Bootstrap, Interval


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


def test_every_metric_keeps_the_contract() -> None:
    for metric in METRICS.values():
        scores = metric.score(["one", "two"], [["one"], ["three", "four"]])
        assert tuple(scores) == metric.NAMES
        assert all(values.shape == (2,) and values.dtype == np.float64 for values in scores.values())
        assert metric.ID and metric.version()


def test_importing_the_metrics_loads_no_heavy_library() -> None:
    code = "import sys, loralab.metrics.floors, loralab.metrics.significance; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "loralab.metrics.rouge" in loaded
    assert not {"rouge_score", "nltk", "scipy", "torch", "transformers", "jax"} & set(loaded)


# --- the bootstrap


def ratio(values: np.ndarray, weights: np.ndarray, axis: int) -> np.ndarray:
    return values.sum(axis) / weights.sum(axis)


def rows_in_groups(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values and weights of 120 groups of one to five rows; the rows of a group have most of their value in common."""
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(120), generator.integers(1, 6, size=120))
    values = generator.gamma(2.0, size=120)[groups] + generator.normal(scale=0.3, size=len(groups))
    return groups, values, generator.integers(1, 80, size=len(groups)).astype(float)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_interval_is_scipys_percentile_interval(weighted: bool, grouped: bool) -> None:
    groups, values, weights = rows_in_groups(seed=1)
    groups = groups if grouped else np.arange(len(values))
    w = weights if weighted else np.ones(len(values))
    units = (np.bincount(groups, w * values), np.bincount(groups, w))  # what SciPy resamples: a group's two sums
    theirs = scipy.stats.bootstrap(
        units,
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(7),
    )
    ours = Bootstrap(groups.tolist(), draws=20_000).interval(values, weights if weighted else None)
    assert ours.value == pytest.approx(np.average(values, weights=w))
    # Monte-Carlo error: a 2.5 % quantile of 20,000 draws varies by 0.019 standard errors of the statistic, and the
    # difference of two such quantiles by 0.027; five of those.
    error = 0.135 * theirs.standard_error
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=error)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=error)


@pytest.mark.parametrize("weighted", [False, True])
def test_interval_covers_the_truth_in_95_of_100_cases(weighted: bool) -> None:
    generator = np.random.default_rng(0)
    trials, hits = 1000, 0
    for trial in range(trials):
        weights = generator.integers(10, 60, size=200).astype(float) if weighted else None
        values = generator.normal(3.0, 1.0, size=200)
        interval = Bootstrap(range(200), draws=1000, seed=trial).interval(values, weights)
        hits += interval.low <= 3.0 <= interval.high
    assert 0.93 <= hits / trials <= 0.97


def test_p_values_are_uniform_where_the_systems_are_equally_good() -> None:
    generator = np.random.default_rng(0)
    found = []
    for trial in range(1000):
        common = generator.normal(size=200)  # what makes a row easy or hard for both
        a, b = common + generator.normal(size=(2, 200))
        found.append(Bootstrap(range(200), draws=1000, seed=trial).p_value(a, b))
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.01
    assert 0.03 <= np.mean(np.array(found) < 0.05) <= 0.07


def test_p_value_and_interval_of_the_difference_agree() -> None:
    groups, values, weights = rows_in_groups(seed=2)
    bootstrap = Bootstrap(groups.tolist())
    noise = np.random.default_rng(3).normal(scale=0.5, size=len(values))
    verdicts = set()
    for shift in np.linspace(-0.2, 0.2, 21):
        other = values + noise + shift
        interval, p = bootstrap.interval(values - other, weights), bootstrap.p_value(values, other, weights)
        outside = interval.low > 0 or interval.high < 0
        assert outside == (p < 0.05)
        assert p == bootstrap.p_value(other, values, weights)
        verdicts.add(outside)
    assert verdicts == {True, False}


def test_p_value_reaches_one_and_never_zero() -> None:
    values = np.random.default_rng(0).normal(size=50)
    bootstrap = Bootstrap(range(50), draws=999)
    assert bootstrap.p_value(values, values) == 1.0
    assert bootstrap.p_value(values, values + 100) == pytest.approx(2 / 1000)


def test_repeating_every_row_within_its_group_changes_nothing() -> None:
    groups, values, weights = rows_in_groups(seed=4)
    once, thrice = Bootstrap(groups.tolist()), Bootstrap(np.repeat(groups, 3).tolist())
    other = values + np.random.default_rng(5).normal(0.1, size=len(values))
    for w in (None, weights):
        w3 = None if w is None else np.repeat(w, 3)
        a, b = once.interval(values, w), thrice.interval(np.repeat(values, 3), w3)
        np.testing.assert_allclose([a.value, a.low, a.high], [b.value, b.low, b.high], rtol=1e-12)
        assert once.p_value(values, other, w) == thrice.p_value(np.repeat(values, 3), np.repeat(other, 3), w3)


def test_rows_of_one_group_are_not_taken_for_independent() -> None:
    generator = np.random.default_rng(6)
    by_group = generator.normal(size=300)
    values, groups = np.repeat(by_group, 3), np.repeat(np.arange(300), 3)
    grouped = Bootstrap(groups.tolist()).interval(values)
    rows = Bootstrap(range(900)).interval(values)
    standard_error = by_group.std() / np.sqrt(300)
    assert grouped.high - grouped.low == pytest.approx(2 * 1.96 * standard_error, rel=0.05)
    assert rows.high - rows.low == pytest.approx(2 * 1.96 * standard_error / np.sqrt(3), rel=0.05)


def test_weights_are_the_tokens_of_a_row() -> None:
    tokens = np.array([10.0, 1.0, 4.0])
    summed_loss = np.array([20.0, 5.0, 10.0])
    interval = Bootstrap(["a", "b", "c"]).interval(summed_loss / tokens, tokens)
    assert interval.value == pytest.approx(35 / 15)
    assert (interval.low, interval.high) == pytest.approx(
        (2.0, 5.0)
    )  # draws of the first row alone, of the second alone


def test_one_group_has_an_interval_without_width() -> None:
    assert Bootstrap(["only"] * 4).interval([1.0, 2.0, 3.0, 6.0]) == Interval(3.0, 3.0, 3.0)


def test_same_seed_same_numbers_and_another_seed_others() -> None:
    values = np.random.default_rng(0).normal(size=80)
    bootstrap = Bootstrap(range(80))
    assert (
        bootstrap.interval(values)
        == bootstrap.interval(values)
        == Bootstrap([f"row {i}" for i in range(80)]).interval(values)
    )
    assert bootstrap.interval(values) != Bootstrap(range(80), seed=1).interval(values)


def test_a_hundred_thousand_rows_stay_within_50_mb() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    bootstrap = Bootstrap(range(100_000), draws=200)
    tracemalloc.start()
    bootstrap.interval(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([1.0, float("nan"), 3.0], None, "values of row 1 are nan"),
        ([1.0, 2.0, float("inf")], None, "values of row 2 are inf"),
        ([1.0, 2.0], None, "shape \\(2,\\) for 3 rows"),
        ([[1.0], [2.0], [3.0]], None, "shape \\(3, 1\\) for 3 rows"),
        ([1.0, 2.0, 3.0], [1.0, float("nan"), 1.0], "weights of row 1 are nan"),
        ([1.0, 2.0, 3.0], [1.0, 1.0, 0.0], "weight of row 2 is 0.0"),
    ],
)
def test_bootstrap_refuses(values: list[float], weights: list[float] | None, message: str) -> None:
    bootstrap = Bootstrap(["a", "b", "b"])
    with pytest.raises(DataError, match=message):
        bootstrap.interval(values, weights)
    with pytest.raises(DataError, match=message):
        bootstrap.p_value([0.0, 0.0, 0.0], values, weights)


def test_bootstrap_refuses_no_rows() -> None:
    with pytest.raises(DataError, match="no rows"):
        Bootstrap([])


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
