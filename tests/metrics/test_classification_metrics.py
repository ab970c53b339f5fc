"""Scores of labels against their definitions, counted by hand, and the bootstrap of what is no mean against SciPy's."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
import scipy.stats

from loralab.errors import DataError
from loralab.metrics import COLUMNS
from loralab.metrics.classification import columns_of, details, score
from loralab.metrics.scores import value_of
from loralab.metrics.significance import Bootstrap, mcnemar


def drawn(count: int, rows: int, seed: int) -> tuple[list[str], list[str]]:
    """(true, given) labels, right in about 60 % of the rows; the last label is never true."""
    generator = np.random.default_rng(seed)
    true = generator.integers(max(count - 1, 2), size=rows)
    given = np.where(generator.random(rows) < 0.6, true, generator.integers(count, size=rows))
    return [f"label {n}" for n in true], [f"label {n}" for n in given]


def by_hand(true: list[str], given: list[str], label: str) -> tuple[float, float, float]:
    """(precision, recall, F1) of one label, in percent, row by row."""
    both = sum(t == g == label for t, g in zip(true, given, strict=True))
    precision = both / max(given.count(label), 1)
    recall = both / max(true.count(label), 1)
    return 100 * precision, 100 * recall, 100 * 2 * precision * recall / max(precision + recall, 1e-300)


@pytest.mark.parametrize(("count", "seed"), list(product([2, 3, 7], [0, 1])))
def test_scores_are_their_definitions(count: int, seed: int) -> None:
    true, given = drawn(count, 80, seed)
    values = {name: value_of(name, column) for name, column in score(given, [[t] for t in true]).items()}
    names = sorted({*true, *given})
    each = np.array([by_hand(true, given, name) for name in names])
    accuracy = 100 * np.mean([t == g for t, g in zip(true, given, strict=True)])
    expected = {"accuracy": accuracy, "f1_macro": each[:, 2].mean()}
    if len(names) == 2:
        expected |= dict(zip(("precision", "recall", "f1"), each[1], strict=True))
    else:
        expected |= {"precision_macro": each[:, 0].mean(), "recall_macro": each[:, 1].mean(), "f1_micro": accuracy}
    assert set(values) == set(expected) == set(columns_of(len(names), False)) - {"ece"}
    assert values == pytest.approx(expected)


def test_several_labels_a_row() -> None:
    true = [["a"], ["a", "b"], [], ["c"]]
    given = [["a"], ["b"], ["b"], []]
    found = score([json.dumps(x) for x in given], [[json.dumps(x)] for x in true])
    values = {name: value_of(name, column) for name, column in found.items()}
    # tp, pred, true: a 1 1 2, b 1 2 1, c 0 0 1
    assert values == pytest.approx({
        "accuracy": 25.0, "precision_macro": 50.0, "recall_macro": 50.0, "f1_macro": 100 * (2 / 3 + 2 / 3 + 0) / 3,
        "f1_micro": 100 * 2 * 2 / (3 + 4),
    })  # fmt: skip


def test_with_several_labels_a_row_the_mean_is_over_all_labels() -> None:
    """Also over c, which no row has or was given: each label's score is 0 where nothing is divided by 0."""
    true, given = [["a"], ["a", "b"], []], [["a"], ["b"], ["b"]]
    listed = [[json.dumps(row)] for row in true]
    probabilities = [{label: float(label in row) for label in "abc"} for row in given]
    found = score([json.dumps(row) for row in given], listed, None, probabilities)
    each = [
        by_hand([str(label in row) for row in true], [str(label in row) for row in given], "True") for label in "abc"
    ]
    expected = dict(zip(("precision_macro", "recall_macro", "f1_macro"), np.mean(each, axis=0), strict=True))
    assert {name: value_of(name, found[name]) for name in expected} == pytest.approx(expected)


def test_the_order_of_two_labels_says_which_is_positive() -> None:
    given, true = ["ham", "spam", "spam"], [["ham"], ["ham"], ["spam"]]
    usual = score(given, true)
    turned = score(given, true, None, [{"spam": 0.4, "ham": 0.6}, {"spam": 0.6, "ham": 0.4}, {"spam": 0.6, "ham": 0.4}])
    assert value_of("precision", usual["precision"]) == pytest.approx(50.0)
    assert value_of("precision", turned["precision"]) == pytest.approx(100.0)


def test_calibration_error() -> None:
    """Two bins: three rows at 0.9 of which two are right, one row at 0.55 that is wrong."""
    given, true = ["a", "a", "b", "b"], [["a"], ["b"], ["b"], ["a"]]
    sure = [{"a": 0.9, "b": 0.1}, {"a": 0.9, "b": 0.1}, {"a": 0.1, "b": 0.9}, {"a": 0.45, "b": 0.55}]
    expected = 100 * (abs(2.7 - 2) + abs(0.55 - 0)) / 4
    assert value_of("ece", score(given, true, None, sure)["ece"]) == pytest.approx(expected)
    right = [{"a": 1.0, "b": 0.0}]
    assert value_of("ece", score(["a"], [["a"]], None, right)["ece"]) == 0.0


def test_calibration_of_several_labels_a_row() -> None:
    """Four choices in three bins: 0.9 of one that is there, 0.2 twice of which one is there, 0.6 of one that is not."""
    given, true = ['["a"]', '["a"]'], [['["a"]'], ['["b"]']]
    probabilities = [{"a": 0.9, "b": 0.2}, {"a": 0.6, "b": 0.2}]
    expected = 100 * (abs(0.9 - 1) + abs(0.4 - 1) + abs(0.6 - 0)) / 4
    assert value_of("ece", score(given, true, None, probabilities)["ece"]) == pytest.approx(expected)


def test_details_add_up() -> None:
    true, given = drawn(3, 60, 3)
    names = sorted({*true, *given})
    about = details(given, true, names, multi=False)
    assert [sum(row) for row in about["confusion"]] == [true.count(name) for name in names]
    assert [sum(column) for column in zip(*about["confusion"], strict=True)] == [given.count(name) for name in names]
    for name in names:
        found = about["per_label"][name]
        assert (found["precision"], found["recall"], found["f1"]) == pytest.approx(by_hand(true, given, name))


def test_an_empty_prediction_is_wrong_and_no_label() -> None:
    found = score(["pos", "", "neg", "pos"], [["pos"], ["pos"], ["neg"], ["neg"]])
    assert set(found) == set(columns_of(2, multi=False)) - {"ece"}
    values = [value_of(name, found[name]) for name in ("accuracy", "precision", "recall", "f1")]
    assert values == pytest.approx([50, 50, 50, 50])
    assert score(["[]", ""], [["[]"], ["[]"]], names=["a"])["accuracy"].tolist() == [100, 0]


def test_what_is_no_label() -> None:
    with pytest.raises(DataError, match="Row 1 has 2 references"):
        score(["a", "a"], [["a"], ["a", "b"]])
    with pytest.raises(DataError, match="Some rows have a list of labels"):
        score(["a", '["a"]'], [["a"], ["a"]])
    with pytest.raises(DataError, match="Some rows have a list of labels"):
        score(["a", '["a"]'], [['["a"]'], ['["a"]']])
    with pytest.raises(DataError, match="these are no labels"):
        score([f"text {n}" for n in range(600)], [["a"]] * 600)


def test_the_interval_of_f1_is_scipys() -> None:
    true, given = drawn(2, 90, 5)
    groups = np.repeat(np.arange(45), 2)
    sums = score(given, [[t] for t in true])["f1"]

    def f1(tp: np.ndarray, pred: np.ndarray, real: np.ndarray, axis: int) -> np.ndarray:
        return 200 * tp.sum(axis) / (pred.sum(axis) + real.sum(axis))

    units = tuple(np.bincount(groups, sums[:, column]) for column in (1, 3, 5))
    theirs = scipy.stats.bootstrap(
        units, f1, paired=True, vectorized=True, n_resamples=3000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    bootstrap = Bootstrap(groups.tolist(), draws=3000, seed=2)
    ours = bootstrap.interval(sums, statistic=COLUMNS["f1"].statistic)
    assert ours.value == pytest.approx(by_hand(true, given, "label 1")[2])
    np.testing.assert_allclose([ours.low, ours.high], [theirs.low, theirs.high], rtol=1e-12)
    seeds = bootstrap.interval(np.stack([sums, sums]), statistic=COLUMNS["f1"].statistic)
    assert (seeds.value, seeds.low, seeds.high) == pytest.approx((ours.value, ours.low, ours.high))


def test_a_difference_in_f1() -> None:
    true, given = drawn(2, 120, 6)
    listed = [[t] for t in true]
    a, b = score(true, listed)["f1"], score(given, listed)["f1"]
    bootstrap, statistic = Bootstrap(range(120), draws=1000), COLUMNS["f1"].statistic
    found = bootstrap.difference(a, b, statistic=statistic)
    assert found.value == pytest.approx(100 - by_hand(true, given, "label 1")[2])
    assert found.p < 0.01 and found.low > 0
    assert bootstrap.difference(b, b, statistic=statistic).p == 1.0
    with pytest.raises(DataError, match="for 120 rows"):
        bootstrap.interval(a[:5], statistic=statistic)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (10, 3), (2, 30), (700, 640)])
def test_mcnemar_is_the_binomial_test_of_rows_where_one_alone_is_right(first: int, second: int) -> None:
    a = np.array([True] * first + [False] * second + [True, True, False])
    b = np.array([False] * first + [True] * second + [True, True, False])
    found = mcnemar(a, b)
    expected = scipy.stats.binomtest(first, first + second).pvalue if first + second else 1.0
    assert (found.first_alone, found.second_alone) == (first, second)
    assert found.p == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand() -> None:
    """1 against 5: 2 · (1 + 6) / 64."""
    a = np.array([1, 0, 0, 0, 0, 0], dtype=bool)
    assert mcnemar(a, ~a).p == pytest.approx(14 / 64)
