"""A comparison as pictures, from what its runs have written down.

losses.png   the training loss of every run, by step and by learning rate; a turn upwards is marked (turning_point.py)
epochs.png   what validation measured after each epoch, the best one marked
cost.png     score against trained parameters, time and memory; the line joins those that none beats in both
pilot.png    the learning rates that were tried
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralab.metrics import COLUMNS
from loralab.reports.run_plots import (
    COLOURS,
    Curves,
    draw_losses,
    draw_validations,
    mark,
    read_curves,
    side_by_side,
    write_figure,
)
from loralab.reports.turning_point import first_turn, smooth
from loralab.runs.folder import METRICS
from loralab.runs.validation_lines import best_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = (
    ("trainable", 1.0, "trained parameters"),
    ("seconds", 60.0, "minutes"),
    ("peak_memory_bytes", 1e9, "peak memory (GB)"),
)
AT_MOST = 3  # columns of epochs.png


def draw_comparison(results: dict[str, Any], runs: Mapping[str, Path], out: Path) -> list[Path]:
    """Draws what there is something to draw of; returns the pictures."""
    curves = {name: read_curves(run) for name, run in runs.items() if (run / METRICS).exists()}
    drawn = [draw_all_losses(curves, out / "losses.png")] if curves else []
    if any(len(each.validations) > 1 for each in curves.values()):
        drawn.append(draw_epochs(curves, out / "epochs.png"))
    scored = [row for row in results["rows"] if row["metrics"] and row["method"] not in ("floor", "none")]
    if len(scored) > 1:
        drawn.append(draw_costs(scored, out / "cost.png"))
    if pilots := {row["variant"]: row["pilot"] for row in scored if row.get("pilot")}:
        drawn.append(draw_pilots(pilots, out / "pilot.png"))
    return drawn


def _legends(figure: Figure) -> None:
    for axes in figure.axes:
        axes.legend(frameon=False, fontsize=8)


def colours(names: Sequence[str]) -> dict[str, str]:
    return {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}


def draw_all_losses(curves: Mapping[str, Curves], file: Path) -> Path:
    figure, (by_step, by_rate) = side_by_side(2, "Training loss: thin each step, thick smoothed")
    for name, colour in colours(list(curves)).items():
        each = curves[name]
        draw_losses(by_step, name, each, colour)
        by_rate.plot(each.rates, smooth(each.losses), color=colour, linewidth=1.5, label=name)
        if turn := first_turn(each.losses.tolist(), each.rates.tolist()):
            mark(by_step, f"{name} turns at step {turn.step}", turn.step, turn.loss, colour)
            mark(by_rate, f"{name} turns at {turn.learning_rate:.2g}", turn.learning_rate, turn.loss, colour)
    by_step.set(xlabel="step", ylabel="loss (nats per target token)")
    by_rate.set(xlabel="learning rate", xscale="log")
    _legends(figure)
    return write_figure(figure, file)


def draw_epochs(curves: Mapping[str, Curves], file: Path) -> Path:
    """One panel for each column that was measured."""
    measured = next(each.validations[0] for each in curves.values() if each.validations)
    columns = [name for name in measured if name in COLUMNS][:AT_MOST]
    figure, panels = side_by_side(len(columns), "Validation while training; a ring is the best")
    for axes, column in zip(panels, columns, strict=True):
        for name, colour in colours(list(curves)).items():
            draw_validations(axes, name, curves[name], column, colour)
            _mark_best(axes, curves[name], column, colour)
        axes.set(xlabel="step", ylabel=COLUMNS[column].title)
    _legends(figure)
    return write_figure(figure, file)


def _mark_best(axes: Axes, curves: Curves, column: str, colour: str) -> None:
    if (best := best_of(curves.validations, column)) is not None:
        mark(axes, "_best", best["step"], best[column], colour)  # a leading underscore keeps it out of the legend


def main_column(rows: Sequence[dict[str, Any]]) -> str:
    """The score that pictures show: ROUGE-2, F1 or the first score, of those that tell the rows apart; else the loss."""
    names = sorted(rows[0]["metrics"], key=lambda name: (name == "loss", name not in ("rouge2", "f1")))
    return next((name for name in names if len({row["metrics"][name]["value"] for row in rows}) > 1), "loss")


def draw_costs(rows: Sequence[dict[str, Any]], file: Path) -> Path:
    """Score with its interval against each cost."""
    column = main_column(rows)
    figure, panels = side_by_side(len(COSTS), f"{COLUMNS[column].title} and what it cost; 95 % intervals")
    for axes, (key, unit, title) in zip(panels, COSTS, strict=True):
        points = [(row[key] / unit, row["metrics"][column]["value"]) for row in rows]
        for (x, y), row, colour in zip(points, rows, colours([row["variant"] for row in rows]).values(), strict=True):
            metric = row["metrics"][column]
            error = [[y - metric["low"]], [metric["high"] - y]]
            axes.errorbar([x], [y], yerr=error, fmt="o", color=colour, capsize=3, label=row["variant"])
        axes.plot(
            *zip(*unbeaten(points, COLUMNS[column].better == "lower"), strict=True),
            color="#999999",
            linewidth=1,
            zorder=0,
        )
        axes.set_xlabel(title)
    _count_in_decades(panels[0])
    panels[0].set_ylabel(COLUMNS[column].title)
    _legends(figure)
    return write_figure(figure, file)


def _count_in_decades(axes: Axes) -> None:
    """A logarithmic axis of counts: 200 k, 500 k, 1 M, without the names between that would run into each other."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def unbeaten(points: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """Returns those (cost, score) than which no other is both cheaper and better, by cost: the Pareto front."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], point[1] if lower else -point[1])):
        if not front or (score < front[-1][1] if lower else score > front[-1][1]):
            front.append((cost, score))
    return front


def draw_pilots(pilots: Mapping[str, dict[str, Any]], file: Path) -> Path:
    """Loss on the rows that chose, against the learning rate."""
    figure, (axes,) = side_by_side(1, "Learning rates tried before training; a ring is the one chosen")
    for name, colour in colours(list(pilots)).items():
        points = {
            point["learning_rate"]: point["loss"] for point in pilots[name]["points"] if point["loss"] is not None
        }
        axes.plot(list(points), list(points.values()), color=colour, marker="o", label=name)
        mark(axes, "_chosen", pilots[name]["chosen"], points[pilots[name]["chosen"]], colour)
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss (nats per target token)")
    _legends(figure)
    return write_figure(figure, file)
