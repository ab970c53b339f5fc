"""Reading curves: where a loss turns, which rate a pilot tries next, which costs nothing beats, and the table by epoch."""

from __future__ import annotations

import numpy as np
import pytest

from loralab.reports.comparison_plots import unbeaten
from loralab.reports.epochs import epochs_table
from loralab.reports.turning_point import first_turn, smooth
from loralab.runs.validation_lines import best_of
from loralab.training.lr_search import best, further, next_rate


def test_a_turn_is_found_where_it_is() -> None:
    """Warm-up to a rate that is too high: the loss falls for 220 steps and rises again, under noise."""
    steps, found = np.arange(600), []
    course = 2 + np.where(steps < 220, (220 - steps) / 220, (steps - 220) / 600)
    for seed in range(50):
        losses = course + np.random.default_rng(seed).normal(0, 0.15, size=600)
        turn = first_turn(losses.tolist(), (steps * 1e-6).tolist())
        assert turn is not None and turn.learning_rate == pytest.approx((turn.step - 1) * 1e-6)
        assert turn.peak_step > turn.step and turn.peak_loss > turn.loss + 0.2
        found.append(turn.step)
    assert abs(np.median(found) - 220) < 30 and min(found) > 150 and max(found) < 300


def test_a_loss_that_falls_has_no_turn() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        steps = int(rng.integers(60, 1500))
        losses = 2 + 4 * np.exp(-3 * np.arange(steps) / steps) + rng.normal(0, 0.2, size=steps)
        assert first_turn(losses.tolist(), [1.0] * steps) is None
    assert first_turn([3.0, 1.0, 5.0], [1.0] * 3) is None, "too short to tell"


def test_smoothing_is_the_mean_of_a_window() -> None:
    losses = np.random.default_rng(0).normal(size=40)
    expected = [losses[max(0, i - 2) : i + 3].mean() for i in range(40)]
    np.testing.assert_allclose(smooth(losses, 5), expected)


def test_a_pilot_ends_with_a_best_that_has_worse_neighbours() -> None:
    points: dict[float, float | None] = {}
    tried = []
    while (rate := next_rate(points, "full")) is not None:  # the more the better, until it breaks
        tried.append(rate)
        points[rate] = None if rate > 2e-2 else 3 - rate
    assert tried == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2] and best(points) == 1e-2
    inner: dict[float, float | None] = dict.fromkeys((1e-4, 3e-4, 3e-3, 1e-2), 2.0) | {1e-3: 1.0}
    assert next_rate(inner, "lora") is None
    assert [further(1e-4, up=False), further(3e-3, up=True), further(1e-3, up=True)] == [3e-5, 1e-2, 3e-3]


def test_the_pareto_front() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (3.0, 7.0), (3.0, 6.0), (4.0, 7.0)]
    assert unbeaten(points, lower=False) == [(1.0, 5.0), (3.0, 7.0)]
    assert unbeaten(points, lower=True) == [(1.0, 5.0), (2.0, 4.0)]


def test_the_table_by_epoch_marks_the_best() -> None:
    lines = [{"step": n, "epoch": n, "loss": loss, "rouge2": -loss} for n, loss in ((1, 3.0), (2, 2.0), (3, 2.5))]
    assert best_of(lines, "loss") == best_of(lines, "rouge2") == lines[1]
    table = epochs_table({"a": lines, "b": lines[:2]}, "loss").splitlines()
    assert table[1].split() == ["loss", "1", "2", "3"]
    assert table[3].split() == ["a", "3.000", "2.000*", "2.500"] and table[4].split() == ["b", "3.000", "2.000*", "-"]
    assert epochs_table({"a": lines[:1]}, "loss") == ""
