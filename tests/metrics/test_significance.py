"""The bootstrap against SciPy and against what it promises, by simulation; Holm's correction against its definition."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import scipy.stats

from loralab.errors import DataError
from loralab.metrics.significance import Bootstrap, Interval, holm


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
        units, ratio, paired=True, vectorized=True, n_resamples=5000, method="percentile", rng=np.random.default_rng(3)
    )  # fmt: skip
    ours = Bootstrap(groups.tolist(), draws=5000, seed=3).interval(values, weights if weighted else None)
    assert ours.value == pytest.approx(np.average(values, weights=w))
    expected = theirs.confidence_interval  # of the same draws: both number them by one call of the generator
    np.testing.assert_allclose([ours.low, ours.high], [expected.low, expected.high], rtol=1e-12)


def sampled(kind: str, generator: np.random.Generator) -> tuple[list[int], np.ndarray, np.ndarray | None]:
    """(groups, values, weights) of a test set from a world in which the true statistic is 3."""
    if kind == "grouped":  # 150 sources of one to five rows that have most of their value in common
        sizes = generator.integers(1, 6, size=150)
        groups = np.repeat(np.arange(150), sizes)
        common = generator.normal(3.0, 1.0, size=150)
        return groups.tolist(), common[groups] + generator.normal(scale=0.3, size=len(groups)), None
    weights = generator.integers(10, 60, size=200).astype(float) if kind == "weighted" else None
    return list(range(200)), generator.normal(3.0, 1.0, size=200), weights


@pytest.mark.parametrize("kind", ["rows", "weighted", "grouped"])
def test_interval_covers_the_truth_in_95_of_100_cases(kind: str) -> None:
    generator = np.random.default_rng(0)
    trials, hits = 1000, 0
    for trial in range(trials):
        groups, values, weights = sampled(kind, generator)
        interval = Bootstrap(groups, draws=1000, seed=trial).interval(values, weights)
        hits += interval.low <= 3.0 <= interval.high
    assert 0.93 <= hits / trials <= 0.97


def test_the_interval_of_a_difference_covers_the_truth_in_95_of_100_cases() -> None:
    """Of two systems that find the same sources hard, each source with three references."""
    generator = np.random.default_rng(1)
    trials, hits, groups = 1000, 0, np.repeat(np.arange(120), 3)
    for trial in range(trials):
        hard = generator.normal(scale=2.0, size=120)
        a, b = (hard + generator.normal(mean, 1.0, size=120) for mean in (0.5, 0.0))
        noise = generator.normal(scale=0.2, size=(2, 360))
        found = Bootstrap(groups.tolist(), draws=1000, seed=trial).difference(
            a[groups] + noise[0], b[groups] + noise[1]
        )
        hits += found.low <= 0.5 <= found.high
    assert 0.93 <= hits / trials <= 0.97


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, False), (0.03, False), (0.35, True), (0.6, True)])
def test_p_agrees_with_scipys_permutation_test_on_clear_cases(shift: float, verdict: bool) -> None:
    generator = np.random.default_rng(3)
    common = generator.normal(size=150)
    a, b = common + shift + generator.normal(size=150), common + generator.normal(size=150)
    a -= (a - b).mean() - shift  # so that the case is as clear as its number says
    theirs = scipy.stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True, n_resamples=5000,
        rng=np.random.default_rng(0),
    )  # fmt: skip
    ours = Bootstrap(range(150)).p_value(a, b)
    assert (ours < 0.05) == (theirs.pvalue < 0.05) == verdict
    assert ours == pytest.approx(theirs.pvalue, abs=0.02)  # two tests of one hypothesis, each of some thousand draws


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
        interval, p = bootstrap.difference(values, other, weights), bootstrap.p_value(values, other, weights)
        same = bootstrap.interval(values - other, weights)
        assert (interval.value, interval.low, interval.high, interval.p) == (same.value, same.low, same.high, p)
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
    assert Bootstrap(["only"] * 2).difference([1.0, 2.0], [0.0, 0.0]).p == 1.0


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
        ([[1.0], [2.0], [3.0]], None, "shape \\(1,\\) for 3 rows"),
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


# --- Holm's correction


def holm_by_definition(p_values: list[float]) -> list[float]:
    """The smallest level at which each hypothesis is rejected, tried out level by level."""
    levels = np.linspace(0, 1, 10_001)
    order = np.argsort(p_values, kind="stable")
    smallest = np.ones(len(p_values))
    for level in reversed(levels):
        for step, i in enumerate(order):
            if p_values[i] > level / (len(p_values) - step) + 1e-12:
                break  # it and all larger ones are kept
            smallest[i] = level
    return smallest.tolist()


def test_holm_by_hand_and_by_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.2]) == [0.2] and holm([]) == []
    assert holm([0.5, 0.6, 0.9]) == [1.0, 1.0, 1.0]
    generator = np.random.default_rng(0)
    for _ in range(20):
        p_values = np.round(generator.beta(0.5, 3, size=generator.integers(1, 7)), 3).tolist()
        np.testing.assert_allclose(holm(p_values), holm_by_definition(p_values), atol=1.01e-4)  # the levels' grid


def test_holm_keeps_false_calls_below_five_percent() -> None:
    """Three pairs of three equally good systems on the same rows: uncorrected, 12 % of such studies call a difference."""
    generator = np.random.default_rng(2)
    alone = together = 0
    for trial in range(600):
        systems = generator.normal(size=(3, 150))
        bootstrap = Bootstrap(range(150), draws=1000, seed=trial)
        p_values = [bootstrap.p_value(systems[i], systems[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        alone += min(p_values) < 0.05
        together += min(holm(p_values)) < 0.05
    assert alone / 600 > 0.08 and together / 600 < 0.07


def test_several_seeds_widen_the_interval_by_their_spread() -> None:
    """Seeds that differ by far more than rows: the interval is that of their mean, as scipy's bootstrap of the seeds gives it."""
    rng = np.random.default_rng(0)
    seeds = np.array([10.0, 11.0, 12.5, 13.0, 14.0])
    rows = rng.normal(0, 0.01, size=200)
    found = Bootstrap(range(200)).interval(seeds[:, None] + rows)
    expected = scipy.stats.bootstrap((seeds,), np.mean, method="percentile", n_resamples=20_000, random_state=1)
    assert found.value == pytest.approx(seeds.mean() + rows.mean())
    interval = expected.confidence_interval
    assert [found.low, found.high] == pytest.approx(
        [interval.low, interval.high], abs=0.1
    )  # two sets of draws of a coarse sum


def test_equal_seeds_change_nothing() -> None:
    values = np.random.default_rng(1).normal(size=50)
    bootstrap = Bootstrap(range(50))
    one, three = bootstrap.interval(values), bootstrap.interval(np.stack([values] * 3))
    assert [one.value, one.low, one.high] == pytest.approx([three.value, three.low, three.high])


def test_the_difference_of_systems_with_seeds_covers_the_truth() -> None:
    """Two systems of equal skill, five seeds each: their difference is called real about as seldom as it should be."""
    rng, false_alarms = np.random.default_rng(2), 0
    for trial in range(200):
        rows = rng.normal(size=60)
        a, b = (rows + rng.normal(0, 0.3, size=(5, 1)) + rng.normal(0, 0.2, size=(5, 60)) for _ in range(2))
        false_alarms += Bootstrap(range(60), draws=400, seed=trial).difference(a, b).p < 0.05
    assert false_alarms <= 30  # 10 are due; resampling five seeds is known to be somewhat bold
